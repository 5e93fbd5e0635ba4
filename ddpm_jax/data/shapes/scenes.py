"""Captioned shapes: an unlimited image-text data set that is computed, not downloaded.

A record is a pure function of (seed, split, index): the scene is sampled with a counter-seeded generator, rendered with
antialiased edges, and described by `captions.caption`. Lengths are fractions of the image side, so that the
same scene exists at every resolution from 16 to 256. x grows to the right and y downwards.

Geometry. A shape of radius r fits the square [-r, r]^2 around its centre, its bounding box is centred there, and its
longer side is 2 r (the square is drawn a little smaller, 2 * 0.86 r, to look as big as the circle). With the signed
distance d in pixels (negative inside), a pixel's coverage is clip(1/2 - d, 0, 1): a one-pixel linear edge.

Held out of training: eight of the 64 (colour, shape) pairs, one for each colour and each shape, and 16 of the 128
relations between shapes ("A above B" and "B below A" are one relation). The training split yields none of them.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import numpy as np

from ddpm_jax.data.shapes.captions import caption

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "green": (25, 150, 50),
    "blue": (30, 60, 225),
    "yellow": (250, 230, 30),
    "orange": (250, 130, 10),
    "purple": (120, 20, 160),
    "cyan": (30, 215, 235),
    "pink": (255, 105, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (12, 12, 12),
    "tan": (205, 185, 145),
}
SIZES: dict[str, float] = {"small": 0.13, "large": 0.21}  # radius as a fraction of the image's side
PLACES: dict[str, tuple[float, float]] = {
    "center": (0.5, 0.5),
    "top left": (0.295, 0.295),
    "top right": (0.705, 0.295),
    "bottom left": (0.295, 0.705),
    "bottom right": (0.705, 0.705),
}
RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")
VERSION = 2  # of what is generated for a seed; part of the fingerprint
SPLITS: tuple[str, ...] = ("train", "single", "held_out", "two", "two_held_out")

_PLACE_JITTER = {"center": 0.06}  # half-width of the square a centre is sampled from; 0.045 for the corners
_CORNER_JITTER = 0.045
_PLACE_BORDER = 0.11  # |coordinate - 1/2| below this reads as the middle, above it as a side
_MARGIN = 0.035  # least distance of an object to the frame
_GAP = 0.08  # least distance between the bounding boxes of two objects, along their relation's axis
_MAX_LENGTH = 2**31 - 1


# --- shapes: signed distances at radius one; x is [1, W], y is [H, 1] or anything that broadcasts ---


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 1.0


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    half = 0.75**0.5  # half the height of the equilateral triangle with side 2
    return np.maximum(half * np.abs(x) - 0.5 * (y + half), y - half)


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    width = 0.72
    return (np.abs(x) + width * np.abs(y) - width) / (1.0 + width * width) ** 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # One edge, from a tip (1, 0) to an inner corner, after folding the plane onto a tenth of it.
    scale, inner, sector = 1.0515, 0.45, 2 * np.pi / 5
    y = y - 0.1004  # centres the bounding box: the tips reach up to -1 but down to cos(36 deg) only
    rho = np.sqrt(x * x + y * y) / scale
    angle = np.arctan2(x, -y)
    angle = angle - sector * np.rint(angle / sector)
    normal = np.array([inner * np.sin(sector / 2), 1 - inner * np.cos(sector / 2)])
    normal *= scale / np.hypot(*normal)
    return (rho * np.cos(angle) - 1.0) * float(normal[0]) + rho * np.abs(np.sin(angle)) * float(normal[1])


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.75) - 0.25


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1.0, y - 0.34), np.maximum(x - 0.34, y - 1.0))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A square standing on a corner, with a disc on each of its upper sides.
    side = 1.0 / (0.5 + 0.125**0.5)
    shift = 0.125**0.5 * side
    x, y = np.abs(x), y - 0.0858
    square = (x + np.abs(y)) * 0.5**0.5 - side / 2
    disc = np.sqrt((x - shift) ** 2 + (y + shift) ** 2) - side / 2
    return np.minimum(square, disc)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}

HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "star"),
        ("green", "ring"),
        ("blue", "triangle"),
        ("yellow", "heart"),
        ("orange", "square"),
        ("purple", "circle"),
        ("cyan", "cross"),
        ("pink", "diamond"),
    }
)


def _held_out_relations() -> frozenset[tuple[str, str, str]]:
    names, held = tuple(SHAPES), set()
    for i, first in enumerate(names):
        for relation, opposite, step in (("above", "below", 3), ("left of", "right of", 5)):
            second = names[(i + step) % len(names)]
            held |= {(first, relation, second), (second, opposite, first)}
    return frozenset(held)


HELD_OUT_RELATIONS: frozenset[tuple[str, str, str]] = _held_out_relations()

_TRAIN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS)
_HELD_PAIRS = tuple(sorted(HELD_OUT_PAIRS))
_HELD_TRIPLES = tuple(sorted(HELD_OUT_RELATIONS))


# --- scenes ---


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape of a scene.

    Attributes:
        shape, colour, size: names from SHAPES, COLOURS and SIZES.
        x, y: its centre in [0, 1], y downwards.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """Content of an image of shapes.

    Attributes:
        objects: one object, or two that differ in (colour, shape).
        background: a name from BACKGROUNDS.
        relation: for two objects, where the first is as seen from the second (a name from RELATIONS); None for one.
        place: for one object, a name from PLACES; None for two.
    """

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None
    place: str | None = None


def place_of(x: float, y: float) -> str | None:
    """Return the name of the place of a centre (x, y) in [0, 1]^2, or None between the named places."""
    column = "left" if x < 0.5 - _PLACE_BORDER else "right" if x > 0.5 + _PLACE_BORDER else "center"
    row = "top" if y < 0.5 - _PLACE_BORDER else "bottom" if y > 0.5 + _PLACE_BORDER else "center"
    name = "center" if row == column else f"{row} {column}"
    return name if name in PLACES else None


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Return where centre `first` = (x, y) lies as seen from `second`, by the longer of the two differences."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


class _Draws:
    """Uniform numbers sampled in one call: one Generator call per attribute would cost more than the rendering."""

    def __init__(self, rng: np.random.Generator):
        self._next = iter(rng.random(24).tolist()).__next__

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self._next()

    def choice(self, options: tuple) -> object:
        return options[int(self._next() * len(options))]


_SIZE_NAMES, _BACKGROUND_NAMES, _PLACE_NAMES = tuple(SIZES), tuple(BACKGROUNDS), tuple(PLACES)


def _one_object(draws: _Draws, pairs: tuple[tuple[str, str], ...]) -> Scene:
    colour, shape = draws.choice(pairs)
    size, background, place = draws.choice(_SIZE_NAMES), draws.choice(_BACKGROUND_NAMES), draws.choice(_PLACE_NAMES)
    x, y = PLACES[place]
    jitter = _PLACE_JITTER.get(place, _CORNER_JITTER)
    x, y = x + draws.uniform(-jitter, jitter), y + draws.uniform(-jitter, jitter)
    return Scene((Object(shape, colour, size, x, y),), background, place=place)


def _two_pairs(draws: _Draws, held_out: bool) -> tuple[tuple[str, str], str, tuple[str, str]]:
    """Return ((colour, shape), relation, (colour, shape)); the pairs are training pairs, whatever the relation is."""
    if held_out:
        first_shape, relation, second_shape = draws.choice(_HELD_TRIPLES)
        first = draws.choice(tuple(p for p in _TRAIN_PAIRS if p[1] == first_shape))
        second = draws.choice(tuple(p for p in _TRAIN_PAIRS if p[1] == second_shape))
        return first, relation, second
    i = int(draws.uniform(0, len(_TRAIN_PAIRS)))
    j = int(draws.uniform(0, len(_TRAIN_PAIRS) - 1))
    first, second = _TRAIN_PAIRS[i], _TRAIN_PAIRS[j + (j >= i)]
    allowed = tuple(r for r in RELATIONS if (first[1], r, second[1]) not in HELD_OUT_RELATIONS)
    return first, draws.choice(allowed), second


def _two_objects(draws: _Draws, held_out: bool) -> Scene:
    first, relation, second = _two_pairs(draws, held_out)
    sizes = draws.choice(_SIZE_NAMES), draws.choice(_SIZE_NAMES)
    background = draws.choice(_BACKGROUND_NAMES)
    # Along the axis: object `near` has the smaller coordinate; the remaining space is divided at random.
    near, far = (0, 1) if relation in ("above", "left of") else (1, 0)
    apart = SIZES[sizes[0]] + SIZES[sizes[1]] + _GAP
    slack = 1.0 - 2 * _MARGIN - 2 * apart + _GAP
    shares = sorted((draws.uniform(0.0, slack), draws.uniform(0.0, slack)))
    along = [0.0, 0.0]
    along[near] = _MARGIN + SIZES[sizes[near]] + shares[0]
    along[far] = along[near] + apart + shares[1] - shares[0]
    across = draws.uniform(0.35, 0.65)
    across = across + draws.uniform(-0.06, 0.06), across + draws.uniform(-0.06, 0.06)
    xs, ys = (across, along) if relation in ("above", "below") else (along, across)
    objects = tuple(Object(pair[1], pair[0], sizes[k], xs[k], ys[k]) for k, pair in enumerate((first, second)))
    return Scene(objects, background, relation=relation)


def _generator(seed: int, split: str, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, SPLITS.index(split), index))))


def _draw_scene(rng: np.random.Generator, split: str, two_fraction: float) -> Scene:
    draws = _Draws(rng)
    if split == "train":
        split = "two" if draws.uniform() < two_fraction else "single"
    if split in ("two", "two_held_out"):
        return _two_objects(draws, held_out=split == "two_held_out")
    return _one_object(draws, _HELD_PAIRS if split == "held_out" else _TRAIN_PAIRS)


def _check_split(seed: int, split: str, two_fraction: float) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    if seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed}.")
    if not 0.0 <= two_fraction <= 1.0:
        raise ValueError(f"two_fraction must lie in [0, 1], got {two_fraction}.")


def scene_from(seed: int, index: int, *, split: str = "train", two_fraction: float = 0.4) -> Scene:
    """Sample the scene of one record; see `ShapesSource` for the splits."""
    _check_split(seed, split, two_fraction)
    return _draw_scene(_generator(seed, split, index), split, two_fraction)


# --- rendering ---


def coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the covered fraction of pixels, clip(1/2 - signed distance, 0, 1).

    Args:
        shape: a name from SHAPES.
        radius: in pixels.
        x: [W] horizontal offsets of pixel centres from the shape's centre, in pixels.
        y: [H] vertical offsets, downwards.

    Returns:
        float32[H, W] in [0, 1].
    """
    x, y = np.asarray(x, np.float32) / np.float32(radius), np.asarray(y, np.float32) / np.float32(radius)
    distance = SHAPES[shape](x[None, :], y[:, None])
    return np.minimum(np.maximum(0.5 - distance * np.float32(radius), 0.0), 1.0)


