"""Shared code of the pipelines: tokenized captions, and checks of the networks' outputs."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.sampling import bounded
from ddpm_jax.models.embedding_norm import EmbeddingNorm, EmbeddingStatistics
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import to_uint8

__all__ = [
    "Text",
    "bounded",
    "check_kept",
    "check_request_kept",
    "check_statistics",
    "embedding_norm",
    "finite",
    "guided_stages",
    "kept_in_training",
    "to_uint8",
    "with_moments",
]


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


def check_statistics(prior: Model, statistics: Model | None) -> None:
    """Raise ValueError unless it is known how embeddings become what a diffusion prior works on."""
    how = prior.metadata.get("embedding")
    if not how or not (how.get("standardized") or how.get("scale")):
        raise ValueError("the metadata of prior lacks 'embedding', the scale that it works at")
    if not how.get("standardized"):
        if statistics is not None:
            raise ValueError("statistics are for a prior of standardized embeddings, and this one works at a scale")
        return
    if statistics is None:
        raise ValueError("the prior works on standardized embeddings and needs statistics, their EmbeddingStatistics")
    if not isinstance(statistics.network, EmbeddingStatistics):
        raise ValueError(f"statistics must be EmbeddingStatistics, got a {type(statistics.network).__name__}")
    ours, theirs = prior.network.embed_dim, statistics.network.embed_dim
    if ours != theirs:
        raise ValueError(f"prior has embed_dim={ours}, and statistics {theirs}")


def embedding_norm(prior: Model, statistics: Model | None) -> EmbeddingNorm:
    """Return the way between embeddings and what a diffusion prior works on, `check_statistics` having passed."""
    how = prior.metadata["embedding"]
    return statistics.apply() if how.get("standardized") else EmbeddingNorm(scale=how["scale"])


def finite(values: jax.Array) -> jax.Array:
    """Return whether all values of each example are finite. values: float[B, ...]. Returns bool[B]."""
    return jnp.isfinite(values).all(axis=tuple(range(1, values.ndim)))


def kept_in_training(model: Model, condition: str, keep: jax.Array | None, count: int) -> jax.Array:
    """Return bool[B] of where a condition is kept: nowhere for a network that was trained without it, at drop=1."""
    if model.metadata.get(condition, {}).get("drop") == 1:
        return jnp.zeros(count, bool)
    return jnp.ones(count, bool) if keep is None else keep


def guided_stages(models: Mapping[str, Model], negative_keep: np.ndarray | None) -> list[str]:
    """Return the stages of unCLIP that were trained with what guidance leads away from.

    A condition at drop=0 is never left out in training, so that its null vectors are those of the initialization.

    Args:
        models: "prior" and "decoder".
        negative_keep: bool[N], False where a negative prompt is empty; None without negative prompts.
    """
    captioned = negative_keep is not None and bool(np.all(negative_keep))
    found = []
    for stage in ("prior", "decoder"):
        left_out = ([] if captioned else ["caption"]) + (["image_embedding"] if stage == "decoder" else [])
        if all(models[stage].metadata.get(condition, {}).get("drop") != 0 for condition in left_out):
            found.append(stage)
    return found


def check_kept(stage: str, model: Model, condition: str, keep: Any, argument: str) -> None:
    """Raise ValueError if an argument leaves out a condition that was never left out in training, at drop=0."""
    if model.metadata.get(condition, {}).get("drop") == 0 and not np.all(keep):
        what = condition.replace("_", " ")
        raise ValueError(f"{argument} leaves out the {what} of the {stage}, which was trained with {condition}.drop=0")


def check_request_kept(pipeline: Any, keep: np.ndarray, embedding: str, use_text: Any) -> None:
    """Raise ValueError if `UnCLIP.generate` is to leave out a condition that was never left out in training."""
    empty, decoder = 'the prompt ""', pipeline.decoder
    if embedding == "prior":
        check_kept("prior", pipeline.prior, "caption", keep, empty)
    by, kept = ("embedding='none'", False) if embedding == "none" else (empty, keep if embedding == "text" else True)
    check_kept("decoder", decoder, "image_embedding", kept, by)
    check_kept("decoder", decoder, "caption", keep & bool(use_text), empty if use_text else "use_text=False")
