"""What a person sees of a run: on stderr, as stdout is for what comes out."""
