"""Gaussian blur with a standard deviation and a window per image."""
