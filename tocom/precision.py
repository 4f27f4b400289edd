"""Products that decide something are not rounded to half precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def unrounded(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without the autocast of the device of `tensor`, for products in fp32."""
    device = tensor.device.type
    # Entered only if need be: on small batches it takes as long as what it is for.
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocast else nullcontext()
