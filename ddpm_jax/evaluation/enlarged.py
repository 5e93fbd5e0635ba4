"""Images that an upsampler alone enlarges, as a set that can be measured."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation.conditions import averages, check_size, labels_of
from ddpm_jax.evaluation.images import ImageSet
from ddpm_jax.parallel.mesh import make_local_mesh
from ddpm_jax.pipelines.request import check_steps, image_keys, in_batches, on_mesh
from ddpm_jax.pipelines.stages import finite
from ddpm_jax.pipelines.upsampling import default_sampling, noise_levels, upsample
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import to_float, to_uint8

NAME = "upsampler"


@functools.partial(jax.jit, static_argnames=("level", "null"))
def _enlarge(
    model: Model,
    sampling: Sampling,
    seed: jax.Array,
    level: float | None,
    null: int | None,
    index: jax.Array,
    images: jax.Array,
    labels: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array]]:
    has_null = labels is not None and null is not None
    how = {
        "noise_level": level,
        "conditions": {} if labels is None else {"y": labels},
        "null": {"y": jnp.full_like(labels, null)} if has_null else None,
    }
    found = upsample(model, sampling, to_float(images), image_keys(seed, index), **how)
    return to_uint8(found), (finite(found),)


class EnlargedImages:
    """Enlargements of averaged copies of images, made while they are read.

    Image i depends only on the seed, i and its original.

    Args:
        model: an upsampler (`is_upsampler`).
        originals: images of the size that it returns, with labels if it is class-conditional.
        seed: of all random numbers.
        batch_size: images at a time; 16 by default.
        options: of `Sampling`, and upsampler_noise_level.

    Raises:
        ValueError: if an option does not fit, or the model is conditioned on captions.
    """

    def __init__(
        self, model: Model, originals: ImageSet, *, seed: int = 0, batch_size: int | None = None, **options: Any
    ):
        odd = set(model.metadata.get("conditions", ())) - {"low_resolution", "labels"}
        if odd:
            raise ValueError(f"the upsampler is conditioned on {min(odd)}; measure the pipeline that it is a part of")
        levels, options = noise_levels({NAME: model}, {}, options)
        unknown = sorted(set(options) - {field.name for field in dataclasses.fields(Sampling)})
        if unknown:
            raise ValueError(f"{unknown[0]} is no option of an upsampler alone; its options have no prefix")
        self._level = levels.get(NAME)
        self._sampling = default_sampling(model).with_options(**options)
        check_steps("steps", self._sampling, model.diffusion)
        self._originals, self._seed = originals, seed
        low = model.metadata["low_resolution"]["size"]
        self._null = model.metadata["labels"].get("null") if "labels" in model.metadata.get("conditions", ()) else None
        self.batch_size = min(max(len(originals), 1), batch_size or 16)
        self._model, self._place, self._unit = on_mesh(make_local_mesh(self.batch_size), model)
        self.classes = originals.classes
        self.name = f"{originals.name}, enlarged from {low} x {low}"
        self.preprocessing = f"{originals.preprocessing}, averages enlarged with seed {seed}"

    def __len__(self) -> int:
        return len(self._originals)

    def read(self, begin: int, end: int) -> dict[str, Any]:
        """Enlarge images [begin, end); see `images.ImageSet`."""
        batch = self._originals.read(begin, end)
        check_size(self._model, batch, self._originals)
        low = averages(self._model, batch["image"])
        labels = labels_of(self._model, batch, self._originals, begin)
        how = (self._sampling, np.uint32(self._seed), self._level, self._null)
        images = in_batches(
            functools.partial(_enlarge, self._model, *how),
            (np.arange(begin, end, dtype=np.int32), low, labels),
            batch_size=self.batch_size,
            stages=(NAME,),
            name="images",
            place=self._place,
            unit=self._unit,
        )
        return batch | {"image": images}
