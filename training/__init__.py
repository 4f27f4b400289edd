"""Training: distilling banks, fine-tuning models, measuring both.

Builds on `tocom` and `adapters`; knows nothing of serving.
"""
