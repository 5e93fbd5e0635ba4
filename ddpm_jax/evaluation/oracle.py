"""Read the attributes of a shapes image back from its pixels, by analysis and without a network.

Steps: the background is the median of the image's border; what differs from it falls into connected components; a
component's colour is the palette entry C that best explains its pixels as mixtures p = B + a (C - B); the fitted
coverage a is compared, in the least-squares sense, with a bank of coverage maps of every shape and size at every
quarter-pixel position (and 7 % smaller and larger), made by the renderer itself.
A component that no map resembles is unreadable (shape None).

Meant for resolutions from 32 up: at 16 a small object is four pixels wide, and some shapes look the same.
"""

import dataclasses
import functools
import itertools

import numpy as np

from ddpm_jax.data.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, coverage
from ddpm_jax.extras import needs_extra

with needs_extra("train"):
    from scipy import ndimage

FOREGROUND = 45.0  # RGB distance from the background that makes a pixel foreground
SPECK = 5 / 32**2  # a smaller component (as a fraction of the image) is dirt, not an object
COLOUR_TOLERANCE = 45.0  # root-mean-square RGB distance of a readable component to its palette mixture
BACKGROUND_TOLERANCE = 45.0  # RGB distance of the border's median to a palette entry
SHAPE_TOLERANCE = 0.10  # squared residual over squared norm of the coverage map
SIZE_TOLERANCE = 1.4  # ratio of a component's extent to a size's diameter within which it may have that size
_SCALES = (0.93, 1.0, 1.07)  # of the radius: a generated shape may be a little too small or too large
_BLAS_BLOCK = 2**18  # multiplications from which OpenBLAS uses several threads
_PHASES = 4  # positions per pixel and axis in the bank

_COLOUR_NAMES, _COLOUR_RGB = tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)
_BACKGROUND_NAMES, _BACKGROUND_RGB = tuple(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), np.float32)


@dataclasses.dataclass(frozen=True)
class ReadObject:
    """Shape that was recognised in an image.

    Attributes:
        shape, colour, size: names, or None for what was not recognised.
        x, y: its centre in [0, 1].
        residual: squared error of the best shape, relative to the squared norm of the component.
    """

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """Content that was recognised in an image.

    Attributes:
        background: a colour's name, or None if it is no palette colour.
        objects: the largest first.
    """

    background: str | None
    objects: tuple[ReadObject, ...]


@dataclasses.dataclass(frozen=True)
class _Bank:
    """Coverage maps of one resolution and size.

    `maps` is float32[K, W * W] for a window of W pixels, `norms` its squared row norms, `shapes` the names of the rows
    and `offsets` float[K, 2] the (x, y) position of the shape's centre relative to the window's middle pixel.
    """

    window: int
    maps: np.ndarray
    norms: np.ndarray
    shapes: tuple[str, ...]
    offsets: np.ndarray


@functools.lru_cache(maxsize=16)
def _bank(resolution: int, size: str) -> _Bank:
    radius = SIZES[size] * resolution
    half = int(np.ceil(max(_SCALES) * radius)) + 1
    grid = np.arange(-half, half + 1)
    phases = (np.arange(_PHASES) + 0.5) / _PHASES - 0.5
    rows = list(itertools.product(SHAPES, _SCALES, phases, phases))
    maps = [coverage(shape, scale * radius, grid - px, grid - py).ravel() for shape, scale, py, px in rows]
    table = np.stack(maps).astype(np.float32)
    offsets = np.array([(px, py) for _, _, py, px in rows])
    return _Bank(2 * half + 1, table, np.square(table).sum(1), tuple(row[0] for row in rows), offsets)


def _fit_colour(pixels: np.ndarray, background: np.ndarray) -> tuple[int, float]:
    """Return the palette index that explains pixels float[N, 3] best, and the root-mean-square distance that stays."""
    towards = _COLOUR_RGB - background  # [8, 3]
    shifted = pixels - background
    alpha = np.clip(shifted @ towards.T / np.square(towards).sum(1), 0.0, 1.0)  # [N, 8]
    errors = np.square(shifted[:, None, :] - alpha[..., None] * towards).sum((0, 2))
    best = int(np.argmin(errors))
    return best, float(np.sqrt(errors[best] / len(pixels)))


