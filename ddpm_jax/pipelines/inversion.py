"""Images as bipartite latents, by DDIM inversion of the decoder, and latents as images (DALL-E 2, section 3).

An image depends only on its own latent, captions, the seed and the index of its noise, whatever the batch.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data.transforms import resize_center_crop
from ddpm_jax.diffusion.samplers import invert, repaint_step
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.diffusion.sampling import Sampling, as_steps
from ddpm_jax.diffusion.schedules import respaced_timesteps
from ddpm_jax.errors import one_for_each
from ddpm_jax.pipelines.decoding import Decoding, Words, decoding_of
from ddpm_jax.pipelines.latents import BipartiteLatent
from ddpm_jax.pipelines.request import (
    MOST_IMAGES,
    Steps,
    as_int,
    as_prompts,
    as_seed,
    call_fitting,
    image_indices,
    image_keys,
    in_batches,
    on_mesh,
)
from ddpm_jax.pipelines.stages import finite
from ddpm_jax.types import to_float, to_uint8

STEPS = 250  # of inversion and of its way back, or all timesteps if there are fewer
LEAST_SIGMA = (
    0.05  # of the first timestep: below it, what the network does not reproduce of an image outgrows the noise
)


def embed_images(
    pipeline: Any,
    images: Any,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    report: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return the CLIP embeddings of images, float32[N, D], as the decoder takes them.

    images: as `data.transforms.as_images` takes them, of any size; the other arguments: as for `encode`.
    """
    decoding = decoding_of(pipeline)
    pixels = decoding.pixels(images)
    batch_size = decoding.batch_size if batch_size is None else batch_size
    decoding, place, unit = on_mesh(mesh, decoding.configured(None, {}))
    run, how = functools.partial(call_fitting, _embed, decoding), {"place": place, "unit": unit, "report": report}
    return in_batches(run, (pixels,), batch_size=batch_size, stages=("CLIP model",), name="images", **how)


def embed_texts(pipeline: Any, captions: Iterable[str]) -> np.ndarray:
    """Return the CLIP embeddings of captions, unit vectors float32[N, D]."""
    decoding = decoding_of(pipeline)
    words = decoding.words(captions)
    decoding, _, _ = on_mesh(None, decoding.configured(None, {}))
    return np.asarray(call_fitting(_embed_text, decoding, words))


def encode(
    pipeline: Any,
    images: Any,
    *,
    prompts: str | Iterable[str] | None = None,
    steps: Steps | None = None,
    iterations: int = 1,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    report: Callable[[int], None] | None = None,
) -> BipartiteLatent:
    """Find the bipartite latents (z_image, x_T) of images by DDIM inversion (DALL-E 2, section 3).

    z_image is the CLIP embedding of an image. x_T is found by inverting the decoder's DDIM, conditioned on z_image and
    without guidance, for the image at the size of the decoder. Upsamplers have no part in it.

    Args:
        pipeline: an `UnCLIP`, or a `Karlo` with an image encoder.
        images: N images as `data.transforms.as_images` takes them, of any size and mode; they are resized and cropped
            as CLIP's are (`data.transforms.resize_center_crop`).
        prompts: captions that the decoder is given too, one for all or one for each; none by default. `decode` needs
            the same.
        steps: of the inversion, at least 2, in any form of `Sampling.steps`; `inversion_steps` by default.
        iterations: network calls a step; more solve each step of the inversion more exactly, see `samplers.invert`.
        batch_size: images at a time; that of the pipeline by default.
        mesh: devices of this process that share each batch, with an axis "data"; one device by default.
        report: called with the number of images each time some are done.

    Returns:
        Latents of N images, which `decode` turns back.

    Raises:
        ValueError: if an argument does not fit.
        NotFiniteError: if a network returned NaN or infinity.
    """
    decoding = decoding_of(pipeline)
    iterations = as_int("iterations", iterations, least=1, most=100)
    pixels, small = decoding.pixels(images), resize_center_crop(images, decoding.image_size)
    count = len(small)
    steps = as_steps("steps", _spaced(decoding, STEPS) if steps is None else steps)
    batch_size = decoding.batch_size if batch_size is None else batch_size
    words, negative = decoding.words(as_captions("prompts", prompts, count)), decoding.negative(None, count)
    decoding.check_kept(None, words)
    configured = decoding.configured(Sampling("ddim", steps), {})
    if len(configured.timesteps) < 2:
        raise ValueError(f"steps={steps!r} is one timestep, and inversion walks from a first to a last one; take more")
    decoding, place, unit = on_mesh(mesh, configured)

    def run(pixels: Any, small: Any, *words: Any) -> Any:
        split = Words(*words[:3]), None if words[3] is None else Words(*words[3:])
        return call_fitting(_encode, decoding, pixels, small, *split, iterations=iterations)

    z_image, xt = in_batches(
        run,
        (pixels, small, *words, *(negative or (None,) * 3)),
        batch_size=batch_size,
        stages=("CLIP model", "decoder"),
        report=report,
        name="images",
        place=place,
        unit=unit,
    )
    return BipartiteLatent(z_image, xt, steps)


