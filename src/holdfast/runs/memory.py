"""Memory that the allocator would hand back to the kernel, only to ask for it again a moment later."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for mallopt


def keep_freed_memory() -> bool:
    """Ask glibc to keep large freed blocks, so that every step does not fault its pages in anew.

    For the whole process, so only the command does it, never the library. True where it took effect.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 25)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
