"""CLIP embeddings of a data set, computed once and shared by the stages that are conditioned on them."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import numpy as np

from ddpm_jax.data.transforms import Select
from ddpm_jax.extras import needs_extra
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.parallel.mesh import batch_shards, data_sharding, make_local_mesh, replicated
from ddpm_jax.progress import progress_bar
from ddpm_jax.storage.clip_images import encode_images
from ddpm_jax.storage.fingerprint import tree_fingerprint
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.temporary import temporary_path
from ddpm_jax.training.describe import describe
from ddpm_jax.types import Source, to_float

with needs_extra("train"):
    from absl import logging

__all__ = ["EmbeddedSource", "cached_embeddings", "tree_fingerprint"]
NAMES = ("z_image", "z_text")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A source of a `Stage` whose records get CLIP embeddings, computed once before the stage is trained.

    The records also have "z_image" and "z_text", float32[D], of unit length.

    Attributes:
        source: the records of the stage.
        read: the same records in the form that CLIP reads; those of `source` by default. For other resolutions.
        transforms: bring a record of `read` to "image" uint8[S, S, 3], "tokens" int32[L] and "mask" bool[L].
        role: of the frozen CLIP among the stage's needs.
        batch_size: of the embedding.
    """

    source: Source
    transforms: tuple[Callable[[dict], dict], ...]
    read: Source | None = None
    role: str = "clip"
    batch_size: int = 256

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        raise TypeError("the embeddings are not computed yet; `compute` returns the source that has them")

    def fingerprint(self) -> str:
        """Return a text that differs if the records differ."""
        return json.dumps({"records": describe(self.source), "embedded": self._mark()}, sort_keys=True)

    def _mark(self) -> dict[str, Any]:
        # The first transforms of the record decide what CLIP reads; `source` does not.
        return {"source": describe(self.source if self.read is None else self.read), "by": describe(self.transforms)}

    def example(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """Return the first record, with zeros for embeddings."""
        z = np.zeros(models[self.role].network.embed_dim, np.float32)
        return dict(self.source[0]) | dict.fromkeys(NAMES, z)

    def compute(self, models: Mapping[str, Any], directory: Path, *, progress: bool = True) -> "EmbeddedSource":
        """Return the source with its embeddings, read from `directory` or computed and written there."""
        clip, mesh = models[self.role], make_local_mesh()
        params = jax.device_put(clip.params, replicated(mesh))
        embed = jax.jit(_embed)
        cache = cached_embeddings(
            directory,
            self.source if self.read is None else self.read,
            (*self.transforms, Select(("image", "tokens", "mask"))),
            lambda batch: embed(clip.replace(params=params), jax.device_put(batch, data_sharding(mesh))),
            fingerprint={"clip": tree_fingerprint(clip.params), **self._mark()},
            batch_size=-(-self.batch_size // batch_shards(mesh)) * batch_shards(mesh),
            progress=progress,
        )
        return EmbeddedSource(self.source, cache)


def _embed(clip: Model, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    z_text, _ = clip.apply(batch["tokens"], batch["mask"], method=CLIP.encode_text)
    return encode_images(clip, to_float(batch["image"])), normalize(z_text)


class EmbeddedSource:
    """A source whose records also have "z_image" and "z_text", float32[D], from a cache."""

    def __init__(self, source: Source, embeddings: Mapping[str, np.ndarray]):
        for name, array in embeddings.items():
            if len(array) != len(source):
                raise ValueError(f"{name} holds {len(array)} embeddings, the source has {len(source)} records")
        self.source, self.embeddings = source, embeddings

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """Return a text that differs if the records differ."""
        arrays = {name: describe(np.asarray(array)) for name, array in self.embeddings.items()}
        return json.dumps({"records": describe(self.source), "embeddings": arrays}, sort_keys=True)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = index.__index__()
        return self.source[index] | {name: array[index] for name, array in self.embeddings.items()}


def cached_embeddings(
    directory: str | os.PathLike,
    source: Source,
    transforms: tuple[Callable[[dict], dict], ...],
    embed: Callable[[dict[str, np.ndarray]], tuple[jax.Array, jax.Array]],
    *,
    fingerprint: Mapping[str, Any],
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Return {"z_image", "z_text"}, float32[N, D] each, read from `directory` or computed and written there.

    Args:
        directory: of the cache; it appears complete or not at all, and its parent exists.
        source: N records.
        transforms: bring a record to what `embed` takes.
        embed: a batch of records -> (z_image, z_text), unit vectors float32[B, D]. The batch always has `batch_size`
            rows; the last one is padded.
        fingerprint: plain data that says what was embedded by what; a cache with another one is recomputed.
        batch_size: B.
        progress: True shows a bar on stderr.

    Raises:
        OSError: when the cache cannot be written; nothing of it is left behind.
    """
    directory = Path(directory)
    mark = json.dumps(fingerprint, sort_keys=True)
    cached = _read(directory, mark)
    if cached is not None:
        return cached
    rows: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    count = len(source)
    hidden = not progress or jax.process_index() != 0
    with progress_bar(count, description="embed", unit="image", shown=not hidden) as bar:
        for start in range(0, count, batch_size):
            records = [_apply(source[i], transforms) for i in range(start, min(start + batch_size, count))]
            filled = len(records)
            records += [records[-1]] * (batch_size - filled)
            batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
            for name, z in zip(NAMES, embed(batch)):
                rows[name].append(np.asarray(z, np.float32)[:filled])
            bar.update(filled)
    arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    if jax.process_index() == 0:
        _write(directory, mark, arrays)
    return arrays


def _apply(record: dict, transforms: tuple[Callable[[dict], dict], ...]) -> dict:
    for transform in transforms:
        record = transform(record)
    return record


def _read(directory: Path, mark: str) -> dict[str, np.ndarray] | None:
    try:
        if (directory / "fingerprint.json").read_text() != mark:
            logging.info("the embeddings in %s are of other data or another CLIP and are recomputed", directory)
            return None
        return {name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in NAMES}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logging.warning("the embeddings in %s cannot be read and are recomputed: %s", directory, error)
        return None


def _write(directory: Path, mark: str, arrays: Mapping[str, np.ndarray]) -> None:
    new = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with temporary_path(new):
            new.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(new / f"{name}.npy", array, allow_pickle=False)
            (new / "fingerprint.json").write_text(mark)
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(new, directory)
    except OSError as error:
        # numpy tells a short write by the number of items, without an errno.
        reason = error.strerror or f"{error}; is the disk full?"
        raise OSError(error.errno or errno.EIO, f"could not write the embeddings: {reason}", str(directory)) from error
