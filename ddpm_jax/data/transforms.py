"""Transforms in numpy: of images as users have them (`as_images`), and of single records for `make_loader`.

A transform is a callable record -> record; one that needs randomness has a method `random_map(record, rng)` instead,
and gets a generator that depends on the loader's seed and the record's position alone. Records are never changed in
place. Instances can be pickled, so that worker processes can run them.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.data.pil_image import is_pil, pil_array
from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.extras import needs_extra

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Replace the string `key` by "tokens" int32[length] and "mask" bool[length].

    A tuple of strings, the captions of a group of hard negatives, gives int32[size, length] and bool[size, length].

    Attributes:
        tokenizer: maps captions to tokens and masks.
        length: of the token arrays.
        key: name of the caption in the record.
    """

    tokenizer: Tokenizer
    length: int
    key: str = "caption"

    def __call__(self, record: dict) -> dict:
        text = record[self.key]
        tokens, mask = self.tokenizer([text] if isinstance(text, str) else list(text), self.length)
        rest = {name: value for name, value in record.items() if name != self.key}
        return rest | (
            {"tokens": tokens[0], "mask": mask[0]} if isinstance(text, str) else {"tokens": tokens, "mask": mask}
        )


@dataclasses.dataclass(frozen=True)
class Select:
    """Drop every entry that is not named.

    Attributes:
        names: of the entries to keep.

    Raises:
        ValueError: on a record without one of the names.
    """

    names: tuple[str, ...]

    def __post_init__(self):
        if isinstance(self.names, str):
            name = self.names
            raise ValueError(f"names={name!r} must be a tuple of names; one name is written as ({name!r},)")

    def __call__(self, record: dict) -> dict:
        missing = [name for name in self.names if name not in record]
        if missing:
            raise ValueError(f"a record has no {missing[0]}, only {', '.join(record)}")
        return {name: record[name] for name in self.names}


Keep = Select  # the name before it was Select


@dataclasses.dataclass(frozen=True)
class Copy:
    """Add the entry `source` under a second name, e.g. for a transform that changes one of the two.

    Attributes:
        source: name of the entry to copy.
        name: of the copy.
    """

    source: str
    name: str

    def __call__(self, record: dict) -> dict:
        return record | {self.name: record[self.source]}


def as_images(images: Any) -> list[np.ndarray]:
    """Convert images in the forms that users have them in to 8-bit RGB.

    Every image argument of a pipeline goes through this function.

    Args:
        images: one image, a sequence of images of any sizes, or an array [N, H, W, C]. An image is one of

            - a PIL image of any mode. Its EXIF orientation is applied, its colour profile is not; of an animation the
              current frame is taken. 16-bit modes are scaled to 8 bits; mode "F" counts as a float array.
            - an array (NumPy, JAX, or PyTorch on the CPU) [H, W] or [H, W, 1] (grey), [H, W, 2] (grey, alpha),
              [H, W, 3] (RGB) or [H, W, 4] (RGB, alpha). Its dtype says its range: uint8 and other integers [0, 255],
              uint16 [0, 65535], bool {0, 1}, floats [0, 1], rounded to the nearest of 256 levels.
            - an array that `clip_pixels` returned. It is recognised by its 256 levels in each channel, and converted
              back exactly.

            Transparent parts are composited on white.

    Returns:
        N >= 1 arrays uint8[H, W, 3].

    Raises:
        ValueError: if there is no image, or one is not of these forms, leaves its range, or is not finite; the message
            names the image.
    """
    if hasattr(images, "dtype"):
        images = _as_numpy(images)
        images = list(images) if images.ndim == 4 else [images]
    elif is_pil(images):
        images = [images]
    elif isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
        raise ValueError(f"images must be PIL images or arrays, got {_shown(images)}")
    found = []
    for number, image in enumerate(images):
        try:
            found.append(as_image(image))
        except ValueError as error:
            raise ValueError(f"images[{number}] {error}") from None
    if not found:
        raise ValueError("images must hold at least one image")
    return found


