"""Named arrays from any of the field's weight files: safetensors, whole or in shards, and PyTorch's formats."""

import math
import stat
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.errors import ReadError, printable
from ddpm_jax.storage.json_file import JSON_BYTES, parse_json, read_json
from ddpm_jax.storage.mapping import memory_mapped
from ddpm_jax.storage.pickles import NAME_LENGTH
from ddpm_jax.storage.tensors import Tensors, take_part
from ddpm_jax.storage.torch_file import AXES, NAMES, TENSORS, dtype_of, is_torch, read_torch

__all__ = ["ReadError", "printable", "read_tensors"]
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SHARDS = 1000  # the largest published checkpoints have less than two hundred


def read_tensors(path: str | Path, *, part: str | None = None) -> Tensors:
    """Read all tensors of a file, without running anything that it contains.

    Args:
        path: a .safetensors file; the .index.json of one in shards; a PyTorch checkpoint of any age, or a TorchScript
            archive. The format is detected from the file's bytes, not from its name, except for an index.
        part: only the tensors below this name, by the rest of their names: "ema" for {"ema": {...}}, or "model_ema" for
            the averages of latent diffusion, which take the place of what they are averages of.

    Returns:
        name -> read-only array, a dict. Nested dictionaries and lists give names joined by dots
        ("state_dict.conv.weight"); what is not a tensor (a step count, a config) is left out, objects of any other
        class are named in `unread`. Arrays are views of the memory-mapped file, so a file larger than the memory can be
        read as long as its arrays are converted one by one.

    Raises:
        ReadError: if the file is missing, broken, of another kind, beyond a limit (docs/checkpoints.md has them),
            contradicts itself, has two tensors of one name, has a shard that holds others than its index says, or does
            not have the part.
    """
    path = Path(path)
    try:
        tensors = _read(path)
        return tensors if part is None else take_part(tensors, part)
    except ReadError:
        raise
    except (RecursionError, MemoryError, OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    # Outside of the except clause: the error would keep all that was read so far in memory.
    raise ReadError(f"weights file {path} cannot be read: {reason}")


def _read(path: Path) -> Tensors:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ReadError(f"weights file {path} does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ReadError(f"weights file {path} is {kind}")
    if not status.st_size:
        raise ReadError(f"weights file {path} cannot be read: it is empty")
    if path.name.endswith(".json"):
        return _read_shards(path)
    if _is_safetensors(path):
        return _read_safetensors(path)
    if is_torch(path):
        return Tensors(*read_torch(path))
    raise ReadError(f"weights file {path} cannot be read: it is neither safetensors nor a PyTorch checkpoint")


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= path.stat().st_size


def _read_shards(path: Path) -> Tensors:
    index = read_json(path)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError("it is not the index of a file in shards (it has no weight_map, or an empty one)")
    shards = sorted(set(where.values()))
    if len(shards) > SHARDS:
        raise ValueError(f"it names {len(shards)} shards, more than {SHARDS}")
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or shard.endswith(".json"):
            raise ValueError(f"its shard {shard!r} is not a weights file beside it")
    found: dict[str, np.ndarray] = {}
    for shard in shards:
        tensors = read_tensors(path.parent / shard)
        for name in tensors:
            if where.get(name, shard) != shard:
                raise ValueError(f"its shard {shard} holds {name}, which it says is in {where[name]}")
        found |= tensors
        if len(found) > TENSORS:
            raise ValueError(f"its shards have more than {TENSORS} tensors")
    if set(found) != set(where):
        strange = sorted(set(found) ^ set(where))
        raise ValueError(f"its shards do not hold what it says: {strange[0]}, and {len(strange) - 1} more")
    return Tensors(found)


def _read_safetensors(path: Path) -> Tensors:
    """Read the header, compare all that it says with the file, and map the arrays."""
    whole = memory_mapped(path)
    length = int.from_bytes(bytes(whole[:8]), "little")
    if length > JSON_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {JSON_BYTES}")
    header = parse_json(bytes(whole[8 : 8 + length]))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a dictionary of strings")
    if len(header) > TENSORS:
        raise ValueError(f"it has {len(header)} tensors, more than {TENSORS}")
    if sum(map(len, header)) > NAMES:
        raise ValueError(f"its names have more than {NAMES} characters together")
    found, extents = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        if 8 + length + end > len(whole):
            raise ValueError(
                f"{name} ends at byte {end} of the numbers, of which the file has {len(whole) - 8 - length}"
            )
        found[name] = np.ndarray(shape, dtype, whole, 8 + length + begin)
        extents.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(extents):
        if begin != place:
            what = "overlaps the numbers" if begin < place else "leaves a gap after those"
            raise ValueError(f"{name} {what} of the tensor before it (it begins at {begin}, not at {place})")
        place = end
    if 8 + length + place != len(whole):
        raise ValueError(f"it has {len(whole) - 8 - length - place} bytes after the last tensor")
    return Tensors(found, metadata=metadata)


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Return the dtype and the shape of a tensor in a header, and where its bytes begin and end."""
    if len(name) > NAME_LENGTH:
        raise ValueError(f"it has a name of {len(name)} characters, more than {NAME_LENGTH}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"{name} has the type {str(kind)[:100]}, which is not one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > AXES or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"{name} has a shape that cannot be (it must be at most {AXES} whole numbers)")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"{name} has data_offsets that are not two whole numbers")
    dtype, (begin, end) = dtype_of(_DTYPES[kind]), offsets
    if math.prod(n for n in shape if n) >= 1 << 48 or begin > end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name} of shape {shape} and type {kind} does not have {end - begin} bytes, as its header says"
        )
    return dtype, tuple(shape), begin, end
