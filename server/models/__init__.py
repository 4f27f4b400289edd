"""Served models: loading them, their weights, graphs and pictures."""
