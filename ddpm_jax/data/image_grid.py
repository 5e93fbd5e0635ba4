"""Grids of images with their captions, for previews and results."""

import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddpm_jax.extras import needs_extra
from ddpm_jax.paths import as_path, is_remote
from ddpm_jax.temporary import temporary_path

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_SIDE = 96
_PADDING = 6


def grid(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    cell_scale: int | None = None,
) -> "Image":
    """Arrange images in rows, each with its caption wrapped under it.

    Args:
      images: uint8[N, H, W, 3], N >= 1.
      captions: N texts, or None.
      columns: images per row; the square root of N, rounded up, by default.
      cell_scale: whole factor by which every pixel is repeated; by default the smallest that makes the shorter side at
        least 96 pixels.

    Returns:
      An RGB `PIL.Image.Image` on white.

    Raises:
      ValueError: for arguments of another type, shape or number.
    """
    with needs_extra("train"):
        from PIL import Image, ImageDraw, ImageFont

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] < 1 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8[N, H, W, 3] with N >= 1, not {images.dtype}{list(images.shape)}")
    count, height, width, _ = images.shape
    if captions is not None and len(captions) != count:
        raise ValueError(f"there are {len(captions)} captions for {count} images")
    columns = min(count, columns or int(np.ceil(np.sqrt(count))))
    scale = cell_scale or max(1, -(-SMALLEST_SIDE // min(height, width)))
    if columns < 1 or scale < 1:
        raise ValueError(f"{columns=} and {cell_scale=} must be at least 1")

    font = ImageFont.load_default(size=12)
    texts = [wrap(caption, width * scale - _PADDING, font.getlength) for caption in captions or [""] * count]
    line_height = sum(font.getmetrics()) + 1 if hasattr(font, "getmetrics") else 12
    text_height = max(len(lines) for lines in texts) * line_height
    cell_width, cell_height = width * scale + _PADDING, height * scale + text_height + _PADDING
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * cell_width + _PADDING, rows * cell_height + _PADDING), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left = _PADDING + index % columns * cell_width
        top = _PADDING + index // columns * cell_height
        large = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(large, (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + height * scale + number * line_height), line, fill="black", font=font)
    return canvas


def wrap(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """Break a text into lines no wider than `width`, between words where that is possible.

    Args:
      text: the text; empty gives no line.
      width: in the unit of `measure`.
      measure: a function str -> float, the width of a line.
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and measure(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while len(line) > 1 and measure(line) > width:
            cut = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or measure(line[:n]) <= width)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line] if line else lines


def save_png(path: str | os.PathLike, image: "Image | np.ndarray") -> None:
    """Write a PNG so that the file is there whole or not at all; the directory is created.

    Args:
      path: ends in ".png".
      image: a PIL image, or uint8[H, W, 3].

    Raises:
      OSError: when it cannot be written; nothing is left behind.
    """
    with needs_extra("train"):
        from PIL import Image

    path = as_path(path)
    pillow_image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            with path.open("wb") as file:
                pillow_image.save(file, format="PNG")
            return
        with temporary_path(path.with_name(f".{secrets.token_hex(8)}.tmp")) as temporary:
            pillow_image.save(temporary, format="PNG")
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write the image: {error.strerror or error}", str(path)) from error
