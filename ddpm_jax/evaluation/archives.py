""".npz files of images and of statistics: read without running anything in them, images as a stream."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.errors import ReadError
from ddpm_jax.paths import local_path
from ddpm_jax.temporary import temporary_path

MOST_BYTES = 1 << 34  # of an array that is read whole


class Header(NamedTuple):
    """What an array in an archive is, before its numbers are read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


def read_headers(path: str | os.PathLike) -> dict[str, Header]:
    """Return the headers of all arrays of an .npz file by name.

    Raises:
        ReadError: if it is no such file, or an array holds Python objects.
    """
    path = local_path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = {}
            for name in names:
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = _read_header(member)
            return found
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ReadError(f"{path} cannot be read as an .npz file: {reason}") from None


def _read_header(member: Any) -> Header:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array has the format {version[0]}.{version[1]}, and not 1.0 or 2.0")
    shape, fortran, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("an array holds Python objects")
    return Header(shape, dtype, fortran)


def read_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """Read one array whole.

    Raises:
        ReadError: if it is not there, is damaged, or has more than 16 GiB.
    """
    header = read_headers(path).get(name)
    if header is None:
        raise ReadError(f"{path} has no array {name}")
    if np.prod(header.shape, dtype=np.float64) * header.dtype.itemsize > MOST_BYTES:
        raise ReadError(f"{path}: {name} has the shape {header.shape}, more than {MOST_BYTES >> 30} GiB")
    try:
        with np.load(local_path(path), allow_pickle=False) as archive:
            return archive[name]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, zipfile.error) as error:
        raise ReadError(f"{path}: {name} cannot be read: {error}") from None


class RowReader:
    """Rows of an array in an .npz file, read where they are needed.

    Reading on from the last row is fast; going back begins at the first again.

    Args:
        path: of the file.
        name: of the array, in C order.

    Raises:
        ReadError: if it is not there.
    """

    def __init__(self, path: str | os.PathLike, name: str):
        self._path, self._name = local_path(path), name
        found = read_headers(path).get(name)
        if found is None or found.fortran or not found.shape:
            what = "no array" if found is None else "an array in Fortran order or without rows,"
            raise ReadError(f"{path} has {what} {name}")
        self.shape, self.dtype = found.shape, found.dtype
        self._bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._archive = zipfile.ZipFile(self._path)
        self._member, self._row = None, 0

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return rows [begin, end).

        Raises:
            ReadError: if the file is damaged.
        """
        try:
            if self._member is None or begin < self._row:
                self._member, self._row = self._archive.open(f"{self._name}.npy"), 0
                _read_header(self._member)
            self._member.seek((begin - self._row) * self._bytes, os.SEEK_CUR)
            data, self._row = self._member.read((end - begin) * self._bytes), end
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, zipfile.zlib.error) as error:
            raise ReadError(f"{self._path}: {self._name} cannot be read: {error}") from None
        if len(data) != (end - begin) * self._bytes:
            raise ReadError(f"{self._path} is truncated: {self._name} ends before row {end} of {self.shape[0]}")
        return np.frombuffer(data, self.dtype).reshape(end - begin, *self.shape[1:])


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(Path(f"{path}.tmp")) as new:
        with open(new, "wb") as file:
            np.savez(file, **arrays)
        os.replace(new, path)


def write_rows(path: str | os.PathLike, name: str, shape: tuple[int, ...], rows: Iterator[np.ndarray]) -> None:
    """Write uint8 rows as they come as the only array of an .npz file, whole or not at all.

    Args:
        path: of the file.
        name: of the array.
        shape: of all rows together.
        rows: uint8[n, ...], any number of times.

    Raises:
        OSError: if it cannot be written.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(Path(f"{path}.tmp")) as new:
        with zipfile.ZipFile(new, "w") as archive, archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for part in rows:
                member.write(np.ascontiguousarray(part, np.uint8).tobytes())
        os.replace(new, path)
