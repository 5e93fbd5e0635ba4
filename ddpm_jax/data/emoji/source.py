"""The emoji as a source of records."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.emoji.packages import STYLES, licences
from ddpm_jax.data.emoji.records import GROUPS, SPLITS, read_emoji, render, split_of
from ddpm_jax.data.source import Fingerprint, check_index
from ddpm_jax.data.transforms import WHITE, check_colour
from ddpm_jax.extras import needs_extra


class EmojiSource:
    """Emoji in up to four styles, read from the tar files of npm packages.

    A record is

        {"image": uint8[H, W, 3], "key": "google/1F44B-1F3FB", "caption": "waving hand: light skin tone, Google Noto
         emoji style", "label": int32, "style": "google", "concept": "1F44B-1F3FB", "base": "1F44B", "tags": "bye, hi"}

    where the label is the group, an index into `class_names`. Images have 64 x 64 pixels (twitter, google), 256 x 256
    (fluent3d; a few are higher) or `svg_size` (openmoji, which needs the package resvg-py). All variants of a base
    concept, in skin tone, gender and direction, are in the same split.

    The files are read into memory when the source is made, about 55 MB.

    Args:
        path: a directory with the tar files that `npm pack` fetches; docs/data.md has the commands.
        split: "train", "validation", or None for both.
        styles: some of "twitter", "google", "fluent3d" and "openmoji".
        svg_size: side of OpenMoji's images.
        background: a colour for transparent parts, red, green and blue in [0, 255].

    Attributes:
        class_names: the groups.

    Raises:
        ValueError: if an argument is wrong, a package is missing (with the command that fetches it) or broken.
        ModuleNotFoundError: if resvg-py is needed and not installed.
    """

    class_names = GROUPS

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str | None = None,
        styles: Sequence[str] = tuple(STYLES),
        svg_size: int = 256,
        background: Sequence[int] = WHITE,
    ):
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be {', '.join(SPLITS)} or None, got {split!r}")
        if not 1 <= svg_size <= 4096:
            raise ValueError(f"svg_size must be in [1, 4096], got {svg_size}")
        self._root, self._split = Path(path).absolute(), split
        self._styles = (styles,) if isinstance(styles, str) else tuple(styles)
        self._svg_size, self._background = svg_size, check_colour("background", background)
        self._emoji = [
            emoji for emoji in read_emoji(path, self._styles) if split is None or split_of(emoji.concept.base) == split
        ]
        if any(STYLES[style].is_svg for style in self._styles):
            with needs_extra("emoji"):
                import resvg_py  # noqa: F401 (before the first image is read)

    def __len__(self) -> int:
        return len(self._emoji)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Decode or render one record.

        Raises:
            DecodeError: if the image is broken; the message names it.
            IndexError: if index is outside of [0, len).
        """
        emoji = self._emoji[check_index(index, len(self))]
        return {
            "image": render(emoji, self._svg_size, background=self._background),
            "key": emoji.key,
            "caption": emoji.caption,
            "label": np.int32(emoji.concept.group),
            "style": emoji.style,
            "concept": emoji.concept.code,
            "base": emoji.concept.base,
            "tags": ", ".join(emoji.concept.tags),
        }

    def fingerprint(self) -> str:
        """Return a hash of the names and contents of all images, the size of rendered ones, and the background."""
        mark = Fingerprint("emoji 1")
        mark.add(self._svg_size, self._background)
        for emoji in self._emoji:
            mark.add(emoji.key, emoji.caption, emoji.concept.group, emoji.concept.base, list(emoji.concept.tags))
            mark.add_array(np.frombuffer(emoji.data, np.uint8))
        return mark.hexdigest()

    def licences(self) -> dict[str, str]:
        """Return the texts of licences, {file name: text}, which belong beside what is made from the images."""
        return licences(self._root, self._styles)

    def __repr__(self) -> str:
        return f"EmojiSource({str(self._root)!r}, split={self._split!r}, {len(self)} images)"
