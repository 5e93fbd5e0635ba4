"""Named arrays from any of the field's weight files: safetensors, whole or in shards, and PyTorch's formats."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop.mapping import mapped
from ddpm_jax.interop.pickles import PickleError
from ddpm_jax.interop.torch_file import dtype_of, is_torch, read_torch

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class ReadError(RuntimeError):
    """A weights file could not be read; the message is one sentence."""


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file, without running anything that it contains.

    Args:
        path: a .safetensors file; the .index.json of one in shards; a PyTorch checkpoint of any age, or a TorchScript
            archive. What kind it is, is read from the file, not from its name.

    Returns:
        name -> read-only array. Nested dictionaries and lists give names joined by dots ("state_dict.conv.weight");
        what is not a tensor (a step count, a config) is left out. Arrays are views of the memory-mapped file, so a
        file larger than the memory can be read as long as its arrays are converted one by one.

    Raises:
        ReadError: if the file is missing, broken, of another kind, or holds anything but tensors, numbers and strings;
            the message names what.
    """
    path = Path(path)
    if not path.is_file():
        raise ReadError(f"weights file {path} {'is a directory' if path.is_dir() else 'does not exist'}")
    if not path.stat().st_size:
        raise ReadError(f"weights file {path} is empty")
    try:
        if path.name.endswith(".json"):
            return _read_shards(path)
        if _is_safetensors(path):
            return _read_safetensors(path)
        if is_torch(path):
            return dict(_named("", read_torch(path)))
    except (PickleError, RecursionError, MemoryError, OSError, ValueError) as error:
        raise ReadError(f"weights file {path} cannot be read: {error or type(error).__name__}") from None
    raise ReadError(f"weights file {path} cannot be read: it is neither safetensors nor a PyTorch checkpoint")


def _named(prefix: str, saved: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(saved, np.ndarray):
        yield prefix or "0", saved
    items = saved.items() if isinstance(saved, dict) else enumerate(saved) if isinstance(saved, (list, tuple)) else ()
    for key, value in items:
        yield from _named(f"{prefix}.{key}" if prefix else str(key), value)


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= path.stat().st_size


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    index = json.loads(path.read_text())
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError("it is not the index of a file in shards (it has no weight_map)")
    found: dict[str, np.ndarray] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise ValueError(f"its shard {shard!r} is not a file beside it")
        found |= read_tensors(path.parent / shard)
    if set(found) != set(where):
        strange = sorted(set(found) ^ set(where))
        raise ValueError(f"its shards do not hold what it says: {strange[0]}, and {len(strange) - 1} more")
    return found


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Let the library check the header, and map the arrays instead of copying them."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    whole = mapped(path)
    length = 8 + int.from_bytes(bytes(whole[:8]), "little")
    found = {}
    for name, entry in json.loads(bytes(whole[8:length])).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the type {entry['dtype']}, which is not one of {', '.join(_DTYPES)}")
        begin, end = entry["data_offsets"]
        found[name] = (
            whole[length + begin : length + end].view(dtype_of(_DTYPES[entry["dtype"]])).reshape(entry["shape"])
        )
    return found
