"""Gaussian blur with a standard deviation and a kernel size per image."""
