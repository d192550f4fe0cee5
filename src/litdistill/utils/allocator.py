"""glibc allocator settings that keep memory freed by one training step for the next step."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the maximum that glibc accepts on a 64-bit system
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in this process. Returns whether the setting took effect.

    By default glibc returns large freed blocks at the top of the heap to the system, and the system hands out zeroed pages at
    the next allocation: up to a thousand page faults in each step of a small network, a third of its time. Peak memory is
    unchanged, up to fragmentation, and so are all results.

    Returns False, and changes nothing, where the C library is not glibc, where the environment sets the thresholds
    (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`), or where it loads another allocator (`LD_PRELOAD`).
    """
    user_settings = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if sys.platform != "linux" or any(name in os.environ for name in user_settings):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, musl for one
        return False
    return bool(mallopt(TRIM_THRESHOLD, NEVER) and mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
