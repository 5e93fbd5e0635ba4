"""GLIDE's tokenizer: GPT-2's byte-pair encoding of lower-cased text.

It is called like those of `data.tokenizer`, but there is no start and no end: a caption is its tokens and padding, and
the unconditional caption is padding alone. Radford et al. (2019), "Language Models are Unsupervised Multitask
Learners", section 2.2.
"""

import functools
import gzip
import itertools
import json
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.tokenizer import byte_symbols
from ddpm_jax.extras import needs_extra

_MOST = 1 << 22  # characters of a file after it is unpacked; GLIDE's have one million and half a million
_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class GlideTokenizer:
    """The tokenizer of GLIDE's base network and its upsamplers, from the two files of its repository.

    The text is lower-cased and nothing else: white space counts, and the names of special tokens are ordinary text.
    (GLIDE's noised CLIP reads captions by `ClipTokenizer()`.) Needs the package regex.

    Args:
        directory: where encoder.json.gz and vocab.bpe.gz are, glide_text2im/tokenizer in a copy of
            github.com/openai/glide-text2im.

    Attributes:
        vocab_size: number of ids, 50257 in GLIDE's files.
        pad: the last id.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged, or not such a file, or the two do not belong together.
    """

    def __init__(self, directory: str | Path):
        with needs_extra("train"):
            import regex

        self._directory = Path(directory)
        self._id = _read(self._directory / "encoder.json.gz", _vocabulary)
        merges = _read(self._directory / "vocab.bpe.gz", _merges)
        lost = [symbol for symbol in map("".join, merges) if symbol not in self._id]
        if lost:
            raise ValueError(
                f"the files in {self._directory} do not belong together: vocab.bpe.gz makes {lost[0]!r}, "
                "which encoder.json.gz has no id for"
            )
        self.vocab_size = len(self._id)
        self.pad = self.vocab_size - 1
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._symbols = sorted(self._id, key=self._id.get)
        self._bytes = byte_symbols()
        self._pattern = regex.compile(_PATTERN)
        self._word_ids = functools.lru_cache(maxsize=65536)(self._merge)

    def __reduce__(self):
        return GlideTokenizer, (self._directory,)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [i for word in self._pattern.findall(text.lower()) for i in self._word_ids(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first padding; in lower case."""
        values = {symbol: byte for byte, symbol in self._bytes.items()}
        kept = itertools.takewhile(lambda i: i != self.pad, map(int, ids))
        return bytes(values[char] for i in kept for char in self._symbols[i]).decode("utf-8", errors="replace")

    def __call__(self, texts: Sequence[str], length: int = 128) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts.

        Args:
            texts: B strings.
            length: L, tokens per text; 128 in GLIDE's networks. A text that is too long is cut with a warning.

        Returns:
            tokens int32[B, L], filled with the last id, and mask bool[B, L], True on the tokens of the text.

        Raises:
            ValueError: for a text without words; `null` is the unconditional caption.
            TypeError: if `texts` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string.")
        tokens, masks = self._filled(len(texts), length)
        for row, mask, text in zip(tokens, masks, texts, strict=True):
            if not text.strip():
                raise ValueError("the text is empty: say what to show, in at least one word.")
            ids = self.ids(text)
            if len(ids) > length:
                shown = text if len(text) <= 40 else text[:37] + "..."
                warnings.warn(f'the text "{shown}" is {len(ids)} tokens, cut to {length}.', stacklevel=2)
            mask[: len(ids)] = True
            row[mask] = ids[:length]
        return tokens, masks

    def null(self, length: int = 128) -> tuple[np.ndarray, np.ndarray]:
        """Return (int32[1, L], bool[1, L]) of the unconditional caption: padding alone, and a mask that is False."""
        return self._filled(1, length)

    def _filled(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}.")
        return np.full((count, length), self.pad, np.int32), np.zeros((count, length), bool)

    def _merge(self, word: str) -> tuple[int, ...]:
        parts = [self._bytes[byte] for byte in word.encode("utf-8")]
        unranked = len(self._ranks)
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, unranked))
            if best not in self._ranks:
                break
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return tuple(self._id[part] for part in parts)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"directory has no {path.name}: {path} must be that of glide_text2im/tokenizer in github.com/openai/"
            "glide-text2im"
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = file.read(_MOST + 1)
        if len(text) > _MOST:
            raise ValueError(f"it has more than {_MOST} characters")
        return parse(text)
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not GLIDE's {path.name}: {error}") from None


def _vocabulary(text: str) -> dict[str, int]:
    """Return the id of each symbol."""
    found = json.loads(text)
    if not isinstance(found, dict) or sorted(map(str, found.values())) != sorted(map(str, range(len(found)))):
        raise ValueError("it must give each symbol one of the ids 0, 1, 2, ...")
    lost = [symbol for symbol in byte_symbols().values() if symbol not in found]
    if lost:
        raise ValueError(f"it has no id for {len(lost)} of the 256 bytes, {lost[0]!r} among them")
    return found


def _merges(text: str) -> list[tuple[str, str]]:
    """Return the pairs, the first to be merged first."""
    version, *lines = text.split("\n")
    pairs = [tuple(line.split()) for line in lines if line]
    if not version.startswith("#version") or any(len(pair) != 2 for pair in pairs):
        raise ValueError("it must be a line #version and then two symbols a line")
    return pairs
