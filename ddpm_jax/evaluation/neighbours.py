"""Measures of two sets of features by their pairs: improved precision and recall, and KID.

Precision is the share of samples inside the manifold of the reference, recall the share of the reference inside that of
the samples; a manifold is the union of balls around its points, each as large as the distance to its k-th neighbour
(Kynkaanniemi et al. 2019). KID is the squared maximum mean discrepancy of a cubic kernel (Binkowski et al. 2018).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.evaluation.bootstrap import random_part, resampled_counts
from ddpm_jax.parallel.mesh import data_sharding, make_local_mesh, replicated

ROWS, COLUMNS = 1024, 8192  # of the distances that are in memory at a time: 32 MB
MOST_PAIRS = 5000  # images of each set in the bootstrap of KID


def precision_recall(reference: np.ndarray, samples: np.ndarray, *, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Find which samples are in the reference's manifold, and which of the reference in that of the samples.

    Distances are computed on all devices of this process, in float32 of features from which the reference's mean is
    subtracted. The memory is that of the features and of a block of distances.

    Args:
        reference: float[N, D].
        samples: float[M, D].
        k: of the neighbour whose distance is a ball's radius; 3 in published numbers.

    Returns:
        bool[M] and bool[N]; their means are precision and recall.

    Raises:
        ValueError: if a set has no more than k images.
    """
    for name, features in {"reference": reference, "samples": samples}.items():
        if not 1 <= k < len(features):
            raise ValueError(f"k={k} must be at least 1 and less than the number of images, {len(features)} ({name})")
    blocks = _Blocks(max(len(reference), len(samples)))
    centre = reference.mean(0, dtype=np.float64)
    reference, samples = (np.asarray(x - centre, np.float32) for x in (reference, samples))
    radii = blocks.radii(reference, k)
    in_reference = blocks.inside(samples, reference, radii)
    return in_reference, blocks.inside(reference, samples, blocks.radii(samples, k))


class _Blocks:
    """Distances between rows, which are split over the devices, and columns, a copy of which is on each.

    Args:
        count: points of the larger set.
    """

    def __init__(self, count: int) -> None:
        self._mesh: Mesh = make_local_mesh()
        self._rows = -(-min(ROWS, count) // self._mesh.size) * self._mesh.size
        self._columns = min(COLUMNS, count)

    def radii(self, features: np.ndarray, k: int) -> np.ndarray:
        """Return the squared distance of each point to its k-th neighbour, float32[N]."""
        found = []
        for rows, count in self._split(features, self._rows, data_sharding(self._mesh)):
            nearest = jnp.full((self._rows, k + 1), jnp.inf)  # the point itself is the first
            for columns, _ in self._split(features, self._columns, replicated(self._mesh), fill=np.inf):
                nearest = _nearest(rows, columns, nearest)
            found.append(np.asarray(nearest[:, k])[:count])
        return np.concatenate(found)

    def inside(self, points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
        """Return which points are in a ball of a squared radius around a centre, bool[N]."""
        found = []
        for rows, count in self._split(points, self._rows, data_sharding(self._mesh)):
            is_in = jnp.zeros(self._rows, bool)
            balls = np.concatenate([centres, radii[:, None]], axis=1)
            for columns, _ in self._split(balls, self._columns, replicated(self._mesh), fill=np.inf):
                is_in = _inside(rows, columns, is_in)
            found.append(np.asarray(is_in)[:count])
        return np.concatenate(found)

    @staticmethod
    def _split(array: np.ndarray, size: int, place: jax.sharding.Sharding, fill: float = 0.0):
        """Yield blocks of equal size on the devices, the last filled up, and how much of each is of the array."""
        for begin in range(0, len(array), size):
            part = array[begin : begin + size]
            count = len(part)
            if count < size:
                part = np.concatenate([part, np.full((size - count, *part.shape[1:]), fill, part.dtype)])
            yield jax.device_put(part, place), count


def _distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Return squared distances, float32[R, C]; inf to columns of a block's rest, which are inf."""
    is_real = jnp.isfinite(columns[:, 0])
    columns = jnp.where(is_real[:, None], columns, 0.0)
    products = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(rows).sum(1)[:, None] + jnp.square(columns).sum(1)[None]
    return jnp.where(is_real[None], jnp.maximum(squares - 2.0 * products, 0.0), jnp.inf)


@jax.jit
def _nearest(rows: jax.Array, columns: jax.Array, nearest: jax.Array) -> jax.Array:
    """Return the least distances, float32[R, k], of those so far and those to the columns, in increasing order."""
    both = jnp.concatenate([nearest, _distances(rows, columns)], axis=1)
    return -jax.lax.top_k(-both, nearest.shape[1])[0]


@jax.jit
def _inside(rows: jax.Array, balls: jax.Array, is_in: jax.Array) -> jax.Array:
    centres, radii = balls[:, :-1], balls[:, -1]
    return is_in | ((_distances(rows, centres) <= radii[None]) & jnp.isfinite(radii)[None]).any(1)


# ---- KID -------------------------------------------------------------------------------------------------------------


def kernel_distances(
    samples: np.ndarray, reference: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> np.ndarray:
    """Return unbiased estimates of KID on random subsets; their mean and standard deviation are what is published.

    The kernel is (x . y / D + 1)^3, in float64. Subsets are those of torch-fidelity for the same seed.

    Args:
        samples, reference: float[N, D] and float[M, D].
        subsets: estimates.
        subset_size: images of each set in an estimate.
        seed: of the subsets.

    Returns:
        float64[subsets].

    Raises:
        ValueError: if a set is smaller than `subset_size`.
    """
    least = min(len(samples), len(reference))
    if not 2 <= subset_size <= least or subsets < 1:
        raise ValueError(f"subset_size={subset_size} must be at least 2 and at most the number of images, {least}")
    rng, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)]
        y = reference[rng.choice(len(reference), subset_size, replace=False)]
        own = [(kernel.sum() - np.trace(kernel)) for kernel in (_kernel(x, x), _kernel(y, y))]
        found.append(sum(own) / (subset_size * (subset_size - 1)) - 2.0 * _kernel(x, y).mean())
    return np.array(found)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1.0) ** 3


def bootstrap_kernel(samples: np.ndarray, reference: np.ndarray, *, replicates: int, seed: int) -> np.ndarray:
    """Return KIDs of resampled samples to a fixed reference, over all pairs of different images.

    At most `MOST_PAIRS` images of each set are used; the spread is then scaled to the number of samples.

    Args:
        samples, reference: float[N, D] and float[M, D].
        replicates: R.
        seed: of the draws.

    Returns:
        float64[R], up to a constant.
    """
    if not replicates:
        return np.zeros(0)
    x, y = random_part(samples, MOST_PAIRS, seed), random_part(reference, MOST_PAIRS, seed)
    count = len(x)
    counts = np.stack(list(resampled_counts(count, count, replicates, seed)), axis=1)
    own, cross, step = np.zeros(replicates), np.zeros(replicates), 512
    for begin in range(0, count, step):
        rows = slice(begin, begin + step)
        kernel = _kernel(x[rows], x)
        kernel[np.arange(len(kernel)), np.arange(begin, begin + len(kernel))] = 0.0
        own += (counts[rows] * (kernel @ counts)).sum(0)
        cross += _kernel(x[rows], y).mean(1) @ counts[rows]
    pairs = count**2 - np.square(counts).sum(0)
    found = own / pairs - 2.0 * cross / count
    return found.mean() + (found - found.mean()) * np.sqrt(count / len(samples))
