"""The format of prepared data sets: ArrayRecord shards of MessagePack records, and a manifest.

A directory holds the shards and manifest.json:

    {"format": "ddpm_jax.array_record", "version": 1,
     "shards": [{"name": "00000.array_record", "records": 1024, "bytes": 52428800, "sha256": "..."}, ...],
     "fields": {"image": "image", "key": "str", "caption": "str", "label": "int",
                "z_image": {"dtype": "<f4", "shape": [768]}},
     "class_names": ["cat", "dog"],           or null
     "provenance": {...}}                     any plain data: where the records come from

Each record of a shard is a MessagePack map (https://msgpack.org) from the names of the fields to

    "image"     bin: a whole JPEG, PNG, WebP or GIF file
    "str"       str
    "int"       int, of 64 bits
    arrays      bin: the elements in C order, of the dtype and shape that the manifest gives; floats are finite

Shards are written with group size 1, so that every record can be read on its own. Reading runs no code from a file.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.decode import encode_png
from ddpm_jax.extras import needs_extra
from ddpm_jax.temporary import temporary_path

with needs_extra("train"):
    import msgpack

MANIFEST = "manifest.json"
FORMAT, VERSION = "ddpm_jax.array_record", 1
_DTYPE = re.compile(r"[|][biu]1|<[iu][248]|<f[248]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_ELEMENTS = 2**31


def record_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record, as they are in a manifest.

    Args:
        record: "image" as the bytes of an image file or as uint8[H, W, 3]; str; int; and arrays of numbers.

    Raises:
        ValueError: if a value is none of these.
    """
    fields: dict[str, Any] = {}
    for name, value in record.items():
        if name == "image":
            fields[name] = "image"
        elif isinstance(value, str):
            fields[name] = "str"
        elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            fields[name] = "int"
        else:
            array = np.asarray(value)
            dtype = array.dtype.newbyteorder("<").str
            if not _DTYPE.fullmatch(dtype):
                raise ValueError(f"{name} must be a str, an int or an array of numbers, got {_shown(value)}")
            fields[name] = {"dtype": dtype, "shape": list(array.shape)}
    return fields


def encode_record(
    record: Mapping[str, Any], fields: Mapping[str, Any], class_names: Sequence[str] | None = None
) -> bytes:
    """Return the bytes of one record.

    Args:
        record: as `record_fields` takes it. Bytes of an image are stored as they are, pixels as PNG.
        fields: what the record must have, neither more nor less.
        class_names: names of the labels.

    Raises:
        ValueError: if the record does not have these fields; the message names its key.
    """
    key = f"the record with the key {record['key']!r}" if "key" in record else "a record"
    if set(record) != set(fields):
        raise ValueError(f"{key} has the fields {', '.join(record)}; the first record has {', '.join(fields)}")
    try:
        return msgpack.packb({name: _encoded(name, record[name], kind, class_names) for name, kind in fields.items()})
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{key}: {error}") from None


