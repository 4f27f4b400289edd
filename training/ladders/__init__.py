"""Ladders: searched, and compared with others."""
