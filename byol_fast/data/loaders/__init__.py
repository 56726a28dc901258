"""Loaders: batches of augmented views, or of center crops for evaluation."""
