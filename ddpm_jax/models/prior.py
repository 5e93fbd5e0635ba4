"""The diffusion prior: from a caption to a CLIP image embedding (DALL-E 2, section 2.2)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import TimeEmbedding
from ddpm_jax.models.transformer import Transformer, causal_mask, gelu


class DiffusionPrior(nn.Module):
    """A causal transformer that predicts the clean image embedding from a noised one.

    The sequence is: encoded text (L tokens), CLIP text embedding, time, noised image embedding, and a learned query
    whose output is the prediction. Padding is masked. A dropped caption has no influence: its tokens are masked and
    its embedding is replaced by a learned one.

    Attributes:
        embed_dim: D > 0, size of the CLIP embeddings.
        context: L, number of text tokens.
        width: channels of the tokens; a multiple of heads.
        layers: number of transformer blocks, >= 1.
        heads: number of attention heads.
        text_encoder: reads token ids and is trained with the prior (as in the paper); None if `text` is the hidden
            states of a frozen encoder (as in Karlo).
        activation: of the MLPs.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which the layers compute; parameters are float32.
        scan: True runs the blocks in a loop, see `Transformer`.
    """

    embed_dim: int
    context: int
    width: int
    layers: int
    heads: int
    text_encoder: nn.Module | None = None
    activation: Callable = gelu
    remat: bool | str = False
    dtype: Any = jnp.float32
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        zt: jax.Array,
        t: jax.Array,
        z_text: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        keep_text: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predict the clean embedding.

        Args:
            zt: float32[B, D], noised and scaled by the caller.
            t: float or int[B].
            z_text: float32[B, D], unit vectors.
            text: hidden states, float[B, L, W], or token ids, int32[B, L], with a text_encoder.
            text_mask: bool[B, L], True at real tokens.
            keep_text: bool[B], False where the caption is dropped; None keeps all.
            train: without effect, since the network has no dropout.

        Returns:
            float32[B, D].

        Raises:
            ValueError: if text has not `context` tokens.
        """
        del train  # it has no dropout
        b, d = zt.shape
        keep = jnp.ones(b, bool) if keep_text is None else keep_text
        dense = lambda name: nn.Dense(self.width, dtype=self.dtype, name=name)  # noqa: E731
        if self.text_encoder is not None:
            text = self.text_encoder(text, text_mask)
        length = text.shape[1]
        if length != self.context:
            raise ValueError(f"text has {length} tokens; this prior was built for {self.context}")
        init = nn.initializers.normal(0.02)
        null = self.param("null_text", init, (self.width,), jnp.float32).astype(self.dtype)
        query = self.param("query", init, (self.width,), jnp.float32).astype(self.dtype)
        text = jnp.where(keep[:, None, None], dense("text_in")(text.astype(self.dtype)), 0)
        z_text = jnp.where(keep[:, None], dense("z_text_in")(z_text.astype(self.dtype) * d**0.5), null[None])
        time = TimeEmbedding(self.width, self.width, self.dtype, name="time")(t)
        noised = dense("zt_in")(zt.astype(self.dtype))
        last = jnp.broadcast_to(query, (b, self.width))
        x = jnp.concatenate([text, jnp.stack([z_text, time, noised, last], axis=1)], axis=1)
        x = x + self.param("position", init, (length + 4, self.width), jnp.float32)[None].astype(self.dtype)
        seen = jnp.pad(text_mask & keep[:, None], ((0, 0), (0, 4)), constant_values=True)
        mask = causal_mask(length + 4) & seen[:, None, None, :]
        x = Transformer(
            self.layers, self.heads, self.activation, self.remat, self.dtype, scan=self.scan, name="transformer"
        )(x, mask)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ln_final")(x[:, -1])
        return nn.Dense(d, dtype=jnp.float32, name="out")(x.astype(jnp.float32))
