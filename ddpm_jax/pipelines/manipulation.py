"""Manipulations of images by `UnCLIP` and `Karlo` (DALL-E 2, sections 3 and 4); docs/manipulations.md explains them.

latent = encode(pipeline, images)
again = decode(pipeline, latent)  # the images, as far as the decoder and the upsamplers reproduce them
others = variations(pipeline, latent, count=4, eta=0.5)  # uint8[N, 4, H, W, 3]

A latent is found once; what is made of it are images, or K images of each latent.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ddpm_jax.checks import shown
from ddpm_jax.pipelines.decoding import decoding_of
from ddpm_jax.pipelines.inpainting import inpaint, outpaint
from ddpm_jax.pipelines.inversion import (
    as_captions,
    check_options,
    checked_latent,
    decode,
    embed_images,
    embed_texts,
    encode,
    inversion_steps,
)
from ddpm_jax.pipelines.latents import (
    BipartiteLatent,
    Pca,
    as_embeddings,
    fit_pca,
    load_latents,
    perturbed,
    save_latents,
    slerp,
    text_difference,
    truncated,
)
from ddpm_jax.pipelines.request import MOST_IMAGES, as_int, as_prompts, image_indices

__all__ = [
    "BipartiteLatent",
    "Pca",
    "check_options",
    "decode",
    "embed_images",
    "embed_texts",
    "encode",
    "fit_pca",
    "inpaint",
    "interpolate",
    "inversion_steps",
    "label_probabilities",
    "load_latents",
    "outpaint",
    "pca_of",
    "perturbed",
    "recaption",
    "reconstruct",
    "save_latents",
    "slerp",
    "text_diff",
    "text_difference",
    "truncated",
    "variations",
]
THETAS = (0.0, 0.125, 0.25, 0.375, 0.5)


def variations(
    pipeline: Any, latent: BipartiteLatent, *, count: int = 4, eta: float | None = None, start: int = 0, **options: Any
) -> np.ndarray:
    """Sample variations of images (DALL-E 2, section 3.1).

    Args:
        pipeline: as for `decode`.
        latent: of N images. With x_T they share it and differ by the noise of DDIM; without it, in all noise.
        count: variations of each, K.
        eta: noise of DDIM, in [0, 1]; 0 returns the image, larger values change more of what z_image leaves open. 1 by
            default with x_T, and an option of the decoder's sampler without it.
        start: index of the first latent.
        options: of `decode`.

    Returns:
        uint8[N, K, H, H, 3].
    """
    latent = checked_latent(decoding_of(pipeline), latent)
    count = as_int("count", count, least=1, most=MOST_IMAGES)
    eta = 1.0 if eta is None and latent.x_T is not None else eta
    start = as_int("start", start, least=0, most=MOST_IMAGES // count - len(latent))
    index = np.arange(start, start + len(latent), dtype=np.int64)[:, None] * count + np.arange(count)
    rows = np.repeat(np.arange(len(latent)), count)
    return _several(pipeline, latent.take(rows), index, **({} if eta is None else {"eta": eta}), **options)


def interpolate(
    pipeline: Any,
    first: BipartiteLatent,
    second: BipartiteLatent,
    *,
    weights: int | Sequence[float] = 5,
    noise: Literal["slerp", "fixed"] | None = None,
    start: int = 0,
    **options: Any,
) -> np.ndarray:
    """Interpolate between images (DALL-E 2, section 3.2): z_w = slerp(z_first, z_second, w).

    Args:
        pipeline: as for `decode`.
        first: of N images, w = 0.
        second: of N images, w = 1.
        weights: K numbers w in [0, 1], or K for evenly spaced ones with both ends.
        noise: "slerp" interpolates x_T too, so that the ends are the images; "fixed" takes one random noise for all
            weights. The former by default, if both have x_T.
        start: index of the first pair.
        options: of `decode`.

    Returns:
        uint8[N, K, H, H, 3].

    Raises:
        ValueError: if an argument does not fit, and as `decode`.
    """
    first, second = (
        checked_latent(decoding_of(pipeline), latent, name) for name, latent in (("first", first), ("second", second))
    )
    if len(first) != len(second):
        raise ValueError(f"there must be as many first as second latents, got {len(first)} and {len(second)}")
    weights = (
        np.linspace(0, 1, as_int("weights", weights, least=1, most=MOST_IMAGES)) if np.ndim(weights) == 0 else weights
    )
    weights = _shares("weights", weights)
    both = first.x_T is not None and second.x_T is not None
    noise = ("slerp" if both else "fixed") if noise is None else noise
    if noise not in ("slerp", "fixed"):
        raise ValueError(f"noise={noise!r} must be 'slerp' or 'fixed'")
    if noise == "slerp" and not both:
        raise ValueError("noise='slerp' needs the x_T of both latents, which encode finds")
    if noise == "slerp" and first.steps != second.steps:
        raise ValueError(f"both latents must have the same steps, got {first.steps!r} and {second.steps!r}")
    latent = BipartiteLatent(_along("z_image", first.z_image, second.z_image, weights))
    if noise == "slerp":
        latent = BipartiteLatent(latent.z_image, _along("x_T", first.x_T, second.x_T, weights), first.steps)
    return _several(pipeline, latent, _shared_noise(start, len(first), len(weights)), **options)


def text_diff(
    pipeline: Any,
    latent: BipartiteLatent,
    source: str,
    target: str,
    *,
    thetas: Sequence[float] = THETAS,
    start: int = 0,
    **options: Any,
) -> np.ndarray:
    """Change images as one caption differs from another (DALL-E 2, section 3.3), with their x_T.

    Args:
        pipeline: as for `decode`.
        latent: of N images.
        source: what the images show, such as "a photo of a cat"; "" is the empty caption.
        target: what they shall show, such as "a photo of a lion".
        thetas: K numbers in [0, 1], see `latents.text_difference`; 0 returns the image.
        start: index of the first latent.
        options: of `decode`.

    Returns:
        uint8[N, K, H, H, 3].

    Raises:
        ValueError: if both captions have the same embedding, and as `decode`.
    """
    latent = checked_latent(decoding_of(pipeline), latent)
    thetas = _shares("thetas", thetas)
    before, after = embed_texts(pipeline, [source, target])
    z_image = _interleaved([text_difference(latent.z_image, before, after, theta) for theta in thetas])
    _check_directions(z_image, len(thetas), "latent.z_image", "the difference of the captions")
    return _with_embeddings(pipeline, latent, z_image, len(thetas), start, options)


def reconstruct(
    pipeline: Any, latent: BipartiteLatent, pca: Pca, dims: Sequence[int], *, start: int = 0, **options: Any
) -> np.ndarray:
    """Decode the first principal components of image embeddings (DALL-E 2, section 4, figure 7).

    Args:
        pipeline: as for `decode`.
        latent: of N images; without x_T, as in the paper, the noise is random and the same for all numbers of
            components.
        pca: from `latents.fit_pca`, or `pca_of` a pipeline.
        dims: K numbers of components.
        start: index of the first latent.
        options: of `decode`.

    Returns:
        uint8[N, K, H, H, 3].
    """
    latent = checked_latent(decoding_of(pipeline), latent)
    if not isinstance(dims, Sequence | np.ndarray) or isinstance(dims, str) or not np.size(dims):
        raise ValueError(f"dims={shown(dims)} must be a sequence of numbers of components, such as [4, 16]")
    z_image = _interleaved([truncated(latent.z_image, pca, number) for number in dims])
    return _with_embeddings(pipeline, latent, z_image, len(dims), start, options)


def recaption(
    pipeline: Any, latent: BipartiteLatent, prompts: Iterable[str], *, start: int = 0, **options: Any
) -> np.ndarray:
    """Decode embeddings with other captions, which change what z_image leaves open, such as the style.

    Args:
        pipeline: as for `decode`.
        latent: of N images. Its x_T says much about the images; without it, the noise is random and the same for all
            captions.
        prompts: K captions.
        start: index of the first latent.
        options: of `decode`.

    Returns:
        uint8[N, K, H, H, 3].
    """
    latent, prompts = checked_latent(decoding_of(pipeline), latent), as_prompts(prompts)
    index = _shared_noise(start, len(latent), len(prompts))
    latent = latent.take(np.repeat(np.arange(len(latent)), len(prompts)))
    return _several(pipeline, latent, index, of_each=prompts, **options)


def pca_of(pipeline: Any) -> Pca:
    """Return the principal components that the codes of an autoregressive prior are made of.

    Raises:
        ValueError: if the pipeline has no codes.
    """
    codes = getattr(pipeline, "codes", None)
    if codes is None:
        raise ValueError("this pipeline has no codes of embeddings; fit principal components with latents.fit_pca")
    return Pca(np.asarray(codes.params["params"]["mean"]), np.asarray(codes.params["params"]["components"]))


def label_probabilities(pipeline: Any, z_image: Any, captions: Iterable[str]) -> np.ndarray:
    """Return what CLIP takes images for: softmax of its logits over captions, float32[N, K].

    z_image: float32[N, D]. captions: K, such as "a photo of an apple". A `Karlo`, whose files do not have the scale of
    CLIP's logits, takes OpenAI's, 100.
    """
    decoding = decoding_of(pipeline)
    z = np.asarray(as_embeddings("z_image", z_image, decoding.embed_dim), np.float64)
    cosines = z @ embed_texts(pipeline, captions).T / np.linalg.norm(z, axis=1, keepdims=True)
    logits = decoding.logit_scale * cosines
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _along(name: str, first: np.ndarray, second: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Interpolate with K weights between N pairs, [N * K, ...]."""
    found = _interleaved([slerp(first, second, weight) for weight in weights])
    _check_directions(found, len(weights), f"first.{name}", f"second.{name}")
    return found


