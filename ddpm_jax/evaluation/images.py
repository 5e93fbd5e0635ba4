"""Sets of images that are measured, read batch by batch: of a data source, an .npz file, or sampled by a pipeline."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.source import read_record
from ddpm_jax.data.split import evenly_spaced
from ddpm_jax.data.transforms import CenterCrop, as_image
from ddpm_jax.evaluation.archives import RowReader, read_array, read_headers
from ddpm_jax.parallel.mesh import make_local_mesh
from ddpm_jax.pipelines.cascade import Cascade
from ddpm_jax.types import Source

IMAGES, LABELS = "arr_0", "arr_1"  # of .npz files, as guided-diffusion writes samples
THREADS = 8  # that decode


class ImageSet(Protocol):
    """Images by index, of which batches are read.

    Attributes:
        name: of where they are from, for messages.
        preprocessing: what was done to the images before features are computed, in words.
        batch_size: images at a time, unless the caller says otherwise.
        classes: "num_classes" and "names" (or None) of the labels; None where this is not known.
    """

    name: str
    preprocessing: str
    batch_size: int
    classes: Mapping[str, Any] | None

    def __len__(self) -> int: ...

    def read(self, begin: int, end: int) -> dict[str, Any]:
        """Return "image" uint8[n, H, W, 3] of images [begin, end), "caption" and "label", lists, where there are any.

        Raises:
            ValueError: if the images differ in size, or one is not an image; the message names it.
        """
        ...


def open_images(spec: str | os.PathLike, *, size: int | None = None, at_most: int | None = None) -> ImageSet:
    """Open the images of an .npz file ("arr_0", NHWC), or of any data source (`data.open_source`).

    Args:
        spec: a path or a name.
        size: to which images are cropped and resized (`data.transforms.CenterCrop`); None leaves them as they are.
        at_most: images to take, evenly spaced, because folders are often in the order of classes; None takes all.

    Raises:
        ValueError: if nothing is there that holds images.
        ReadError: if an .npz file is damaged.
    """
    text = os.fspath(spec)
    if text.endswith(".npz"):
        return NpzImages(text, size=size, at_most=at_most)
    return SourceImages(open_source(text), text, size=size, at_most=at_most)


class _Sized:
    """Brings images to one size, and refuses those that differ."""

    batch_size = 64
    classes: Mapping[str, Any] | None = None

    def __init__(self, name: str, size: int | None):
        self.name, self._crop, self._shape = name, None if size is None else CenterCrop(size), None
        self.preprocessing = "as stored" if size is None else f"central square, resized to {size} as ADM does"

    def _image(self, index: int, value: Any, key: Any = None) -> np.ndarray:
        what = f"image {index} of {self.name}" + (f" ({key})" if key is not None else "")
        try:
            image = as_image(value)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from None
        image = image if self._crop is None else self._crop({"image": image})["image"]
        if self._shape is None:
            self._shape = image.shape
        if image.shape != self._shape:
            raise ValueError(
                f"{what} has {image.shape[0]} x {image.shape[1]} pixels, and those before it {self._shape[0]} x "
                f"{self._shape[1]}; --size=N brings all to N x N pixels"
            )
        return image


class SourceImages(_Sized):
    """Images of a data source, decoded by several threads.

    Args:
        source: its records have "image".
        name: of it, for messages.
        size, at_most: see `open_images`.
    """

    def __init__(
        self, source: Source, name: str = "the source", *, size: int | None = None, at_most: int | None = None
    ):
        super().__init__(name, size)
        self._source, self._rows = source, evenly_spaced(len(source), at_most)
        names = getattr(source, "class_names", None)
        if names is not None:
            self.classes = {"num_classes": len(names), "names": tuple(names)}
        if len(self._rows):
            first = read_record(source, 0)
            if "image" not in first:
                raise ValueError(f"the records of {name} have no image, only {', '.join(first)}")
            self._image(0, first["image"], first.get("key"))  # the size that all others must have

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, begin: int, end: int) -> dict[str, Any]:
        """Return the images [begin, end); see `ImageSet`."""

        def one(index: int) -> dict[str, Any]:
            record = read_record(self._source, index)
            return {**record, "image": self._image(index, record["image"], record.get("key"))}

        with ThreadPoolExecutor(THREADS) as pool:
            records = list(pool.map(one, self._rows[begin:end].tolist()))
        found: dict[str, Any] = {"image": np.stack([record["image"] for record in records])}
        for name in ("caption", "label"):
            if all(name in record for record in records):
                found[name] = [record[name] for record in records]
        return found


class NpzImages(_Sized):
    """Images of an .npz file: "arr_0", uint8[N, H, W, C] or floats in [0, 1]; labels in "arr_1".

    Args:
        path: of the file.
        size, at_most: see `open_images`.
    """

    def __init__(self, path: str | os.PathLike, *, size: int | None = None, at_most: int | None = None):
        super().__init__(os.fspath(path), size)
        self._images = RowReader(path, IMAGES)
        if len(self._images.shape) != 4 or not 1 <= self._images.shape[-1] <= 4:
            raise ValueError(f"{path}: {IMAGES} must be images [N, H, W, C], got the shape {self._images.shape}")
        count = self._images.shape[0]
        labels = read_headers(path).get(LABELS)
        if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu"):
            raise ValueError(f"{path}: {LABELS} must be {count} integers, got {labels.dtype}{list(labels.shape)}")
        self._labels = None if labels is None else read_array(path, LABELS)
        self._rows = evenly_spaced(count, at_most)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, begin: int, end: int) -> dict[str, Any]:
        """Return the images [begin, end); see `ImageSet`."""
        rows = self._rows[begin:end]
        images = [self._image(row, self._images.read(row, row + 1)[0]) for row in rows.tolist()]
        found: dict[str, Any] = {"image": np.stack(images)}
        return found if self._labels is None else found | {"label": self._labels[rows].tolist()}


class SampledImages:
    """Images that a pipeline samples while they are read; image i depends on the seed, i and its conditions alone.

    Args:
        pipeline: `Cascade`, `UnCLIP` or another whose `generate` takes prompts.
        count: of the images.
        captions: prompts, which are repeated in their order; of a pipeline that takes them.
        labels: classes, which are repeated in their order; by default all in turn, if the pipeline has classes.
        seed: of all random numbers.
        batch_size: images at a time; the pipeline's by default.
        options: of `generate`.

    Raises:
        ValueError: if the pipeline needs captions and there are none.
    """

    def __init__(
        self,
        pipeline: Any,
        count: int,
        *,
        captions: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        **options: Any,
    ):
        self._pipeline, self._count, self._seed, self._options = pipeline, count, seed, options
        self.name, self.preprocessing = f"samples of a {type(pipeline).__name__}", f"as sampled, seed {seed}"
        self.batch_size = min(count, batch_size or getattr(pipeline, "batch_size", 16))
        self.classes = known = pipeline.labels if isinstance(pipeline, Cascade) else None
        if not isinstance(pipeline, Cascade) and not captions:
            raise ValueError(f"a {type(pipeline).__name__} needs captions; give a reference with captions")
        self._captions = captions or None
        self._labels = list(range(known["num_classes"])) if labels is None and known is not None else labels

    def __len__(self) -> int:
        return self._count

    def read(self, begin: int, end: int) -> dict[str, Any]:
        """Sample images [begin, end); see `ImageSet`."""
        rows = range(begin, end)
        taken = lambda values: None if values is None else [values[i % len(values)] for i in rows]  # noqa: E731
        captions, labels = taken(self._captions), taken(self._labels)
        given: dict[str, Any] = {"num_images": end - begin} if captions is None else {"prompts": captions}
        given |= {} if labels is None else {"labels": labels}
        mesh = make_local_mesh(self.batch_size)
        how = {"seed": self._seed, "start": begin, "batch_size": self.batch_size, "mesh": mesh} | self._options
        images = self._pipeline.generate(**given, **how)
        images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
        found: dict[str, Any] = {"image": images}
        return found | ({"caption": captions} if captions else {}) | ({"label": labels} if labels else {})


def class_labels(
    labels: Sequence[int] | np.ndarray,
    classes: Mapping[str, Any] | None,
    known: Mapping[str, Any],
    name: str,
    *,
    begin: int = 0,
    owner: str = "model",
) -> np.ndarray:
    """Return labels as those of a model, int32[n]: matched by the names of classes where both have names.

    Args:
        labels: of images of a set.
        classes: of the set, see `ImageSet`.
        known: "num_classes" and "names" (or None) of the model.
        name: of the set.
        begin: index of the first image.
        owner: what has the classes `known`, for messages.

    Raises:
        ValueError: if a label is none of the classes; the message names the image, by its number among those of the
            set. Also if the set has names, the model has none, and they differ in their number.
    """
    labels, count = np.asarray(labels), known["num_classes"]
    names, known_names = (None if each is None else each.get("names") for each in (classes, known))
    if names is not None and known_names is None and len(names) != count:
        raise ValueError(
            f"{name} has {len(names)} classes with names, and the {owner} {count} without names, so that they cannot "
            f"be matched; make the labels those of the {owner}, for instance as {LABELS} of an .npz file"
        )
    if names is None or known_names is None or tuple(names) == tuple(known_names):
        wrong = np.flatnonzero((labels < 0) | (labels >= count))
        if len(wrong):
            raise ValueError(
                f"label {labels[wrong[0]]} of measured image {begin + wrong[0]} of {name} must be in [0, {count}), "
                f"the classes of the {owner}"
            )
        return labels.astype(np.int32)
    once = {each: index for index, each in enumerate(known_names) if list(known_names).count(each) == 1}
    found = np.array([once.get(names[label], -1) for label in labels], np.int32)
    wrong = np.flatnonzero(found < 0)
    if len(wrong):
        raise ValueError(
            f"the class {names[labels[wrong[0]]]!r} of measured image {begin + wrong[0]} of {name} is not one of the "
            f"{count} classes of the {owner}, {', '.join(known_names[:8])}{', ...' if count > 8 else ''}"
        )
    return found


def share_of(count: int) -> range:
    """Return the indices of the images that this host reads, of `count` that all hosts share."""
    hosts, index = jax.process_count(), jax.process_index()
    return range(index * count // hosts, (index + 1) * count // hosts)
