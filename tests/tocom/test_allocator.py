import ctypes
import resource
import subprocess
import sys

import pytest

from tocom import allocator

PROGRAM = """
import resource, torch
from tocom.allocator import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
for _ in range(30):
    if _ == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's alone")
def test_freed_memory_is_not_asked_for_again() -> None:
    # Without it there may be none either: that is up to the library and the system.
    faults = int(subprocess.check_output([sys.executable, "-c", PROGRAM]))
    pages = 20 * 4 * 2**22 // resource.getpagesize()
    assert faults < 0.05 * pages


RETURNED = """
from pathlib import Path
from tocom.allocator import keep_freed_memory, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

keep_freed_memory()
blocks = [bytearray(2**20) for _ in range(200)]
full = resident()
del blocks
kept = resident()
return_freed_memory()
print(full, kept, resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's alone")
def test_freed_memory_can_be_returned() -> None:
    printed = subprocess.check_output([sys.executable, "-c", RETURNED])
    full, kept, returned = map(int, printed.split())
    page = resource.getpagesize()
    assert (full - kept) * page < 20 * 2**20
    assert (full - returned) * page > 180 * 2**20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    allocator.keep_freed_memory()
    allocator.return_freed_memory()
