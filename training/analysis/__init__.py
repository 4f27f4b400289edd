"""What methods do to tokens, compared: which tokens they keep or join, and what it changes."""