def _check_directions(found: np.ndarray, of_each: int, first: str, second: str) -> None:
    """Raise ValueError if interpolations between finite ends are not finite, as between opposite ones."""
    if (bad := np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(1))).size:
        row = bad[0] // of_each
        raise ValueError(f"{first}[{row}] and {second} are opposite, so that there is no shortest path between them")


def _shares(name: str, values: Any) -> list[float]:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={shown(values)} must be numbers in [0, 1]") from None
    if found.ndim != 1 or not len(found) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"{name} must be numbers in [0, 1], got {values!r:.60}")
    return found.tolist()


def _interleaved(parts: Sequence[Any]) -> np.ndarray:
    """Return K arrays [N, ...] as one [N * K, ...], all of the first example first."""
    stacked = np.stack([np.asarray(part) for part in parts], axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _shared_noise(start: int, count: int, of_each: int) -> np.ndarray:
    """Return int32[N, K], in which all images of one latent have the same noise."""
    return np.repeat(image_indices(start, count)[:, None], of_each, axis=1)


def _with_embeddings(
    pipeline: Any, latent: BipartiteLatent, z_image: np.ndarray, of_each: int, start: int, options: dict[str, Any]
) -> np.ndarray:
    """Decode K embeddings for each latent, all with its x_T."""
    latent = latent.take(np.repeat(np.arange(len(latent)), of_each)).replace(z_image=z_image)
    return _several(pipeline, latent, _shared_noise(start, len(latent) // of_each, of_each), **options)


def _several(
    pipeline: Any,
    latent: BipartiteLatent,
    index: np.ndarray,
    *,
    prompts: Any = None,
    negative_prompts: Any = None,
    of_each: Sequence[str] | None = None,
    **options: Any,
) -> np.ndarray:
    """Decode K images for each of N.

    Args:
        pipeline: as for `decode`.
        latent: of the N * K images.
        index: int[N, K], of the noise.
        prompts: one for all, or one for each of N.
        negative_prompts: the same.
        of_each: K captions of each of N, in place of prompts.
        options: of `decode`.
    """
    count, number = index.shape
    each = lambda name, given: (  # noqa: E731
        given
        if given is None or isinstance(given, str)
        else [text for text in as_captions(name, given, count) for _ in range(number)]
    )
    captions = {"prompts": each("prompts", prompts) if of_each is None else list(of_each) * count}
    captions["negative_prompts"] = each("negative_prompts", negative_prompts)
    images = decode(pipeline, latent, noise_index=index.reshape(-1), **captions, **options)
    return images.reshape(count, number, *images.shape[1:])
