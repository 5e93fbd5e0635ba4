"""Shared code of the built-in sources: the errors of single records, the check of an index, and fingerprints.

A source has `__len__`, `__getitem__(index) -> dict` and `fingerprint() -> str`; see docs/data.md.
"""

import codecs
import hashlib
import json
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.types import Source

RESERVED = ("image", "caption", "label", "key")
"""Fields of records with a type of their own, so that no other array has such a name."""
ENDS = 64 * 1024
_MARKS = (  # byte order marks; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class RecordError(ValueError):
    """One record cannot be read; the message names its file or key, and the reason."""


class CaptionError(RecordError):
    """The caption of a record is missing or is not UTF-8."""


def check_index(index: SupportsIndex, length: int) -> int:
    """Return index as an int in [0, length).

    Raises:
        IndexError: if it is outside, which also ends a loop over the source.
        TypeError: if it is not an integer.
    """
    number = operator.index(index)
    if not 0 <= number < length:
        raise IndexError(f"index must be in [0, {length}), got {number}")
    return number


def read_record(source: Source, index: int) -> Mapping[str, Any]:
    """Return one record of a source, for training.

    Raises:
        RecordError: as the source; the message also says how to leave such records out.
        ValueError: if it is no dict.
    """
    try:
        record = source[index]
    except RecordError as error:
        hint = "python -m ddpm_jax.prepare copies a data set without such records, and lists them"
        raise type(error)(f"{error}; {hint}") from None
    return check_record(record, f"record {index} of the source")


def transformed(transform: Callable[..., Any], *arguments: Any) -> Mapping[str, Any]:
    """Return `transform(*arguments)`, the first of which is a record.

    Raises:
        ValueError: if it is no dict, as that of a function without a return.
    """
    return check_record(transform(*arguments), f"what the transform {_named(transform)} returns")


def check_record(record: Any, what: str) -> Mapping[str, Any]:
    """Return a record; raise ValueError, with `what` as the subject, if it is no dict."""
    if not isinstance(record, Mapping):
        raise ValueError(f'{what} must be a dict, such as {{"image": uint8[H, W, 3]}}, got {type(record).__name__}')
    return record


def _named(transform: Callable[..., Any]) -> str:
    owner = getattr(transform, "__self__", transform)  # of the method random_map
    return getattr(owner, "__qualname__", type(owner).__name__)


class Fingerprint:
    """A SHA-256 hash of named values, the same in every process and on every machine.

    Args:
        name: of what is described, with the version of its format; a part of the hash.
    """

    def __init__(self, name: str):
        self._hash = hashlib.sha256()
        self.add(name)

    def add(self, *values: Any) -> None:
        """Add plain data: str, int, float, bool, None, and lists, tuples and dicts with str keys of these."""
        for value in values:
            self._add_bytes(json.dumps(value, sort_keys=True).encode())

    def add_array(self, array: np.ndarray) -> None:
        """Add the dtype, the shape and every byte of an array of numbers."""
        array = np.asarray(array)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        self.add(array.dtype.str, list(array.shape))
        # Block by block, since an array that is not contiguous, or is on disk, is copied.
        rows = array.reshape(1, -1) if array.ndim < 2 else array
        step = max(1, 2**24 // max(1, rows[:1].nbytes))
        for begin in range(0, len(rows), step):
            self._hash.update(np.ascontiguousarray(rows[begin : begin + step]).data)

    def add_file(self, path: str | os.PathLike) -> None:
        """Add the size of a file and its first and last 64 KiB; all of it, if it has at most 128 KiB.

        Raises:
            RecordError: if it cannot be read.
        """
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.add(size)
                self._add_bytes(file.read(size if size <= 2 * ENDS else ENDS))
                if size > 2 * ENDS:
                    file.seek(size - ENDS)
                    self._add_bytes(file.read(ENDS))
        except OSError as error:
            raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from None

    def hexdigest(self) -> str:
        """Return the hash as 64 hexadecimal digits."""
        return self._hash.hexdigest()

    def _add_bytes(self, data: bytes) -> None:
        self._hash.update(len(data).to_bytes(8, "little"))  # so that no two lists of values have the same bytes
        self._hash.update(data)


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a whole file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | os.PathLike) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        CaptionError: if it cannot be read or is not UTF-8; the message names the file and the line.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CaptionError(f"{path}: cannot be read: {error.strerror or error}") from None
    return decode_text(data, str(path))


def decode_text(data: bytes, name: str) -> str:
    """Return UTF-8 bytes as text, without a byte order mark; raise CaptionError with the name and the line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        for mark, encoding in _MARKS:
            if data.startswith(mark):
                hint = f"convert the file, e.g. with iconv -f {encoding} -t utf-8"
                raise CaptionError(f"{name}: is {encoding.upper()}, not UTF-8; {hint}") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise CaptionError(
            f"{name}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); "
            "convert the file, e.g. with iconv -f latin1 -t utf-8"
        ) from None