def check_resolution(resolution: int) -> None:
    """Raise ValueError unless 16 <= resolution <= 256."""
    if not 16 <= resolution <= 256:
        raise ValueError(f"resolution must lie between 16 and 256, got {resolution}.")


@functools.lru_cache(maxsize=64)
def _blank(background: str, resolution: int) -> np.ndarray:
    return np.full((resolution, resolution, 3), BACKGROUNDS[background], np.uint8)


def render(scene: Scene, resolution: int) -> np.ndarray:
    """Render a scene.

    Args:
        scene: what to render.
        resolution: side R of the image in pixels, 16 to 256.

    Returns:
        uint8[R, R, 3].

    Raises:
        ValueError: if the resolution is out of range.
    """
    check_resolution(resolution)
    image = _blank(scene.background, resolution).copy()
    for thing in scene.objects:
        radius = SIZES[thing.size] * resolution
        cx, cy = thing.x * resolution - 0.5, thing.y * resolution - 0.5  # in units where pixel k has its centre at k
        left, right = max(0, int(cx - radius)), min(resolution, int(cx + radius) + 2)
        top, bottom = max(0, int(cy - radius)), min(resolution, int(cy + radius) + 2)
        alpha = coverage(thing.shape, radius, np.arange(left, right) - cx, np.arange(top, bottom) - cy)[..., None]
        patch = image[top:bottom, left:right].astype(np.float32)
        colour = np.asarray(COLOURS[thing.colour], np.float32)
        image[top:bottom, left:right] = patch + alpha * (colour - patch) + 0.5  # + 0.5: the cast to uint8 truncates
    return image


