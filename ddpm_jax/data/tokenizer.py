"""Tokenizers: CLIP's byte-pair encoding, and a word-level one for small vocabularies.

Both are called alike, `tokens, mask = tokenizer(texts, length)`, and write `sot words... eot pad...`; a text that is
too long is cut with a warning and keeps its eot.

The merges in `bpe_simple_vocab_16e6.txt.gz` are those of OpenAI's CLIP (https://github.com/openai/CLIP, MIT licence,
see NOTICE). Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision", section
2.4; byte-pair encoding: Sennrich et al. (2016), algorithm 1, on bytes instead of characters.
"""

import abc
import difflib
import functools
import gzip
import html
import itertools
import pathlib
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from ddpm_jax.extras import needs_extra

_CLIP_FILE = pathlib.Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_CLIP_SIZE = 49408  # 2 * 256 byte symbols, 48894 merges, start and end of text
_CLIP_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""


class Tokenizer(abc.ABC):
    """Base class of the tokenizers.

    Attributes:
        vocab_size: number of ids, the special ones included.
        sot, eot, pad: ids of the start, the end and the filling.
    """

    vocab_size: int
    sot: int
    eot: int
    pad: int

    @abc.abstractmethod
    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without sot and eot."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first eot, without sot; normalised, not the original spelling."""

    @abc.abstractmethod
    def to_config(self) -> dict:
        """Return plain data from which `tokenizer_from_config` makes this tokenizer again."""

    def __reduce__(self):
        return tokenizer_from_config, (self.to_config(),)

    def _row(self, ids: list[int], text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        if length < 3:
            raise ValueError(f"length must be at least 3 (start, one token, end), got {length}.")
        if len(ids) + 2 > length:
            shown = text if len(text) <= 40 else text[:37] + "..."
            # Level 4 is the caller of tokenizer(texts, length).
            warnings.warn(f'the text "{shown}" is {len(ids) + 2} tokens, cut to {length}.', stacklevel=4)
            ids = ids[: length - 2]
        tokens, mask = np.full(length, self.pad, np.int32), np.zeros(length, bool)
        tokens[: len(ids) + 2] = [self.sot, *ids, self.eot]
        mask[: len(ids) + 2] = True
        return tokens, mask

    def _encode(self, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.ids(text)
        if not ids:
            raise ValueError("the text is empty: say what to show, in at least one word.")
        return self._row(ids, text, length)

    def __call__(self, texts: Sequence[str], length: int = 77) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts.

        Args:
            texts: B strings.
            length: L, tokens per text, sot and eot included.

        Returns:
            tokens int32[B, L] and mask bool[B, L], True on sot, the words and eot.

        Raises:
            ValueError: for a text without words, and by the word-level tokenizer for an unknown word.
            TypeError: if `texts` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string.")
        tokens, masks = np.empty((len(texts), length), np.int32), np.empty((len(texts), length), bool)
        for i, text in enumerate(texts):
            tokens[i], masks[i] = self._encode(text, length)
        return tokens, masks

    def encode(self, text: str, length: int = 77) -> np.ndarray:
        """Encode one text as int32[L]."""
        return self._encode(text, length)[0]

    def null(self, length: int = 77) -> tuple[np.ndarray, np.ndarray]:
        """Return (int32[1, L], bool[1, L]) of the text without words, which conditions an unconditional branch."""
        tokens, mask = self._row([], "", length)
        return tokens[None], mask[None]


def byte_symbols() -> dict[int, str]:
    """Return the printable character that stands for each byte in the merges file.

    Printable Latin-1 bytes stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in symbols]
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@functools.lru_cache(maxsize=1)
def _clip_tables() -> tuple[dict[tuple[str, str], int], tuple[str, ...]]:
    """Return the rank of each merge and the symbol of each id."""
    # Order of the ids: bytes (printable ones first), the same at a word's end, merges, specials.
    single = list(byte_symbols().values())
    wanted = _CLIP_SIZE - 2 * len(single) - 2
    with gzip.open(_CLIP_FILE, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + wanted]  # the first line is a version
    merges = [tuple(line.split()) for line in lines]
    symbols = single + [s + "</w>" for s in single] + ["".join(pair) for pair in merges]
    return {pair: rank for rank, pair in enumerate(merges)}, (*symbols, "<|startoftext|>", "<|endoftext|>")


class ClipTokenizer(Tokenizer):
    """CLIP's tokenizer: lower-cased byte-pair encoding with 49408 ids.

    The text is repaired by ftfy, HTML-unescaped twice, and its white space collapsed, as in OpenAI's code. The names of
    the special tokens in a text are ordinary text. Needs the packages regex and ftfy.

    Args:
        pad: 0 as OpenAI and open_clip fill up, or "eot" as Hugging Face does. 0 is also the id of "!".

    Raises:
        ValueError: if `pad` is neither.
    """

    vocab_size, sot, eot = _CLIP_SIZE, _CLIP_SIZE - 2, _CLIP_SIZE - 1

    def __init__(self, *, pad: int | str = 0):
        if pad not in (0, "eot"):
            raise ValueError(f'pad must be 0 or "eot", got {pad!r}.')
        with needs_extra("train"):
            import regex

        self.pad = self.eot if pad == "eot" else 0
        self._ranks, self._symbols = _clip_tables()
        self._id = {symbol: i for i, symbol in enumerate(self._symbols)}
        self._bytes = byte_symbols()
        self._pattern = regex.compile(_CLIP_PATTERN, regex.IGNORECASE)
        self._word_ids = functools.lru_cache(maxsize=65536)(self._merge)

    def ids(self, text: str) -> list[int]:
        with needs_extra("train"):
            import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = re.sub(r"\s+", " ", text).strip().lower()
        return [i for word in self._pattern.findall(text) for i in self._word_ids(word)]

    def _merge(self, word: str) -> tuple[int, ...]:
        parts = [self._bytes[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        unranked = len(self._ranks)
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, unranked))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                paired = tuple(parts[i : i + 2]) == best
                merged.append("".join(best) if paired else parts[i])
                i += 2 if paired else 1
            parts = merged
        return tuple(self._id[part] for part in parts)

    def decode(self, ids: Sequence[int]) -> str:
        values = {symbol: byte for byte, symbol in self._bytes.items()}
        kept = []
        for i in map(int, ids):
            if i == self.eot:
                break
            if i != self.sot:
                kept.append(self._symbols[i])
        text = "".join(kept).replace("</w>", " ")
        raw = b"".join(b" " if char == " " else bytes([values[char]]) for char in text)
        return raw.decode("utf-8", errors="replace").strip()

    def to_config(self) -> dict:
        return {"kind": "clip", "pad": "eot" if self.pad == self.eot else 0}


class CompactTokenizer(Tokenizer):
    """A word-level tokenizer: pad 0, sot 1, eot 2, then the words in the order given. Punctuation is ignored.

    Args:
        vocab: distinct lower-case words of letters and digits.

    Raises:
        ValueError: if the words are none, repeated, or not plain lower-case words.
    """

    pad, sot, eot = 0, 1, 2

    def __init__(self, vocab: Sequence[str]):
        self.vocab = tuple(vocab)
        odd = [word for word in self.vocab if self._words(word) != [word]]
        if odd or not self.vocab or len(set(self.vocab)) != len(self.vocab):
            found = f"{odd[0]!r}" if odd else "a repeated word" if self.vocab else "none"
            raise ValueError(f"vocab must hold distinct lower-case words, got {found}.")
        self.vocab_size = len(self.vocab) + 3
        self._id = {word: i + 3 for i, word in enumerate(self.vocab)}

    @staticmethod
    def _words(text: str) -> list[str]:
        # Composed: a combining accent, which is a separate character, is no part of a word.
        return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())

    def ids(self, text: str) -> list[int]:
        words = self._words(text)
        for word in words:
            if word not in self._id:
                near = difflib.get_close_matches(word, self.vocab, 1, cutoff=0.0)[0]
                raise ValueError(f'the word "{word}" is not in the vocabulary; the nearest known word is "{near}".')
        return [self._id[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        words = []
        for i in map(int, ids):
            if i == self.eot:
                break
            if i > self.eot:
                words.append(self.vocab[i - 3])
        return " ".join(words)

    def to_config(self) -> dict:
        return {"kind": "compact", "vocab": list(self.vocab)}


def tokenizer_from_config(config: Mapping) -> Tokenizer:
    """Make the tokenizer that `to_config` described.

    Raises:
        ValueError: if the kind is unknown.
    """
    kind = config.get("kind")
    if kind == "clip":
        return ClipTokenizer(pad=config.get("pad", 0))
    if kind == "compact":
        return CompactTokenizer(config["vocab"])
    raise ValueError(f'the tokenizer\'s kind must be "clip" or "compact", got {kind!r}.')
