"""Further fields of prepared records, computed from images and captions by a network."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from ddpm_jax.data.array_record import write_shard
from ddpm_jax.data.decode import decode_image
from ddpm_jax.data.preparing.part import Part, PrepareError
from ddpm_jax.data.record_format import decode_record, record_fields
from ddpm_jax.types import Source


class Embedder(Protocol):
    """Computes arrays of records; `fingerprint` says by what, and of what batch size."""

    fingerprint: str
    batch_size: int

    def __call__(self, images: np.ndarray, captions: Sequence[str] | None) -> Mapping[str, np.ndarray]:
        """Return {name: array [B, ...]} of uint8[B, H, W, 3] and of B captions, or None where records have none."""
        ...


def embed_part(part: Part, decoded: Path, path: Path, embedders: Sequence[Embedder], source: Source) -> Part:
    """Write the shard of a part again, with the fields that the embedders compute, and return the changed part.

    The images are those that are stored, so an embedding belongs to what `ArrayRecordSource` reads.

    Args:
        part: as its worker returned it.
        decoded: the shard that the worker wrote; it is removed.
        path: of the new shard.
        embedders: what computes the fields.
        source: for the names of its classes.

    Raises:
        PrepareError: if two of the fields have one name, or values are not finite.
    """
    class_names = getattr(source, "class_names", None)
    records = _embedded(part, decoded, embedders)
    try:
        first = next(records)
        fields = record_fields(first)
        shard = write_shard(path, _chain(first, records), fields, class_names)
    except ValueError as error:
        raise PrepareError(str(error)) from None
    decoded.unlink()
    return Part(shard, fields, part.kept, part.skipped)


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _embedded(part: Part, decoded: Path, embedders: Sequence[Embedder]) -> Iterator[dict[str, Any]]:
    data = ArrayRecordDataSource(str(decoded))
    size = max(embedder.batch_size for embedder in embedders)
    for begin in range(0, len(data), size):
        numbers = range(begin, min(begin + size, len(data)))
        records = [decode_record(data[number], part.fields) for number in numbers]
        images = np.stack([decode_image(record["image"]) for record in records])
        captions = [record["caption"] for record in records] if "caption" in part.fields else None
        for embedder in embedders:
            for name, values in embedder(images, captions).items():
                if name in records[0]:
                    raise PrepareError(f"two models, or a model and the source, give a field {name}")
                for record, value in zip(records, values, strict=True):
                    record[name] = np.asarray(value)
        yield from records