def inversion_steps(pipeline: Any, count: int = STEPS) -> tuple[int, ...]:
    """Return timesteps for `encode`: evenly spaced, from the first whose noise is at least 0.05 to the last.

    Args:
        pipeline: as for `encode`.
        count: of the timesteps; all from there on if there are fewer.
    """
    return _spaced(decoding_of(pipeline), as_int("count", count, least=2))


def decode(
    pipeline: Any,
    latent: BipartiteLatent,
    *,
    prompts: str | Iterable[str] | None = None,
    negative_prompts: str | Iterable[str] | None = None,
    seed: int = 0,
    start: int = 0,
    noise_index: Sequence[int] | None = None,
    low_res: bool = False,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    report: Callable[[int], None] | None = None,
    **options: Any,
) -> np.ndarray:
    """Make images of bipartite latents.

    From x_T the decoder is sampled by DDIM with eta = 0, the latent's steps, and no guidance and threshold, which
    inverts `encode`; options change each of these. Without x_T it is sampled as the pipeline's own options say.

    Args:
        pipeline: an `UnCLIP`, or a `Karlo` with an image encoder.
        latent: of N images.
        prompts: captions that the decoder is given beside z_image, one for all or one for each; none by default.
        negative_prompts: captions that guidance leads away from, one for all or one for each.
        seed: seed of all random numbers, in [0, 2**32): of the upsamplers, of eta, and of x_T where there is none.
        start: index of the noise of the first image.
        noise_index: index of the noise of each image, in place of start, start + 1, ...; images with the same index
            have the same noise.
        low_res: True returns the decoder's images, not upsampled.
        batch_size: as for `encode`.
        mesh: as for `encode`.
        report: as for `encode`.
        options: the options of the stages, as those of `generate`: steps, eta, scale, upsampler_steps, ...

    Returns:
        uint8[N, H, H, 3].

    Raises:
        ValueError: if an argument does not fit, or the steps begin at another timestep than those of the latent.
        NotFiniteError: if a network returned NaN or infinity.
    """
    decoding = decoding_of(pipeline)
    latent = checked_latent(decoding, latent)
    own = None if latent.x_T is None else Sampling("ddim", latent.steps)
    count = len(latent)
    negative = decoding.negative(negative_prompts, count)
    configured = decoding.configured(own, options, negative)
    _check_first(decoding, configured, latent)
    return decoded(
        configured,
        (latent.z_image, None, latent.x_T),
        decoding.words(as_captions("prompts", prompts, count)),
        negative,
        seed=seed,
        index=image_indices(start, count) if noise_index is None else _indices(noise_index, count),
        low_res=low_res,
        batch_size=decoding.batch_size if batch_size is None else batch_size,
        mesh=mesh,
        report=report,
    )


def check_options(
    pipeline: Any, inverted: bool, *, negative_prompts: Sequence[str] | None = None, **options: Any
) -> bool:
    """Raise ValueError for options of the stages that `decode` would refuse, with x_T if `inverted` is true.

    Returns:
        Whether the decoder is guided.
    """
    decoding = decoding_of(pipeline)
    own = Sampling("ddim", min(STEPS, decoding.diffusion.num_steps)) if inverted else None
    negative = None if not negative_prompts else decoding.negative(negative_prompts, len(negative_prompts))
    return decoding.configured(own, options, negative).sampling.scale is not None


