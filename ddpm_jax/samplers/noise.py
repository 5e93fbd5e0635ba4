"""Keys and noise of samplers: one key an example, so that a sample does not depend on its batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def example_keys(key: jax.Array, n: int, start: int = 0) -> jax.Array:
    """Return the keys of examples start .. start + n - 1: fold_in(key, index).

    Key i depends on i alone, so a set of samples can be drawn in batches of any size and on any number of devices.

    Args:
        key: one typed key, ``jax.random.key(seed)``.
        n: B >= 1.
        start: index of the first example, >= 0.

    Returns:
        Typed keys [B].

    Raises:
        ValueError: if n < 1 or start < 0.
    """
    if n < 1:
        raise ValueError(f"{n=} must be at least 1")
    if start < 0:
        raise ValueError(f"{start=} must not be negative")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(start, start + n))


def check_keys(keys: jax.Array, n: int | None = None) -> None:
    """Raise ValueError unless keys is a vector of typed keys, n of them if n is given."""
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1:
        raise ValueError(
            f"keys must be a vector of typed keys, one an example, as from example_keys(jax.random.key(0), n), "
            f"got {keys.dtype}{list(keys.shape)}"
        )
    if n is not None and keys.shape[0] != n:
        raise ValueError(f"keys must be one an example, shape ({n},), got {keys.shape}")


def transition_keys(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """Return the keys [B] of one transition of a sampler: fold_in(keys[i], number). 0 is the initial noise."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def per_example_normal(keys: jax.Array, like: jax.Array) -> jax.Array:
    """Draw standard normal noise of the shape and dtype of ``like``, [B, ...], example i from keys[i].

    In a loop around a small network the noise is most of the work. In float32, bits become normals as in
    ``jax.random.normal``, but both words of every Threefry block are used and all rounds are one fused loop over the
    batch, which is several times faster on a CPU. Other dtypes are drawn by ``jax.random.normal``. Keys of another
    generator serve as Threefry's, by their first two words, since that generator would not draw under ``vmap``, or on
    several devices, what it draws alone.
    """
    shape, words = like.shape[1:], jax.random.key_data(keys)[:, :2]
    if like.dtype != jnp.float32:
        draw = lambda key: jax.random.normal(key, shape, like.dtype)  # noqa: E731
        return jax.vmap(draw)(jax.random.wrap_key_data(words, impl="threefry2x32"))
    bits = _threefry_bits(words, math.prod(shape))
    one = np.uint32(0x3F800000)  # 1.0: 23 random bits behind it are a number in [1, 2)
    least = np.nextafter(np.float32(-1.0), np.float32(0.0))
    uniform = 2.0 * (jax.lax.bitcast_convert_type((bits >> 9) | one, jnp.float32) - 1.0) + least
    return (np.float32(np.sqrt(2.0)) * jax.lax.erf_inv(jnp.maximum(uniform, least))).reshape(like.shape)


def _threefry_bits(keys: jax.Array, size: int) -> jax.Array:
    """Return uint32[B, size]: Threefry-2x32-20 (Salmon et al. 2011) of the counters 0 .. size - 1, for every key.

    Counter i and counter i + ceil(size / 2) are the two words of one block, as in ``jax.extend.random.threefry_2x32``.
    keys: uint32[B, 2].
    """
    half = -(-size // 2)
    key = [keys[:, 0, None], keys[:, 1, None]]
    key.append(key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    counters = np.arange(2 * half, dtype=np.uint32)
    counters[size:] = 0
    x, y = counters[None, :half] + key[0], counters[None, half:] + key[1]
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << np.uint32(distance)) | (y >> np.uint32(32 - distance))) ^ x
        x, y = x + key[(group + 1) % 3], y + key[(group + 2) % 3] + np.uint32(group + 1)
    return jnp.concatenate([x, y], axis=1)[:, :size]
