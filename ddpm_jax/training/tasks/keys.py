"""Keys of a training step: one for each use, by its name."""

import zlib

import jax


def named_keys(key: jax.Array, *names: str) -> tuple[jax.Array, ...]:
    """Return a key for each name, independent of the other names and of their order.

    So a condition that is added to a task leaves the noise of the others as it is.
    """
    return tuple(jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names)
