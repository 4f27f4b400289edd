"""Many tasks at many rates: which there are, their runs, and the table of all."""
