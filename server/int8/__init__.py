"""Graphs whose linear layers are in int8: what they are measured on, and where they pay."""
