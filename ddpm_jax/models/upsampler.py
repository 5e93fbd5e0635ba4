"""Upsamplers: unCLIP's super-resolution U-Net without attention (DALL-E 2, 2.1), and SR3's (Saharia et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import TimeEmbedding
from ddpm_jax.models.ncsnpp import NCSNpp
from ddpm_jax.models.unet import UNet


class Upsampler(nn.Module):
    """U-Net whose input is the noised image and the low-resolution image, resized bicubically.

    Convolutions only, if the U-Net has no attention, so it may be trained on crops and run on whole images.

    Attributes:
        unet: the U-Net; of the blocks of `NCSNpp` in SR3.
        noise_level_input: True embeds the level of the noise that was added to the low-resolution image, like a
            timestep, and adds it to the time embedding (conditioning augmentation: Ho et al. 2022, cascaded diffusion,
            section 4.2; Imagen, section 2.4).
        residual: True adds the enlarged image to the output, for networks that predict x0: they learn what bicubic
            enlarging lacks, and begin as it. False in the published networks.
    """

    unet: UNet | NCSNpp
    noise_level_input: bool = False
    residual: bool = False

    @nn.compact
    def __call__(
        self,
        xt: jax.Array,
        t: jax.Array,
        low_res: jax.Array,
        noise_level: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predict the process' output.

        Args:
            xt: float32[B, H, W, 3].
            t: [B].
            low_res: float32[B, h, w, 3] in [-1, 1].
            noise_level: float32[B] in [0, 1], if and only if the network has noise_level_input.
            train: True turns dropout on.

        Raises:
            ValueError: if noise_level is missing or not an input of this network, or residual=True has an output of
                other channels than the image.
        """
        if (noise_level is not None) != self.noise_level_input:
            raise ValueError(
                f"noise_level is an input if, and only if, noise_level_input={self.noise_level_input} is True"
            )
        if self.residual and self.unet.out_channels != low_res.shape[-1]:
            raise ValueError(f"residual=True is for an output of x0, and out_channels={self.unet.out_channels}")
        b, height, width, _ = xt.shape
        low = jax.image.resize(low_res, (b, height, width, low_res.shape[-1]), "cubic")
        emb = None
        if noise_level is not None:
            channels = self.unet.channels
            # Levels are in [0, 1], timesteps in [0, 1000).
            emb = TimeEmbedding(channels, 4 * channels, self.unet.dtype, name="noise_level")(1000.0 * noise_level)
        out = self.unet(jnp.concatenate([xt, low.astype(xt.dtype)], axis=-1), t, emb, train=train)
        return out + low if self.residual else out
