"""The emoji as records: concepts, names, groups and images, from the packages' tar files."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax.data.decode import DecodeError, decode_image
from ddpm_jax.data.emoji.packages import NAMES, STYLES, broken, check_packages, read_members
from ddpm_jax.data.transforms import WHITE
from ddpm_jax.extras import needs_extra

GROUPS = (
    "smileys-emotion",
    "people-body",
    "component",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
STYLE_NAMES = {"twitter": "Twitter", "google": "Google Noto", "fluent3d": "Fluent 3D", "openmoji": "OpenMoji"}
SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.1
# Gender signs and the arrow of "facing right" behind a joiner; men, women and children; flags that are another flag.
_SUFFIXES = ("200D-2640", "200D-2642", "200D-27A1")
_PERSONS = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
_SAME_FLAGS = {"HM": "AU", "BV": "NO", "SJ": "NO", "CP": "FR", "MF": "FR", "EA": "ES", "UM": "US", "DG": "IO"}
_VARIATION = "FE0F"  # selects the coloured form; the packages do not agree on where to write it
_NAMES_FILE = "package/en/data.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Concept:
    """Concept that an emoji depicts, in any style.

    Attributes:
        code: code points in hexadecimal, "1F44B-1F3FB", without variation selectors.
        base: the code of what it is a variant of, "1F44B": variants in skin tone, gender and direction, and flags of
            one design, have the same, since their images can be equal.
        name: "waving hand: light skin tone".
        tags: further words, "bye", "hello".
        group: index into GROUPS.
    """

    code: str
    base: str
    name: str
    tags: tuple[str, ...]
    group: int


@dataclasses.dataclass(frozen=True, slots=True)
class Emoji:
    """One image of a concept.

    Attributes:
        concept: what it depicts.
        style: a key of `packages.STYLES`.
        data: its PNG, WebP or SVG file.
    """

    concept: Concept
    style: str
    data: bytes

    @property
    def key(self) -> str:
        """The style and the code, "google/1F44B"."""
        return f"{self.style}/{self.concept.code}"

    @property
    def caption(self) -> str:
        """The name and the style in words."""
        return f"{self.concept.name}, {STYLE_NAMES[self.style]} emoji style"


def split_of(base: str) -> str:
    """Return the split of a base concept: "validation" for about a tenth."""
    number = int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big")
    return "validation" if number < VALIDATION_SHARE * 2**64 else "train"


def read_concepts(directory: str | os.PathLike) -> dict[str, Concept]:
    """Return the concepts of the package emojibase-data by code.

    Raises:
        EmojiError: if the package is broken.
    """
    found = dict(read_members(directory, NAMES, _NAMES_FILE.replace(".", r"\.")))
    try:
        entries = json.loads(found[_NAMES_FILE])
        concepts = [concept for entry in entries if "group" in entry for concept in _concepts(entry)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise broken(directory, NAMES, f"{type(error).__name__} in {_NAMES_FILE}") from None
    return {concept.code: concept for concept in concepts}


def read_emoji(directory: str | os.PathLike, styles: tuple[str, ...] = tuple(STYLES)) -> list[Emoji]:
    """Read the emoji of some styles from the packages' tar files in a directory.

    Files that show no Unicode emoji with a name (OpenMoji's extras) are left out. Where a package has two files for
    one concept, the one whose name comes first is taken.

    Args:
        directory: with the tar files that `npm pack` fetches.
        styles: some of "twitter", "google", "fluent3d" and "openmoji".

    Returns:
        The emoji, style by style as given, and by code in each.

    Raises:
        EmojiError: if a package is missing, with the commands that fetch it, or broken.
        ValueError: for an unknown style.
    """
    check_packages(directory, styles)
    concepts = read_concepts(directory)
    return [emoji for style in styles for emoji in _read_style(directory, style, concepts)]


def render(emoji: Emoji, svg_size: int = 256, *, background: Sequence[int] = WHITE) -> np.ndarray:
    """Decode the image of an emoji.

    Args:
        emoji: as read.
        svg_size: side of the images that are rendered from SVG, those of OpenMoji.
        background: a colour for transparent parts, red, green and blue in [0, 255].

    Returns:
        uint8[H, W, 3].

    Raises:
        DecodeError: if the image is broken.
        ModuleNotFoundError: for an SVG image, if the package resvg-py is not installed.
    """
    try:
        data = render_svg(emoji.data, svg_size) if STYLES[emoji.style].is_svg else emoji.data
        return decode_image(data, background=background)
    except DecodeError as error:
        raise DecodeError(f"{emoji.key}: {error}") from None


def render_svg(data: bytes, size: int) -> bytes:
    """Return a PNG file of size x size pixels of a square SVG image.

    Raises:
        DecodeError: if the image is broken, or refers to other files.
        ModuleNotFoundError: if the package resvg-py is not installed.
    """
    with needs_extra("emoji"):
        import resvg_py
    if b"href" in data or b"<!DOCTYPE" in data or b"url(" in data.replace(b"url(#", b""):
        raise DecodeError("an SVG image that refers to other files is not rendered")
    try:
        # No emoji has text, and fonts differ between machines.
        return resvg_py.svg_to_bytes(svg_string=data.decode("utf-8"), width=size, height=size, skip_system_fonts=True)
    except ValueError as error:
        raise DecodeError(f"the SVG image is damaged ({error})") from None


def _concepts(entry: dict[str, Any]) -> list[Concept]:
    """Return the concept of an entry of emojibase, and of its variants in skin tone."""
    base, tags, group = _base(_code(entry["hexcode"])), tuple(entry.get("tags", ())), int(entry["group"])
    if not 0 <= group < len(GROUPS):
        raise ValueError(f"group {group}")
    variants = [entry, *entry.get("skins", ())]
    return [Concept(_code(each["hexcode"]), base, str(each["label"]), tags, group) for each in variants]


def _code(name: str) -> str:
    """Return the one spelling of the code points in a file's name."""
    points = [point.zfill(4) for point in name.upper().replace("_", "-").split("-")]
    code = "-".join(point for point in points if point != _VARIATION)
    tagged = points[-1].startswith("E00") and points[-1] != "E007F"
    return code + "-E007F" if tagged else code  # flags of regions end with a cancel tag, which Fluent Emoji leaves out


def _base(code: str) -> str:
    """Return the code of what a code without skin tones is a variant of."""
    for suffix in _SUFFIXES:
        code = code.replace(f"-{suffix}", "")
    points = code.split("-")
    letters = "".join(chr(int(point, 16) - 0x1F1E6 + ord("A")) for point in points if "1F1E6" <= point <= "1F1FF")
    if len(letters) == 2 and letters in _SAME_FLAGS:
        points = [f"{ord(letter) - ord('A') + 0x1F1E6:X}" for letter in _SAME_FLAGS[letters]]
    return "-".join(_PERSONS.get(point, point) for point in points)


def _read_style(directory: str | os.PathLike, style: str, concepts: dict[str, Concept]) -> list[Emoji]:
    pattern = STYLES[style].images
    found: dict[str, Emoji] = {}
    for name, data in sorted(read_members(directory, STYLES[style], pattern)):
        code = _code(name.rpartition("/")[2].rpartition(".")[0])
        if code in concepts and code not in found:
            found[code] = Emoji(concepts[code], style, data)
    if not found:
        raise broken(directory, STYLES[style], "it has no images")
    return [found[code] for code in sorted(found)]
