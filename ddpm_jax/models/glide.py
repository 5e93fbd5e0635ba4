"""GLIDE's text-conditional U-Nets: base, upsampler, and both for inpainting (Nichol et al. 2022, section 4)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import Embed
from ddpm_jax.models.transformer import Transformer
from ddpm_jax.models.unet import UNet


class Glide(nn.Module):
    """Text-conditional U-Net with a transformer text encoder that is trained with it.

    The U-Net's attention layers attend to every position of the transformer, padding included; the output at the last
    position, usually padding, is also projected and added to the time embedding. Padding has learned embeddings for
    each position, so the null condition is a caption of padding alone.

    Attributes:
        unet: the U-Net.
        vocab_size: number of token ids.
        context: number of tokens of a caption.
        width: channels of the transformer; a multiple of heads.
        layers: number of transformer blocks.
        heads: number of the transformer's attention heads.
        dtype: in which the transformer computes; parameters are float32.
    """

    unet: UNet
    vocab_size: int = 50257
    context: int = 128
    width: int = 512
    layers: int = 16
    heads: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        xt: jax.Array,
        t: jax.Array,
        tokens: jax.Array,
        mask: jax.Array,
        *,
        low_res: jax.Array | None = None,
        image: jax.Array | None = None,
        known: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Predict eps and the learned variance, in that order along the last axis.

        Args:
            xt: float[B, H, W, 3].
            t: [B].
            tokens: int32[B, context]; mask: bool[B, context], True at real tokens.
            low_res: float[B, h, w, 3], for an upsampler; resized bilinearly.
            image: float[B, H, W, 3], the image to inpaint, for an inpainting network.
            known: float[B, H, W, 1], given with image; 1 where it is to be preserved, 0 where it is masked out.
            train: True turns dropout on.

        Returns:
            float32[B, H, W, 6].

        Raises:
            ValueError: if tokens do not have length `context`, or only one of image and known is given.
        """
        if tokens.shape[1] != self.context:
            raise ValueError(f"tokens have length {tokens.shape[1]}; this network was built for {self.context}")
        if (image is None) != (known is None):
            raise ValueError("image and known must be given together")
        parts = [xt]
        if image is not None:
            parts += [image * known, known]
        if low_res is not None:
            parts.append(jax.image.resize(low_res, (*xt.shape[:3], low_res.shape[-1]), "linear", antialias=False))
        init = nn.initializers.normal(0.02)
        text = Embed(self.vocab_size, self.width, dtype=self.dtype, embedding_init=init, name="token")(tokens)
        position, padding = (
            self.param(name, nn.initializers.normal(0.01), (self.context, self.width), jnp.float32).astype(self.dtype)
            for name in ("position", "padding")
        )
        text = jnp.where(mask[..., None], text + position[None], padding[None])
        text = Transformer(self.layers, self.heads, remat=self.unet.remat, dtype=self.dtype, name="transformer")(text)
        text = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ln_final")(text)
        emb = nn.Dense(4 * self.unet.channels, dtype=self.dtype, name="text_emb")(text[:, -1])
        x = jnp.concatenate([part.astype(xt.dtype) for part in parts], axis=-1)
        return self.unet(x, t, emb, text, train=train)
