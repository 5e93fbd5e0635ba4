"""From the bytes of an image file to pixels: JPEG, PNG, WebP and GIF, always as RGB in 8 bits."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np

from ddpm_jax.data.pil_image import load
from ddpm_jax.data.source import RecordError
from ddpm_jax.data.transforms import WHITE, as_image, check_colour
from ddpm_jax.extras import needs_extra

with needs_extra("train"):
    from PIL import Image

MAX_PIXELS = 89_478_485
"""The largest image by default; also that of Pillow (a quarter of a gigabyte of RGB)."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
_MAGIC = ((b"\xff\xd8", "JPEG"), (b"\x89PNG", "PNG"), (b"GIF8", "GIF"), (b"RIFF", "WebP"))


class DecodeError(RecordError):
    """The bytes of an image cannot be decoded; the message is one sentence with the reason."""


def decode_image(data: bytes, *, background: Sequence[int] = WHITE, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the bytes of an image file to 8-bit RGB.

    The content decides about the format, not the name of the file. The first frame of an animation is taken, the EXIF
    orientation is applied, and colour profiles are ignored. Palettes, grey, CMYK and bits become RGB; 16-bit grey is
    scaled to 8 bits, and of 16-bit RGB the upper 8 bits are taken. Transparent parts are composited on `background`;
    where a 16-bit RGB file names one transparent colour, these are all colours with its upper 8 bits.

    Args:
        data: a whole JPEG, PNG, WebP or GIF file.
        background: red, green and blue in [0, 255].
        max_pixels: a larger image is refused before memory for its pixels is allocated. Above twice
            `PIL.Image.MAX_IMAGE_PIXELS`, which holds for the process, Pillow refuses the image as well.

    Returns:
        uint8[H, W, 3].

    Raises:
        DecodeError: if the data are empty, truncated, damaged, of another format, or hold too many pixels.
        ValueError: if background is not a colour.
    """
    background = check_colour("background", background)
    if not data:
        raise DecodeError("the file is empty")
    image = _open(data, max_pixels)
    if image.width * image.height > max_pixels:
        raise DecodeError(f"the image has {image.width} x {image.height} pixels, more than max_pixels={max_pixels}")
    try:
        load(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged data
        raise DecodeError(f"the image is truncated or damaged ({_reason(error)})") from None
    try:
        return as_image(image, background=background)
    except ValueError as error:
        raise DecodeError(f"the image {error}") from None


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Callable `decode_image` with fixed options, which are checked when it is made.

    Attributes:
        background, max_pixels: see `decode_image`.
    """

    background: Sequence[int] = WHITE
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        object.__setattr__(self, "background", check_colour("background", self.background))
        if not isinstance(self.max_pixels, int) or self.max_pixels < 1:
            raise ValueError(f"max_pixels must be a positive integer, got {self.max_pixels!r}")

    def __call__(self, data: bytes) -> np.ndarray:
        """Return uint8[H, W, 3] of the bytes of an image file; raise DecodeError if that is not possible."""
        return decode_image(data, background=self.background, max_pixels=self.max_pixels)


def encode_png(image: np.ndarray) -> bytes:
    """Return uint8[H, W, 3] as the bytes of a PNG file, from which `decode_image` gets the same pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, "PNG", compress_level=6)
    return stream.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header, which allocates no memory for pixels."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError(
            f"the image has more pixels than max_pixels={max_pixels} or PIL.Image.MAX_IMAGE_PIXELS allows"
        ) from None
    except Image.UnidentifiedImageError:
        kind = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
        raise DecodeError(
            f"the {kind} image is truncated or damaged in its header"
            if kind
            else "the content is not that of a JPEG, PNG, WebP or GIF file"
        ) from None
    except Exception as error:  # see decode_image
        raise DecodeError(f"the image is truncated or damaged ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:120]
