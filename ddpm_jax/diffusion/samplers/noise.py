"""Keys and noise of samplers: one key an example, so that a sample does not depend on its batch; or recorded noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ddpm_jax.checks import check_indices, check_static, is_known, look_up
from ddpm_jax.diffusion.keys import fold_in, key_vector, one_key, threefry


@struct.dataclass
class RecordedNoise:
    """Noise to use in place of keys, e.g. that of another implementation, wherever keys [B] are taken.

    The leading axis is the batch, as that of keys, so that ``vmap`` and sharding treat both alike:

        noise = RecordedNoise(jnp.stack([x_T, *noises], axis=1))  # each [B, H, W, C]
        sample(process, denoise, noise, (H, W, C))

    Attributes:
        values: float[B, T + 1, *shape]: values[:, 0] is the initial noise, of standard deviation 1, and values[:, i]
            that of transition i = 1 .. T, the last of which leads into the data, where the noise is multiplied by 0.
            A step that draws several times in a transition takes float[B, T + 1, M, *shape] with its draw m at
            values[:, i, m] (docs/samplers.md lists them); one that draws once takes draw 0, as does the initial noise.
    """

    values: jax.Array

    @property
    def shape(self) -> tuple[int]:
        """(B,), as that of keys."""
        return self.values.shape[:1]

    def part(self, number: int | jax.Array) -> "RecordedNoise":
        """Return the noise of one transition, or of one draw of a transition; NaN for a traced number out of range."""
        if self.values.ndim < 2:
            raise ValueError(f"recorded noise must have an axis of transitions, got shape {self.values.shape}")
        if is_known(number):
            check_indices("the number of a draw of recorded noise", np.asarray(number), self.values.shape[1])
        return RecordedNoise(look_up(jnp.moveaxis(self.values, 1, 0), jnp.asarray(number)))

    def draw(self, like: jax.Array) -> jax.Array:
        """Return noise of the shape and dtype of ``like``; draw 0 where there are several."""
        values = self.values
        while values.ndim > like.ndim:
            values = values[:, 0]
        if values.shape != like.shape:
            raise ValueError(
                f"recorded noise must have the shape [B, T + 1, *shape], or [B, T + 1, M, *shape], for samples of "
                f"{like.shape}; of one draw it has {values.shape}"
            )
        return values.astype(like.dtype)


def example_keys(key: jax.Array, n: int, start: int | jax.Array = 0) -> jax.Array:
    """Return the keys of examples start .. start + n - 1: fold_in(key, index).

    Key i depends on i alone, so samples can be generated in batches of any size and on any number of devices, with
    a key of any generator: the keys returned are Threefry's (see ``ddpm_jax.diffusion.keys``).

    Args:
        key: one key, ``jax.random.key(seed)``; typed or old-style.
        n: B >= 1, a Python number.
        start: index of the first example, >= 0.

    Returns:
        Typed keys [B].

    Raises:
        ValueError: if key is not one key, n < 1 or start < 0.
    """
    check_static("n", n, "since it is a shape")
    if n < 1:
        raise ValueError(f"{n=} must be at least 1")
    if is_known(start) and (start := int(start)) < 0:
        raise ValueError(f"{start=} must not be negative")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(threefry(one_key(key)), start + jnp.arange(n))


def check_keys(keys: jax.Array | RecordedNoise, n: int | None = None) -> jax.Array | RecordedNoise:
    """Return Threefry keys of a vector of keys of any generator (``keys.key_vector``), or recorded noise as it is.

    Raises:
        ValueError: if it is neither, or does not have n entries where n is given.
    """
    if not isinstance(keys, RecordedNoise):
        return key_vector(keys, n)
    if n is not None and keys.shape[0] != n:
        raise ValueError(f"recorded noise must be for {n} examples, got shape {keys.values.shape}")
    return keys


def check_entries(keys: jax.Array | RecordedNoise, count: int) -> jax.Array | RecordedNoise:
    """Return keys as they are.

    Raises:
        ValueError: if they are recorded noise with fewer than ``count`` entries along axis 1.
    """
    if isinstance(keys, RecordedNoise) and (keys.values.ndim < 2 or keys.values.shape[1] < count):
        raise ValueError(
            f"recorded noise must have at least {count} entries along axis 1, one for each step of the process, got "
            f"shape {keys.values.shape}"
        )
    return keys


def check_draws(keys: jax.Array | RecordedNoise, like: jax.Array, count: int, step: str) -> None:
    """Check the number of draws M in the recorded noise of one transition, [B, M, *shape].

    Raises:
        ValueError: if it is less than ``count``; the message names the step.
    """
    if isinstance(keys, RecordedNoise) and keys.values.ndim > like.ndim and keys.values.shape[1] < count:
        raise ValueError(
            f"recorded noise must have the shape [B, T + 1, M, *shape] with M at least {count} for {step}, got "
            f"M = {keys.values.shape[1]}"
        )


def transition_keys(keys: jax.Array | RecordedNoise, number: int | jax.Array) -> jax.Array | RecordedNoise:
    """Return the keys [B] of one transition of a sampler: fold_in(keys[i], number). 0 is the initial noise."""
    return keys.part(number) if isinstance(keys, RecordedNoise) else fold_in(keys, number)


def per_example_normal(keys: jax.Array | RecordedNoise, like: jax.Array) -> jax.Array:
    """Sample standard normal noise of the shape and dtype of ``like``, [B, ...], example i from keys[i].

    In a loop around a small network the noise is most of the work. In float32, bits become normals as in
    ``jax.random.normal``, but both words of every Threefry block are used and all rounds are one fused loop over the
    batch, which is several times faster on a CPU. Other dtypes are sampled by ``jax.random.normal``. Keys of another
    generator become Threefry keys first (see ``ddpm_jax.diffusion.keys``). Recorded noise is returned as it is.
    """
    if isinstance(keys, RecordedNoise):
        return keys.draw(like)
    keys, shape = threefry(keys), like.shape[1:]
    if like.dtype != jnp.float32:
        return jax.vmap(lambda key: jax.random.normal(key, shape, like.dtype))(keys)
    bits = _threefry_bits(jax.random.key_data(keys), math.prod(shape))
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