def as_image(image: Any, *, background: Sequence[int] = WHITE) -> np.ndarray:
    """Convert one image to 8-bit RGB.

    Args:
        image: a PIL image or an array, as `as_images` takes each.
        background: red, green and blue in [0, 255], on which transparent parts are composited.

    Returns:
        uint8[H, W, 3].

    Raises:
        ValueError: if it is not of these forms, leaves its range, or is not finite. The message begins with a verb,
            for the caller to name the image before it.
    """
    return _without_alpha(_as_uint8(_as_array(image)), check_colour("background", background))


def check_colour(name: str, colour: Sequence[int]) -> tuple[int, int, int]:
    """Return red, green and blue as a tuple; raise ValueError unless they are three integers in [0, 255]."""
    try:
        values = tuple(operator.index(value) for value in colour)
    except TypeError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise ValueError(f"{name} must be three integers in [0, 255] (red, green, blue), got {colour!r}")
    return values


def resize_center_crop(images: Any, size: int) -> np.ndarray:
    """Resize images so that their short side is `size`, and take the central square.

    The resize is Pillow's antialiased bicubic one in 8 bits, as in OpenAI's and open_clip's preprocessing. Of an image
    whose long side is more than 20 times its short side, only the middle 20 are resized.

    Args:
        images: as `as_images` takes them.
        size: >= 1, in pixels.

    Returns:
        uint8[N, size, size, 3]. Images that have this size are not changed.

    Raises:
        ValueError: as `as_images`.
    """
    return np.stack([_square(image, size) for image in as_images(images)])


