"""Pruning channels: which ones go, while all weights learn to do without them."""
