"""Files as arrays of bytes that the system reads when they are looked at, and may forget afterwards."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np


def mapped(path: Path) -> np.ndarray:
    """Return a file's bytes, uint8[size], read-only; the file is read where, and when, the array is."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def forget(array: Any) -> None:
    """Give back the memory that holds what was read of the file behind an array; it can be read again."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    if array is not None and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
