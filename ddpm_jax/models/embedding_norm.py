"""The space of CLIP image embeddings in which a diffusion prior works, and the way there and back.

Noise has unit variance, and the entries of a unit vector of D dimensions have a size of 1 / sqrt(D): a prior works on
x = (z - mean) * scale. Every prior has its own convention: one scale for all entries (DALL-E 2, 17.2 for 1024
dimensions), or entries of mean 0 and deviation 1 over the training embeddings (Karlo).
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

PAPER_SCALE = 0.54  # times sqrt(D); 17.2 / sqrt(1024)


class EmbeddingNorm(flax.struct.PyTreeNode):
    """x = (z - mean) * scale of an embedding z, and back.

    Attributes:
        mean: float32[D] or a number.
        scale: float32[D] or a number, positive.
        length: the norm that embeddings have in training, 1 for unit vectors.
    """

    mean: jax.Array | float = 0.0
    scale: jax.Array | float = 1.0
    length: jax.Array | float = 1.0

    @classmethod
    def standardizing(cls, mean: jax.Array, std: jax.Array) -> "EmbeddingNorm":
        """Return the one that gives entries mean 0 and deviation 1; mean, std: float32[D], of training embeddings.

        The length is the root of the mean square of the norms, that is, of the sum of mean^2 + std^2.
        """
        return cls(mean, 1.0 / std, jnp.sqrt(jnp.sum(jnp.square(mean) + jnp.square(std))))

    def normalize(self, z: jax.Array) -> jax.Array:
        """Return what the prior works on. z: float32[B, D]. Returns float32[B, D]."""
        return (z - _row(self.mean)) * _row(self.scale)

    def restore(self, x: jax.Array) -> jax.Array:
        """Return the embeddings of what the prior works on: the inverse of `normalize`."""
        return x / _row(self.scale) + _row(self.mean)

    def project(self, x: jax.Array) -> jax.Array:
        """Return the nearest x whose embeddings have the length of those in training, for the option `l2_clamp`."""
        z = self.restore(x)
        norm = jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
        return self.normalize(z * (self.length / norm))


class EmbeddingStatistics(nn.Module):
    """Mean and standard deviation of the entries of training embeddings; a call returns their `EmbeddingNorm`.

    The parameters are fitted to embeddings (`training.tasks.statistics.StatisticsTask`), and not trained by gradients.

    Attributes:
        embed_dim: D > 0, size of the embeddings.
    """

    embed_dim: int

    @nn.compact
    def __call__(self) -> EmbeddingNorm:
        """Return the way between embeddings and entries of mean 0 and deviation 1."""
        mean = self.param("mean", nn.initializers.zeros, (self.embed_dim,), jnp.float32)
        std = self.param("std", nn.initializers.ones, (self.embed_dim,), jnp.float32)
        return EmbeddingNorm.standardizing(mean, std)


def _row(values: jax.Array | float) -> jax.Array | float:
    return values if jnp.ndim(values) == 0 else values[None]
