"""Guidance: what is done to a condition in training and to a denoiser in sampling.

Denoiser in, denoiser out; thresholds are functions of x0 and go in as ``x0_transform`` (see ``process.predict``).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.types import Denoiser


def drop(key: jax.Array, rate: float, batch_size: int) -> jax.Array:
    """Draw which examples keep a condition in training (Ho & Salimans 2022, algorithm 1).

    Call it once per condition, each with its own key, so that drops are independent.

    Args:
        key: one typed key.
        rate: probability of dropping, in [0, 1]; 0 keeps and 1 drops every example.
        batch_size: B.

    Returns:
        keep, bool[B]; the caller replaces the condition by its null where it is False.

    Raises:
        ValueError: if rate is outside [0, 1].
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{rate=} must be in [0, 1]")
    return jax.random.uniform(key, (batch_size,)) >= rate


def classifier_free(cond: Denoiser, null: Denoiser, scale: float | jax.Array) -> Denoiser:
    """Guide a denoiser by its own condition: null + scale * (cond - null) (Ho & Salimans 2022, eq. 6).

    The paper writes w = scale - 1. When the output has twice the channels of xt, only the first half, the prediction,
    is guided; the variance half is the conditional network's. Works for eps, x0 and v outputs alike.

    Args:
        cond: the denoiser with its condition closed over.
        null: the same network with the null condition closed over.
        scale: a float, or float[B], one for every example. With the Python number 1, ``null`` is never called.

    Returns:
        A denoiser, float32.

    Raises:
        ValueError: when called, if the two outputs differ in shape, do not fit xt, or scale is neither scalar nor [B].
    """
    if isinstance(scale, (int, float)) and scale == 1:
        return cond

    def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
        with_condition, without = cond(xt, t), null(xt, t)
        channels = xt.shape[-1]
        fits = with_condition.shape[:-1] == xt.shape[:-1] and with_condition.shape[-1] in (channels, 2 * channels)
        if with_condition.shape != without.shape or not fits:
            raise ValueError(
                f"cond and null must return the shape of xt {xt.shape}, or twice its channels, both the same, "
                f"got {with_condition.shape} and {without.shape}"
            )
        dtype = jnp.promote_types(with_condition.dtype, jnp.float32)
        with_condition, without = with_condition.astype(dtype), without.astype(dtype)
        guided, base = with_condition[..., :channels], without[..., :channels]
        guided = base + _per_example(scale, xt).astype(dtype) * (guided - base)
        return jnp.concatenate([guided, with_condition[..., channels:]], axis=-1)

    return denoise


def static_threshold(bound: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """Return the ``x0_transform`` that clips x0 to [-bound, bound] (DDPM's code; Imagen section 2.3).

    Raises:
        ValueError: if bound is not positive.
    """
    if bound <= 0:
        raise ValueError(f"{bound=} must be positive")
    return lambda x0: jnp.clip(x0, -bound, bound)


def _per_example(scale: float | jax.Array, xt: jax.Array) -> jax.Array:
    scale = jnp.asarray(scale)
    if scale.ndim == 0:
        return scale
    if scale.shape != xt.shape[:1]:
        raise ValueError(f"scale must be a number or one for each of {xt.shape[0]} examples, got shape {scale.shape}")
    return scale.reshape(scale.shape + (1,) * (xt.ndim - 1))
