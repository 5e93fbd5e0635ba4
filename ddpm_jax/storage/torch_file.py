"""PyTorch's files, read without torch: zip checkpoints, TorchScript archives, and the two formats before them.

Arrays are views of the memory-mapped file. A storage must be as long as the file says in both places that say it.
"""

import math
import mmap
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ddpm_jax.storage.mapping import opened
from ddpm_jax.storage.pickle_machine import interpret
from ddpm_jax.storage.pickles import (
    NAME_LENGTH,
    Budget,
    Opaque,
    PickleError,
    Storage,
    Tensor,
    checked_key,
    storage_type,
)
from ddpm_jax.storage.tar_file import is_tar, read_tar
from ddpm_jax.storage.zip_file import extent, read_members

TENSORS = 100_000  # of a file; the largest published checkpoints have some thousands
NAMES = 20_000_000  # characters of all names together; a small file may give one long name to many tensors
ENTRIES = 1_000_000  # of all dictionaries and lists; a small file may refer to the same list again and again
DEPTH = 100  # of dictionaries and lists in each other
DESCRIPTION = 1 << 26  # bytes; the largest data.pkl of a published checkpoint has a few million
AXES = 64  # of a tensor; numpy's arrays have no more
_MAGIC = 0x1950A86A20F9469CFC6C  # of the format of torch 0.1.10 to 1.5
_PROTOCOL = 1001
# Bytes of a number in the storages that are passed over.
_UNREAD_SIZES = {
    "torch.ComplexFloatStorage": 8, "torch.ComplexDoubleStorage": 16, "torch.QInt8Storage": 1, "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
}  # fmt: skip
_UNREAD = 1000  # names of objects that are not read, of which a message lists some

Extent = tuple[int, int]  # where bytes of the file begin and end


def is_torch(path: Path) -> bool:
    """Return whether a file begins as one of PyTorch's."""
    with open(path, "rb") as file:
        begin = file.read(512)
    return begin[:4] in (b"PK\x03\x04", b"PK\x05\x06") or begin[:1] == b"\x80" or is_tar(begin)


