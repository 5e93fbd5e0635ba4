"""Inpainting and outpainting by the decoder and the upsamplers of a pipeline (RePaint, Lugmayr et al. 2022)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.checks import shown
from ddpm_jax.data.transforms import all_true_center_crop, as_images, resize_center_crop
from ddpm_jax.errors import one_for_each
from ddpm_jax.extras import needs_extra
from ddpm_jax.pipelines.decoding import Decoding, decoding_of
from ddpm_jax.pipelines.inversion import as_captions, decoded, embed_images
from ddpm_jax.pipelines.request import as_float, as_int, image_indices

Embedding = Literal["prior", "image", "none"]
PLACES = {
    "center": (0.5, 0.5),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "top left": (0.0, 0.0),
    "top right": (1.0, 0.0),
    "bottom left": (0.0, 1.0),
    "bottom right": (1.0, 1.0),
}
_WITHOUT_HISTORY = ("ancestral", "analytic", "ddim")
_GREY = 128


def inpaint(
    pipeline: Any,
    images: Any,
    keep_masks: Any,
    *,
    prompts: str | Iterable[str] | None = None,
    embedding: Embedding | None = None,
    **options: Any,
) -> np.ndarray:
    """Replace a part of images, by RePaint in the decoder and in the upsamplers.

    Args:
        pipeline: an `UnCLIP`, or a `Karlo` with an image encoder.
        images: N images, as `data.transforms.as_images` takes them.
        keep_masks: one mask for each image, of its height and width, or one for all: bool[H, W], True where the image
            stays, or integers 0 and 1. Images, and arrays as `data.transforms.as_images` takes them, are True where the
            mean of their channels is at least 128 of 255.
        prompts: captions of the whole images, one for all or one for each; none by default.
        embedding: what the decoder is given as image embedding: the "prior"'s for the captions, that of the given
            "image", what is replaced included, or "none". The prior's by default if there are captions, else none.
        options: resample (10, passes of each step of the decoder), negative_prompts, seed, start, low_res, batch_size,
            mesh, report and the options of the stages, as for `decode`.

    Returns:
        uint8[N, H, H, 3]; what is known of an image is its own, resized. A pixel is known if all pixels of the image
        under it are, and the others are not read.

    Raises:
        ValueError: if an argument does not fit, or a sampler carries history.
        NotFiniteError: if a network returned NaN or infinity.
    """
    images = as_images(images)
    masks = _as_masks(keep_masks, images)
    known = [_known_pixels(image, mask) for image, mask in zip(images, masks)]
    squares = lambda size: resize_center_crop(known, size)  # noqa: E731
    kept = lambda size: np.stack([all_true_center_crop(mask, size)[..., None] for mask in masks])  # noqa: E731
    return _fill(pipeline, images, squares, kept, prompts, embedding, "none", **options)


def outpaint(
    pipeline: Any,
    images: Any,
    *,
    extent: float = 0.5,
    place: str | tuple[float, float] = "center",
    prompts: str | Iterable[str] | None = None,
    embedding: Embedding | None = None,
    **options: Any,
) -> np.ndarray:
    """Continue images beyond their frame: they become a part of larger ones, whose rest is sampled.

    Args:
        pipeline: as for `inpaint`.
        images: N images; their central squares become the part that is known.
        extent: side of that part as a share of the new side, in (0, 1).
        place: where it is, one of `PLACES`, or the shares (x, y) of the rest that are left of it and above it.
        prompts: as for `inpaint`.
        embedding: as for `inpaint`; without captions that of the image.
        options: as for `inpaint`.

    Returns:
        uint8[N, H, H, 3].

    Raises:
        ValueError: as `inpaint`.
    """
    extent = as_float("extent", extent, least=0.0, most=1.0)
    x, y = _as_place(place)
    images, first = as_images(images), decoding_of(pipeline).image_size
    side = round(extent * first)
    if not 0 < side < first:
        raise ValueError(f"extent={extent} leaves {side} of the {first} pixels of the decoder's images")
    left, top = round(x * (first - side)), round(y * (first - side))

    def window(size: int) -> tuple[slice, slice]:  # the decoder's, enlarged, so that all stages agree
        by = size // first
        return slice(by * top, by * (top + side)), slice(by * left, by * (left + side))

    def squares(size: int) -> np.ndarray:
        rows, columns = window(size)
        canvas = np.full((len(images), size, size, 3), _GREY, np.uint8)
        canvas[:, rows, columns] = resize_center_crop(images, rows.stop - rows.start)
        return canvas

    def kept(size: int) -> np.ndarray:
        mask = np.zeros((len(images), size, size, 1), bool)
        mask[:, *window(size)] = True
        return mask

    return _fill(pipeline, images, squares, kept, prompts, embedding, "image", **options)


def _as_place(place: Any) -> tuple[float, float]:
    """Return the shares (x, y) of the rest that are left of the known part and above it."""
    if isinstance(place, str) and place in PLACES:
        return PLACES[place]
    if not isinstance(place, (tuple, list)) or len(place) != 2:
        raise ValueError(f"place={shown(place)} must be two shares (x, y), or one of {', '.join(PLACES)}")
    x, y = (as_float("place", share, least=0.0, most=1.0) for share in place)
    return x, y


def _fill(
    pipeline: Any,
    images: list[np.ndarray],
    squares: Callable[[int], np.ndarray],
    kept: Callable[[int], np.ndarray],
    prompts: Any,
    embedding: Any,
    without_captions: Embedding,
    *,
    negative_prompts: Any = None,
    resample: int = 10,
    seed: int = 0,
    start: int = 0,
    low_res: bool = False,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    report: Callable[[int], None] | None = None,
    **options: Any,
) -> np.ndarray:
    """Sample what is unknown. squares, kept: side -> uint8[N, side, side, 3] and bool[N, side, side, 1]."""
    decoding, count = decoding_of(pipeline), len(images)
    embedding = _checked_embedding(decoding, embedding, prompts, without_captions)
    negative = decoding.negative(negative_prompts, count)
    configured = decoding.configured(None, options, negative)
    sizes = decoding.sizes[:1] if low_res else decoding.sizes
    for name in ("decoder", *decoding.upsamplers)[: len(sizes)]:
        if (sampler := configured.pipeline.sampling[name].sampler) not in _WITHOUT_HISTORY:
            raise ValueError(
                f"{name}_sampler={sampler!r} cannot repeat steps, as inpainting does; take one of "
                f"{', '.join(_WITHOUT_HISTORY)}"
            )
    batch_size = decoding.batch_size if batch_size is None else batch_size
    z_image = None
    if embedding == "image":
        z_image = embed_images(pipeline, images, batch_size=batch_size, mesh=mesh)
    elif embedding == "none":
        z_image = np.zeros((count, decoding.embed_dim), np.float32)
    return decoded(
        configured,
        (z_image, np.full(count, embedding != "none"), None),
        decoding.words(as_captions("prompts", prompts, count)),
        negative,
        seed=seed,
        index=image_indices(start, count),
        low_res=low_res,
        batch_size=batch_size,
        mesh=mesh,
        report=report,
        known=[array for size in sizes for array in (squares(size), kept(size))],
        resample=as_int("resample", resample, least=1, most=1000),
        name="images",
    )


def _checked_embedding(decoding: Decoding, embedding: Any, prompts: Any, default: Embedding) -> Embedding:
    if embedding is None:
        return "prior" if prompts is not None and decoding.has_prior else default
    if embedding not in ("prior", "image", "none"):
        raise ValueError(f"embedding={embedding!r} must be 'prior', 'image' or 'none'")
    if embedding == "prior" and (prompts is None or not decoding.has_prior):
        what = "prompts" if prompts is None else "a pipeline with a prior"
        raise ValueError(f"embedding='prior' needs {what}")
    return embedding


def _as_masks(masks: Any, images: list[np.ndarray]) -> list[np.ndarray]:
    """Return bool[H, W] for each image."""
    if hasattr(masks, "ndim") and masks.ndim == 3 and masks.dtype == bool:
        masks = list(masks)  # bool[N, H, W]; as one image it would have W <= 4 channels
    masks = _scaled(masks) if hasattr(masks, "dtype") or not isinstance(masks, Sequence) else list(map(_scaled, masks))
    try:
        found = [mask.mean(-1) >= 128 for mask in as_images(masks)]
    except ValueError as error:
        raise ValueError(str(error).replace("images", "keep_masks", 1)) from None
    if len(found) not in (1, len(images)):
        raise ValueError(f"keep_masks must be {one_for_each(len(images), 'mask', 'image')}, got {len(found)}")
    found *= len(images) if len(found) == 1 else 1
    for number, (mask, image) in enumerate(zip(found, images)):
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"keep_masks[{number}] is of {mask.shape[0]} x {mask.shape[1]} pixels, and its image of "
                f"{image.shape[0]} x {image.shape[1]}"
            )
    return found


def _scaled(mask: Any) -> Any:
    """Return a mask of the integers 0 and 1 as one of 0 and 255, and any other as it is."""
    if not isinstance(mask, (np.ndarray, jax.Array)) or mask.dtype.kind not in "iu" or not mask.size:
        return mask
    array = np.asarray(mask)
    return 255 * array.astype(np.uint8) if array.min() >= 0 and array.max() <= 1 else mask


def _known_pixels(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image with the nearest known pixel in place of each unknown one, which resizing would read."""
    if not mask.any():
        return np.full_like(image, _GREY)
    with needs_extra("train"):
        from scipy import ndimage
    rows, columns = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return image[rows, columns]
