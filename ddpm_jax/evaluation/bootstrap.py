"""Confidence intervals by the bootstrap (Efron 1979): how much a number varies with the images that were sampled."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

Z = 1.959964  # of 95 %


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def resampled_counts(size: int, count: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of `size` examples is drawn, float64[size], in `count` draws with replacement."""
    rng = np.random.default_rng([seed, 0xB007])
    for _ in range(replicates):
        yield rng.multinomial(count, np.full(size, 1.0 / size)).astype(np.float64)


def random_part(features: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return at most this number of rows, chosen at random; all of them if there are no more."""
    if len(features) <= most:
        return features
    return features[np.random.default_rng([seed, 0x70]).choice(len(features), most, replace=False)]


def interval(value: float, replicates: np.ndarray, *, least: float = -np.inf, most: float = np.inf) -> Interval | None:
    """Return value +- 1.96 standard deviations of its replicates, cut to [least, most]; None of fewer than two.

    Not the replicates' own quantiles: those of a distance such as FID lie above the value, since a resampled set is
    farther from any other.
    """
    if len(replicates) < 2:
        return None
    half = Z * float(np.std(replicates, ddof=1))
    return Interval(max(least, value - half), min(most, value + half))


def bootstrap_means(values: np.ndarray, *, replicates: int, seed: int) -> np.ndarray:
    """Return the means of resampled values, float[n] -> float64[R]."""
    values = np.asarray(values, np.float64)
    counts = resampled_counts(len(values), len(values), replicates, seed)
    return np.array([each @ values / len(values) for each in counts])
