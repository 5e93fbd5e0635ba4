"""The unCLIP decoder: an ADM U-Net that draws what a CLIP image embedding, and a caption, describe (DALL-E 2, 2.1)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.unet import UNet


class Decoder(nn.Module):
    """U-Net conditioned on an image embedding and on text.

    The image embedding is projected and added to the time embedding, and projected to `image_tokens` context tokens
    that precede the text tokens; the CLIP text embedding is projected and added to the time embedding too (Karlo). With
    `pool_text` the mean of the text tokens is as well (Imagen, section 2.4), so that words reach every
    layer and not only those with attention. With `layout_channels` the sum of these projections is projected to a map
    of the U-Net's grid, of so many channels, which goes in beside the noised picture: convolutions turn a vector into
    something at a place by their padding alone, and a small network is slow to learn that. 0 is the published network.

    Dropped conditions leave no trace: the image embedding is replaced by learned null vectors, text tokens are
    hidden from attention and the text embedding is replaced by a learned one.
    """

    unet: UNet
    embed_dim: int
    context_width: int
    image_tokens: int = 4
    pool_text: bool = False
    layout_channels: int = 0
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

        xt: float32[B, H, W, 3]; t: [B]; z_image, z_text: float32[B, D] of unit length; text: hidden states
        [B, L, W] or, with a text_encoder, int32[B, L]; text_mask: bool[B, L]; keep_image, keep_text: bool[B], None
        keeps all. Returns float32[B, H, W, unet.out_channels].
        """
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
        null_text = self.param("null_text", init, (emb_width,), jnp.float32).astype(self.dtype)
        z_image = jnp.where(keep_image[:, None], z_image, null_z[None])
        text_emb = jnp.where(keep_text[:, None], dense(emb_width, "text_emb")(z_text), null_text[None])
        emb = dense(emb_width, "image_emb")(z_image) + text_emb
        tokens = dense(k * width, "image_tokens_in")(z_image).reshape(b, k, width)
        if self.text_encoder is not None:
            text = self.text_encoder(text)
        hidden = dense(width, "text_in")(text.astype(self.dtype))
        hidden = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="text_ln")(hidden)
        hidden = jnp.where(keep_text[:, None, None], hidden, 0)
        if self.pool_text:
            seen = (text_mask & keep_text[:, None]).astype(self.dtype)[:, :, None]
            pooled = jnp.sum(hidden * seen, axis=1) / jnp.maximum(jnp.sum(seen, axis=1), 1)
            emb = emb + dense(emb_width, "text_pool")(pooled)
        context = jnp.concatenate([tokens, hidden], axis=1)
        mask = jnp.pad(text_mask & keep_text[:, None], ((0, 0), (k, 0)), constant_values=True)
        layout = None
        if self.layout_channels:
            grid = (xt.shape[1] // self.unet.patch, xt.shape[2] // self.unet.patch, self.layout_channels)
            layout = dense(math.prod(grid), "layout")(nn.silu(emb)).reshape(b, *grid)
        return self.unet(xt, t, emb, context, mask, layout, train=train)