def decoded(
    decoding: Decoding,
    given: tuple[Any, Any, Any],
    words: Words,
    negative: Words | None,
    *,
    seed: Any,
    index: np.ndarray,
    low_res: bool,
    batch_size: Any,
    mesh: Mesh | None = None,
    report: Callable[[int], None] | None = None,
    known: Sequence[np.ndarray] = (),
    resample: int = 1,
    name: str = "latent",
) -> np.ndarray:
    """Run the compiled program of all stages from the embedding on.

    Args:
        decoding: configured.
        given: z_image, None for the prior's; bool[N], whether it is kept, None keeps all; and x_T or None.
        words: captions.
        negative: captions that guidance leads away from, or None.
        seed: as for `decode`.
        index: int32[N], index of the noise of each image.
        low_res: as for `decode`.
        batch_size: images at a time.
        mesh: as for `decode`.
        report: as for `decode`.
        known: for each stage of images uint8[N, R, R, 3] and bool[N, R, R, 1], True where the image is known; () if
            nothing is known.
        resample: of `samplers.repaint_step`, for the decoder.
        name: of the argument that the images are from.

    Returns:
        uint8[N, H, H, 3].
    """
    decoding.check_kept(given[1], words)
    decoding, place, unit = on_mesh(mesh, decoding)
    static = {"low_res": bool(low_res), "resample": resample}

    def run(index: Any, z_image: Any, keep: Any, xt: Any, *rest: Any) -> Any:
        words, negative = Words(*rest[:3]), None if rest[3] is None else Words(*rest[3:6])
        arguments = (np.uint32(as_seed(seed)), index, z_image, keep, xt, words, negative, rest[6:])
        return call_fitting(_decode, decoding, *arguments, **static)

    return in_batches(
        run,
        (index, *given, *words, *(negative or (None,) * 3), *known),
        batch_size=batch_size,
        stages=decoding.stages[:3] if low_res else decoding.stages,
        report=report,
        name=name,
        place=place,
        unit=unit,
    )


# ---- Arguments -------------------------------------------------------------------------------------------------------


def _spaced(decoding: Decoding, count: int) -> tuple[int, ...]:
    sigma = np.asarray(decoding.diffusion.process.sigma)
    first, last = int(np.argmax(sigma >= LEAST_SIGMA)), len(sigma) - 1
    return tuple(np.linspace(first, last, min(count, last - first + 1)).round().astype(int).tolist())


def as_captions(name: str, captions: Any, count: int) -> list[str]:
    """Return one caption for each image; the empty one for None."""
    if captions is None or isinstance(captions, str):
        return [captions or ""] * count
    found = as_prompts(captions)
    if len(found) not in (1, count):
        raise ValueError(f"{name} must be {one_for_each(count, 'caption', 'image')}, got {len(found)}")
    return found * (count if len(found) == 1 else 1)


def _check_first(decoding: Decoding, configured: Decoding, latent: BipartiteLatent) -> None:
    """Raise ValueError if sampling does not begin at the timestep of the noise of a latent."""
    if latent.x_T is None:
        return
    first, found = configured.timesteps[-1], respaced_timesteps(decoding.diffusion.num_steps, latent.steps)[-1]
    if first != found:
        raise ValueError(
            f"steps={configured.sampling.steps!r} begin at timestep {first}, and the x_T of this latent is of timestep "
            f"{found}; take the steps of encode, {latent.steps!r}"
        )


def _indices(values: Any, count: int) -> np.ndarray:
    found = np.asarray(values)
    if found.shape != (count,) or found.dtype.kind not in "iu" or found.min() < 0 or found.max() > MOST_IMAGES:
        raise ValueError(f"noise_index must be {count} integers in [0, 2**31), one for each image")
    return found.astype(np.int32)