def all_true_center_crop(mask: np.ndarray, size: int) -> np.ndarray:
    """Return where a mask is True under the whole of a pixel of `resize_center_crop`, bool[size, size].

    mask: bool[H, W].
    """
    mask = _middle(mask)
    new, starts = _square_of(mask, size)
    # Counts of False pixels from the corner on; a pixel of the square covers whole and parts of pixels of the mask.
    counts = np.pad(np.cumsum(np.cumsum(~mask, axis=0), axis=1), ((1, 0), (1, 0)))
    places = [np.arange(start, start + size) for start in starts]
    (left, right), (top, bottom) = (
        (place * side // resized, -(-(place + 1) * side // resized))
        for place, side, resized in zip(places, mask.shape[::-1], new)
    )
    rows = counts[bottom] - counts[top]
    return rows[:, right] == rows[:, left]


def clip_pixels(images: Any, size: int = 224) -> np.ndarray:
    """Prepare images as OpenAI's and open_clip's image towers were trained.

    `resize_center_crop` to `size`, then (x / 255 - mean) / std with CLIP's mean and standard deviation of each channel.

    Args:
        images: as `as_images` takes them. What this function returned is returned again, resized if size differs.
        size: >= 1, in pixels.

    Returns:
        float32[N, size, size, 3].

    Raises:
        ValueError: as `as_images`.
    """
    return (resize_center_crop(images, size).astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _as_numpy(image: Any) -> np.ndarray:
    if hasattr(image, "detach"):  # a PyTorch tensor, which may be on a device, need a gradient, or be of bfloat16
        image = image.detach().cpu()
        image = image.float() if str(image.dtype) == "torch.bfloat16" else image
    return np.asarray(image)


def _as_array(image: Any) -> np.ndarray:
    """Return an image as an array [H, W] or [H, W, C], with 1 <= C <= 4, of any dtype."""
    if is_pil(image):
        image = pil_array(image)
    if not hasattr(image, "dtype"):
        raise ValueError(f"must be a PIL image or an array, got {_shown(image)}; open a file with PIL.Image.open")
    array = _as_numpy(image)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[-1] > 4):
        first = array.ndim == 3 and array.shape[0] <= 4
        raise ValueError(
            f"must be an array [H, W] or [H, W, C] with 1 to 4 channels, got shape {array.shape}"
            + ("; move its channels to the last axis" if first and 0 not in array.shape else "")
        )
    return array


def _as_uint8(array: np.ndarray) -> np.ndarray:
    """Map an array to uint8 by the range of its dtype, see `as_images`."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.name == "bfloat16":  # JAX's, unknown to NumPy's hierarchy of types
        array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        return _float_as_uint8(array)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"must hold numbers, got dtype {array.dtype}")
    least, most = array.min(), array.max()
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        if 0 < most < 256:
            raise ValueError(f"is uint16, whose white is 65535, but its largest value is {most}; give it as uint8")
        return np.rint(array / 257).astype(np.uint8)
    if least < 0 or most > 255:
        raise ValueError(f"has {array.dtype} values from {least} to {most}; they must be in [0, 255]")
    return array.astype(np.uint8)


def _float_as_uint8(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ValueError("has values that are not finite (NaN or infinity)")
    least, most = float(array.min()), float(array.max())
    if array.ndim == 3 and array.shape[-1] == 3:
        levels = (array.astype(np.float64) * CLIP_STD + CLIP_MEAN) * 255
        nearest = np.rint(levels)
        if np.abs(levels - nearest).max() < 1e-3 and nearest.min() >= 0 and nearest.max() <= 255:
            return nearest.astype(np.uint8)
    if least < -1e-5 or most > 1 + 1e-5:
        hint = "; give those of [-1, 1] as (x + 1) / 2" if least > -1.001 and most < 1.001 else ""
        hint = "; give those of [0, 255] as uint8" if least >= 0 and 1.001 < most < 255.001 else hint
        raise ValueError(f"has float values from {least:.4g} to {most:.4g}; they must be in [0, 1]{hint}")
    return np.rint(np.clip(array.astype(np.float64), 0, 1) * 255).astype(np.uint8)


def _without_alpha(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Return uint8[H, W, 3] of uint8[H, W] or [H, W, C], transparent parts composited on the background."""
    image = image if image.ndim == 3 else image[:, :, None]
    channels = image.shape[-1]
    if channels in (2, 4):
        colour, alpha = image[:, :, :-1].astype(np.int32), image[:, :, -1:].astype(np.int32)
        below = np.array(background, np.int32)
        image = ((colour * alpha + below * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _pillow() -> Any:
    with needs_extra("train"):
        from PIL import Image

    return Image


def _check_size(size: int) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}")


def _resized(image: np.ndarray, size: tuple[int, int], resampling: Any = None) -> np.ndarray:
    """Resize uint8[H, W, 3] to `size`, (width, height), by the bicubic filter or another one."""
    module = _pillow()
    resampling = module.Resampling.BICUBIC if resampling is None else resampling
    return np.asarray(module.fromarray(np.ascontiguousarray(image)).resize(size, resampling))


def _middle(image: np.ndarray) -> np.ndarray:
    """Return the image without what lies beyond 20 times its shorter side, since resizing it may need any memory."""
    most = 20 * min(image.shape[:2])
    top, left = (max(side - most, 0) // 2 for side in image.shape[:2])
    return image[top : top + most, left : left + most]


def _square(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    image = _middle(image)
    new, (left, top) = _square_of(image, size)
    return _resized(image, new)[top : top + size, left : left + size]


def _square_of(image: np.ndarray, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (width, height) that an image [H, W, ...] is resized to, and (left, top) of the square in it."""
    height, width = image.shape[:2]
    short = min(height, width)
    new = int(size * width / short), int(size * height / short)
    return new, (round((new[0] - size) / 2), round((new[1] - size) / 2))


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resize the image `key` so that its shorter side has `size` pixels, uint8[H, W, 3] -> uint8[H', W', 3].

    Pillow's bicubic filter with antialiasing: when it shrinks, the filter is as much wider. The longer side is rounded
    to the nearest pixel.

    Attributes:
        size: of the shorter side in pixels.
        key: name of the image in the record.

    Raises:
        ValueError: on an image whose longer side is more than 100 times the shorter one.
    """

    size: int
    key: str = "image"

    def __post_init__(self):
        _check_size(self.size)

    def __call__(self, record: dict) -> dict:
        image = record[self.key]
        height, width = image.shape[:2]
        short, long = min(height, width), max(height, width)
        if short == self.size:
            return record
        if long > 100 * short:
            raise ValueError(f"an image of {height} x {width} pixels is too long to be resized to {self.size}")
        longer = (2 * long * self.size + short) // (2 * short)
        new = (longer, self.size) if width > height else (self.size, longer)
        return record | {self.key: _resized(image, new)}


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Shrink or enlarge the image `key` and cut out its middle, uint8[H, W, 3] -> uint8[size, size, 3].

    As ADM prepares ImageNet (Dhariwal and Nichol 2021, guided-diffusion's center_crop_arr): halved by averaging while
    the shorter side is at least 2 size, then resized to it by Pillow's bicubic filter with antialiasing, then cut. Of
    an image whose longer side is more than 20 times its shorter side, only the middle 20 are resized.

    Attributes:
        size: height and width of the result in pixels.
        key: name of the image in the record.
    """

    size: int
    key: str = "image"

    def __post_init__(self):
        _check_size(self.size)

    def __call__(self, record: dict) -> dict:
        image, resampling = record[self.key], _pillow().Resampling
        if image.shape[:2] == (self.size, self.size):
            return record
        image = _middle(image)
        while min(image.shape[:2]) >= 2 * self.size:
            image = _resized(image, (image.shape[1] // 2, image.shape[0] // 2), resampling.BOX)
        scale = self.size / min(image.shape[:2])
        image = _resized(image, (round(image.shape[1] * scale), round(image.shape[0] * scale)))
        top, left = (image.shape[0] - self.size) // 2, (image.shape[1] - self.size) // 2
        return record | {self.key: image[top : top + self.size, left : left + self.size]}


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirror the image `key` from left to right with a probability, uint8[H, W, C] -> uint8[H, W, C].

    Attributes:
        probability: in [0, 1].
        key: name of the image in the record.
    """

    probability: float = 0.5
    key: str = "image"

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")

    def random_map(self, record: dict, rng: np.random.Generator) -> dict:
        if rng.random() >= self.probability:
            return record
        return record | {self.key: np.ascontiguousarray(record[self.key][:, ::-1])}


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cut a random square window of `size` pixels out of the image `key`, uint8[H, W, C] -> uint8[size, size, C].

    Super-resolution networks are fully convolutional and are trained on crops (Dhariwal and Nichol 2021, unCLIP
    section 2.2).

    Attributes:
        size: height and width of the window in pixels.
        key: name of the image in the record.

    Raises:
        ValueError: on an image smaller than the window.
    """

    size: int
    key: str = "image"

    def __post_init__(self):
        _check_size(self.size)

    def random_map(self, record: dict, rng: np.random.Generator) -> dict:
        image = record[self.key]
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise ValueError(f"size must be at most the image's {height} x {width} pixels, got {self.size}")
        top, left = int(rng.integers(height - self.size + 1)), int(rng.integers(width - self.size + 1))
        return record | {self.key: image[top : top + self.size, left : left + self.size]}


@dataclasses.dataclass(frozen=True)
class AverageDown:
    """Shrink the image `key` by averaging factor x factor pixels, uint8[H, W, C] -> uint8[H/factor, W/factor, C].

    Attributes:
        factor: >= 1.
        key: name of the image in the record.

    Raises:
        ValueError: on an image whose sides `factor` does not divide.
    """

    factor: int
    key: str = "image"

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    def __call__(self, record: dict) -> dict:
        image = record[self.key]
        height, width, channels = image.shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor={self.factor} must divide the image's {height} x {width} pixels")
        # Axis by axis: numpy sums over two axes at once far more slowly.
        rows = image.reshape(height // self.factor, self.factor, width * channels).sum(1, dtype=np.int32)
        sums = rows.reshape(height // self.factor, width // self.factor, self.factor, channels).sum(2)
        return record | {self.key: np.rint(sums / self.factor**2).astype(np.uint8)}
