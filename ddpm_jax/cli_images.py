"""Images that commands read and write."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddpm_jax import cli
from ddpm_jax.errors import counted


def image_parts(path: str, *, what: str, size: int = 256) -> Iterator[tuple[list[np.ndarray], list[str]]]:
    """Yield the images of a file or a folder, uint8[H, W, 3] each, and their names, at most `size` at a time.

    Raises:
        UsageError: naming the flag `what`, if one is missing or cannot be decoded.
    """
    from ddpm_jax.data.decode import decode_image
    from ddpm_jax.data.image_folder import ImageFolder
    from ddpm_jax.data.source import RecordError

    cli.check_exists(path, what=what)
    try:
        if not Path(path).is_dir():
            yield [decode_image(Path(path).read_bytes())], [Path(path).name]
            return
        folder = ImageFolder(path, captions=None, labels=False)
        for start in range(0, len(folder), size):
            records = [folder[index] for index in range(start, min(start + size, len(folder)))]
            yield [record["image"] for record in records], [record["key"] for record in records]
    except (RecordError, ValueError) as error:
        raise cli.UsageError(f"{what}={path}: {error}") from error


def count_images(path: str, *, what: str) -> int:
    """Return the number of images of a file or a folder, without reading them; raises as `image_parts`."""
    from ddpm_jax.data.image_folder import ImageFolder

    cli.check_exists(path, what=what)
    try:
        return len(ImageFolder(path, captions=None, labels=False)) if Path(path).is_dir() else 1
    except ValueError as error:
        raise cli.UsageError(f"{what}={path}: {error}") from error


def read_images(paths: Sequence[str], *, what: str) -> tuple[list[np.ndarray], list[str]]:
    """Return all images of files and folders, and their names; see `image_parts`."""
    parts = [part for path in paths for part in image_parts(path, what=what)]
    return [image for images, _ in parts for image in images], [name for _, names in parts for name in names]


def write_rows(
    out: str,
    images: np.ndarray,
    texts: Sequence[str],
    *,
    inputs: Sequence[np.ndarray] = (),
    names: Sequence[str] = (),
    out_dir: str | None = None,
) -> None:
    """Write a grid with a row of images for each input.

    Args:
        out: a PNG file.
        images: uint8[N, K, H, H, C] with 1 or 3 channels.
        texts: K, what stands below the images.
        inputs: N images of any sizes, in the first column, or more, of which each row has the first ones; or none.
        names: of the inputs.
        out_dir: directory of a PNG file for each image, or None.
    """
    from ddpm_jax.data import image_grid
    from ddpm_jax.data.transforms import resize_center_crop

    if images.shape[-1] not in (1, 3):
        raise cli.UsageError(f"images of {images.shape[-1]} channels cannot be written as PNG; edit them in Python")
    images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    rows, texts = images, [list(texts)] * len(images)
    if len(inputs):
        first = resize_center_crop(inputs[: len(images)], images.shape[2])
        rows = np.concatenate([first[:, None], images], axis=1)
        texts = [[name, *below] for name, below in zip(names, texts)]
    flat, captions = rows.reshape(-1, *rows.shape[2:]), [text for row in texts for text in row]
    image_grid.save_png(out, image_grid.grid(flat, captions, columns=rows.shape[1]))
    if out_dir is not None:
        for row, column in np.ndindex(*images.shape[:2]):
            image_grid.save_png(f"{out_dir}/{row:03d}_{column:03d}.png", images[row, column])
    count = counted(images.shape[0] * images.shape[1], "image")
    cli.show(f"wrote {out}: {count} of {images.shape[2]} x {images.shape[3]} pixels")
