"""An index of a tar file: where each of its members begins, so that any of them can be read on its own."""

import dataclasses
import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ddpm_jax.temporary import temporary_path

FORMAT, VERSION = "ddpm_jax.tar_index", 1
_BLOCK = 512  # of tar: headers and contents begin at its multiples


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """The regular files of a tar file.

    Attributes:
        size: of the tar file, in bytes.
        modified: its time of modification, in nanoseconds.
        headers: SHA-256 of all bytes that are not contents of members.
        content: SHA-256 of the whole file.
        members: (name, offset of the content, size) of each, in their order.
    """

    size: int
    modified: int
    headers: str
    content: str
    members: tuple[tuple[str, int, int], ...]


def open_index(path: Path, directory: Path | None = None) -> TarIndex:
    """Return the index of a tar file: the stored one, if it is valid, or a new one, which is then stored.

    An index is valid if the tar file has the size, time of modification and headers that it was made from. Making one
    reads the whole file.

    Args:
        path: of the tar file.
        directory: where the index NAME.index.json is stored; None for beside the tar file.

    Raises:
        ValueError: if the file is not an uncompressed, complete tar file.
    """
    stored = (directory or path.parent) / f"{path.name}.index.json"
    index = _read(stored)
    if index is not None and _is_valid(index, path):
        return index
    index = make_index(path)
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(stored.with_name(f".{stored.name}.{os.getpid()}")) as unfinished:
            unfinished.write_text(_text(index))
            os.replace(unfinished, stored)
    except OSError as error:
        warnings.warn(
            f"the index of {path.name} is made again next time, since {stored} cannot be written "
            f"({error.strerror or error}); give another index_directory",
            stacklevel=2,
        )
    return index


def make_index(path: Path) -> TarIndex:
    """Read a tar file and return its index; raises as `open_index`."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tuple(_members(tar))
        except (tarfile.TarError, ValueError, OSError, OverflowError) as error:
            raise ValueError(f"{path} is not an uncompressed, complete tar file: {error}") from None
        file.seek(0)
        content = hashlib.file_digest(file, "sha256").hexdigest()
        return TarIndex(status.st_size, status.st_mtime_ns, _hash_headers(file, members), content, members)


def _members(tar: tarfile.TarFile) -> Iterable[tuple[str, int, int]]:
    end = 0
    while (member := tar.next()) is not None:
        if member.offset_data < end or member.size < 0:  # headers that lie would let the loop run back
            raise ValueError(f"the member {member.name} begins inside of another one")
        end = member.offset_data
        if member.isreg():
            if member.issparse():
                raise ValueError(f"the member {member.name} is sparse")
            yield member.name, member.offset_data, member.size
            end += _in_blocks(member.size)
        tar.members = []  # else the headers of all members stay in memory
    tar.fileobj.seek(end)
    size = 0
    while block := tar.fileobj.read(2**20):  # what follows is an end of zeros; tarfile does not look at it
        if block.strip(b"\0"):
            raise ValueError(f"there is something else after the last member, at byte {end}")
        size += len(block)
    if size < _BLOCK:
        raise ValueError("its end is missing")


def _hash_headers(file: BinaryIO, members: Iterable[tuple[str, int, int]]) -> str:
    """Return the SHA-256 of what lies before the content of each member."""
    digest, position = hashlib.sha256(), 0
    for _, offset, size in members:
        file.seek(position)
        digest.update(file.read(offset - position))
        position = offset + _in_blocks(size)
    return digest.hexdigest()


def _is_valid(index: TarIndex, path: Path) -> bool:
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) != (index.size, index.modified):
        return False
    with open(path, "rb", buffering=_BLOCK) as file:
        return _hash_headers(file, index.members) == index.headers


def _text(index: TarIndex) -> str:
    values = dataclasses.asdict(index)
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "version": VERSION, "index": values, "sha256": digest})


def _read(path: Path) -> TarIndex | None:
    """Return an index from a file, or None if there is none or it is not one that this version wrote."""
    try:
        text = path.read_text()
        values = json.loads(text)["index"]
        index = TarIndex(**values | {"members": tuple((str(n), int(o), int(s)) for n, o, s in values["members"])})
        return index if _text(index) == text else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _in_blocks(size: int) -> int:
    """Return what a content of this size takes in a tar file."""
    return -(-size // _BLOCK) * _BLOCK
