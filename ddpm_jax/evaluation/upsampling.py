"""How well upsamplers restore held-out images, by the noise level of conditioning augmentation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_count
from ddpm_jax.data.degradation import DegradeBSR
from ddpm_jax.data.transforms import AverageDown, CenterCrop
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation.images import SourceImages, class_labels
from ddpm_jax.extras import needs_extra
from ddpm_jax.pipelines.enlarging import Enlarging
from ddpm_jax.pipelines.request import batches
from ddpm_jax.pipelines.upsampling import image_size_of, upsample
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import Source, to_float, to_uint8

DEGRADATIONS = ("none", "blur", "bsr")
_ROUNDING = 1 / 12  # mean squared error of rounding to whole grey levels


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each image in dB, float64[N].

    An error below that of rounding to 8 bits counts as that, 58.9 dB. images, references: uint8[N, H, W, C].
    """
    if images.shape != references.shape or images.dtype != np.uint8 or references.dtype != np.uint8:
        raise ValueError(
            f"images and references must be uint8 of one shape, got {images.dtype}{list(images.shape)} and "
            f"{references.dtype}{list(references.shape)}"
        )
    errors = np.square(images.astype(np.float64) - references).mean(axis=tuple(range(1, images.ndim)))
    return 10 * np.log10(255**2 / np.maximum(errors, _ROUNDING))


def bicubic(images: np.ndarray, size: int) -> np.ndarray:
    """Enlarge images by Pillow's bicubic filter. uint8[N, h, w, 3] -> uint8[N, size, size, 3]."""
    with needs_extra("train"):
        from PIL import Image

    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC)) for i in images])


def sliced_wasserstein(
    images: np.ndarray,
    references: np.ndarray,
    *,
    seed: int = 0,
    patches: int = 128,
    directions: int = 512,
) -> float:
    """Return the sliced Wasserstein distance between the finest details of two sets of images, times 1000.

    Patches of 7 x 7 pixels are taken at random from the images less their blurred copies, the finest level of a
    Laplacian pyramid; each channel is normalized by the statistics of its own set, and the distance is the mean over
    random directions of that between sorted projections (Karras et al. 2018, progressive growing, section 5). It sees
    which details there are, not where, and needs no network.

    Args:
        images, references: uint8[N, H, W, 3] of one shape, sides at least 7.
        seed: of the patches and directions.
        patches: of each image.
        directions: random unit vectors.
    """
    if images.shape != references.shape or min(images.shape[1:3]) < 7:
        raise ValueError(f"images must have one shape, 7 x 7 or larger, got {images.shape} and {references.shape}")
    rng = np.random.default_rng(seed)
    height, width = images.shape[1:3]
    place = rng.integers([height - 6, width - 6], size=(len(images), patches, 2))
    basis = rng.standard_normal((7 * 7 * images.shape[-1], directions)).astype(np.float32)
    basis /= np.linalg.norm(basis, axis=0)
    sides = [np.sort(_descriptors(x, place) @ basis, axis=0) for x in (images, references)]
    return 1000 * float(np.abs(sides[0] - sides[1]).mean())