def read_torch(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return what was saved.

    Returns:
        name -> read-only array, where nested dictionaries and lists give names joined by dots; and the same for objects
        that are not read: name -> class.

    Raises:
        PickleError: if the file is broken, contradicts itself, is beyond a limit, or holds only what is not read.
    """
    data, budget = opened(path), Budget()
    read = _read_zip if data[:2] == b"PK" else _read_stream if data[:1] == b"\x80" else _read_tar
    try:
        saved, place_of = read(data, budget)
        tensors, unread = _flattened(saved)
        if not tensors and budget.module:
            raise PickleError(
                f"it holds a whole module, an object of {budget.module}, and its class would have to be run; save its "
                "tensors with torch.save(model.state_dict(), path)"
            )
        if not tensors and budget.unread:
            raise PickleError(next(iter(budget.unread)))
        whole = np.frombuffer(data, np.uint8)
        return {name: _array(name, tensor, whole, place_of(tensor.storage)) for name, tensor in tensors.items()}, unread
    except (LookupError, TypeError, OverflowError, AttributeError) as error:
        # A part refers to one that is not there, or is of another type than the format says.
        raise PickleError(f"it is broken ({type(error).__name__}: {error})") from None


# ---- The zip file of torch 1.6 and later, and of TorchScript ---------------------------------------------------------


def _read_zip(data: mmap.mmap, budget: Budget) -> tuple[Any, Callable[[Storage], Extent]]:
    members = read_members(data)
    roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise PickleError(
            f"it is a zip file, but not one of PyTorch (it has {'no' if not roots else 'more than one'} data.pkl)"
        )
    order = members.get(f"{roots[0]}byteorder")
    if order is not None:
        begin, end = extent(data, order)
        if data[begin : min(end, begin + 7)] != b"little":
            raise PickleError("its numbers are big-endian, which is not supported")
    description = members[f"{roots[0]}data.pkl"]
    if description.size > DESCRIPTION:
        raise PickleError(f"its member {description.name} has {description.size} bytes, more than {DESCRIPTION}")
    begin, end = extent(data, description)
    with memoryview(data) as view, view[begin:end] as described:
        if zlib.crc32(described) != description.crc:
            raise PickleError(f"its member {description.name} is damaged (its checksum is another)")
    saved, _ = interpret(data, begin, end, _storage_of, budget)

    def place_of(storage: Storage) -> Extent:
        member = members.get(f"{roots[0]}data/{storage.key}") or members.get(f"{roots[0]}tensors/{storage.key}")
        if member is None:
            raise PickleError(f"it lacks the numbers of a tensor (data/{storage.key})")
        return extent(data, member)

    return saved, place_of


def _storage_of(persistent_id: Any) -> Storage | Opaque:
    """Read ("storage", class, key, device, numel), or a class before torch 1.6, ("module", class, file, source)."""
    if isinstance(persistent_id, tuple) and persistent_id[:1] == ("module",) and len(persistent_id) > 1:
        return persistent_id[1] if isinstance(persistent_id[1], Opaque) else Opaque("module")
    if not isinstance(persistent_id, tuple) or len(persistent_id) < 5 or persistent_id[0] != "storage":
        raise PickleError("a tensor's storage is not described as PyTorch does")
    _, kind, key, _, numel = persistent_id[:5]
    if not isinstance(key, (str, int)) or type(numel) is not int or numel < 0:
        raise PickleError("a tensor's storage is not described as PyTorch does")
    dtype = storage_type(kind)
    return dtype if isinstance(dtype, Opaque) else Storage(dtype, checked_key(key), numel)


# ---- Pickles one after another, torch 0.1.10 to 1.5 ------------------------------------------------------------------


def _read_stream(data: mmap.mmap, budget: Budget) -> tuple[Any, Callable[[Storage], Extent]]:
    """Read the magic number, the protocol, the writer's sizes, what was saved, the storages' keys, the storages."""
    storages: dict[Any, tuple[int, int]] = {}  # key -> numbers, and bytes of each

    def storage_of(persistent_id: Any) -> Storage | Opaque:
        storage = _storage_of(persistent_id)
        if isinstance(storage, Opaque) and persistent_id[0] == "module":
            return storage
        if len(persistent_id) > 5 and persistent_id[5] is not None:
            raise PickleError("a tensor's storage is a view of another, which torch 0.4 and later do not write")
        unread = isinstance(storage, Opaque)
        if unread and storage.name not in _UNREAD_SIZES:
            raise PickleError(f"it names {storage.name}, whose numbers have no known size")
        size = _UNREAD_SIZES[storage.name] if unread else dtype_of(storage.dtype).itemsize
        key, numel = checked_key(persistent_id[2]), persistent_id[4]
        if storages.setdefault(key, (numel, size)) != (numel, size):
            raise PickleError(f"its storage {key} is described in two ways")
        return storage

    place = 0

    def following() -> Any:
        nonlocal place
        found, place = interpret(data, place, len(data), storage_of, budget)
        return found

    if following() != _MAGIC or following() != _PROTOCOL:
        raise PickleError("it is a pickle, but not one of PyTorch")
    sizes = following()
    if not isinstance(sizes, dict) or sizes.get("little_endian") is not True:
        raise PickleError("its numbers are big-endian, which is not supported")
    saved, keys = following(), following()
    if not isinstance(keys, list) or sorted(map(str, map(checked_key, keys))) != sorted(map(str, storages)):
        raise PickleError("its list of storages is not that of its tensors")
    where = {}
    for key in keys:
        numel, size = storages[key]
        if _number(data, place) != numel:
            raise PickleError(f"its storage {key} has {_number(data, place)} numbers, and {numel} by its description")
        end = place + 8 + numel * size
        if end > len(data):
            raise PickleError("it ends before its numbers do")
        where[key] = place + 8, end
        place = end
    return saved, lambda storage: where[storage.key]


def _number(data: mmap.mmap, place: int, most: int | None = None) -> int:
    """Return the int64 at a place, if it is one that can be a size."""
    if place + 8 > (len(data) if most is None else most):
        raise PickleError("it ends before its numbers do")
    number = struct.unpack_from("<q", data, place)[0]
    if number < 0:
        raise PickleError("it is broken (a size is negative)")
    return number


# ---- The tar of torch 0.1 --------------------------------------------------------------------------------------------


def _read_tar(data: mmap.mmap, budget: Budget) -> tuple[Any, Callable[[Storage], Extent]]:
    """Read the members "storages", "tensors" and "pickle"; the last refers to tensors by number."""
    parts = read_tar(data, ("storages", "tensors", "pickle"))
    storages = _tar_storages(data, *parts["storages"], budget)
    tensors = _tar_tensors(data, *parts["tensors"], budget, storages)

    def tensor_of(persistent_id: Any) -> Any:
        number = int(persistent_id) if isinstance(persistent_id, (str, int)) else None
        if number not in tensors:
            raise PickleError("it refers to a tensor that it does not hold")
        return tensors[number]

    saved, _ = interpret(data, *parts["pickle"], tensor_of, budget)
    return saved, lambda storage: storages[storage.key][1]


def _tar_storages(data: mmap.mmap, place: int, end: int, budget: Budget) -> dict[Any, tuple[Storage, Extent]]:
    found: dict[Any, tuple[Storage, Extent]] = {}
    count, place = interpret(data, place, end, _no_storage, budget)
    for _ in range(_count(count)):
        entry, place = interpret(data, place, end, _no_storage, budget)
        key, _, kind = _of_length(3, entry)
        dtype = storage_type(kind)
        if isinstance(dtype, Opaque):
            raise PickleError(f"it has numbers of the type {dtype.name}, which is not supported")
        numel = _number(data, place, end)
        begin = place + 8
        place = begin + numel * dtype_of(dtype).itemsize
        if place > end:
            raise PickleError("it ends before its numbers do")
        if checked_key(key) in found:
            raise PickleError(f"it has two storages of the key {key}")
        found[key] = Storage(dtype, key, numel), (begin, place)
    views, place = interpret(data, place, end, _no_storage, budget)
    for view in views:
        target, root, offset, numel = _of_length(4, view)
        storage, (begin, _) = found[checked_key(root)]
        if _count(offset) + _count(numel, storage.numel) > storage.numel or checked_key(target) in found:
            raise PickleError(f"its storage {target} is no part of the storage {root}")
        begin += offset * dtype_of(storage.dtype).itemsize
        extent = begin, begin + numel * dtype_of(storage.dtype).itemsize
        found[target] = Storage(storage.dtype, target, numel), extent
    return found


def _tar_tensors(data: mmap.mmap, place: int, end: int, budget: Budget, storages: dict) -> dict[Any, Tensor]:
    found: dict[Any, Tensor] = {}
    count, place = interpret(data, place, end, _no_storage, budget)
    for _ in range(_count(count)):
        entry, place = interpret(data, place, end, _no_storage, budget)
        key, storage_key, _ = _of_length(3, entry)
        rank = _number(data, place, end) & 0xFFFFFFFF  # an int32, and four bytes without a meaning
        if rank > AXES:
            raise PickleError(f"a tensor has {rank} axes, more than {AXES}")
        numbers = [_number(data, place + 8 * i, end) for i in range(1, 2 * rank + 2)]
        place += 8 * (2 * rank + 2)
        storage = storages[checked_key(storage_key)][0]
        if checked_key(key) in found:
            raise PickleError(f"it has two tensors of the key {key}")
        found[key] = Tensor(storage, numbers[-1], tuple(numbers[:rank]), tuple(numbers[rank:-1]))
    return found


def _no_storage(persistent_id: Any) -> Storage:
    raise PickleError("it is broken (a reference stands where none can)")


def _count(value: Any, most: int = TENSORS) -> int:
    if type(value) is not int or value < 0:
        raise PickleError("it is broken (a count is not a number)")
    if value > most:
        raise PickleError(f"it is broken (a count is {value}, more than {most})")
    return value


def _of_length(length: int, value: Any) -> tuple:
    if not isinstance(value, tuple) or len(value) != length:
        raise PickleError("it is broken (an entry has another length)")
    return value


# ---- From descriptions to arrays -------------------------------------------------------------------------------------


def dtype_of(name: str) -> np.dtype:
    """Return the numpy type of a name such as "float32" or "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _flattened(saved: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of nested dictionaries and lists, and the classes of what is not read, by joined keys."""
    tensors: dict[str, Tensor] = {}
    unread: dict[str, str] = {}
    entries, characters = ENTRIES, NAMES

    def named(name: str) -> str:
        nonlocal characters
        characters -= len(name)
        if len(name) > NAME_LENGTH:
            raise PickleError(f"it has a name of {len(name)} characters, more than {NAME_LENGTH}")
        if characters < 0:
            raise PickleError(f"its names have more than {NAMES} characters together")
        return name or "0"

    def walk(prefix: str, items: Any, depth: int) -> None:
        nonlocal entries
        if depth > DEPTH:
            raise PickleError(f"its dictionaries and lists are more than {DEPTH} deep in each other")
        for key, value in items:
            entries -= 1
            if entries < 0:
                raise PickleError(f"it holds more than {ENTRIES} entries")
            if isinstance(value, Tensor):
                name = named(f"{prefix}{key}")
                if name in tensors:
                    raise PickleError(f"it has two tensors of the name {name}")
                if len(tensors) == TENSORS:
                    raise PickleError(f"it has more than {TENSORS} tensors")
                tensors[name] = value
            elif isinstance(value, dict):
                walk(named(f"{prefix}{key}") + "." if prefix or key != "" else "", value.items(), depth + 1)
            elif type(value) in (list, tuple):
                walk(named(f"{prefix}{key}") + "." if prefix or key != "" else "", enumerate(value), depth + 1)
            elif isinstance(value, Opaque) and len(unread) < _UNREAD:
                unread[named(f"{prefix}{key}")] = value.name

    walk("", [("", saved)], 0)
    return tensors, unread


def _array(name: str, tensor: Tensor, whole: np.ndarray, place: Extent) -> np.ndarray:
    """Return a read-only view of a storage's bytes, after checking that it stays within them."""
    shape, strides, (begin, end) = tensor.shape, tensor.strides, place
    dtype, stored = dtype_of(tensor.dtype or tensor.storage.dtype), dtype_of(tensor.storage.dtype)
    if (end - begin) // stored.itemsize != tensor.storage.numel:
        raise PickleError(
            f"the storage of {name} has {(end - begin) // stored.itemsize} numbers, and {tensor.storage.numel} by its "
            "description"
        )
    if len(shape) > AXES:
        raise PickleError(f"{name}: a tensor has {len(shape)} axes, more than {AXES}")
    if len(shape) != len(strides) or min((*shape, *strides, tensor.offset), default=0) < 0:
        raise PickleError(f"{name}: a tensor has shape {shape} and strides {strides}, which cannot be")
    if max((*shape, *strides, tensor.offset), default=0) >= 1 << 63:
        raise PickleError(f"{name} has a size, stride or offset of more than 63 bits")
    numbers = (end - begin) // dtype.itemsize
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= numbers:
        raise PickleError(
            f"{name}: a tensor of shape {shape} needs {last + 1} numbers of its storage, which has {numbers}"
        )
    if math.prod(shape) > numbers:  # strides of 0 would make a few bytes a tensor that no memory holds
        raise PickleError(
            f"{name}: a tensor of shape {shape} has {math.prod(shape)} numbers, more than its storage, which has "
            f"{numbers}"
        )
    if 0 in shape:
        if math.prod(size for size in shape if size) >= 1 << 48:
            raise PickleError(f"{name}: a tensor has shape {shape}, which cannot be")
        empty = np.zeros(shape, dtype)
        empty.flags.writeable = False
        return empty
    steps = tuple(stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return np.ndarray(shape, dtype, whole, begin + tensor.offset * dtype.itemsize, steps)
