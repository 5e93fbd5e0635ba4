"""Arrays that every host has whole, on devices of all hosts, and back."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from ddpm_jax.parallel.mesh import data_sharding, replicated


def put(tree: Any, sharding: Sharding) -> Any:
    """Place a tree of arrays, of which every host has a whole copy; each device gets its part.

    Args:
        tree: of numpy arrays, or of `jax.Array`s on devices of this host; the same on every host.
        sharding: over devices of any hosts.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _put(np.asarray(leaf), sharding), tree)


def _put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    # Not by jax.device_put, which compares the copies of all hosts first.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def split_key(seed: int, count: int, mesh: Mesh) -> jax.Array:
    """Return keys split from the one of a seed, on every device of `mesh`."""
    if jax.process_count() == 1:
        return jax.random.split(jax.device_put(jax.random.key(seed), replicated(mesh)), count)
    data = _put(np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), count))), replicated(mesh))
    return jax.jit(jax.random.wrap_key_data, out_shardings=replicated(mesh))(data)


def pad_and_put(tree: Any, shards: int, mesh: Mesh) -> Any:
    """Split arrays [N, ...] over the devices as a batch is; copies of the last row make N a multiple of `shards`."""
    count = jax.tree.leaves(tree)[0].shape[0]
    rows = np.minimum(np.arange(-(-count // shards) * shards), count - 1)
    return put(jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree), data_sharding(mesh))


def fetch(tree: Any) -> Any:
    """Return a tree of arrays as numpy, whole, on every host; all of them call it."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
