"""The autoencoder of latent diffusion: images to a smaller grid of latents and back (Rombach et al. 2022, G.1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import AttentionBlock, GroupNorm, ResBlock, conv, upsample2

EPS = 1e-6


class Autoencoder(nn.Module):
    """A convolutional encoder to a Gaussian over latents, and a decoder (KL-regularised, LDM 3.1).

    Attention, with one head, is in the middle only.

    Attributes:
        channels: width of the first level, > 0; level i has int(channels * channel_mult[i]) channels.
        channel_mult: multipliers of the width, one for each level; each level but the last halves the image.
        num_res_blocks: residual blocks of each level in the encoder, >= 1; the decoder has one more.
        latent_channels: channels of the latents.
        out_channels: channels of the decoded images.
        scale: diffusion models are trained on z * scale, which has about unit variance; the number belongs to the
            weights (0.18215 for Stable Diffusion 1 and 2).
        groups: groups of the group norms; divides the channels of every level.
        dtype: in which the layers compute; results are float32.
    """

    channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 4
    out_channels: int = 3
    scale: float = 0.18215
    groups: int = 32
    dtype: Any = jnp.float32

    def setup(self):
        same = (self.channels, tuple(self.channel_mult), self.num_res_blocks)
        self.encoder = Encoder(*same, 2 * self.latent_channels, self.groups, self.dtype)
        self.decoder = Decoder(*same, self.out_channels, self.groups, self.dtype)
        self.moments = conv(2 * self.latent_channels, 1, None, self.dtype)
        self.latents = conv(self.latent_channels, 1, None, self.dtype)

    @property
    def factor(self) -> int:
        """Height and width of an image divided by those of its latents."""
        return 2 ** (len(self.channel_mult) - 1)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and standard deviation of the latents, float32[B, H / factor, W / factor, latent_channels].

        images: float[B, H, W, 3] in [-1, 1]. Not multiplied by scale. The logarithm of the variance is clipped to
        [-30, 20]. Raises ValueError if factor does not divide a side.
        """
        if images.shape[1] % self.factor or images.shape[2] % self.factor:
            raise ValueError(f"images have shape {images.shape}; height and width must be multiples of {self.factor}")
        mean, log_var = jnp.split(self.moments(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_var, -30.0, 20.0))

    def decode(self, z: jax.Array) -> jax.Array:
        """Decode latents z, float[B, h, w, C], not multiplied by scale, to float32[B, factor * h, factor * w, 3]."""
        return self.decoder(self.latents(z.astype(self.dtype))).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encode images and decode the means of their latents."""
        return self.decode(self.encode(images)[0])


class Encoder(nn.Module):
    """Encoder of an autoencoder: images, float[B, H, W, 3] -> features, [B, h, w, out_channels].

    Attributes:
        channels, channel_mult, groups, dtype: see `Autoencoder`.
        num_res_blocks: residual blocks of each level.
        out_channels: channels of the features: means and log variances of the latents.
    """

    channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    out_channels: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = conv(self.channels, 3, "in_conv", self.dtype)(x.astype(self.dtype))
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                h = _res(self, int(self.channels * mult), f"down_{level}_{i}")(h, None)
            if level != len(self.channel_mult) - 1:
                # Padded below and to the right only, unlike the convolutions of our U-Nets.
                half = nn.Conv(h.shape[-1], (3, 3), 2, ((0, 1), (0, 1)), dtype=self.dtype, name=f"down_{level}_sample")
                h = half(h)
        h = nn.silu(GroupNorm(self.groups, EPS, self.dtype, name="out_norm")(_middle(self, h)))
        return conv(self.out_channels, 3, "out_conv", self.dtype)(h)


class Decoder(nn.Module):
    """Decoder of an autoencoder: latents, [B, h, w, C] -> images, [B, H, W, out_channels].

    Attributes:
        channels, channel_mult, groups, dtype: see `Autoencoder`.
        num_res_blocks: residual blocks of each level, and one more.
        out_channels: channels of the images.
    """

    channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    out_channels: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        h = _middle(self, conv(int(self.channels * self.channel_mult[-1]), 3, "in_conv", self.dtype)(z))
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = _res(self, int(self.channels * mult), f"up_{level}_{i}")(h, None)
            if level:
                h = conv(h.shape[-1], 3, f"up_{level}_sample", self.dtype)(upsample2(h))
        h = nn.silu(GroupNorm(self.groups, EPS, self.dtype, name="out_norm")(h))
        return conv(self.out_channels, 3, "out_conv", self.dtype)(h)


def _res(net: Encoder | Decoder, features: int, name: str) -> ResBlock:
    return ResBlock(features, groups=net.groups, dtype=net.dtype, eps=EPS, name=name)


def _middle(net: Encoder | Decoder, h: jax.Array) -> jax.Array:
    h = _res(net, h.shape[-1], "mid_0")(h, None)
    h = AttentionBlock(h.shape[-1], net.groups, net.dtype, EPS, name="mid_attn")(h)
    return _res(net, h.shape[-1], "mid_1")(h, None)
