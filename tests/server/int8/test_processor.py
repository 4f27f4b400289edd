"""On which processors int8 is of use."""

import pytest
import torch

from server.int8.processor import lacks_int8


@pytest.mark.parametrize(
    ("capabilities", "lacks"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_vnni": False}, True),
        ({"avx512_vnni": True}, False),
        ({"avx_vnni": True}, False),
        ({"amx_int8": True}, False),
        ({"neon": True, "dot": False}, True),
        ({"neon": True, "dot": True}, False),
        ({}, False),  # torch does not say
    ],
)
def test_what_a_processor_has_decides(capabilities, lacks):
    assert lacks_int8(capabilities) is lacks


def test_this_one_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sse2": True}, raising=False)
    assert lacks_int8()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not lacks_int8()
