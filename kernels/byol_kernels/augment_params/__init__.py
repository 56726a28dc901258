"""Augmentation parameters, sampled on the device."""
