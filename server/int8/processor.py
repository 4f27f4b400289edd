"""Whether int8 is of use on this processor."""

from collections.abc import Mapping
from typing import Any

import torch

#: What torch calls instructions that add products of bytes without overflow, any of which will do.
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "dot", "i8mm")


def lacks_int8(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Return whether a processor is known to have no instructions for products of bytes.

    Without them, x86 adds such products in 16 bits, which overflow: answers would be wrong.

    Args:
        capabilities: of it, in torch's words; None: this processor's, of which a torch before
            2.11 says nothing.
    """
    if capabilities is None:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities) and not any(map(capabilities.get, INSTRUCTIONS))
