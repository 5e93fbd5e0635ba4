"""Embeddings of captions from the autoregressive prior, code by code (DALL-E 2, section 2.2)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.keys import threefry
from ddpm_jax.diffusion.tokens import TokenSampling, sample_tokens
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.pipelines.stages import Text
from ddpm_jax.storage.model_directory import Model


def check_codes(prior: Model, codes: Model | None) -> None:
    """Raise ValueError unless codes are those that an autoregressive prior predicts."""
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
    """Sample embeddings of captions.

    The code of the dot product is sampled from its top half, which is that of the captions that fit best. Its buckets
    have equal shares of the training pairs, so that all of the half are equally probable.

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
    keys, count = threefry(keys), len(given[2])
    own = lambda number: jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)  # noqa: E731
    buckets = codes.network.dot_buckets
    draw = lambda key: jax.random.randint(key, (), buckets // 2, buckets)  # noqa: E731
    dot_code = jax.vmap(draw)(own(0))
    conditions = [given] if sampling.scale is None else [given, null]
    text, read, keep = (jax.tree.map(lambda *x: jnp.concatenate(x), *parts) for parts in zip(*conditions))
    arguments = (jnp.tile(dot_code, len(conditions)), text.z, read, text.mask, keep)

    def guided(logits: jax.Array) -> jax.Array:
        if sampling.scale is None:
            return logits
        return logits[count:] + sampling.scale * (logits[:count] - logits[count:])

    def following(state: Any, token: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = prior.apply(state, jnp.tile(token, len(conditions)), method="next")
        return guided(logits), state

    first, state = prior.apply(*arguments, method="begin")
    found = sample_tokens(
        guided(first),
        following,
        state,
        own(1),
        prior.network.dims,
        temperature=1.0 if sampling.temperature is None else sampling.temperature,
        top_p=sampling.top_p,
    )
    return codes.apply(found, method=EmbeddingCodes.decode)
