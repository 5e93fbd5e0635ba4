"""Keys and noise of samplers: one key an example, so that a sample does not depend on its batch."""

import jax
import jax.numpy as jnp


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
    """Draw standard normal noise of the shape and dtype of ``like``, [B, ...], example i from keys[i]."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)
