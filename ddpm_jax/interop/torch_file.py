"""PyTorch's files, read without torch: zip checkpoints, TorchScript archives, and the two formats before them.

Arrays are views of the memory-mapped file wherever the format allows it, which all but the tar of torch 0.1 do.
"""

import io
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from ddpm_jax.interop.mapping import mapped
from ddpm_jax.interop.pickles import PickleError, Storage, Tensor, checked_key, interpret, storage_type

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format of torch 0.1.10 to 1.5
_PROTOCOL = 1001
_ENTRIES = 1_000_000
_DESCRIPTION = 1 << 26  # bytes; the largest data.pkl of a published checkpoint has a few million
_MOST_AXES = 64  # which numpy's arrays have


def is_torch(path: Path) -> bool:
    """Tell whether a file begins as one of PyTorch's."""
    with open(path, "rb") as file:
        begin = file.read(4)
    return begin[:4] == b"PK\x03\x04" or begin[:1] == b"\x80" or tarfile.is_tarfile(path)


def read_torch(path: Path) -> Any:
    """Return what was saved: dictionaries, lists and tuples, with numpy arrays for tensors.

    Raises:
        PickleError: if the file is broken, or holds more than tensors.
    """
    with open(path, "rb") as file:
        begin = file.read(4)
    read = _read_zip if begin == b"PK\x03\x04" else _read_stream if begin[:1] == b"\x80" else _read_tar
    try:
        return read(path)
    except (LookupError, TypeError, OverflowError, AttributeError) as error:
        # A part refers to one that is not there, or is of another type than the format says.
        raise PickleError(f"it is broken ({type(error).__name__}: {error})") from None


# ---- The zip file of torch 1.6 and later, and of TorchScript ---------------------------------------------------------