def checked_latent(decoding: Decoding, latent: Any, name: str = "latent") -> BipartiteLatent:
    """Return a latent as arrays of numpy, if it is one of this pipeline; name: of the argument."""
    if not isinstance(latent, BipartiteLatent):
        raise ValueError(f"{name} must be a BipartiteLatent, as encode returns it, got a {type(latent).__name__}")
    z, size = np.asarray(latent.z_image, np.float32), decoding.image_size
    if z.ndim != 2 or not len(z) or z.shape[1] != decoding.embed_dim:
        raise ValueError(f"z_image must be float32[N, {decoding.embed_dim}] for this pipeline, got shape {z.shape}")
    _check_known(f"{name}.z_image", z)
    if latent.x_T is None:
        return BipartiteLatent(z)
    xt, wanted = np.asarray(latent.x_T, np.float32), (len(z), size, size, decoding.channels)
    if xt.shape != wanted:
        raise ValueError(f"x_T must be float32{list(wanted)} for this pipeline, got shape {xt.shape}")
    _check_known(f"{name}.x_T", xt)
    if latent.steps is None:
        raise ValueError("a latent with x_T needs the steps with which it was found")
    return BipartiteLatent(z, xt, latent.steps)


def _check_known(name: str, values: np.ndarray) -> None:
    if not (known := np.isfinite(values).reshape(len(values), -1).all(1)).all():
        raise ValueError(f"{name}[{int(np.argmin(known))}] holds NaN or infinity")


# ---- Compiled programs -----------------------------------------------------------------------------------------------


@jax.jit
def _embed(decoding: Decoding, pixels: jax.Array) -> tuple[jax.Array, tuple[jax.Array]]:
    z = decoding.embed(pixels)
    return z, (finite(z),)


@jax.jit
def _embed_text(decoding: Decoding, words: Words) -> jax.Array:
    return decoding.embed_text(words)


@functools.partial(jax.jit, static_argnames="iterations")
def _encode(
    decoding: Decoding, pixels: jax.Array, small: jax.Array, words: Words, negative: Words | None, *, iterations: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Return (z_image, x_T) of one batch, and whether all of each is finite."""
    z_image, diffusion = decoding.embed(pixels), decoding.diffusion
    denoise, _ = decoding.denoisers(z_image, jnp.ones(len(small), bool), words, negative)
    xt = invert(
        decoding.sampling.process(diffusion),
        denoise,
        to_float(small),
        prediction=diffusion.prediction,
        variance=diffusion.variance,
        iterations=iterations,
    )
    return (z_image, xt), (finite(z_image), finite(xt))


@functools.partial(jax.jit, static_argnames=("low_res", "resample"))
def _decode(
    decoding: Decoding,
    seed: jax.Array,
    index: jax.Array,
    z_image: jax.Array | None,
    keep_image: jax.Array | None,
    xt: jax.Array | None,
    words: Words,
    negative: Words | None,
    known: Sequence[jax.Array],
    *,
    low_res: bool,
    resample: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the images of one batch, and for each of `Decoding.stages` whether all that it returned is finite."""
    keys, everything = image_keys(seed, index), jnp.ones(len(index), bool)
    finite_of = [finite(decoding.embed_text(words)) | ~words.keep, everything]
    if z_image is None:
        z_image = decoding.sample_embedding(words, negative, transition_keys(keys, 0))
        finite_of[1] = finite(z_image)
    wraps: list[Any] = [None] * len(decoding.sizes)
    for stage, (image, mask) in enumerate(zip(known[::2], known[1::2])):
        repaint = functools.partial(repaint_step, to_float(image), mask, resample=resample if stage == 0 else 1)
        wraps[stage] = lambda step, repaint=repaint: repaint(step=step)
    keep_image = everything if keep_image is None else keep_image
    own = transition_keys(keys, 1)
    stop = None if low_res else decoding.stops[0]
    images = decoding.decode(z_image, keep_image, words, negative, own, x_init=xt, stop=stop, wrap_step=wraps[0])
    finite_of.append(finite(images))
    if not low_res:
        images, others = decoding.enlarge(images, keys, wraps[1:])
        finite_of += others
    return to_uint8(images), tuple(finite_of)
