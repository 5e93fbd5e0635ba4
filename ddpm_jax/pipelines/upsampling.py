"""Upsamplers, any number of them in a row, which several pipelines end with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.samplers import RecordedNoise
from ddpm_jax.diffusion.samplers.noise import per_example_normal, transition_keys
from ddpm_jax.diffusion.sampling import Sampling, sample_with, sampling_from
from ddpm_jax.diffusion.tiles import tiled_denoiser
from ddpm_jax.pipelines.enlarging import Enlarging, split_rows, stops_of, tile_unit
from ddpm_jax.pipelines.request import as_float
from ddpm_jax.pipelines.stages import finite
from ddpm_jax.storage.metadata import thaw
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import Denoiser, Step

IMAGES = Sampling("ancestral", 250, threshold=1.0)  # the default: estimates of x0 are clipped to the range of images
_NOISE = 2**20  # of the keys of an example: beyond the sampler's transitions


def default_sampling(model: Model) -> Sampling:
    """Return the default sampling options of a stage.

    Those of its metadata, for a converted checkpoint; else `IMAGES`, or all timesteps if there are fewer than 250.
    """
    if "sampling" in model.metadata:
        return sampling_from(thaw(model.metadata["sampling"]))
    return IMAGES.with_options(steps=min(IMAGES.steps, model.diffusion.num_steps))


def image_size_of(model: Model) -> int:
    """Return the height and width of the images that a model samples.

    Raises:
        ValueError: if its metadata does not say it.
    """
    if "image_size" not in model.metadata:
        raise ValueError(f"the metadata of a {type(model.network).__name__} lacks 'image_size'")
    return model.metadata["image_size"]


def default_names(count: int) -> tuple[str, ...]:
    """Return the names of upsamplers that were given none."""
    return ("upsampler",) * count if count < 2 else tuple(f"upsampler_{n + 1}" for n in range(count))


def check_upsamplers(base: Model, upsamplers: Sequence[Model], names: Sequence[str], first: str) -> None:
    """Check that every upsampler enlarges what the stage before it returns.

    Args:
        base: the stage before the first.
        upsamplers: smallest images first.
        names: one for each.
        first: the name of `base`.

    Raises:
        ValueError: if there is not one name for each, or the sizes or channels do not fit.
    """
    if len(names) != len(upsamplers) or len(set(names)) != len(names):
        raise ValueError(f"names={tuple(names)} must be one for each of the {len(upsamplers)} upsamplers")
    before, name_before = base, first
    for name, model in zip(names, upsamplers):
        size, low = image_size_of(model), image_size_of(before)
        wanted = model.metadata.get("low_resolution", {}).get("size", low)
        if wanted != low:
            raise ValueError(f"{name} enlarges images of size {wanted}, and {name_before} returns size {low}")
        if size == low:
            raise ValueError(f"{name} is of size {size} as {name_before} is, and does not enlarge its images")
        if size % low:
            raise ValueError(f"{name} returns images of size {size}, no multiple of size {low} of {name_before}")
        before, name_before = model, name


def noise_levels(
    models: Mapping[str, Model], defaults: Mapping[str, float], options: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the levels of noise on the images that upsamplers enlarge, and the options that are left.

    Args:
        models: the upsamplers by name.
        defaults: levels by name; those in the metadata, or 0, for what is absent.
        options: of a request; NAME_noise_level are taken.

    Raises:
        ValueError: if a level is larger than any that the upsampler was trained with.
    """
    levels, options = {}, dict(options)
    for name, model in models.items():
        low, option = model.metadata.get("low_resolution", {}), f"{name}_noise_level"
        given = options.pop(option, None)
        level = defaults.get(name, low.get("sampling_noise_level", 0.0)) if given is None else given
        level = as_float(option, level, least=0.0, most=1.0)
        trained = low.get("noise")
        if trained is not None and level > trained:
            raise ValueError(f"{option}={level} must be at most {trained}, the largest level {name} was trained with")
        if level or low.get("noise_level_input", False):
            levels[name] = level
    return levels, options


def denoiser(model: Model, **inputs: Any) -> Denoiser:
    """Close a network over its conditions; improved diffusion's are given timesteps times a scale."""
    scale = model.metadata.get("timestep_scale", 1.0)
    return lambda xt, t: model.apply_traced(xt, t if scale == 1.0 else scale * t, **inputs)


