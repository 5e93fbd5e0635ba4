"""The unCLIP upsampler: an unconditional super-resolution U-Net without attention (DALL-E 2, 2.1; SR3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.unet import UNet


class Upsampler(nn.Module):
    """U-Net that sees the low-resolution picture, resized bicubically, beside the noised one.

    Convolutions only, so it may be trained on crops and run on whole pictures.
    """

    unet: UNet

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, low_res: jax.Array, *, train: bool = False) -> jax.Array:
        """Predict the process' output. xt: float32[B, H, W, 3]; t: [B]; low_res: float32[B, h, w, 3] in [-1, 1]."""
        b, height, width, _ = xt.shape
        low = jax.image.resize(low_res, (b, height, width, low_res.shape[-1]), "cubic")
        return self.unet(jnp.concatenate([xt, low.astype(xt.dtype)], axis=-1), t, train=train)