def _read_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise PickleError("two of its members have the same name")
            for name in members:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                    raise PickleError(f"its member {name!r} has a path that leads out of the archive")
            roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1]
            roots = [root for root in roots if f"{root}data.pkl" in members]
            if len(roots) != 1:
                raise PickleError("it is a zip file, but not one of PyTorch (it has no data.pkl)")
            order = members.get(f"{roots[0]}byteorder")
            if order is not None and _member(archive, order) != b"little":
                raise PickleError("its numbers are big-endian, which is not supported")
            saved = interpret(io.BytesIO(_member(archive, members[f"{roots[0]}data.pkl"])), _storage_of)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, zlib.error) as error:
        raise PickleError(f"it is a broken zip file ({error})") from None
    whole = mapped(path)

    def bytes_of(storage: Storage) -> np.ndarray:
        info = members.get(f"{roots[0]}data/{storage.key}") or members.get(f"{roots[0]}tensors/{storage.key}")
        if info is None:
            raise PickleError(f"it lacks the numbers of a tensor (data/{storage.key})")
        _check_stored(info)
        header = bytes(whole[info.header_offset : info.header_offset + 30])
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise PickleError(f"it is a broken zip file (no header for {info.filename})")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        return whole[begin : begin + info.file_size]

    return _resolve(saved, bytes_of)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a member that describes tensors, unless it is one that could fill the memory."""
    _check_stored(info)
    if info.file_size > _DESCRIPTION:
        raise PickleError(f"its member {info.filename} has {info.file_size} bytes, more than {_DESCRIPTION}")
    return archive.read(info)


def _check_stored(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED:
        raise PickleError(f"its member {info.filename} is compressed, which PyTorch's never are")


def _storage_of(persistent_id: Any) -> Storage:
    """Read ("storage", class, key, device, number of elements)."""
    if not isinstance(persistent_id, tuple) or len(persistent_id) < 5 or persistent_id[0] != "storage":
        raise PickleError("a tensor's storage is not described as PyTorch does")
    _, kind, key, _, numel = persistent_id[:5]
    if not isinstance(key, (str, int)) or type(numel) is not int or numel < 0:
        raise PickleError("a tensor's storage is not described as PyTorch does")
    return Storage(storage_type(kind), key, numel)


# ---- Pickles one after another, torch 0.1.10 to 1.5 ------------------------------------------------------------------


def _read_stream(path: Path) -> Any:
    """Read the magic number, the protocol, the writer's sizes, what was saved, the storages' keys, the storages."""
    storages: dict[Any, Storage] = {}

    def storage_of(persistent_id: Any) -> Storage:
        storage = _storage_of(persistent_id)
        if len(persistent_id) > 5 and persistent_id[5] is not None:
            raise PickleError("a tensor's storage is a view of another, which torch 0.4 and later do not write")
        storages[storage.key] = storage
        return storage

    with open(path, "rb") as file:
        if interpret(file, storage_of) != _MAGIC or interpret(file, storage_of) != _PROTOCOL:
            raise PickleError("it is a pickle, but not one of PyTorch")
        sizes = interpret(file, storage_of)
        if not isinstance(sizes, dict) or sizes.get("little_endian") is not True:
            raise PickleError("its numbers are big-endian, which is not supported")
        saved = interpret(file, storage_of)
        keys = interpret(file, storage_of)
        place = file.tell()
    if not isinstance(keys, list) or {checked_key(key) for key in keys} != set(storages):
        raise PickleError("its list of storages is not that of its tensors")
    whole, where = mapped(path), {}
    for key in keys:
        numel = _count(bytes(whole[place : place + 8]))
        size = numel * dtype_of(storages[key].dtype).itemsize
        where[key] = whole[place + 8 : place + 8 + size]
        place += 8 + size
    return _resolve(saved, lambda storage: where[storage.key])


def _count(eight: bytes) -> int:
    if len(eight) != 8:
        raise PickleError("it ends before its numbers do")
    return max(0, struct.unpack("<q", eight)[0])


# ---- The tar of torch 0.1 --------------------------------------------------------------------------------------------


def _read_tar(path: Path) -> Any:
    """Read the members "storages", "tensors" and "pickle"; the last refers to tensors by number."""
    try:
        with tarfile.open(path, "r:") as archive:
            parts = {}
            for name in ("storages", "tensors", "pickle"):
                info = archive.getmember(name)
                member = archive.extractfile(info) if info.isreg() and not info.issparse() else None
                if member is None:
                    raise PickleError(f"its member {name} is not a file")
                parts[name] = io.BytesIO(member.read())
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise PickleError(f"it is a broken tar file, or not one of PyTorch ({error})") from None
    no_storage = _refuse_storage
    storages: dict[Any, tuple[Storage, np.ndarray]] = {}
    for _ in range(_whole_number(interpret(parts["storages"], no_storage))):
        key, _, kind = _of_length(3, interpret(parts["storages"], no_storage))
        checked_key(key)
        numel = _count(parts["storages"].read(8))
        size = numel * dtype_of(storage_type(kind)).itemsize
        data = parts["storages"].read(min(size, parts["storages"].getbuffer().nbytes))
        storages[key] = Storage(storage_type(kind), key, numel), np.frombuffer(data, np.uint8)
    for view in interpret(parts["storages"], no_storage):
        target, root, offset, numel = _of_length(4, view)
        storage, data = storages[checked_key(root)]
        size = dtype_of(storage.dtype).itemsize
        storages[checked_key(target)] = (
            Storage(storage.dtype, target, numel),
            data[offset * size : (offset + numel) * size],
        )
    tensors: dict[Any, Tensor] = {}
    for _ in range(_whole_number(interpret(parts["tensors"], no_storage))):
        key, storage_key, _ = _of_length(3, interpret(parts["tensors"], no_storage))
        rank = int.from_bytes(parts["tensors"].read(8)[:4], "little")
        numbers = [_count(parts["tensors"].read(8)) for _ in range(2 * min(rank, 64) + 1)]
        storage = storages[checked_key(storage_key)][0]
        tensors[checked_key(key)] = Tensor(storage, numbers[-1], tuple(numbers[:rank]), tuple(numbers[rank:-1]))

    def tensor_of(persistent_id: Any) -> Any:
        number = int(persistent_id) if isinstance(persistent_id, (str, int)) else None
        if number not in tensors:
            raise PickleError("it refers to a tensor that it does not hold")
        return tensors[number]

    return _resolve(interpret(parts["pickle"], tensor_of), lambda storage: storages[storage.key][1])


def _refuse_storage(persistent_id: Any) -> Storage:
    raise PickleError("it is broken (a reference stands where none can)")


def _whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise PickleError("it is broken (a count is not a number)")
    return value


def _of_length(length: int, value: Any) -> tuple:
    if not isinstance(value, tuple) or len(value) != length:
        raise PickleError("it is broken (an entry has another length)")
    return value


# ---- From descriptions to arrays -------------------------------------------------------------------------------------


def dtype_of(name: str | None) -> np.dtype:
    """Return the numpy type of a name such as "float32" or "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _resolve(saved: Any, bytes_of: Callable[[Storage], np.ndarray]) -> Any:
    """Replace every description of a tensor by its array."""
    left = iter(range(_ENTRIES))  # a small file may refer to the same list so often that no memory holds the result

    def resolve(value: Any) -> Any:
        if next(left, None) is None:
            raise PickleError(f"it holds more than {_ENTRIES} entries")
        if isinstance(value, Tensor):
            return _array(value, bytes_of(value.storage))
        if isinstance(value, dict):
            return {key: resolve(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(resolve(entry) for entry in value)
        return value

    return resolve(saved)


def _array(tensor: Tensor, data: np.ndarray) -> np.ndarray:
    """Return a read-only view of a storage's bytes, after checking that it stays within them."""
    dtype = dtype_of(tensor.dtype or tensor.storage.dtype)
    shape, strides = tensor.shape, tensor.strides
    if len(shape) > _MOST_AXES:
        raise PickleError(f"a tensor has {len(shape)} axes, more than {_MOST_AXES}")
    if len(shape) != len(strides) or min((*shape, *strides, tensor.offset), default=0) < 0:
        raise PickleError(f"a tensor has shape {shape} and strides {strides}, which cannot be")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    numbers = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    if 0 not in shape and last >= len(numbers):
        raise PickleError(
            f"a tensor of shape {shape} needs {last + 1} numbers of its storage, which has {len(numbers)}"
        )
    if math.prod(shape) > len(numbers):  # strides of 0 would make a few bytes a tensor that no memory holds
        raise PickleError(
            f"a tensor of shape {shape} has {math.prod(shape)} numbers, more than its storage, which has {len(numbers)}"
        )
    if 0 in shape:
        return np.zeros(shape, dtype)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], shape, steps, writeable=False)
