"""The program `tocom-train`: what its commands take and do, once they are known."""
