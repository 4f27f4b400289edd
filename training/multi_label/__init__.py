"""Tasks whose pictures have several classes each."""
