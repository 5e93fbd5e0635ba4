"""Descriptions of shape scenes in several phrasings, with synonyms.

The words are chosen so that every phrase has one meaning: `VOCABULARY` is all of them, for a word-level tokenizer.
A caption has at most `MAX_WORDS` words.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ddpm_jax.data.shapes.scenes import Object, Scene

MAX_WORDS = 22

OPENINGS: tuple[str, ...] = ("", "a picture of", "an image of", "a drawing of")

# The first phrase of each entry is the plain one; it is also the one chosen without a generator.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "star": ("star",),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "orange": ("orange",),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "pink": ("pink",),
    "white": ("white",),
    "gray": ("gray", "grey"),
    "black": ("black",),
    "tan": ("tan", "beige"),
    "center": ("in the center", "in the middle", "at the center"),
    "top left": ("in the top left", "in the upper left corner", "at the top left"),
    "top right": ("in the top right", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left", "in the lower left corner", "at the bottom left"),
    "bottom right": ("in the bottom right", "in the lower right corner", "at the bottom right"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
BACKDROPS: tuple[str, ...] = ("on a {} background", "against a {} backdrop", "on {}")

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            word
            for phrase in itertools.chain(OPENINGS, *SYNONYMS.values(), BACKDROPS, ("a", "an"))
            for word in phrase.replace("{}", " ").split()
        }
    )
)


class _Plain:
    """Chooses the first option every time."""

    def choice(self, options: tuple[str, ...]) -> str:
        return options[0]


class _Random:
    """Chooses uniformly; a caption takes all its random numbers from one generator call, which is cheap."""

    def __init__(self, rng: np.random.Generator):
        self._next = iter(rng.random(16).tolist()).__next__

    def choice(self, options: tuple) -> object:
        return options[int(self._next() * len(options))]

    def uniform(self) -> float:
        return self._next()


# Attributes that a training caption of one object, or of two, may leave open.
_OPEN_ONE = (
    *(("size",), ("background",), ("place",)),
    *(("size", "background"), ("size", "place"), ("background", "place")),
    ("size", "background", "place"),
)
_OPEN_TWO = (("size",), ("background",), ("size", "background"))


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeio" else f"a {phrase}"


def _name(thing: Object, choose: _Plain | _Random, with_size: bool) -> str:
    words = [choose.choice(SYNONYMS[thing.colour]), choose.choice(SYNONYMS[thing.shape])]
    if with_size:
        words.insert(0, choose.choice(SYNONYMS[thing.size]))
    return _article(" ".join(words))


def caption(scene: Scene, rng: np.random.Generator | None = None, *, open_fraction: float = 0.0) -> str:
    """Describe a scene.

    Args:
        scene: what to describe.
        rng: chooses phrasing and synonyms; None gives the plain phrasing, such as "a small green star above a large
            red ring on a gray background".
        open_fraction: in [0, 1], of the captions that leave open some or all of size, background and place, if there is
            a generator. The others say everything: sizes, colours, shapes, background, and the place or the relation.

    Returns:
        At most `MAX_WORDS` lower-case words from `VOCABULARY`; a comma may follow a word.
    """
    choose = _Plain() if rng is None else _Random(rng)
    omitted: tuple[str, ...] = ()
    if open_fraction and rng is not None and choose.uniform() < open_fraction:
        omitted = choose.choice(_OPEN_ONE if len(scene.objects) == 1 else _OPEN_TWO)
    opening = choose.choice(OPENINGS)
    names = [_name(thing, choose, "size" not in omitted) for thing in scene.objects]
    ground = choose.choice(BACKDROPS).format(choose.choice(SYNONYMS[scene.background]))
    where = choose.choice(SYNONYMS[scene.relation or scene.place])
    ground_first = choose.choice((False, False, True))
    if scene.relation is not None:
        body = [names[0], where, names[1]]
    else:
        body = [names[0]] if "place" in omitted else [names[0], where]
    if "background" in omitted:
        return " ".join(filter(None, [opening, *body]))
    if ground_first and not opening:
        return f"{ground}, {' '.join(body)}"
    if ground_first and scene.place is not None:
        body.insert(1, ground)
        return " ".join(filter(None, [opening, *body]))
    return " ".join(filter(None, [opening, *body, ground]))
