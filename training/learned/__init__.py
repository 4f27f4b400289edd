"""Training what methods of reduction learn: their weights, and DynamicViT's own way."""
