"""What glibc's allocator does with memory that is freed.

By default it returns large blocks to the system at once, and every forward gets them back
page by page: a quarter of the time of a batch on a small virtual machine, where a page fault
is dear. Programs call this once, at their start; libraries leave their process alone.
"""

import ctypes

#: Names of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc allows no more
_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Let the process keep up to 1 GiB that it has freed, for its next forward.

    Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, _KEPT)


def return_freed_memory() -> None:
    """Return to the system what the process has freed and keeps, which it will have to get anew.

    For after work that needed much memory and is not soon to come again. Does nothing where the C
    library is another one.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
