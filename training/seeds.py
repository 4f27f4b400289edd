"""Seeds: all randomness of a run is a function of (seed, purpose, position)."""

import numpy as np


def derive(seed: int, purpose: str, position: int) -> int:
    """Return a 32-bit seed that is a function of its arguments alone."""
    return int(np.random.SeedSequence([seed, *purpose.encode(), position]).generate_state(1)[0])
