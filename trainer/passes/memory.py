"""How glibc's allocator keeps and gives back memory: tensors of a few megabytes come and go thousands of times in an update.

By itself it returns large blocks to the system as they are freed, and takes them again, cleared, page by page, with the next tensor.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""`mallopt`'s names for them (malloc.h)."""
MOST_KEPT = 1 << 30
LARGEST_MMAP = 32 << 20
"""The most that glibc takes for it."""


def keep_freed() -> None:
    """Has freed memory kept for what comes next, by all threads together, until it is given back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc alone has it
        for option, value in ((TRIM_THRESHOLD, MOST_KEPT), (MMAP_THRESHOLD, LARGEST_MMAP), (ARENA_MAX, 1)):
            mallopt(option, value)


def give_back() -> None:
    """Returns to the system what is free. Takes milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
