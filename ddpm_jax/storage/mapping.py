"""Memory-mapped files: the system reads a page when it is used, and may drop it afterwards."""

import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np


def opened(path: Path) -> mmap.mmap:
    """Return a file's bytes as a read-only map; a file that is not a regular one is never waited for.

    Raises:
        OSError: if it cannot be opened or mapped.
        ValueError: if it is empty, or not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def memory_mapped(path: Path) -> np.ndarray:
    """Return a file's bytes, uint8[size], read-only."""
    return np.frombuffer(opened(path), np.uint8)


def release(array: Any) -> None:
    """Release the pages of the memory-mapped file behind an array; they are read again on the next use."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    if array is not None and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
