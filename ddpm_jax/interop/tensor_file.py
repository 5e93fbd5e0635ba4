"""Named arrays from any of the field's weight files: safetensors, whole or in shards, and PyTorch's formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop.mapping import mapped
from ddpm_jax.interop.pickles import NAME_LENGTH, PickleError
from ddpm_jax.interop.torch_file import dtype_of, is_torch, read_torch

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


_NAMES = 20_000_000  # characters of all names together; a small file may give one long name to many tensors
_MESSAGE = 4000


def printable(message: str) -> str:
    r"""Return a message as one line that a terminal shows as it is, of at most 4000 characters and how many follow.

    Names out of files stand in it, which may hold anything: what is not printable becomes \n, \x1b or the like.
    """
    shown = message[:_MESSAGE]
    more = f"... ({len(message) - _MESSAGE} characters more)" if len(message) > _MESSAGE else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + more


class ReadError(RuntimeError):
    """A weights file could not be read; the message is one sentence on one printable line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


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
        ReadError: if the file is missing, broken, of another kind, holds anything but tensors, numbers and strings,
            has two tensors of one name, or has a shard that holds others than its index says; the message names what.
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
            return _named(read_torch(path))
    except (PickleError, RecursionError, MemoryError, OSError, ValueError) as error:
        raise ReadError(f"weights file {path} cannot be read: {str(error) or type(error).__name__}") from None
    raise ReadError(f"weights file {path} cannot be read: it is neither safetensors nor a PyTorch checkpoint")


def _named(saved: Any) -> dict[str, np.ndarray]:
    """Return the tensors of nested dictionaries and lists, with their keys joined by dots."""
    found: dict[str, np.ndarray] = {}
    left = _NAMES

    def add(name: str, value: Any) -> None:
        nonlocal left
        left -= len(name)
        if len(name) > NAME_LENGTH:
            raise ValueError(f"it has a name of {len(name)} characters, more than {NAME_LENGTH}")
        if left < 0:
            raise ValueError(f"its names have more than {_NAMES} characters together")
        if isinstance(value, np.ndarray):
            if (name or "0") in found:
                raise ValueError(f"it has two tensors of the name {name or '0'}")
            found[name or "0"] = value
        items = value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
        for key, entry in items:
            add(f"{name}.{key}" if name else str(key), entry)

    add("", saved)
    return found


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
        if Path(shard).name != shard or shard.endswith(".json"):
            raise ValueError(f"its shard {shard!r} is not a weights file beside it")
        tensors = read_tensors(path.parent / shard)
        for name in tensors:
            if where.get(name, shard) != shard:
                raise ValueError(f"its shard {shard} holds {name}, which it says is in {where[name]}")
        found |= tensors
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
