"""Parts of a source: a deterministic split into training and validation records."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.source import Fingerprint, check_index
from ddpm_jax.types import Source

_MAX_LENGTH = 2**28


class Subset:
    """Some of the records of a source, in a given order.

    Args:
        source: any source.
        indices: of its records, each in [0, len(source)).

    Attributes:
        class_names: those of the source, or None.

    Raises:
        ValueError: if there is no index, or one is outside of the source.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self._indices = np.array(indices, np.int64)
        if self._indices.ndim != 1 or not self._indices.size:
            raise ValueError(f"indices must be at least one integer, got the shape {self._indices.shape}")
        if self._indices.min() < 0 or self._indices.max() >= len(source):
            raise ValueError(f"indices must be in [0, {len(source)}), got up to {self._indices.max()}")
        self._source = source
        self.class_names = getattr(source, "class_names", None)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Return one record; raise IndexError if index is outside of [0, len)."""
        return self._source[int(self._indices[check_index(index, len(self))])]

    def fingerprint(self) -> str:
        """Return a hash of the source's fingerprint and of the indices."""
        mark = Fingerprint("subset 1")
        mark.add(self._source.fingerprint())
        mark.add_array(self._indices)
        return mark.hexdigest()

    def __repr__(self) -> str:
        return f"Subset({self._source!r}, {len(self)} records)"


def evenly_spaced(count: int, at_most: int | None) -> np.ndarray:
    """Return the indices of up to `at_most` of `count` records, evenly spaced, int[N].

    Folders are often in the order of their classes, so the first records are of one class. None takes all.
    """
    taken = count if at_most is None else min(count, at_most)
    return np.arange(taken) * count // max(taken, 1)


def split_source(source: Source, validation: int | float, *, seed: int = 0) -> tuple[Subset, Subset]:
    """Split a source into records to train on and records to measure the validation loss on.

    Which records are held out depends on the length of the source, `validation` and `seed` alone, and of a larger
    `validation` includes those of a smaller one. Both parts keep the order of the source.

    Args:
        source: any source, of at least two records.
        validation: the number of records held out, an int; or their share, a float in (0, 1), which is rounded.
        seed: in [0, 2^64); another one holds out other records.

    Returns:
        The training records and the held-out records, at least one each.

    Raises:
        ValueError: if an argument is out of its range.
    """
    length = len(source)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    if length > _MAX_LENGTH:
        raise ValueError(f"source must have at most {_MAX_LENGTH} records to be split, got {length}")
    count = validation
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise ValueError(f"validation must be a share in (0, 1) or a number of records, got {validation}")
        count = min(max(round(validation * length), 1), length - 1)
    if not 1 <= count < length:
        raise ValueError(f"validation must leave at least one of {length} records on each side, got {validation}")
    ranks = _hash(np.arange(length, dtype=np.uint64) + _hash(np.array([seed], np.uint64)))
    chosen = np.zeros(length, bool)
    chosen[np.argsort(ranks, kind="stable")[:count]] = True
    return Subset(source, np.flatnonzero(~chosen)), Subset(source, np.flatnonzero(chosen))


def _hash(values: np.ndarray) -> np.ndarray:
    """Return uint64 hashes, by the finalizer of SplitMix64 (Steele et al. 2014); NumPy's permutations may change."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