class ShapesSource:
    """A random-access source of captioned shapes (a Grain `RandomAccessDataSource`).

    Args:
        seed: non-negative; another seed is another data set.
        resolution: side of the images, 16 to 256.
        split: "train" (a mix of one- and two-object scenes without anything held out, some of whose captions leave
            something open), or one of the evaluation splits, which say everything and use random streams of
            their own: "single" (one object, a training pair), "held_out" (one object, a held-out pair), "two" (two
            objects, a training relation), "two_held_out" (training pairs in a held-out relation).
        length: what `len` returns; records 0 .. length - 1 exist.
        two_fraction: fraction of two-object scenes in the split "train".
        open_fraction: fraction of its captions that leave open some or all of size, background and place.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        seed: int,
        resolution: int,
        split: str = "train",
        *,
        length: int = _MAX_LENGTH,
        two_fraction: float = 0.4,
        open_fraction: float = 0.25,
    ):
        _check_split(seed, split, two_fraction)
        if not 0.0 <= open_fraction <= 1.0:
            raise ValueError(f"open_fraction must lie in [0, 1], got {open_fraction}.")
        check_resolution(resolution)
        if not 1 <= length <= _MAX_LENGTH:
            raise ValueError(f"length must lie between 1 and 2**31 - 1, got {length}.")
        self.seed, self.resolution, self.split = seed, resolution, split
        self.length, self.two_fraction, self.open_fraction = length, two_fraction, open_fraction

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return (
            f"ShapesSource(seed={self.seed}, resolution={self.resolution}, split={self.split!r}, "
            f"length={self.length}, two_fraction={self.two_fraction}, open_fraction={self.open_fraction})"
        )

    def fingerprint(self) -> str:
        """Return a text that differs if the records differ."""
        return f"{self!r}, version {VERSION}"

    def _index(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"index must lie in [0, {self.length}), got {index}.")
        return index

    def scene(self, index: int) -> Scene:
        """Return the scene of record `index`."""
        return scene_from(self.seed, self._index(index), split=self.split, two_fraction=self.two_fraction)

    def __getitem__(self, index: int) -> dict:
        """Return {"image": uint8[R, R, 3], "caption": str, "index": int64}."""
        index = self._index(index)
        rng = _generator(self.seed, self.split, index)
        scene = _draw_scene(rng, self.split, self.two_fraction)
        text = caption(scene, rng, open_fraction=self.open_fraction if self.split == "train" else 0.0)
        return {"image": render(scene, self.resolution), "caption": text, "index": np.int64(index)}
