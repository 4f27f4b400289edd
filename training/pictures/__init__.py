"""Pictures: the sets, the draws of a run, their augmentation, the batches."""
