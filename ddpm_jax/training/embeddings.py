"""CLIP embeddings of a data set, computed once and shared by the stages that are conditioned on them."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import numpy as np

from ddpm_jax.data.transforms import Select
from ddpm_jax.extras import needs_extra
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.mesh import batch_shards, data_sharding, make_local_mesh, replicated
from ddpm_jax.paths import as_path, is_remote, write_whole
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
            batch_size=self.batch_size,
            multiple=batch_shards(mesh),
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
    multiple: int = 1,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Return {"z_image", "z_text"}, float32[N, D] each, read from `directory` or computed and written there.

    Args:
        directory: of the cache; it appears complete or not at all, and its parent exists. Several hosts share it, and
            each embeds a share of the records. What was embedded before an interruption is in `<directory>.parts`.
        source: N records.
        transforms: bring a record to what `embed` takes.
        embed: a batch of records -> (z_image, z_text), unit vectors float32[B, D]. Every batch is padded to as many
            rows.
        fingerprint: plain data that says what was embedded by what; a cache with another one is recomputed.
        batch_size: records in a batch, the same on all hosts.
        multiple: B is `batch_size` rounded up to a multiple of it, such as the devices of this host.
        progress: True shows a bar on stderr.

    Raises:
        OSError: when the cache cannot be written.
    """
    directory, others = as_path(directory), hosts.current()
    mark = json.dumps(fingerprint, sort_keys=True)
    cached = _read(directory, mark, len(source))
    if all(others.gather("looking for embeddings", cached is not None)):
        return cached
    parts = _Parts(directory, mark)
    if others.index == 0:
        parts.begin()
    others.barrier("the begin of an embedding")
    spans, rows = _spans(len(source), batch_size), -(-batch_size // multiple) * multiple
    own = spans[others.index :: others.count]
    total = sum(stop - start for start, stop in own)
    hidden = not progress or others.index != 0
    with progress_bar(total, description="embed", unit="image", shown=not hidden) as bar:
        for start, stop in own:
            if parts.has(start, stop):
                bar.update(stop - start)
                continue
            arrays = _embed_span(source, transforms, embed, range(start, stop, batch_size), rows, bar.update)
            parts.write(start, stop, arrays)
    others.barrier("the end of an embedding")
    if others.index == 0:
        parts.finish(spans)
    others.barrier("the embeddings are written")
    found = _read(directory, mark, len(source))
    if found is None:
        raise OSError(errno.EIO, "the embeddings that were written cannot be read", str(directory))
    return found


def _spans(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the records of the parts, which depend on no host or device: at most 64 batches, in some 256 parts."""
    rows = batch_size * min(max(count // (256 * batch_size), 1), 64)
    return [(start, min(start + rows, count)) for start in range(0, count, rows)]


def _embed_span(
    source: Source,
    transforms: tuple[Callable[[dict], dict], ...],
    embed: Callable[[dict[str, np.ndarray]], tuple[jax.Array, jax.Array]],
    span: range,
    rows: int,
    report: Callable[[int], Any],
) -> dict[str, np.ndarray]:
    """Return the embeddings of the records of a span, by batches of its step, each padded to `rows`."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for start in span:
        hosts.current().busy(f"embedding of record {start}")
        records = [_apply(source[i], transforms) for i in range(start, min(start + span.step, span.stop))]
        filled = len(records)
        records += [records[-1]] * (rows - filled)
        batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
        for name, z in zip(NAMES, embed(batch)):
            found[name].append(np.asarray(z, np.float32)[:filled])
        report(filled)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _apply(record: dict, transforms: tuple[Callable[[dict], dict], ...]) -> dict:
    for transform in transforms:
        record = transform(record)
    return record


def _read(directory: Path, mark: str, count: int) -> dict[str, np.ndarray] | None:
    try:
        if (directory / "fingerprint.json").read_text() != mark:
            logging.info("the embeddings in %s are of other data or another CLIP and are recomputed", directory)
            return None
        found = {name: _load(directory / f"{name}.npy") for name in NAMES}
        for name, array in found.items():
            if len(array) != count:
                raise ValueError(f"{name}.npy holds {len(array)} of {count} records")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logging.warning("the embeddings in %s cannot be read and are recomputed: %s", directory, error)
        return None


def _load(path: Any) -> np.ndarray:
    """Return an array, mapped into memory where its file can be."""
    if is_remote(path):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _remove(directory: Any) -> None:
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
    elif directory.exists():
        directory.rmtree()


class _Parts:
    """Embeddings of spans of records, written as they are computed, so that an interrupted embedding goes on.

    Args:
        directory: of the whole cache; the parts are in one of the same name and ".parts".
        mark: says what is embedded by what; parts with another one are removed.
    """

    def __init__(self, directory: Path, mark: str):
        self._directory, self._mark = directory, mark
        self._parts = directory.with_name(directory.name + ".parts")

    def begin(self) -> None:
        """Create the directory of the parts, without those of another embedding."""
        with _writing(self._directory):
            marked = self._parts / "fingerprint.json"
            if not marked.exists() or marked.read_text() != self._mark:
                _remove(self._parts)
                self._parts.mkdir(parents=True)
                marked.write_text(self._mark)

    def has(self, start: int, stop: int) -> bool:
        """Return whether the part of these records is there."""
        return self._path(start, stop).exists()

    def write(self, start: int, stop: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a part, whole or not at all."""
        data = io.BytesIO()
        np.save(data, np.stack([arrays[name] for name in NAMES]), allow_pickle=False)
        with _writing(self._directory):
            write_whole(self._path(start, stop), data.getvalue())

    def finish(self, spans: Sequence[tuple[int, int]]) -> None:
        """Put the parts together and remove them."""
        parts = [_load(self._path(*span)) for span in spans]
        if is_remote(self._directory):
            self._finish_remote(parts)
            return
        new = self._directory.with_name(self._directory.name + ".tmp")
        shutil.rmtree(new, ignore_errors=True)
        with _writing(self._directory), temporary_path(new):
            new.mkdir(parents=True)
            shape = (sum(part.shape[1] for part in parts), parts[0].shape[2])
            for i, name in enumerate(NAMES):
                with open(new / f"{name}.npy", "wb") as file:
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in parts:
                        part[i].tofile(file)
            (new / "fingerprint.json").write_text(self._mark)
            shutil.rmtree(self._directory, ignore_errors=True)
            os.replace(new, self._directory)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _finish_remote(self, parts: Sequence[np.ndarray]) -> None:
        """Put the parts together in a bucket, where the fingerprint, which is written last, says that all is there."""
        with _writing(self._directory):
            _remove(self._directory)
            self._directory.mkdir(parents=True, exist_ok=True)
            for i, name in enumerate(NAMES):
                data = io.BytesIO()
                np.save(data, np.concatenate([part[i] for part in parts]), allow_pickle=False)
                (self._directory / f"{name}.npy").write_bytes(data.getvalue())
            (self._directory / "fingerprint.json").write_text(self._mark)
            _remove(self._parts)

    def _path(self, start: int, stop: int) -> Any:
        # The end too: another batch size, after an interruption, cuts the records into other parts.
        return self._parts / f"{start}-{stop}.npy"


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # numpy reports a short write by the number of items, without an errno.
        reason = error.strerror or f"{error}; is the disk full?"
        raise OSError(error.errno or errno.EIO, f"could not write the embeddings: {reason}", str(directory)) from error