def _descriptors(images: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return normalized patches of the finest details, float32[N * patches, 7 * 7 * C]."""
    with needs_extra("train"):
        from scipy.ndimage import convolve1d

    x, binomial = images.astype(np.float32), np.array([1, 4, 6, 4, 1], np.float32) / 16
    blurred = convolve1d(convolve1d(x, binomial, axis=1, mode="mirror"), binomial, axis=2, mode="mirror")
    windows = np.lib.stride_tricks.sliding_window_view(x - blurred, (7, 7), axis=(1, 2))
    found = np.concatenate([windows[i, at[:, 0], at[:, 1]] for i, at in enumerate(place)])  # [P, C, 7, 7]
    found = (found - found.mean((0, 2, 3), keepdims=True)) / np.maximum(found.std((0, 2, 3), keepdims=True), 1e-6)
    return found.reshape(len(found), -1)


def read_pairs(
    source: Source, size: int, low_size: int, *, count: int, degradation: str = "none", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return low-resolution copies of held-out images, and the images.

    Args:
        source: records with "image"; the first `count`, cut to squares by `CenterCrop`.
        size: of the images, a multiple of low_size.
        low_size: of the copies.
        count: N.
        degradation: "none" averages pixels, "blur" blurs the averages (k 3, sigma 0.6), "bsr" is `DegradeBSR`.
        seed: of the degradation; that of image i depends on it and i alone.

    Returns:
        uint8[N, low_size, low_size, 3] and uint8[N, size, size, 3].

    Raises:
        ValueError: if the source has fewer images, or an argument is out of its range.
    """
    check_count("count", count)
    if degradation not in DEGRADATIONS:
        raise ValueError(f"degradation={degradation!r} must be one of {', '.join(map(repr, DEGRADATIONS))}")
    if size % low_size or size == low_size:
        raise ValueError(f"size={size} must be a multiple of low_size={low_size}, and larger")
    if len(source) < count:
        raise ValueError(f"count={count} is more than the {len(source)} images that there are")
    factor, crop, low, high = size // low_size, CenterCrop(size), [], []
    for number in range(count):
        image = crop({"image": source[number]["image"]})["image"]
        if degradation == "bsr":
            low.append(DegradeBSR(factor).degrade(image, np.random.default_rng([seed, number])))
        else:
            low.append(AverageDown(factor)({"image": image})["image"])
        high.append(image)
    low = np.stack(low)
    return (_blurred(low) if degradation == "blur" else low), np.stack(high)


def _blurred(images: np.ndarray) -> np.ndarray:
    with needs_extra("train"):
        from scipy.ndimage import convolve1d

    kernel = np.exp(-0.5 * np.square(np.array([-1, 0, 1]) / 0.6))
    x, kernel = images.astype(np.float64), kernel / kernel.sum()
    for axis in (1, 2):
        x = convolve1d(x, kernel, axis=axis, mode="nearest")
    return np.rint(x).astype(np.uint8)


def read_labels(known: Mapping[str, Any], source: Source, count: int, name: str) -> np.ndarray | None:
    """Return the classes of the first images of a source as a model numbers them.

    Args:
        known: "labels" of the model's metadata.
        source: records with "label".
        count: N.
        name: of the source, for messages.

    Returns:
        int32[N], or None if a record has no label.

    Raises:
        ValueError: as `images.class_labels`.
    """
    labels = [source[number].get("label") for number in range(count)]
    if None in labels:
        return None
    return class_labels(labels, SourceImages(source, name).classes, known, name)


@functools.partial(jax.jit, static_argnames="enlarging")
def _restore(
    model: Model,
    sampling: Sampling,
    images: jax.Array,
    labels: jax.Array | None,
    keys: jax.Array,
    level: jax.Array,
    enlarging: Enlarging,
) -> jax.Array:
    null = None if labels is None else model.metadata["labels"].get("null")
    found = upsample(
        model,
        sampling,
        to_float(images),
        keys,
        noise_level=level,
        conditions=None if labels is None else {"y": labels},
        null=None if null is None else {"y": jnp.full_like(labels, null)},
        enlarging=enlarging,
    )
    return to_uint8(found)


def restore(
    model: Model,
    sampling: Sampling,
    images: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    level: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    enlarging: Enlarging = Enlarging(),  # noqa: B008 (it is frozen)
    report: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Enlarge images with an upsampler.

    Args:
        model: an upsampler.
        sampling: how.
        images: uint8[N, h, w, 3].
        labels: int32[N] in the model's numbering, of a model with classes; by default the null class, if it has one.
        level: of the noise that is added to them.
        seed: of the noise; image i depends on it, i and image i.
        batch_size: images at a time.
        enlarging: tiles.
        report: called with the number of images each time some are done.

    Returns:
        uint8[N, H, W, 3].

    Raises:
        ValueError: if the model is conditioned on captions, or on classes without labels here and without a null class.
    """
    labels = _known_labels(model, labels, len(images))
    sampling, keys, done = sampling.checked(), example_keys(jax.random.key(seed), len(images)), []
    for rows, new in batches(len(images), batch_size):
        own = None if labels is None else labels[rows]
        found = _restore(model, sampling, images[rows], own, keys[rows], np.float32(level), enlarging)
        done.append(np.asarray(found)[:new])
        if report is not None:
            report(new)
    return np.concatenate(done)


def _known_labels(model: Model, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """Return the labels that an upsampler is given, None if it has no classes."""
    conditions = model.metadata.get("conditions", ())
    if "tokens" in conditions:
        raise ValueError("the upsampler is conditioned on captions, which images to restore do not have")
    if "labels" not in conditions:
        return None
    null = model.metadata["labels"].get("null")
    if labels is None and null is None:
        raise ValueError("the upsampler is class-conditional without a null class, and the images have no labels")
    return np.full(count, null, np.int32) if labels is None else labels


def sweep_restored(
    model: Model,
    sampling: Sampling,
    low: np.ndarray,
    high: np.ndarray,
    levels: Sequence[float],
    *,
    labels: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 16,
    enlarging: Enlarging = Enlarging(),  # noqa: B008 (it is frozen)
    report: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Restore images at several noise levels.

    Args:
        model, sampling, low, labels, seed, batch_size, enlarging, report: as in `restore`.
        high: the originals, uint8[N, H, W, 3].
        levels: at most the largest of training.

    Returns:
        "bicubic" and "levels", a list: each {"psnr": mean in dB, "swd": `sliced_wasserstein`}, those of the levels with
        "level"; and "images": the first 8 of each level, uint8[levels, 8, H, W, 3].
    """
    plain, rows, shown = bicubic(low, image_size_of(model)), [], []
    for level in levels:
        options = {"level": level, "seed": seed, "batch_size": batch_size, "enlarging": enlarging, "report": report}
        images = restore(model, sampling, low, labels=labels, **options)
        rows.append({"level": float(level)} | scores(images, high))
        shown.append(images[:8])
    return {"bicubic": scores(plain, high), "levels": rows, "images": np.stack(shown)}


def scores(images: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Return {"psnr": mean over images in dB, "swd": `sliced_wasserstein`}."""
    return {"psnr": float(psnr(images, references).mean()), "swd": sliced_wasserstein(images, references)}


def best_levels(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the row of the best level by each measure: the highest "psnr" and "all_right", the lowest "swd"."""
    found = {}
    for measure, sign in (("psnr", 1), ("swd", -1), ("all_right", 1)):
        if rows and measure in rows[0]:
            found[measure] = max(rows, key=lambda row: sign * row[measure])
    return found
