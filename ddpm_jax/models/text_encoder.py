"""Token ids in, hidden states out: the text transformer of CLIP, of the prior and of the decoder."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.transformer import Transformer, causal_mask, gelu


class TextEncoder(nn.Module):
    """A transformer over tokens with learned positions and a final layer norm (CLIP 2.4, GLIDE 4).

    tokens: int32[B, L] with L <= context; mask: bool[B, L], True at real tokens. Returns hidden states [B, L, width].
    Causal as in CLIP, padding needs no mask: it stands after the end token and a position never looks ahead. With
    causal=False every token sees every real one, as in GLIDE's encoder, and the mask is needed.
    """

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    activation: Callable = gelu
    causal: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        length = tokens.shape[1]
        if not self.causal and mask is None:
            raise ValueError("a text encoder that is not causal needs a mask, so that no token sees padding")
        if length > self.context:
            raise ValueError(f"tokens have length {length}, the text encoder was built for at most {self.context}")
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, dtype=self.dtype, name="token")(tokens)
        position = self.param("position", nn.initializers.normal(0.01), (self.context, self.width), jnp.float32)
        x = x + position[None, :length].astype(self.dtype)
        x = Transformer(self.layers, self.heads, self.activation, self.remat, self.dtype, name="transformer")(
            x, causal_mask(length) if self.causal else mask[:, None, None, :]
        )
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ln_final")(x)


def end_position(mask: jax.Array) -> jax.Array:
    """Return int32[B], the position of the end token: the last real one. mask: bool[B, L], True at real tokens.

    For tokens padded with 0 it is CLIP's own rule, the largest id of a row.
    """
    return jnp.sum(mask, axis=-1) - 1
