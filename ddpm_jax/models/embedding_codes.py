"""CLIP embeddings as a short row of codes: principal components in buckets (DALL-E 2, section 2.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class EmbeddingCodes(nn.Module):
    """Principal components of embeddings, ordered by eigenvalue, each quantized into buckets.

    The parameters are fitted to embeddings (`training.tasks.codes.CodesTask`), and not trained by gradients. With mean
    m and components P [D, K] a unit vector z has the coordinates c = P^T (z - m). The code of a coordinate is the
    number of its bucket, of those between its edges, and stands for the middle of the bucket.

    Attributes:
        embed_dim: D > 0, size of the embeddings.
        dims: K, number of components, at most D.
        buckets: of each component, >= 2.
        dot_buckets: of the dot product of text and image embedding, >= 2.
    """

    embed_dim: int
    dims: int
    buckets: int
    dot_buckets: int

    def setup(self):
        if self.dims > self.embed_dim:
            raise ValueError(f"dims={self.dims} must be at most embed_dim={self.embed_dim}")
        zeros = nn.initializers.zeros
        self.mean = self.param("mean", zeros, (self.embed_dim,), jnp.float32)
        self.components = self.param("components", zeros, (self.embed_dim, self.dims), jnp.float32)
        self.edges = self.param("edges", zeros, (self.dims, self.buckets + 1), jnp.float32)
        self.dot_edges = self.param("dot_edges", zeros, (self.dot_buckets - 1,), jnp.float32)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return the codes of unit vectors: `encode`."""
        return self.encode(z)

    def coordinates(self, z: jax.Array) -> jax.Array:
        """Return the principal components of embeddings. z: float32[B, D]. Returns float32[B, K]."""
        return jnp.einsum("bd,dk->bk", z - self.mean[None], self.components, precision="highest")

    def encode(self, z: jax.Array) -> jax.Array:
        """Return the bucket of each component. z: float32[B, D]. Returns int32[B, K] in [0, buckets)."""
        inner = self.edges[:, 1:-1]
        return jax.vmap(jnp.searchsorted, in_axes=(0, 1), out_axes=1)(inner, self.coordinates(z)).astype(jnp.int32)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Return the embeddings that codes stand for. codes: int32[B, K]. Returns unit vectors, float32[B, D].

        Codes outside of [0, buckets) give NaN.
        """
        middle = 0.5 * (self.edges[:, 1:] + self.edges[:, :-1])
        known = (codes >= 0) & (codes < self.buckets)
        c = jax.vmap(jnp.take, in_axes=(0, 1), out_axes=1)(middle, jnp.where(known, codes, 0))
        c = jnp.where(known, c, jnp.nan)
        z = self.mean[None] + jnp.einsum("bk,dk->bd", c, self.components, precision="highest")
        return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)

    def dot_code(self, z_text: jax.Array, z_image: jax.Array) -> jax.Array:
        """Return the bucket of the dot product of unit vectors, float32[B, D]. Returns int32[B]."""
        return jnp.searchsorted(self.dot_edges, jnp.sum(z_text * z_image, axis=-1)).astype(jnp.int32)
