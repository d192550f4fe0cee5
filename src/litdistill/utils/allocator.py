"""The C library's allocator, told to keep what a training step frees: the next step takes the same again."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # of a 64-bit system; glibc refuses more
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps freed memory in this process, where the C library is glibc; whether it is now kept.

    By default glibc gives large blocks back to the system when they are freed, if the heap happens to lie so, and the system
    hands out zeroed pages when they are asked for again: up to a thousand page faults in each step of a small network, a
    third of its time. What a process holds at its peak stays as it was, up to fragments.

    No number changes. An environment that sets the thresholds itself (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`,
    `GLIBC_TUNABLES`) or another allocator (`LD_PRELOAD`) is left as it is.
    """
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if sys.platform != "linux" or any(name in os.environ for name in own):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, musl for one
        return False
    return bool(mallopt(TRIM_THRESHOLD, NEVER) and mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
