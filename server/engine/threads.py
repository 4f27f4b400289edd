"""How many torch threads the operations of a thread may use."""

import torch


def set_torch_threads(threads: int) -> None:
    """Set it for the calling thread."""
    # Asked first: a thread that was never asked takes over what any other thread set last.
    torch.get_num_threads()
    torch.set_num_threads(threads)
