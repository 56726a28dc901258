"""Crops of uint8 images, resized to a square."""
