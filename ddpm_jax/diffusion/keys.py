"""Random keys: which are accepted, and how keys are derived so that it holds for every generator of JAX.

Functions that sample once from one key use the generator that the key belongs to (``one_key``). Where each example
has its own key, all keys become Threefry keys first (``example_keys`` and ``key_vector``), because the other generators
do not have the properties that samplers promise:

- under "unsafe_rbg", ``fold_in(fold_in(key, a), b)`` equals ``fold_in(fold_in(key, b), a)``, so that the noise of
  different transitions would be the same, and a key that is derived under ``vmap`` depends on its batch;
- under "rbg" and "unsafe_rbg", samples under ``vmap`` depends on the batch and on its first key.

Keys of the old style (``jax.random.PRNGKey``, arrays of uint32) are accepted everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def one_key(key: Any, name: str = "key") -> jax.Array:
    """Return one typed key of one typed or old-style key, of the same generator.

    Raises:
        ValueError: if it is not exactly one key.
    """
    typed = _typed(key)
    if typed is None or typed.ndim != 0:
        raise ValueError(f"{name} must be one key, as from jax.random.key(0), got {_described(key)}")
    return typed


def key_vector(keys: Any, n: int | None = None) -> jax.Array:
    """Return Threefry keys [B] of a vector of keys of any generator, typed or old-style.

    Args:
        keys: typed keys [B], or old-style keys uint32[B, 2] (Threefry) or uint32[B, 4] (RBG).
        n: the number of examples, if it is known.

    Raises:
        ValueError: if it is not a vector of keys, n of them if n is given.
    """
    typed = _typed(keys)
    if typed is None or typed.ndim != 1:
        raise ValueError(
            "keys must be a vector of keys, one for each example, as from example_keys(jax.random.key(0), n), "
            f"got {_described(keys)}"
        )
    if n is not None and typed.shape[0] != n:
        raise ValueError(f"keys must be one for each example, {n} of them, got {typed.shape[0]}")
    return threefry(typed)


def threefry(keys: jax.Array) -> jax.Array:
    """Return Threefry keys of typed keys of any shape: those themselves, or a hash of all words of another generator's.

    The hash is a chain of ``fold_in``, h <- Threefry_h(word), from a constant key: a pseudorandom function of the
    words and their order.
    """
    if str(jax.random.key_impl(keys)) == "threefry2x32":
        return keys
    words = jax.random.key_data(keys).astype(jnp.uint32)
    words = words.reshape(keys.size, -1)
    hashed = jnp.broadcast_to(jax.random.key(words.shape[1], impl="threefry2x32"), words.shape[:1])
    for column in range(words.shape[1]):
        hashed = jax.vmap(jax.random.fold_in)(hashed, words[:, column])
    return hashed.reshape(keys.shape)


def fold_in(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """Fold one number into every key of a vector, by ``jax.random.fold_in`` of Threefry keys. Returns keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(threefry(keys), number)


def _typed(keys: Any) -> jax.Array | None:
    """Return typed keys of typed or old-style ones, None of anything else."""
    if not isinstance(keys, (jax.Array, np.ndarray)):
        return None
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return keys
    if keys.dtype != np.uint32 or keys.ndim < 1 or keys.shape[-1] not in (2, 4):
        return None
    return jax.random.wrap_key_data(keys, impl="threefry2x32" if keys.shape[-1] == 2 else "rbg")


def _described(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray)):
        typed = _typed(value)
        count = "" if typed is None else ", one key" if typed.ndim == 0 else f", keys of shape {typed.shape}"
        return f"{value.dtype}{list(value.shape)}{count}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)} (jnp.stack makes an array of keys)"
    return f"{type(value).__name__} {value!r}"
