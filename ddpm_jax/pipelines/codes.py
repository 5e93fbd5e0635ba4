"""Embeddings of captions from the autoregressive prior, code by code (DALL-E 2, section 2.2)."""

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.tokens import TokenSampling, sample_codes
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.pipelines.stages import Text
from ddpm_jax.storage.model_directory import Model


def check_codes(prior: Model, codes: Model | None, statistics: Model | None = None) -> None:
    """Raise ValueError unless codes are those that an autoregressive prior predicts, and there are no statistics."""
    if statistics is not None:
        raise ValueError("statistics are for a DiffusionPrior, and prior is an AutoregressivePrior")
    if codes is None:
        raise ValueError("an AutoregressivePrior needs codes, the EmbeddingCodes that it predicts")
    if not isinstance(codes.network, EmbeddingCodes):
        raise ValueError(f"codes must be EmbeddingCodes, got a {type(codes.network).__name__}")
    for name in ("embed_dim", "dims", "buckets", "dot_buckets"):
        ours, theirs = getattr(prior.network, name), getattr(codes.network, name)
        if ours != theirs:
            raise ValueError(f"prior has {name}={ours}, and codes {theirs}")


def sample_code_embedding(
    prior: Model,
    codes: Model,
    sampling: TokenSampling,
    keys: jax.Array,
    given: tuple[Text, jax.Array, jax.Array],
    null: tuple[Text, jax.Array, jax.Array],
) -> jax.Array:
    """Sample embeddings of captions, see `sample_codes`.

    Args:
        prior: an `AutoregressivePrior`.
        codes: its `EmbeddingCodes`.
        sampling: how.
        keys: [B].
        given: (text, what the network reads of it, bool[B] False where the caption is dropped).
        null: the same of what guidance leads away from.

    Returns:
        Unit vectors, float32[B, D].
    """
    conditions = [given] if sampling.scale is None else [given, null]
    text, read, keep = (jax.tree.map(lambda *x: jnp.concatenate(x), *parts) for parts in zip(*conditions))
    found = sample_codes(
        sampling,
        keys,
        dims=prior.network.dims,
        dot_buckets=codes.network.dot_buckets,
        begin=lambda dot_code: prior.apply(dot_code, text.z, read, text.mask, keep, method="begin"),
        following=lambda state, code: prior.apply(state, code, method="next"),
    )
    return codes.apply(found, method=EmbeddingCodes.decode)