def decode_record(data: bytes, fields: Mapping[str, Any], class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the record whose bytes these are, with "image" as the bytes of an image file.

    Args:
        data: as `encode_record` returns them.
        fields: of those to return.
        class_names: names of the labels.

    Raises:
        ValueError: if the bytes are not of such a record.
    """
    try:
        values = msgpack.unpackb(data)
    except Exception as error:  # several types, not all of them of msgpack
        raise ValueError(f"is not MessagePack: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"must be a MessagePack map, got {_shown(values)}")
    if missing := [name for name in fields if name not in values]:
        raise ValueError(f"has no field {missing[0]}")
    return {name: _decoded(name, values[name], kind, class_names) for name, kind in fields.items()}


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """Read and check the manifest of a directory.

    Raises:
        ValueError: if it is missing or wrong.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    check_manifest(manifest, str(file))
    return manifest


def check_manifest(manifest: Any, name: str) -> None:
    """Raise ValueError, with the name of the manifest, unless each of its fields is right."""

    def check(right: Any, rule: str) -> None:
        if not right:
            raise ValueError(f"{name}: {rule}")

    check(isinstance(manifest, dict) and manifest.get("format") == FORMAT, f"format must be {FORMAT!r}")
    check(manifest.get("version") == VERSION, f"version must be {VERSION}, got {_shown(manifest.get('version'))}")
    shards, fields, class_names = (manifest.get(entry) for entry in ("shards", "fields", "class_names"))
    check(isinstance(shards, list) and all(isinstance(shard, dict) for shard in shards), "shards must be a list")
    for number, shard in enumerate(shards):
        where = f"shards[{number}]"
        file = shard.get("name")
        check(isinstance(file, str) and file == os.path.basename(file) != "", f"{where}.name must be a file name")
        for entry in ("records", "bytes"):
            check(_is_count(shard.get(entry)), f"{where}.{entry} must be an int in [0, 2^63)")
        check(isinstance(digest := shard.get("sha256"), str) and _SHA256.fullmatch(digest), f"{where}.sha256 is wrong")
    check(len({shard["name"] for shard in shards}) == len(shards), "names of shards must differ")
    check(0 < sum(shard["records"] for shard in shards) < 2**63, "there must be at least one record")
    check(isinstance(fields, dict) and fields, "fields must be a map")
    for field, kind in fields.items():
        check(_is_kind(field, kind), f"fields.{field} is wrong: {_shown(kind)}")
    names = class_names is None or (isinstance(class_names, list) and all(isinstance(c, str) for c in class_names))
    check(names, "class_names must be a list of str, or null")
    check(isinstance(manifest.get("provenance"), dict), "provenance must be a map")


def write_manifest(
    path: str | os.PathLike,
    shards: Sequence[Mapping[str, Any]],
    fields: Mapping[str, Any],
    *,
    class_names: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write manifest.json into a directory of shards, which makes it readable.

    Args:
        path: of the directory.
        shards: what `write_shard` returned, in the order of the records.
        fields: as `record_fields` returns them.
        class_names: names of the labels.
        provenance: plain data about where the records come from.

    Raises:
        ValueError: if there is no record, or an argument is wrong.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "shards": [dict(shard) for shard in shards],
        "fields": dict(fields),
        "class_names": None if class_names is None else list(class_names),
        "provenance": dict(provenance or {}),
    }
    check_manifest(manifest, f"the manifest of {path}")
    target = Path(path) / MANIFEST
    with temporary_path(target.with_name(f".{MANIFEST}.{os.getpid()}")) as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, target)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_kind(field: str, kind: Any) -> bool:
    if field == "image" or kind == "image":
        return field == "image" and kind == "image"
    if field in ("caption", "key") or kind == "str":
        return kind == "str"
    if field == "label" or kind == "int":
        return kind == "int"
    if not isinstance(kind, dict) or set(kind) != {"dtype", "shape"}:
        return False
    dtype, shape = kind["dtype"], kind["shape"]
    right = isinstance(dtype, str) and _DTYPE.fullmatch(dtype) and isinstance(shape, list)
    return bool(right) and all(_is_count(side) for side in shape) and math.prod(shape) <= _MAX_ELEMENTS


def _encoded(name: str, value: Any, kind: Any, class_names: Sequence[str] | None) -> Any:
    if kind == "image":
        if isinstance(value, bytes):
            return value
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3:
            raise ValueError(f"image must be bytes or uint8[H, W, 3], got {_shown(value)}")
        return encode_png(value)
    if kind == "str":
        return _check_type(name, value, str)
    if kind == "int":
        number = _check_type(name, int(value) if isinstance(value, np.integer) else value, int)
        return _check_label(number, class_names) if name == "label" else number
    array = np.asarray(value)
    if array.dtype.newbyteorder("<").str != kind["dtype"] or list(array.shape) != kind["shape"]:
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}, that of the first record {kind['dtype']}{kind['shape']}"
        )
    _check_finite(name, array)
    return np.ascontiguousarray(array.astype(kind["dtype"], copy=False)).tobytes()


def _decoded(name: str, value: Any, kind: Any, class_names: Sequence[str] | None) -> Any:
    if kind == "str":
        return _check_type(name, value, str)
    if kind == "int":
        if name == "label":
            return np.int32(_check_label(_check_type(name, value, int), class_names))
        return np.int64(_check_type(name, value, int))
    _check_type(name, value, bytes)
    if kind == "image":
        return value
    dtype, shape = np.dtype(kind["dtype"]), kind["shape"]
    if len(value) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{name} has {len(value)} bytes, {dtype}{shape} needs {dtype.itemsize * math.prod(shape)}")
    array = np.frombuffer(value, dtype).reshape(shape)
    _check_finite(name, array)
    return array


def _check_type(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be {kind.__name__}, got {_shown(value)}")
    return value


def _check_label(label: int, class_names: Sequence[str] | None) -> int:
    most = 2**31 if class_names is None else len(class_names)
    if not 0 <= label < most:
        raise ValueError(f"label must be in [0, {most}), got {label}")
    return label


def _check_finite(name: str, array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite (NaN or infinity)")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
