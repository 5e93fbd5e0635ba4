"""What a model is given beside the images that it is measured on: their classes, and averages for an upsampler."""

from typing import Any

import numpy as np

from ddpm_jax.data.transforms import AverageDown
from ddpm_jax.evaluation.images import ImageSet, class_labels
from ddpm_jax.pipelines.upsampling import image_size_of
from ddpm_jax.storage.model_directory import Model


def is_upsampler(model: Any) -> bool:
    """Return whether this is one model that enlarges images of a size that its metadata has."""
    return isinstance(model, Model) and "size" in model.metadata.get("low_resolution", {})


def averages(model: Model, images: np.ndarray) -> np.ndarray:
    """Return what an upsampler enlarges, uint8[N, h, w, C]: averages of images of the size that it returns."""
    shrink = AverageDown(image_size_of(model) // model.metadata["low_resolution"]["size"])
    return np.stack([shrink({"image": image})["image"] for image in images])


def labels_of(model: Model, batch: dict[str, Any], images: ImageSet, begin: int) -> np.ndarray | None:
    """Return the class of each image of a batch, int32[N]; the null class where there are no labels.

    Args:
        model: whose classes are meant; None is returned if it is not class-conditional.
        batch: of `images.read`, from image `begin`.

    Raises:
        ValueError: if a label is no class of the model, or there are none and the model has no null class.
    """
    if "labels" not in model.metadata.get("conditions", ()):
        return None
    known = model.metadata["labels"]
    if "label" in batch:
        return class_labels(batch["label"], images.classes, known, images.name, begin=begin)
    if known.get("null") is None:
        raise ValueError(f"the model is class-conditional without a null class, and {images.name} has no labels")
    return np.full(len(batch["image"]), known["null"], np.int32)


def check_size(model: Model, batch: dict[str, Any], images: ImageSet) -> None:
    """Raise ValueError if images of a batch are not of the size that a model returns."""
    size, (height, width) = image_size_of(model), batch["image"].shape[1:3]
    if (height, width) != (size, size):
        raise ValueError(
            f"the model is of images of {size} x {size} pixels, and {images.name} has {height} x {width}; "
            f"--size={size} brings them there"
        )
