"""CIFAR-10 (Krizhevsky 2009), read from its official binary version."""

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.source import Fingerprint, check_index

FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32  # the label, then the red, green and blue values, row by row
_MOST = 10_000  # records of a file; the official ones have as many
_MEMBERS = 100  # of the archive; the official one has 9


class Cifar10Source:
    """The images of CIFAR-10, 32 x 32 pixels in 10 classes.

    A record is {"image": uint8[32, 32, 3], "label": int32, "key": "data_batch_1.bin/17"}, in the order of the files.
    They are read into memory when the source is made, 154 MB for the training images.

        source = Cifar10Source("cifar-10-binary.tar.gz")

    Args:
        path: of cifar-10-binary.tar.gz ("CIFAR-10 binary version" on the data set's page), or of a directory with its
            files data_batch_1.bin to data_batch_5.bin and test_batch.bin.
        split: "train", 50,000 images, or "test", 10,000.

    Attributes:
        class_names: those of the data set.

    Raises:
        ValueError: if split is another one, or a file is missing or is not of this format; the message names it.
    """

    class_names = _CLASSES

    def __init__(self, path: str | os.PathLike, split: str = "train"):
        if split not in FILES:
            raise ValueError(f"split must be {' or '.join(map(repr, FILES))}, got {split!r}")
        self._path, self._split, wanted = str(path), split, FILES[split]
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist; give cifar-10-binary.tar.gz or the directory of its files")
        found = dict(_from_directory(path, wanted) if Path(path).is_dir() else _from_archive(path, wanted))
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"{path} has no {missing[0]}; give the binary version, cifar-10-binary.tar.gz")
        files = [_records(f"{path}: {name}", found[name]) for name in wanted]
        self._keys = [(name, place) for name, file in zip(wanted, files, strict=True) for place in range(len(file))]
        self._records = np.concatenate(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Return one record; raise IndexError if index is outside of [0, len)."""
        index = check_index(index, len(self))
        record, (name, place) = self._records[index], self._keys[index]
        image = np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        return {"image": image, "label": np.int32(record[0]), "key": f"{name}/{place}"}

    def fingerprint(self) -> str:
        """Return a hash of all labels and pixels, the same for the archive and its extracted files."""
        mark = Fingerprint("cifar10 1")
        mark.add_array(self._records)
        return mark.hexdigest()

    def __repr__(self) -> str:
        return f"Cifar10Source({self._path!r}, split={self._split!r}, {len(self)} images)"


def _records(name: str, data: bytes) -> np.ndarray:
    """Return the records of a file, uint8[N, 3073]; raise ValueError if they are none."""
    if not data or len(data) % _RECORD or len(data) > _MOST * _RECORD:
        raise ValueError(f"{name} has {len(data)} bytes, which are not 1 to {_MOST} records of {_RECORD} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    wrong = np.flatnonzero(records[:, 0] >= len(_CLASSES))
    if wrong.size:
        raise ValueError(
            f"{name} has the label {records[wrong[0], 0]} in record {wrong[0]}; labels are 0 to {len(_CLASSES) - 1}"
        )
    return records


def _from_directory(path: str | os.PathLike, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files that are there."""
    for name in wanted:
        file = Path(path) / name
        if file.is_file():
            try:
                with open(file, "rb") as stream:
                    yield name, stream.read(_MOST * _RECORD + 1)
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _from_archive(path: str | os.PathLike, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the members whose names end in those that are wanted; nothing is unpacked to disk."""
    try:
        with tarfile.open(path, "r:*") as archive:
            for number, member in enumerate(archive):
                name = member.name.rpartition("/")[2]
                if number >= _MEMBERS or member.size > _MOST * _RECORD:
                    raise ValueError(f"{path} is not cifar-10-binary.tar.gz: it has more or larger files")
                if member.isreg() and name in wanted:
                    file = archive.extractfile(member)
                    assert file is not None  # it is a regular file
                    yield name, file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} cannot be read as cifar-10-binary.tar.gz: {error}") from None
