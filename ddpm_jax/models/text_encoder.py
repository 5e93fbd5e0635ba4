"""Token ids in, hidden states out: the text encoders of CLIP, of the prior and of the decoder."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import Embed
from ddpm_jax.models.transformer import Transformer, causal_mask, gelu


class TextEncoder(nn.Module):
    """A transformer over tokens with learned positions and a final layer norm (CLIP 2.4, GLIDE 4).

    tokens: int32[B, L] with L <= context; mask: bool[B, L], True at real tokens. Returns hidden states [B, L, width].

    Attributes:
        vocab_size: number of token ids.
        context: largest L.
        width: channels of the hidden states; a multiple of heads.
        layers: number of transformer blocks, >= 1.
        heads: number of attention heads.
        activation: of the MLPs.
        causal: True as in CLIP, where padding needs no mask, since it follows the end token. False attends to all
            real tokens, as GLIDE's encoder does, and requires the mask.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which the layers compute; parameters are float32.
        mlp_width: width of the MLPs' hidden layer; 4 * width if None.
        scan: True runs the blocks in a loop, see `Transformer`.
    """

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    activation: Callable = gelu
    causal: bool = True
    remat: bool | str = False
    dtype: Any = jnp.float32
    mlp_width: int | None = None
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        length = tokens.shape[1]
        if not self.causal and mask is None:
            raise ValueError("a text encoder that is not causal needs a mask, so that no token sees padding")
        if length > self.context:
            raise ValueError(f"tokens have length {length}, the text encoder was built for at most {self.context}")
        init = nn.initializers.normal(0.02)
        x = Embed(self.vocab_size, self.width, embedding_init=init, dtype=self.dtype, name="token")(tokens)
        position = self.param("position", nn.initializers.normal(0.01), (self.context, self.width), jnp.float32)
        x = x + position[None, :length].astype(self.dtype)
        options = (self.activation, self.remat, self.dtype, self.mlp_width, self.scan)
        x = Transformer(self.layers, self.heads, *options, name="transformer")(
            x, causal_mask(length) if self.causal else mask[:, None, None, :]
        )
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ln_final")(x)


class RecurrentTextEncoder(nn.Module):
    """Two gated recurrent networks (Cho et al. 2014) over tokens, one from each end, and a final layer norm.

    The recurrence carries neighbouring tokens into a hidden state from the first step of training, where attention
    first has to learn which tokens matter: on small data it learns in far fewer steps which object a colour belongs to.

    tokens: int32[B, L]; mask: bool[B, L], True at real tokens, which come first. Returns hidden states [B, L, width],
    of which those of real tokens do not depend on the padding. Raises ValueError if the width is odd.

    Attributes:
        vocab_size: number of token ids.
        width: channels of the hidden states, even: each direction has half of them.
        layers: number of recurrent layers, >= 1.
        dtype: in which the layers compute; parameters are float32.
    """

    vocab_size: int
    width: int
    layers: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        if self.width % 2:
            raise ValueError(f"width={self.width} must be even: each direction has half of it")
        half, init = self.width // 2, nn.initializers.normal(0.3)
        x = Embed(self.vocab_size, half, embedding_init=init, dtype=self.dtype, name="token")(tokens)
        masks = jnp.stack([mask, mask[:, ::-1]])[..., None].swapaxes(1, 2)
        for i in range(self.layers):
            both = [
                nn.Dense(3 * half, dtype=self.dtype, name=f"in_{i}_{name}")(y)
                for name, y in {"ahead": x, "back": x[:, ::-1]}.items()
            ]
            matrices = [
                self.param(f"kernel_{i}_{name}", nn.initializers.orthogonal(), (half, 3 * half), jnp.float32)
                for name in ("ahead", "back")
            ]
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (2, 1, half), jnp.float32)
            states = _gru(jnp.stack(both), masks, *(v.astype(self.dtype) for v in (jnp.stack(matrices), bias)))
            x = jnp.concatenate([states[0], states[1][:, ::-1]], axis=-1)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ln_final")(x)


def _gru(inputs: jax.Array, mask: jax.Array, matrix: jax.Array, bias: jax.Array) -> jax.Array:
    """Run gated recurrent networks, one per direction, over all tokens; the state is unchanged where mask is False.

      r, z = sigmoid(a_r + U_r h), sigmoid(a_z + U_z h);  n = tanh(a_n + r (U_n h + b));  h' = (1 - z) n + z h

    inputs: [2, B, L, 3 W], a of (r, z, n); mask: bool[2, L, B, 1]; matrix: [2, W, 3 W]; bias: [2, 1, W].
    Returns the states, [2, B, L, W].
    """

    def step(h: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (a_r, a_z, a_n), real = jnp.split(token[0], 3, axis=-1), token[1]
        u_r, u_z, u_n = jnp.split(jnp.einsum("dbw,dwv->dbv", h, matrix), 3, axis=-1)
        r, z = nn.sigmoid(a_r + u_r), nn.sigmoid(a_z + u_z)
        n = jnp.tanh(a_n + r * (u_n + bias))
        h = jnp.where(real, (1 - z) * n + z * h, h)
        return h, h

    start = jnp.zeros((*inputs.shape[:2], matrix.shape[1]), inputs.dtype)
    # Iterations cost more than the small products in them, so short captions are unrolled.
    tokens = (inputs.transpose(2, 0, 1, 3), mask.swapaxes(0, 1))
    states = jax.lax.scan(step, start, tokens, unroll=min(inputs.shape[2], 32))[1]
    return states.transpose(1, 2, 0, 3)


def end_position(mask: jax.Array) -> jax.Array:
    """Return int32[B], the position of the end token: the last real one. mask: bool[B, L], True at real tokens.

    For tokens padded with 0 it is CLIP's own rule, the largest id of a row.
    """
    return jnp.sum(mask, axis=-1) - 1
