"""Health of a prior: how near its embeddings are to the true ones, beside embeddings that need no prior."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ddpm_jax.models.clip import normalize


def embedding_health(
    predicted: jax.Array, z_image: jax.Array, z_text: jax.Array | None = None, *, length: jax.Array | float = 1.0
) -> Mapping[str, jax.Array]:
    """Compare sampled image embeddings with the true ones; docs/prior.md says what healthy values are.

    Args:
        predicted: float32[B, D], one sample for each caption, of any norm.
        z_image: float32[B, D], the true embeddings, unit vectors.
        z_text: float32[B, D], the text embeddings, unit vectors; None leaves their metrics out.
        length: the norm that embeddings have in training.

    Returns:
        float32[] each, means over the batch:

        - cosine_predicted: of predicted and true embedding;
        - cosine_text, cosine_other_image, cosine_mean_image: the same of the baselines in place of the prediction: the
          text embedding, another image's embedding, and the mean of all other images' embeddings;
        - cosine_predicted_text: of predicted and text embedding; healthy is about cosine_text;
        - norm_predicted: the norm of the prediction over `length`;
        - rank_predicted, rank_text: the rank of the true image among those of the batch by the cosine with the
          prediction, and with the text embedding: 1 is the nearest, (B + 1) / 2 is chance.
    """
    unit = normalize(predicted)
    cosine = lambda a, b: jnp.sum(a * b, axis=-1)  # noqa: E731
    others = normalize(jnp.sum(z_image, axis=0, keepdims=True) - z_image)
    found = {
        "cosine_predicted": cosine(unit, z_image),
        "cosine_other_image": cosine(jnp.roll(z_image, 1, axis=0), z_image),
        "cosine_mean_image": cosine(others, z_image),
        "norm_predicted": jnp.linalg.norm(predicted, axis=-1) / length,
        "rank_predicted": _ranks(unit, z_image),
    }
    if z_text is not None:
        found |= {
            "cosine_text": cosine(z_text, z_image),
            "cosine_predicted_text": cosine(unit, z_text),
            "rank_text": _ranks(z_text, z_image),
        }
    return {name: jnp.mean(values, dtype=jnp.float32) for name, values in found.items()}


def _ranks(query: jax.Array, z_image: jax.Array) -> jax.Array:
    """Return the rank of image i by query i, from 1, float32[B]; images at the same distance do not count."""
    near = jnp.einsum("bd,nd->bn", query, z_image, precision="highest")
    return 1.0 + jnp.sum(near > jnp.diagonal(near)[:, None], axis=1, dtype=jnp.float32)
