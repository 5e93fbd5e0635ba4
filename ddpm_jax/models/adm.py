"""The class-conditional U-Net of ADM and the classifier that guides it (Dhariwal & Nichol 2021)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.attention import attention
from ddpm_jax.models.layers import Embed, GroupNorm, TimeEmbedding
from ddpm_jax.models.unet import Blocks, UNet, check_blocks, check_image_size, encode

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


class ClassUNet(nn.Module):
    """Class-conditional U-Net: a learned vector for each class is added to the time embedding (improved DDPM, 4).

    Attributes:
        unet: the U-Net.
        num_classes: K > 0; for classifier-free guidance one more, whose last index is the null class.
    """

    unet: UNet
    num_classes: int

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, y: jax.Array, *, train: bool = False) -> jax.Array:
        """Predict the process' output, float32[B, H, W, unet.out_channels].

        Args:
            xt: float[B, H, W, C].
            t: float or int[B].
            y: int32[B] in [0, num_classes).
            train: True turns dropout on.
        """
        width = 4 * self.unet.channels
        init = nn.initializers.normal(1.0)
        label = Embed(self.num_classes, width, embedding_init=init, dtype=self.unet.dtype, name="label")(y)
        return self.unet(xt, t, label, train=train)


class SuperUNet(nn.Module):
    """ADM's upsampler: the low-resolution image, resized bilinearly, is concatenated to the noised image.

    Attributes:
        unet: the U-Net; its input has twice the channels of the image.
        num_classes: K > 0, or None for an unconditional network.
        noise_level_input: True embeds the level of the noise that was added to the low-resolution image, like a
            timestep, and adds it to the time embedding (conditioning augmentation: Ho et al. 2022, cascaded diffusion,
            section 4.2). False in ADM.
    """

    unet: UNet
    num_classes: int | None = None
    noise_level_input: bool = dataclasses.field(default=False, metadata={"describe": "unless default"})

    @nn.compact
    def __call__(
        self,
        xt: jax.Array,
        t: jax.Array,
        low_res: jax.Array,
        y: jax.Array | None = None,
        noise_level: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predict the process' output, float32[B, H, W, unet.out_channels].

        Args:
            xt: float[B, H, W, C].
            t: float or int[B].
            low_res: float[B, h, w, C].
            y: int32[B] in [0, num_classes), if and only if the network has classes.
            noise_level: float32[B] in [0, 1], if and only if the network has noise_level_input.
            train: True turns dropout on.

        Raises:
            ValueError: if y or noise_level is missing, or given to a network that does not take it.
        """
        low = jax.image.resize(low_res, (*xt.shape[:3], low_res.shape[-1]), "linear", antialias=False)
        x, emb = jnp.concatenate([xt, low.astype(xt.dtype)], axis=-1), None
        if (y is None) != (self.num_classes is None):
            raise ValueError(f"y is needed if, and only if, the network has classes; num_classes={self.num_classes}")
        if (noise_level is not None) != self.noise_level_input:
            raise ValueError(
                f"noise_level is an input if, and only if, noise_level_input={self.noise_level_input} is True"
            )
        width = 4 * self.unet.channels
        if y is not None:
            emb = Embed(self.num_classes, width, dtype=self.unet.dtype, name="label")(y)
        if noise_level is not None:
            # Levels are in [0, 1], timesteps in [0, 1000).
            embed = TimeEmbedding(self.unet.channels, width, self.unet.dtype, name="noise_level")
            level = embed(1000.0 * noise_level)
            emb = level if emb is None else emb + level
        return self.unet(x, t, emb, train=train)


class Classifier(nn.Module):
    """Classifier of noised images: the U-Net's encoder path and a pooling head (ADM 4, appendix H).

    Attributes:
        channels: width of the first level, > 0; level i has int(channels * channel_mult[i]) channels.
        num_classes: K > 0.
        image_size: height and width of the training images; pool="attention" takes no other size.
        channel_mult, num_res_blocks: levels and residual blocks, see `UNet`.
        attention_resolutions: heights of the feature maps that have attention in images of image_size, where
            attention_levels is None.
        head_channels: channels of an attention head, where heads is None.
        heads: number of attention heads at every level.
        conv_resample, scale_shift: see `UNet`.
        pool: "attention" as published (the query is the mean over positions), "adaptive" (the mean over positions),
            "spatial" or "spatial_v2" (the means of every block's output through one hidden layer of 2048, with ReLU,
            or with a group norm and SiLU).
        dropout: rate of dropout inside residual blocks, in [0, 1).
        groups: groups of the group norms; divides the channels of every level.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which blocks compute; parameters and the head are float32.
        attention_levels: levels that have attention, 0 being the finest; None takes attention_resolutions.
        pool_resample: average pooling between levels, see `UNet`.
    """

    channels: int
    num_classes: int
    image_size: int
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int = 64
    heads: int | None = None
    conv_resample: bool = False
    scale_shift: bool = True
    pool: str = "attention"
    dropout: float = 0.0
    groups: int = 32
    remat: bool | str = False
    dtype: Any = jnp.float32
    attention_levels: tuple[int, ...] | None = None
    pool_resample: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, *, train: bool = False) -> jax.Array:
        """Return the logits, float32[B, num_classes].

        Args:
            x: float[B, H, W, C], noised images.
            t: float or int[B].
            train: True turns dropout on.

        Raises:
            ValueError: if pool has no such value, or x has a size that the network does not take.
        """
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} must be one of {', '.join(POOLS)}")
        if self.pool == "attention" and x.shape[1:3] != (self.image_size,) * 2:
            raise ValueError(f"x has shape {x.shape}; this classifier was built for images of {self.image_size}")
        check_blocks(self)
        for size in x.shape[1:3]:
            check_image_size(size, 1, len(self.channel_mult))
        time = TimeEmbedding(self.channels, 4 * self.channels, self.dtype, name="time")(t)
        h, skips = encode(Blocks(self, time, train, []), x.astype(self.dtype), True)
        h = h.astype(jnp.float32)
        if self.pool.startswith("spatial"):
            means = [part.astype(jnp.float32).mean((1, 2)) for part in (*skips, h)]
            h = nn.Dense(2048, name="hidden")(jnp.concatenate(means, axis=-1))
            h = nn.relu(h) if self.pool == "spatial" else nn.silu(GroupNorm(self.groups, name="out_norm")(h))
            return nn.Dense(self.num_classes, name="out")(h)
        h = nn.silu(GroupNorm(self.groups, name="out_norm")(h))
        if self.pool == "adaptive":
            return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="out")(h.mean((1, 2)))
        return AttentionPool(self.head_channels, self.num_classes, name="pool")(h)


class AttentionPool(nn.Module):
    """CLIP's pooling (Radford et al. 2021, ResNets): the mean over positions attends to itself and all positions.

    x: float32[B, H, W, C] -> float32[B, features].

    Attributes:
        head_channels: channels of an attention head; divides C.
        features: of the output.
    """

    head_channels: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        x = x.reshape(b, height * width, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        init = nn.initializers.normal(c**-0.5)
        x = x + self.param("position", init, (x.shape[1], c), jnp.float32)[None]
        q, k, v = jnp.split(nn.Dense(3 * c, name="qkv")(x).reshape(b, x.shape[1], -1, self.head_channels), 3, axis=2)
        return nn.Dense(self.features, name="out")(attention(q[:, :1], k, v).reshape(b, c))
