"""One part of a prepared data set: the records of a range of the source, as a shard and a list of what was skipped.

A part depends on the source, its range and the options alone.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.array_record import write_shard
from ddpm_jax.data.decode import encode_png
from ddpm_jax.data.record_format import record_fields
from ddpm_jax.data.source import CaptionError, RecordError
from ddpm_jax.data.transforms import CenterCrop, as_image
from ddpm_jax.extras import needs_extra
from ddpm_jax.temporary import temporary_path
from ddpm_jax.types import Source

with needs_extra("train"):
    from PIL import Image

UNREADABLE, TOO_SMALL, NO_CAPTION = "unreadable", "too small", "no caption"
FORMATS = ("png", "webp", "jpeg")
_DIGEST_BYTES = 16  # of pixels; two of 10^9 different images have the same with a probability of 10^-21


class PrepareError(RuntimeError):
    """A data set cannot be prepared; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a prepared data set.

    Attributes:
        size: side of the images in pixels; they are resized and cropped by `data.transforms.CenterCrop`.
        min_side: images with a shorter side than this are skipped; None is `size`, 1 skips none.
        format: "png" and "webp" keep every pixel; "jpeg" does not.
        quality: of JPEG, in [1, 100].
        keep_duplicates: whether to keep records whose pixels, before resizing, are those of an earlier record.
        shard_records: records of the source in the range of a shard.
    """

    size: int
    min_side: int | None = None
    format: str = "png"
    quality: int = 95
    keep_duplicates: bool = False
    shard_records: int = 1024

    def __post_init__(self):
        for name, most in (("size", 8192), ("min_side", 2**31), ("quality", 100), ("shard_records", 2**31)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be in [1, {most}], got {value}")
        if self.format not in FORMATS:
            raise ValueError(f"format must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {self.format!r}")

    def plain(self) -> dict[str, Any]:
        """Return the options as plain data; those without an influence are left out."""
        values = dataclasses.asdict(self) | {"min_side": self.min_side or self.size}
        return values if self.format == "jpeg" else {k: v for k, v in values.items() if k != "quality"}


@dataclasses.dataclass
class Part:
    """Result of preparing a range of records.

    Attributes:
        shard: its entry of the manifest, or None where no record was kept.
        fields: of the records, as in the manifest.
        kept: for each record of the shard its index in the source, the digest of its pixels, and its key.
        skipped: {"index", "reason", "message"} of each other record.
    """

    shard: dict[str, Any] | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
    skipped: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def write_part(
    source: Source, begin: int, end: int, path: Path, options: Options, done: Callable[[int], None] = lambda count: None
) -> Part:
    """Write the shard of a range of the source, whole or not at all.

    Args:
        source: the records.
        begin: the first index.
        end: the index after the last one.
        path: of the shard.
        options: how to prepare.
        done: called with 1 after each record.

    Raises:
        PrepareError: if the source has no images, or its records differ in their fields.
    """
    part = Part()
    class_names = getattr(source, "class_names", None)
    records = _prepared(source, begin, end, options, part, done)
    first = next(records, None)
    if first is not None:
        try:
            part.fields = record_fields(first)
            part.shard = write_shard(path, _chain(first, records), part.fields, class_names)
        except ValueError as error:
            raise PrepareError(str(error)) from None
    return part


def save_part(path: Path, part: Part) -> None:
    """Write a part's outcome, which makes the part complete; whole or not at all."""
    with temporary_path(path.with_name(f".{path.name}.{os.getpid()}")) as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(part)), encoding="utf-8")
        os.replace(unfinished, path)


def load_part(path: Path) -> Part:
    """Read what `save_part` wrote.

    Raises:
        PrepareError: if the file is damaged.
    """
    try:
        return Part(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise PrepareError(f"{path} is damaged ({error}); remove it, and its range is prepared again") from None


def encode_image(image: np.ndarray, options: Options) -> bytes:
    """Return uint8[H, W, 3] as the bytes of an image file."""
    if options.format == "png":
        return encode_png(image)
    stream = io.BytesIO()
    if options.format == "webp":
        Image.fromarray(image).save(stream, "WEBP", lossless=True, quality=75, method=4)
    else:
        Image.fromarray(image).save(stream, "JPEG", quality=options.quality, subsampling=0)
    return stream.getvalue()


class _Skip(Exception):
    """A record that is not kept."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def _chain(first: dict, rest: Iterator[dict]) -> Iterator[dict]:
    yield first
    yield from rest


def _prepared(
    source: Source, begin: int, end: int, options: Options, part: Part, done: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Yield the records to keep, and note in the part what became of each."""
    for index in range(begin, end):
        try:
            record, digest = _prepare(source, index, options)
            part.kept.append((index, digest, str(record.get("key", f"record {index}"))))
            yield record
        except _Skip as skip:
            part.skipped.append({"index": index, "reason": skip.reason, "message": str(skip)})
        done(1)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that Python keeps as lone surrogates
        return False
    return True


def _prepare(source: Source, index: int, options: Options) -> tuple[dict[str, Any], str]:
    """Return a record ready to be stored, and the digest of its pixels before resizing."""
    try:
        record = dict(source[index])
    except CaptionError as error:
        raise _Skip(NO_CAPTION, str(error)) from None
    except RecordError as error:
        raise _Skip(UNREADABLE, str(error)) from None
    key = str(record.get("key", f"record {index}"))
    if "image" not in record:
        raise PrepareError(f"{key} has no image; it has {', '.join(record)}")
    try:
        image = as_image(record["image"])
    except ValueError as error:
        raise _Skip(UNREADABLE, f"{key}: the image {error}") from None
    if "caption" in record and not str(record["caption"]).strip():
        raise _Skip(NO_CAPTION, f"{key}: the caption is empty")
    for name, value in record.items():
        if isinstance(value, str) and not _is_utf8(value):
            raise _Skip(UNREADABLE, f"{key}: {name} is not UTF-8")
    height, width = image.shape[:2]
    least = options.min_side or options.size
    if min(height, width) < least:
        raise _Skip(TOO_SMALL, f"{key}: has {width} x {height} pixels, and the shorter side must have {least}")
    digest = hashlib.sha256(f"{height} {width} ".encode() + image.tobytes()).digest()[:_DIGEST_BYTES].hex()
    small = CenterCrop(options.size)({"image": image})["image"]
    return record | {"image": encode_image(np.ascontiguousarray(small), options)}, digest
