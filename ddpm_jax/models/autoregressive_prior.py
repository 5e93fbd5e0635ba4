"""The autoregressive prior: from a caption to the codes of a CLIP image embedding (DALL-E 2, section 2.2)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import Embed
from ddpm_jax.models.transformer import Cache, Transformer, causal_mask, gelu


class AutoregressivePrior(nn.Module):
    """A causal transformer that predicts each code of `EmbeddingCodes` from those before it.

    The sequence is: encoded text (L tokens), CLIP text embedding, the code of the dot product of text and image
    embedding, and the codes but for the last. The output at each of the last K positions is the distribution of the
    next code. Padding is masked. A dropped caption has no influence: its tokens are masked, its embedding is replaced
    by a learned one, and the dot product by a code of its own.

    Attributes:
        embed_dim: D > 0, size of the CLIP embeddings.
        dims: K, number of codes of an embedding.
        buckets: number of values of a code.
        dot_buckets: number of values of the code of the dot product.
        context: L, number of text tokens.
        width: channels of the tokens; a multiple of heads.
        layers: number of transformer blocks, >= 1.
        heads: number of attention heads.
        text_encoder: reads token ids and is trained with the prior (as in the paper); None if `text` is the hidden
            states of a frozen encoder.
        activation: of the MLPs.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which the layers compute; parameters are float32.
        scan: True runs the blocks in a loop, see `Transformer`.
    """

    embed_dim: int
    dims: int
    buckets: int
    dot_buckets: int
    context: int
    width: int
    layers: int
    heads: int
    text_encoder: nn.Module | None = None
    activation: Callable = gelu
    remat: bool | str = False
    dtype: Any = jnp.float32
    scan: bool = False

    def setup(self):
        init, dense = nn.initializers.normal(0.02), lambda: nn.Dense(self.width, dtype=self.dtype)
        self.text_in, self.z_text_in = dense(), dense()
        self.null_text = self.param("null_text", init, (self.width,), jnp.float32)
        self.dot = Embed(self.dot_buckets + 1, self.width, embedding_init=init, dtype=self.dtype)
        self.code = Embed(self.buckets, self.width, embedding_init=init, dtype=self.dtype)
        self.position = self.param("position", init, (self.length, self.width), jnp.float32)
        self.transformer = Transformer(self.layers, self.heads, self.activation, self.remat, self.dtype, scan=self.scan)
        self.ln_final = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.out = nn.Dense(self.buckets, dtype=jnp.float32)

    @property
    def length(self) -> int:
        """Number of tokens of the sequence."""
        return self.context + 1 + self.dims

    def __call__(
        self,
        codes: jax.Array,
        dot_code: jax.Array,
        z_text: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_text: jax.Array | None = None,
    ) -> jax.Array:
        """Predict every code from those before it.

        Args:
            codes: int32[B, K] in [0, buckets).
            dot_code: int32[B] in [0, dot_buckets).
            z_text: float32[B, D], unit vectors.
            text: hidden states, float[B, L, W], or token ids, int32[B, L], with a text_encoder.
            text_mask: bool[B, L], True at real tokens.
            keep_text: bool[B], False where the caption is dropped; None keeps all.

        Returns:
            Logits, float32[B, K, buckets].

        Raises:
            ValueError: if text has not `context` tokens, or codes are not K.
        """
        if codes.shape[1] != self.dims:
            raise ValueError(f"codes are {codes.shape[1]} for each example; this prior was built for {self.dims}")
        prefix, seen = self._prefix(dot_code, z_text, text, text_mask, keep_text)
        x = jnp.concatenate([prefix, self.code(codes[:, :-1])], axis=1) + self.position[None].astype(self.dtype)
        x = self.transformer(x, causal_mask(self.length) & self._visible(seen))
        return self._logits(x[:, -self.dims :])

    def begin(
        self,
        dot_code: jax.Array,
        z_text: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_text: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Read the prefix, with the arguments of a call.

        Returns:
            The logits of the first code, float32[B, buckets], and the state that `next` needs: keys and values of all
            blocks and which positions may be seen.
        """
        x, seen = self._prefix(dot_code, z_text, text, text_mask, keep_text)
        n, room = x.shape[1], self.dims - 1
        x = x + self.position[None, :n].astype(self.dtype)
        visible = self._visible(seen)
        mask = jnp.pad(causal_mask(n), ((0, 0), (0, 0), (0, 0), (0, room))) & visible
        shape = (x.shape[0], self.length, self.heads, self.width // self.heads)
        empty = jnp.zeros((self.layers, *shape), self.dtype)
        x, cache = self.transformer(x, mask, Cache(empty, empty, jnp.zeros((), jnp.int32)))
        return self._logits(x[:, -1:])[:, 0], (cache, visible)

    def next(self, state: Any, code: jax.Array) -> tuple[jax.Array, Any]:
        """Read one more code, int32[B]. Returns the logits of the one after it, and the state."""
        cache, visible = state
        at = jax.lax.dynamic_slice_in_dim(self.position, cache.index, 1)[None].astype(self.dtype)
        so_far = jnp.arange(self.length)[None, None, None] <= cache.index
        x, cache = self.transformer(self.code(code[:, None]) + at, visible & so_far, cache)
        return self._logits(x)[:, 0], (cache, visible)

    def _prefix(
        self,
        dot_code: jax.Array,
        z_text: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_text: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the tokens before the codes, [B, L + 2, width], and which text tokens are seen, bool[B, L]."""
        keep = jnp.ones(z_text.shape[0], bool) if keep_text is None else keep_text
        if self.text_encoder is not None:
            text = self.text_encoder(text, text_mask)
        if text.shape[1] != self.context:
            raise ValueError(f"text has {text.shape[1]} tokens; this prior was built for {self.context}")
        text = jnp.where(keep[:, None, None], self.text_in(text.astype(self.dtype)), 0)
        z = self.z_text_in(z_text.astype(self.dtype) * self.embed_dim**0.5)
        z = jnp.where(keep[:, None], z, self.null_text[None].astype(self.dtype))
        dot = self.dot(jnp.where(keep, dot_code, self.dot_buckets))
        return jnp.concatenate([text, z[:, None], dot[:, None]], axis=1), text_mask & keep[:, None]

    def _visible(self, seen: jax.Array) -> jax.Array:
        """Return bool[B, 1, 1, length] of which text tokens are seen, bool[B, L]."""
        wide = jnp.pad(seen, ((0, 0), (0, self.length - self.context)), constant_values=True)
        return wide[:, None, None]

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.out(self.ln_final(x).astype(jnp.float32))
