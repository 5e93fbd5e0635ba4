"""Shared code of the pipelines: tokenized captions, and checks of the networks' outputs."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.sampling import bounded
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import to_uint8

__all__ = ["Text", "bounded", "finite", "to_uint8", "with_moments"]


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


def with_moments(models: Mapping[str, Model]) -> list[str]:
    """Return the names of the models that have second moments, for the sampler "analytic"."""
    return [name for name, model in models.items() if model.moments is not None]


def finite(values: jax.Array) -> jax.Array:
    """Return whether all values of each example are finite. values: float[B, ...]. Returns bool[B]."""
    return jnp.isfinite(values).all(axis=tuple(range(1, values.ndim)))
