"""Records from numpy arrays in memory."""

import math
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.source import RESERVED, Fingerprint, check_index
from ddpm_jax.data.transforms import as_images


class ArraySource:
    """Images in memory, with captions, labels and any other arrays.

    A record is {"image": uint8[H, W, 3]}, with "caption": str and "label": int32 where they are given, and an entry of
    each other array.

        source = ArraySource(images, labels=digits)

    Args:
        images: N images: an array [N, H, W, C] with 1 to 4 channels, or [N, H, W]; or a sequence of images of any
            sizes, arrays or of PIL. uint8 in [0, 255], floats in [0, 1], and the other forms of
            `ddpm_jax.data.transforms.as_images`. An array uint8[N, H, W, 3] is not copied.
        captions: N strings.
        labels: N integers >= 0, or N strings, which are numbered in their order.
        class_names: names of integer labels; labels are smaller than their number.
        arrays: of numbers, each with N entries; floats must be finite.

    Attributes:
        class_names: a tuple of str, or None.

    Raises:
        ValueError: if an argument is wrong; of images and arrays, the message names the index.
    """

    def __init__(
        self,
        images: Any,
        captions: Sequence[str] | None = None,
        labels: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        **arrays: Any,
    ):
        self._images = _checked_images(images)
        count = len(self._images)
        self._captions = None if captions is None else _checked_captions(captions, count)
        self._labels, self.class_names = _checked_labels(labels, class_names, count)
        self._arrays = {name: _checked_array(name, array, count) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Return one record; raise IndexError if index is outside of [0, len)."""
        index = check_index(index, len(self))
        record: dict[str, Any] = {"image": self._images[index]}
        if self._captions is not None:
            record["caption"] = self._captions[index]
        if self._labels is not None:
            record["label"] = self._labels[index]
        return record | {name: array[index] for name, array in self._arrays.items()}

    def fingerprint(self) -> str:
        """Return a hash of all values, dtypes and shapes."""
        mark = Fingerprint("arrays 1")
        mark.add(self.class_names, self._captions, len(self))
        for image in self._images:
            mark.add_array(image)
        mark.add(self._labels is not None)
        if self._labels is not None:
            mark.add_array(self._labels)
        for name in sorted(self._arrays):
            mark.add(name)
            mark.add_array(self._arrays[name])
        return mark.hexdigest()

    def __repr__(self) -> str:
        return f"ArraySource({len(self)} images)"


def _checked_images(images: Any) -> Any:
    if hasattr(images, "dtype") and hasattr(images, "shape"):
        shape = tuple(images.shape)
        if len(shape) == 3 and shape[-1] > 4:
            images = images.reshape(*shape, 1)
        elif len(shape) != 4:
            raise ValueError(f"images must be an array [N, H, W, C] or [N, H, W], got shape {shape}")
        array = images if isinstance(images, np.ndarray) else None
        if array is not None and array.dtype == np.uint8 and shape[-1] == 3 and math.prod(shape):
            return array
    return as_images(images)


def _checked_captions(captions: Sequence[str], count: int) -> list[str]:
    if isinstance(captions, str):
        raise ValueError(f"captions must be {count} strings, got one")
    captions = list(captions)
    if len(captions) != count:
        raise ValueError(f"captions must be {count}, as many as images, got {len(captions)}")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"captions[{number}] must be a string, got {caption!r}")
    return [str(caption) for caption in captions]


def _checked_labels(
    labels: Any, class_names: Sequence[str] | None, count: int
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    if labels is None:
        if class_names is not None:
            raise ValueError("class_names needs labels")
        return None, None
    values = np.asarray(labels)
    if values.shape != (count,):
        raise ValueError(f"labels must have the shape ({count},), one for each image, got {values.shape}")
    if values.dtype.kind in "UT":
        if class_names is None:
            class_names = sorted({str(value) for value in values})
        numbers = {name: number for number, name in enumerate(class_names)}
        unknown = next((str(value) for value in values if str(value) not in numbers), None)
        if unknown is not None:
            raise ValueError(f"labels has {unknown!r}, which is not one of class_names")
        values = np.array([numbers[str(value)] for value in values])
    if values.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers or strings, got {values.dtype}")
    most = 2**31 if class_names is None else len(class_names)
    wrong = np.flatnonzero((values < 0) | (values >= most))
    if wrong.size:
        raise ValueError(f"labels[{wrong[0]}] must be in [0, {most}), got {values[wrong[0]]}")
    return values.astype(np.int32), None if class_names is None else tuple(class_names)


def _checked_array(name: str, array: Any, count: int) -> np.ndarray:
    if name in RESERVED:
        plural = f"; {name}s are the argument {name}s" if name in ("caption", "label") else ""
        raise ValueError(f"{name} must not be the name of another array{plural}")
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of numbers, got {array.dtype}")
    if array.ndim < 1 or len(array) != count:
        raise ValueError(f"{name} must have {count} entries, as many as images, got the shape {array.shape}")
    if array.dtype.kind == "f":
        for number, entry in enumerate(array):
            if not np.isfinite(entry).all():
                raise ValueError(f"{name}[{number}] has values that are not finite (NaN or infinity)")
    return array
