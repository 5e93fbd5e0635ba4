"""Shared code of the pipelines: tokenized captions, and checks of the networks' outputs."""

import flax.struct
import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.sampling import bounded
from ddpm_jax.types import to_uint8

__all__ = ["Text", "bounded", "finite", "to_uint8"]


class Text(flax.struct.PyTreeNode):
    """Encoded batch of captions.

    Attributes:
        z: float32[B, D], the CLIP text embedding.
        hidden: [B, L, W], hidden states of the CLIP text tower, or int32[B, L] tokens for networks with a text encoder
            of their own.
        mask: bool[B, L], True at real tokens.
    """

    z: jax.Array
    hidden: jax.Array
    mask: jax.Array


def finite(values: jax.Array) -> jax.Array:
    """Return whether all values of each example are finite. values: float[B, ...]. Returns bool[B]."""
    return jnp.isfinite(values).all(axis=tuple(range(1, values.ndim)))