def upsample(
    model: Model,
    sampling: Sampling,
    images: jax.Array,
    keys: jax.Array | RecordedNoise,
    *,
    noise_level: float | jax.Array | None = None,
    conditions: Mapping[str, Any] | None = None,
    null: Mapping[str, Any] | None = None,
    enlarging: Enlarging = Enlarging(),  # noqa: B008 (it is frozen)
    stop: int | None = None,
    wrap_step: Callable[[Step], Step] | None = None,
) -> jax.Array:
    """Enlarge images (SR3; cascaded diffusion, Ho et al. 2022).

    Args:
        model: an upsampler; its metadata has "diffusion" and "image_size", and "low_resolution" if it was trained with
            noise on its low-resolution images.
        sampling: how.
        images: float32[B, h, w, C] in [-1, 1].
        keys: [B].
        noise_level: standard deviation of the noise that is added to the images, in [0, 1]; None adds none. With
            `enlarging.truncated` it is in the images already.
        conditions: other inputs of the network by name.
        null: the same inputs for the unconditional branch of guidance, if it has one.
        enlarging: tiles, and whether the images are noisy.
        stop: steps of the sampler after which its noisy image is returned; None makes all.
        wrap_step: of `sample_with`.

    Returns:
        float32[B, R, R, C].
    """
    low, inputs = model.metadata.get("low_resolution", {}), {"low_res": images, **(conditions or {})}
    if low.get("noise_level_input", False):
        inputs["noise_level"] = jnp.full(len(images), 0.0 if noise_level is None else noise_level, jnp.float32)
    if noise_level is not None and not enlarging.truncated:
        # As in training (`training.tasks.conditions.LowResolution`).
        clean = jnp.sqrt(1.0 - jnp.square(noise_level)) * images if low.get("variance_preserving", False) else images
        inputs["low_res"] = clean + noise_level * per_example_normal(transition_keys(keys, _NOISE), images)
    size = image_size_of(model)
    return sample_with(
        sampling,
        model.diffusion,
        _denoiser_of_size(model, enlarging, inputs),
        keys,
        (size, size, images.shape[-1]),
        null=None if null is None else _denoiser_of_size(model, enlarging, inputs | dict(null)),
        moments=model.moments,
        stop=stop,
        wrap_step=wrap_step,
    )


def _denoiser_of_size(model: Model, enlarging: Enlarging, inputs: Mapping[str, Any]) -> Denoiser:
    """Return the network with its inputs, on whole images, on rows that devices share, or on tiles."""
    if enlarging.tile is None:
        whole = denoiser(model, **inputs)
        return lambda xt, t: split_rows(whole(split_rows(xt), t))
    others, overlap = dict(inputs), enlarging.overlap
    low_res = others.pop("low_res")
    unit = tile_unit(model.network, image_size_of(model) // low_res.shape[1])
    overlap = enlarging.tile // (4 * unit) * unit if overlap is None else overlap
    network = lambda xt, t, low_res: denoiser(model, low_res=low_res, **others)(xt, t)  # noqa: E731
    return tiled_denoiser(network, {"low_res": low_res}, tile=enlarging.tile, overlap=overlap, unit=unit)


def upsample_all(
    pipeline: Any,
    images: jax.Array,
    keys: jax.Array,
    first: int,
    inputs: Callable[[Model], tuple[Mapping[str, Any], Mapping[str, Any] | None]] = lambda model: ({}, None),
    wraps: Sequence[Callable[[Step], Step] | None] = (),
) -> tuple[jax.Array, list[jax.Array]]:
    """Run the upsamplers of a pipeline one after the other, each until the next one says.

    Args:
        pipeline: checked, with upsamplers, names, sampling, noise_levels and enlarging.
        images: of the stage before, stopped at the first of `stops_of(pipeline.enlarging)`.
        keys: [B], of the whole request.
        first: number of the first upsampler among the stages.
        inputs: model -> conditions and null conditions, as in `upsample`.
        wraps: `wrap_step` of each upsampler; none by default.

    Returns:
        The images, and bool[B] for each upsampler: whether all that it returned is finite.
    """
    enlarging, stops, finite_of = dict(pipeline.enlarging), stops_of(pipeline.enlarging), []
    for number, (name, model) in enumerate(zip(pipeline.names, pipeline.upsamplers)):
        conditions, null = inputs(model)
        images = upsample(
            model,
            pipeline.sampling[name],
            images,
            transition_keys(keys, first + number),
            noise_level=pipeline.noise_levels.get(name),
            conditions=conditions,
            null=null,
            enlarging=enlarging[name],
            stop=stops[number + 1],
            wrap_step=wraps[number] if wraps else None,
        )
        finite_of.append(finite(images))
    return images, finite_of
