"""JSON files: bounded before they are parsed, without two values for one name, and written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.paths import as_path, is_remote, write_whole
from ddpm_jax.storage.mapping import opened

JSON_BYTES = 1 << 24  # the largest header of a published safetensors file has about one million
JSON_VALUES = 1_400_000  # commas, opening brackets and strings; a safetensors header has 13 for each tensor


def read_json(path: str | Path) -> Any:
    """Return what a JSON file says.

    Raises:
        ValueError: if it is no JSON, or beyond the limits of `parse_json`.
        OSError: if it cannot be read.
    """
    path = as_path(path)
    if is_remote(path):
        data = path.read_bytes()
    elif not path.stat().st_size:
        raise ValueError("it is empty")
    else:
        data = opened(path)
    if len(data) > JSON_BYTES:
        raise ValueError(f"it has {len(data)} bytes of JSON, more than {JSON_BYTES}")
    return parse_json(data[:])


def parse_json(data: bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: if it is no JSON, too large, too deeply nested, or has one name twice in an object.
    """
    if len(data) > JSON_BYTES:
        raise ValueError(f"it has {len(data)} bytes of JSON, more than {JSON_BYTES}")
    # Those within strings count too, so there are at most as many values.
    values = sum(data.count(mark) for mark in (b",", b"[", b"{")) + data.count(b'"') // 2
    if values > JSON_VALUES:
        raise ValueError(f"its JSON has about {values} values and separators, more than {JSON_VALUES}")
    try:
        return json.loads(data, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names: set[str] = set()
        twin = next(name for name, _ in pairs if name in names or names.add(name))
        raise ValueError(f"its JSON has the name {twin[:100]!r} twice in one object")
    return found


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, whole or not at all, by the first process alone.

    Raises:
        OSError: if it cannot be written; it says why, and names the file.
    """
    if jax.process_index() != 0:
        return
    try:
        write_whole(path, (json.dumps(value, indent=1) + "\n").encode())
    except OSError as error:
        raise OSError(error.errno, f"could not write the file: {error.strerror}", str(path)) from error
