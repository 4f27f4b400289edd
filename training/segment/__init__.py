"""Segmentation: decoders trained on a backbone's dense features, and measured at every rung."""