def _products(windows: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Return windows @ maps.T, by blocks small enough for BLAS to stay on one thread.

    Waking threads for so small a product costs more than it saves, and ten times as much on a busy machine.
    """
    rows = max(1, _BLAS_BLOCK // windows.size)
    return np.concatenate([windows @ maps[k : k + rows].T for k in range(0, len(maps), rows)], axis=1)


def _fit_shape(alpha: np.ndarray, middle: tuple[int, int], bank: _Bank) -> tuple[float, str, float, float]:
    """Return the least relative residual, its shape, and the fitted centre x, y in pixel coordinates.

    `alpha` is float32[R, R], zero outside the component; `middle` is the pixel (row, column) to search around. The gain
    of the coverage may lie in [0.8, 1.25], since a generated colour is rarely the exact one.
    """
    search = 1 + len(alpha) // 128  # whole pixels to either side
    reach = bank.window // 2 + search
    row, column = middle
    padded = np.pad(alpha, reach)[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (bank.window, bank.window))
    side = windows.shape[0]
    energy = np.square(alpha).sum()  # of the whole component: what no window shows stays unexplained
    products = _products(windows.reshape(side * side, -1), bank.maps)  # [shifts, K]
    gain = np.clip(products / bank.norms, 0.8, 1.25)
    residual = (energy - 2 * gain * products + gain**2 * bank.norms) / bank.norms
    shift, best = np.unravel_index(int(np.argmin(residual)), residual.shape)
    dy, dx = divmod(int(shift), side)
    x, y = bank.offsets[best] + (column + dx - search, row + dy - search)
    return max(0.0, float(residual[shift, best])), bank.shapes[best], float(x), float(y)


def _size_errors(extent: int, resolution: int) -> dict[str, float]:
    """Return for each size how far its diameter is from an extent in pixels, as a ratio >= 1."""
    diameters = {size: 2 * radius * resolution for size, radius in SIZES.items()}
    return {size: max(extent / diameter, diameter / extent) for size, diameter in diameters.items()}


def _read_object(image: np.ndarray, mask: np.ndarray, box: tuple[slice, slice], background: np.ndarray) -> ReadObject:
    resolution = len(image)
    colour, error = _fit_colour(image[mask], background)
    name = _COLOUR_NAMES[colour] if error <= COLOUR_TOLERANCE else None
    # The faint edge pixels below the foreground threshold belong to the shape too.
    around = ndimage.binary_dilation(mask, np.ones((3, 3), bool))
    towards = _COLOUR_RGB[colour] - background
    alpha = np.where(around, (image - background) @ towards / np.square(towards).sum(), 0.0).astype(np.float32)
    top, bottom, left, right = box[0].start, box[0].stop - 1, box[1].start, box[1].stop - 1
    middle = (top + bottom + 1) // 2, (left + right + 1) // 2
    errors = _size_errors(max(bottom - top, right - left) + 1, resolution)
    nearest = min(errors, key=errors.get)
    fits = [
        (*_fit_shape(alpha, middle, _bank(resolution, size)), size)
        for size, ratio in errors.items()
        if size == nearest or ratio <= SIZE_TOLERANCE
    ]
    residual, shape, x, y, size = min(fits)
    if residual > SHAPE_TOLERANCE:
        shape, size = None, nearest if errors[nearest] <= SIZE_TOLERANCE else None
        x, y = (left + right) / 2, (top + bottom) / 2
    return ReadObject(shape, name, size, (x + 0.5) / resolution, (y + 0.5) / resolution, residual)


def read(image: np.ndarray) -> Reading:
    """Read an image.

    Args:
        image: uint8[R, R, 3], R >= 32.

    Returns:
        The `Reading`. Nothing is assumed about the number of objects: every component that is more than a speck is
        one, readable or not.

    Raises:
        ValueError: if the image is not square, uint8 and of side 32 or more.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"image must be uint8[R, R, 3], got {image.dtype}{list(image.shape)}.")
    if len(image) < 32:
        raise ValueError(f"image must be at least 32 pixels wide to be readable, got {len(image)}.")
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(border, axis=0)
    distances = np.linalg.norm(_BACKGROUND_RGB - background, axis=1)
    name = _BACKGROUND_NAMES[int(np.argmin(distances))] if distances.min() <= BACKGROUND_TOLERANCE else None
    foreground = np.square(pixels - background).sum(-1) > FOREGROUND**2
    labels, _ = ndimage.label(foreground, np.ones((3, 3), int))
    least = SPECK * foreground.size
    areas = np.bincount(labels.ravel())
    boxes = ndimage.find_objects(labels)
    order = [k for k in sorted(range(1, len(areas)), key=lambda k: -areas[k]) if areas[k] >= least]
    return Reading(name, tuple(_read_object(pixels, labels == k, boxes[k - 1], background) for k in order))
