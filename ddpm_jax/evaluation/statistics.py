"""Statistics of features, accumulated over any number of images, and distances between them: FID and Inception Score.

FID is the Frechet distance between Gaussians that have the means and covariances of two sets of features (Heusel et al.
2017); with spatial features it is sFID (Nash et al. 2021). All sums are in float64.
"""

import numpy as np

from ddpm_jax.evaluation.bootstrap import random_part, resampled_counts

MOST = 10_000  # images of the bootstrap, in float64
FLUSH = 1024  # vectors of an update of moments


class Moments:
    """Mean and covariance of vectors that come in batches, merged as Chan et al. (1983) do.

    Vectors wait until there are `FLUSH` of them, since an update of the covariance costs the same for any number.

    Args:
        dimensions: D.
    """

    def __init__(self, dimensions: int):
        self._count, self._waiting = 0, 0
        self._mean, self._scatter = np.zeros(dimensions), np.zeros((dimensions, dimensions))
        self._batches: list[np.ndarray] = []

    @classmethod
    def of(cls, count: int, mean: np.ndarray, scatter: np.ndarray) -> "Moments":
        """Return the moments of `count` vectors with a mean, float64[D], and a scatter, float64[D, D]."""
        found = cls(0)
        found._count, found._mean, found._scatter = count, mean, scatter
        return found

    def add(self, features: np.ndarray) -> None:
        """Add vectors, float[B, D].

        Raises:
            ValueError: if they have another size, or are not finite.
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(f"features must have shape [B, {len(self._mean)}], got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features have values that are not finite (NaN or infinity)")
        self._batches.append(features)
        self._waiting += len(features)
        if self._waiting >= FLUSH:
            self._flush()

    def merge(self, other: "Moments") -> None:
        """Add the vectors of another object."""
        self._flush()
        self._merge(other.count, other.mean, other.scatter)

    def _flush(self) -> None:
        if self._waiting:
            waiting = np.concatenate(self._batches).astype(np.float64)
            self._batches, self._waiting = [], 0
            mean = waiting.mean(0)
            waiting -= mean
            self._merge(len(waiting), mean, waiting.T @ waiting)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self._count + count
        if count:
            step = mean - self._mean
            self._scatter = self._scatter + scatter + np.outer(step, step * (self._count * count / total))
            self._mean = self._mean + step * (count / total)
            self._count = total

    @property
    def count(self) -> int:
        """The number of vectors."""
        return self._count + self._waiting

    @property
    def mean(self) -> np.ndarray:
        """The mean, float64[D]."""
        self._flush()
        return self._mean

    @property
    def scatter(self) -> np.ndarray:
        """The sum of outer products of the deviations from the mean, float64[D, D]."""
        self._flush()
        return self._scatter

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, float64[D, D]; raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}")
        return self.scatter / (self.count - 1)


def root(covariance: np.ndarray) -> np.ndarray:
    """Return L, float64[D, D], with L L^T = covariance; eigenvalues that rounding made negative count as zero.

    Raises:
        ValueError: if the covariance is not a square, finite and symmetric array.
    """
    covariance = np.asarray(covariance, np.float64)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not np.isfinite(covariance).all():
        raise ValueError(f"a covariance must be a finite array [D, D], got shape {covariance.shape}")
    scale = np.abs(covariance).max(initial=0.0)
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-4 * scale:
        raise ValueError("a covariance must be symmetric")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -1e-3 * max(values[-1], 0.0):
        raise ValueError(f"a covariance must have no negative eigenvalue, and the least is {values[0]:g}")
    return vectors * np.sqrt(np.maximum(values, 0.0))


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """Return the squared Frechet distance between two Gaussians (Dowson and Landau 1982).

        |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2)

    With C_i = L_i L_i^T the last trace is the sum of the singular values of L_1^T L_2. Each of them is accurate to
    rounding of the largest, also where covariances are singular or ill-conditioned, as those of fewer images than
    dimensions are; the square root of the product C_1 C_2 has half of the digits there.

    Args:
        mean_1, mean_2: float[D].
        covariance_1, covariance_2: float[D, D].

    Raises:
        ValueError: if shapes do not fit, or a covariance is none.
    """
    mean_1, mean_2 = np.asarray(mean_1, np.float64), np.asarray(mean_2, np.float64)
    shapes = [np.shape(array) for array in (mean_1, covariance_1, mean_2, covariance_2)]
    if mean_1.ndim != 1 or shapes != [(len(mean_1),), (len(mean_1),) * 2] * 2:
        raise ValueError(f"means must be [D] and covariances [D, D], got the shapes {', '.join(map(str, shapes))}")
    root_1, root_2 = root(covariance_1), root(covariance_2)
    overlap = np.linalg.svd(root_1.T @ root_2, compute_uv=False).sum()
    step = mean_1 - mean_2
    return max(0.0, float(step @ step + np.trace(covariance_1) + np.trace(covariance_2) - 2.0 * overlap))


def bootstrap_frechet(
    features: np.ndarray, mean: np.ndarray, covariance: np.ndarray, *, count: int, replicates: int, seed: int
) -> np.ndarray:
    """Return Frechet distances of resampled features to a fixed Gaussian.

    Args:
        features: float[n, D], all of the set or a random part of it; at most `MOST` of them are used.
        mean, covariance: float[D] and [D, D], of the reference.
        count: vectors that each replicate draws, the size of the set.
        replicates: R.
        seed: of the draws.

    Returns:
        float64[R].
    """
    features = random_part(features, MOST, seed)
    centre = features.mean(0, dtype=np.float64)
    x, factor = features - centre, root(covariance)
    squares, projected, found = np.square(x).sum(1), x @ factor, []
    for counts in resampled_counts(len(features), count, replicates, seed):
        shift, along = counts @ x / count, counts @ projected / count
        inner = (projected.T * counts) @ projected - count * np.outer(along, along)
        values = np.linalg.eigvalsh(inner / (count - 1))
        trace = (counts @ squares - count * shift @ shift) / (count - 1)
        step = centre + shift - mean
        overlap = np.sqrt(np.maximum(values, 0.0)).sum()
        found.append(step @ step + trace + np.trace(covariance) - 2.0 * overlap)
    return np.array(found)


class ClassScores:
    """Inception Score, exp E KL(p(y|x) || p(y)), over parts of a set of images (Salimans et al. 2016).

    Args:
        count: images of the set, at least `splits`.
        classes: of the network.
        splits: parts, over which the score is averaged; 10 in published numbers.
        seed: of the shuffle before the set is cut into parts; 2020 in torch-fidelity. None cuts it in its own order,
            as guided-diffusion's evaluator does (in parts of 5,000 images).
    """

    def __init__(self, count: int, classes: int, *, splits: int = 10, seed: int | None = 2020):
        if not 1 <= splits <= count:
            raise ValueError(f"splits={splits} must be at least 1 and at most the number of images, {count}")
        order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
        bounds = np.array([i * count // splits for i in range(splits + 1)])
        self._part = np.empty(count, np.int64)
        self._part[order] = np.repeat(np.arange(splits), np.diff(bounds))
        self.counts = np.zeros(splits)
        self.probabilities, self.negative_entropies = np.zeros((splits, classes)), np.zeros(splits)

    def add(self, indices: np.ndarray, logits: np.ndarray) -> None:
        """Add float[B, K] logits of the images with these indices."""
        parts = self._part[np.asarray(indices)]
        log_p = log_softmax(logits)
        p = np.exp(log_p)
        np.add.at(self.counts, parts, 1)
        np.add.at(self.negative_entropies, parts, (p * log_p).sum(1))
        for part in np.unique(parts):
            self.probabilities[part] += p[parts == part].sum(0)

    def merge(self, other: "ClassScores") -> None:
        """Add what another object of the same set has."""
        self.counts += other.counts
        self.probabilities += other.probabilities
        self.negative_entropies += other.negative_entropies

    def scores(self) -> np.ndarray:
        """Return the score of each part, float64[splits]."""
        mean = self.probabilities / self.counts[:, None]
        logs = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
        return np.exp(self.negative_entropies / self.counts - (mean * logs).sum(1))


def bootstrap_score(logits: np.ndarray, *, count: int, replicates: int, seed: int) -> np.ndarray:
    """Return Inception Scores of resampled images, each of one part; arguments as in `bootstrap_frechet`."""
    log_p = log_softmax(random_part(logits, MOST, seed))
    p = np.exp(log_p)
    entropies, found = (p * log_p).sum(1), []
    for counts in resampled_counts(len(p), count, replicates, seed):
        mean = counts @ p / count
        logs = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
        found.append(np.exp(counts @ entropies / count - mean @ logs))
    return np.array(found)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log softmax over the last axis, float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
