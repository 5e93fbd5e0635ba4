"""The unCLIP decoder: an ADM U-Net conditioned on a CLIP image embedding and a caption (DALL-E 2, 2.1)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import Embed
from ddpm_jax.models.unet import UNet


class Decoder(nn.Module):
    """U-Net conditioned on an image embedding and on text.

    The image embedding is projected and added to the time embedding, and projected to `image_tokens` context tokens
    that precede the text tokens. Dropped conditions have no influence: the image embedding is replaced by learned null
    vectors, text tokens are masked and left out of the sum of word vectors, and the text embedding is replaced by a
    learned one. word_vectors, cond_map_channels, cond_map_heads and text_encoder are not in the paper.

    Attributes:
        unet: the U-Net.
        embed_dim: D > 0, size of the CLIP embeddings.
        context_width: channels of the context tokens.
        image_tokens: number of context tokens that the image embedding is projected to.
        text_embedding: True also adds a projection of the CLIP text embedding to the time embedding (Karlo).
        word_vectors: size of the vocabulary, or 0. A learned vector for every token is added to the time embedding,
            besides the text encoder's output: it generalises to pairs of words that training does not contain, since
            the sum says the same about a shape whatever its colour. It needs a text_encoder, that is, token ids.
        cond_map_channels: E, or 0. The embedding is projected to a map of the U-Net's grid with E channels, which is
            concatenated to the noised image: convolutions localise a global vector by their padding alone, which small
            networks are slow to learn.
        cond_map_heads: heads of a `GridCrossAttention` whose result is added to that map, or 0: each spatial position
            cross-attends to the caption tokens, which binds attributes to one of several objects. It needs
            cond_map_channels and word_vectors.
        text_encoder: reads token ids and is trained with the decoder; None if `text` is hidden states.
        dtype: in which the layers compute; parameters are float32.
    """

    unet: UNet
    embed_dim: int
    context_width: int
    image_tokens: int = 4
    text_embedding: bool = True
    word_vectors: int = 0
    cond_map_channels: int = 0
    cond_map_heads: int = 0
    text_encoder: nn.Module | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        xt: jax.Array,
        t: jax.Array,
        z_image: jax.Array,
        z_text: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_image: jax.Array | None = None,
        keep_text: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predict the process' output for xt.

        Args:
            xt: float32[B, H, W, 3].
            t: float or int[B].
            z_image: float32[B, D], unit vectors.
            z_text: float32[B, D], unit vectors.
            text: hidden states, float[B, L, W], or token ids, int32[B, L], with a text_encoder.
            text_mask: bool[B, L], True at real tokens.
            keep_image: bool[B], False where the image embedding is dropped; None keeps all.
            keep_text: bool[B], False where the caption is dropped; None keeps all.
            train: True turns dropout on.

        Returns:
            float32[B, H, W, unet.out_channels].

        Raises:
            ValueError: if fields contradict each other.
        """
        check_cond_map(self.cond_map_heads, self.cond_map_channels, self.word_vectors)
        if self.unet.modulate and not self.cond_map_channels:
            raise ValueError("modulate=True of the U-Net needs cond_map_channels, got cond_map_channels=0")
        b = xt.shape[0]
        keep_image = jnp.ones(b, bool) if keep_image is None else keep_image
        keep_text = jnp.ones(b, bool) if keep_text is None else keep_text
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)  # noqa: E731
        emb_width, k, width = 4 * self.unet.channels, self.image_tokens, self.context_width
        init = nn.initializers.normal(0.02)
        # Unit vectors have entries of size 1/sqrt(D): bring them to unit variance before a projection.
        gain = self.embed_dim**0.5
        z_image, z_text = (z_image * gain).astype(self.dtype), (z_text * gain).astype(self.dtype)
        null_z = self.param("null_image", init, (self.embed_dim,), jnp.float32).astype(self.dtype)
        z_image = jnp.where(keep_image[:, None], z_image, null_z[None])
        emb = dense(emb_width, "image_emb")(z_image)
        if self.text_embedding:
            null_text = self.param("null_text", init, (emb_width,), jnp.float32).astype(self.dtype)
            emb = emb + jnp.where(keep_text[:, None], dense(emb_width, "text_emb")(z_text), null_text[None])
        seen = text_mask & keep_text[:, None]
        if self.word_vectors:
            words = self._words(text, emb_width)
            emb = emb + jnp.sum(jnp.where(seen[:, :, None], words, 0), axis=1)
        tokens = dense(k * width, "image_tokens_in")(z_image).reshape(b, k, width)
        ids, text = text, text if self.text_encoder is None else self.text_encoder(text, text_mask)
        hidden = dense(width, "text_in")(text.astype(self.dtype))
        hidden = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="text_ln")(hidden)
        hidden = jnp.where(keep_text[:, None, None], hidden, 0)
        context = jnp.concatenate([tokens, hidden], axis=1)
        mask = jnp.pad(seen, ((0, 0), (k, 0)), constant_values=True)
        cond_map = None  # its parameters have older names, which select their initial values
        if self.cond_map_channels:
            grid = (xt.shape[1] // self.unet.patch, xt.shape[2] // self.unet.patch, self.cond_map_channels)
            cond_map = dense(math.prod(grid), "layout")(nn.silu(emb)).reshape(b, *grid)
            if self.cond_map_heads:
                attention = GridCrossAttention(grid, self.cond_map_heads, self.word_vectors, self.dtype, name="places")
                cond_map = cond_map + attention(hidden, ids, seen)
        return self.unet(xt, t, emb, context, mask, cond_map, train=train)

    def _words(self, tokens: jax.Array, width: int) -> jax.Array:
        if self.text_encoder is None:
            raise ValueError("word_vectors need token ids: give the decoder a text_encoder")
        # 0.2: a dozen words add up to about the size of the projected image embedding.
        init = nn.initializers.normal(0.2)
        return Embed(self.word_vectors, width, dtype=self.dtype, embedding_init=init, name="words")(tokens)


def check_cond_map(heads: int, channels: int, word_vectors: int) -> None:
    """Raise ValueError unless cond_map_heads has the word vectors and the map that it needs."""
    if heads and not (channels and word_vectors):
        raise ValueError(
            f"cond_map_heads={heads} needs cond_map_channels and word_vectors, got cond_map_channels={channels} and "
            f"word_vectors={word_vectors}"
        )


class GridCrossAttention(nn.Module):
    """Cross-attention from the positions of a grid, which have learned queries, to the tokens of a caption.

    Keys are projected hidden states; values are learned vectors of the token ids, and the outputs of the heads are
    summed. The queries do not depend on the caption, so they are multiplied with the key matrix first, which makes one
    large matrix product of many small ones.

    Attributes:
        grid: (height, width, channels) of the result.
        heads: number of heads, of 16 channels each.
        vocab_size: number of token ids.
        dtype: in which the products are computed; logits and softmax are float32.
    """

    grid: tuple[int, int, int]
    heads: int
    vocab_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, words: jax.Array, mask: jax.Array) -> jax.Array:
        """Return a map, [B, *grid], which is 0 if the mask is False everywhere.

        tokens: float[B, L, W], hidden states; words: int32[B, L], the token ids; mask: bool[B, L], True at tokens that
        are attended to.
        """
        (b, length), (height, width, channels) = tokens.shape[:2], self.grid
        columns = self.heads * height * width
        query = self.param("query", nn.initializers.normal(1.0), (self.heads, height * width, 16), jnp.float32)
        key = self.param("kernel", nn.initializers.lecun_normal(), (tokens.shape[-1], self.heads * 16), jnp.float32)
        weight = jnp.einsum("hpd,whd->whp", query, key.reshape(-1, self.heads, 16)).reshape(-1, columns) / 4
        logits = jnp.einsum("blw,wa->bla", tokens, weight.astype(self.dtype), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min), axis=1)
        weights = jnp.where(mask[:, :, None], weights, 0.0).astype(self.dtype)
        weights = weights.reshape(b, length * self.heads, height * width)
        # The outputs of the heads are summed, so each is initialised small.
        init = nn.initializers.normal(self.heads**-0.5)
        value = Embed(self.vocab_size, self.heads * channels, dtype=self.dtype, embedding_init=init, name="value")
        found = jnp.einsum("bmp,bmc->bpc", weights, value(words).reshape(b, length * self.heads, channels))
        return found.reshape(b, height, width, channels)
