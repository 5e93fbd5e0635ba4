"""From a PIL image of any mode to an array of its pixels."""

import sys
from typing import Any

import numpy as np

_ORIENTATION = 0x0112  # the tag of EXIF
_GREY_SCALES = {"L;2": 85, "L;4": 17}  # from the levels of 2 and 4 bits to those of 8


def is_pil(image: Any) -> bool:
    """Whether it is a PIL image; Pillow is not imported for that."""
    module = sys.modules.get("PIL.Image")  # not imported: there can be no such image
    return module is not None and isinstance(image, module.Image)


def load(image: Any) -> None:
    """Read the pixels of a PIL image that is open, and nothing if they are read already.

    The one transparent colour of a PNG file is scaled to 8 bits, as Pillow scales the pixels but not that colour.

    Raises:
        Exception: of many types, if the file is damaged.
    """
    transparent = image.info.get("transparency")
    depth = image.tile[0][3] if image.format == "PNG" and image.tile else None  # no tile is left after reading
    image.load()
    if depth in _GREY_SCALES and isinstance(transparent, int):
        image.info["transparency"] = transparent * _GREY_SCALES[depth]
    elif depth == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def pil_array(image: Any) -> np.ndarray:
    """Return the pixels of a PIL image, turned by its EXIF orientation.

    Args:
        image: of any mode.

    Returns:
        uint8[H, W, 3], or with alpha uint8[H, W, 4]; of 16 bits uint8[H, W] or [H, W, 2] (grey, alpha); of mode "F"
        float32[H, W]; of mode "I" that was not read from a file uint16[H, W], since its white is not known.

    Raises:
        ValueError: if its pixels cannot be read, or those of mode "I" are outside of [0, 65535].
    """
    try:
        is_file = image.format is not None
        load(image)
        image = _turned(image)
        if image.mode == "F":
            return np.asarray(image)
        if image.mode.startswith("I"):  # "I" holds 16 bits too, where Pillow read a 16-bit file
            return _sixteen_bits(image, is_file or image.mode != "I")
        if image.mode in ("P", "PA") and image.palette is None:
            raise ValueError("it has no palette")
        mode = "RGBA" if image.has_transparency_data else "RGB"
        return np.asarray(image if image.mode == mode else image.convert(mode))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types for damaged data
        raise ValueError(f"cannot be read: {error or type(error).__name__}") from None


def _turned(image: Any) -> Any:
    """Apply the EXIF orientation; not by ImageOps.exif_transpose, which fails if another EXIF tag has a wrong type."""
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF: Pillow raises many types; the pixels do not depend on it
        return image
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    method = turns.get(orientation) if isinstance(orientation, int | float) else None
    return image if method is None else image.transpose(method)


def _sixteen_bits(image: Any, is_scaled: bool) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"the values of mode I must be in [0, 65535], got {values.min()} to {values.max()}")
    values = values.astype(np.uint16)
    grey = np.rint(values / 257).astype(np.uint8) if is_scaled else values
    transparent = image.info.get("transparency")  # one level of grey
    if not isinstance(transparent, int):
        return grey
    return np.stack([grey, np.where(values == transparent, 0, np.iinfo(grey.dtype).max).astype(grey.dtype)], -1)
