"""Banks that are looked after while serving."""
