"""Checksums of trees of arrays, by which damaged checkpoints are noticed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = 2**20  # bytes


def checksum(tree: Any) -> int:
    """Return a 32-bit checksum of the bits and positions of a tree of arrays, the same under every sharding."""
    leaves = jax.tree.leaves(tree)
    split = [isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated for leaf in leaves]
    small = [not parts and leaf.nbytes <= _SMALL for leaf, parts in zip(leaves, split, strict=True)]
    large = [leaf for leaf, is_small in zip(leaves, small, strict=True) if not is_small]
    # Sharded leaves in one program: many that run at once, each with a sum over devices, can leave the devices of a CPU
    # waiting for one another in different programs. Otherwise one for each shape, which compiles faster.
    sums = iter(jax.device_get(_checksums(large) if any(split) else [_checksum(leaf) for leaf in large]))
    # Compiling takes longer than these on the host; a network has them in dozens of shapes.
    rest = iter(jax.device_get([leaf for leaf, is_small in zip(leaves, small, strict=True) if is_small]))
    values = (_checksum_on_host(next(rest)) if is_small else int(next(sums)) for is_small in small)
    return sum((2 * i + 1) * value for i, value in enumerate(values)) % 2**32


def _checksum_on_host(array: np.ndarray) -> int:
    """Return what `_checksum` does."""
    array = np.ascontiguousarray(array).reshape(-1)
    bits = array.view(f"uint{min(32, 8 * array.dtype.itemsize)}").astype(np.uint32)
    return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint32) + 1), dtype=np.uint32))


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    # Sums of integers modulo 2**32 do not depend on their order, so a sharded array gives the same number.
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jnp.dtype(f"uint{min(32, 8 * array.dtype.itemsize)}")
    bits = jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
