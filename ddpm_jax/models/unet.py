"""The ADM U-Net (Dhariwal & Nichol 2021, section 3) that the decoder and the upsamplers are built on, and its half."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import (
    AttentionBlock,
    GroupNorm,
    Resample,
    ResBlock,
    TimeEmbedding,
    conv,
    depth_to_space,
    downsample2,
    space_to_depth,
)
from ddpm_jax.models.spatial_transformer import SpatialTransformer


class UNet(nn.Module):
    """U-Net with BigGAN up/down blocks, adaptive group norm and attention at chosen resolutions.

    channels: width of the first level; level i has channels * channel_mult[i]. attention_resolutions: the feature
    map sizes (in pixels of the network's own grid, image size / patch) that have attention. patch: space-to-depth
    stem, so that the first level works on (size / patch)^2 positions; 1 is the published network. mid_attention:
    False gives the network without any attention that DALL-E 2 uses for upsampling. modulate: the layout, averaged down
    to each level, also scales and shifts the features of every block (see `ResBlock`). heads: so many at every level,
    in place of heads of head_channels. conv_resample: `Resample` between levels, as before BigGAN's blocks.
    attention_levels: the levels that have attention, whatever the size of the picture, in place of
    attention_resolutions. spatial_transformer: attention is a `SpatialTransformer`, as in latent diffusion.
    """

    channels: int
    out_channels: int
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int = 64
    heads: int | None = None
    conv_resample: bool = False
    patch: int = 1
    scale_shift: bool = True
    mid_attention: bool = True
    modulate: bool = False
    dropout: float = 0.0
    groups: int = 32
    remat: bool = False
    dtype: Any = jnp.float32
    attention_levels: tuple[int, ...] | None = None
    spatial_transformer: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        emb: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        layout: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Run the network.

        x: float[B, H, W, C]; t: [B]; emb: [B, 4 * channels], added to the time embedding; context: [B, M, D] tokens
        for the attention layers with context_mask bool[B, M]; layout: [B, H/patch, W/patch, E], concatenated to the
        picture behind the stem. Returns float32[B, H, W, out_channels].
        Raises ValueError if the image size cannot be halved as often as the network has levels.
        """
        check_image_size(x.shape[1], self.patch, len(self.channel_mult))
        check_image_size(x.shape[2], self.patch, len(self.channel_mult))
        time = TimeEmbedding(self.channels, 4 * self.channels, self.dtype, name="time")(t)
        time = time if emb is None else time + emb.astype(self.dtype)
        layouts = _pyramid(layout, len(self.channel_mult)) if self.modulate and layout is not None else {}
        parts = Parts(self, time, train, layouts, context, context_mask)
        h = space_to_depth(x.astype(self.dtype), self.patch)
        if layout is not None:
            h = jnp.concatenate([h, layout.astype(self.dtype)], axis=-1)
        h, skips = contract(parts, h, self.mid_attention)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = parts.res(h, int(self.channels * mult), f"up_{level}_{i}")
                h = parts.attend(h, f"up_{level}_{i}_attn", level)
            if level != 0:
                h = parts.move(h, f"up_{level}_sample", "up")
        h = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="out_norm")(h))
        h = conv(self.out_channels * self.patch**2, 3, "out_conv", jnp.float32, zero=True)(h.astype(jnp.float32))
        return depth_to_space(h, self.patch)


class Parts:
    """The blocks of a U-Net `net`, made inside its call, with all that is the same for each of them."""

    def __init__(self, net: Any, time: jax.Array, train: bool, layouts: dict, context: Any = None, mask: Any = None):
        self.net, self.time, self.train, self.layouts = net, time, train, layouts
        self.context, self.mask = context, mask
        self.block = nn.remat(ResBlock, static_argnums=(3,)) if net.remat else ResBlock
        kind = SpatialTransformer if getattr(net, "spatial_transformer", False) else AttentionBlock
        self.attention = nn.remat(kind) if net.remat else kind
        self.levels = getattr(net, "attention_levels", None)

    def res(self, h: jax.Array, features: int, name: str, resample: str | None = None) -> jax.Array:
        net = self.net
        block = self.block(features, resample, net.scale_shift, net.dropout, net.groups, net.dtype, name=name)
        height = {None: h.shape[1], "up": 2 * h.shape[1], "down": h.shape[1] // 2}[resample]
        return block(h, self.time, self.train, self.layouts.get(height))

    def move(self, h: jax.Array, name: str, resample: str) -> jax.Array:
        if self.net.conv_resample:
            return Resample(h.shape[-1], resample, self.net.dtype, name=name)(h)
        return self.res(h, h.shape[-1], name, resample)

    def attend(self, h: jax.Array, name: str, level: int | None = None) -> jax.Array:
        """Let the features attend; at a level only if it is one of those that do."""
        net = self.net
        chosen = h.shape[1] in net.attention_resolutions if self.levels is None else level in self.levels
        if level is not None and not chosen:
            return h
        head = net.head_channels if net.heads is None else h.shape[-1] // net.heads
        return self.attention(head, net.groups, net.dtype, name=name)(h, self.context, self.mask)


def contract(parts: Parts, h: jax.Array, mid_attention: bool) -> tuple[jax.Array, list[jax.Array]]:
    """Return what the way down and the middle make of the stem, and the features to skip to the way up."""
    net = parts.net
    h = conv(int(net.channels * net.channel_mult[0]), 3, "in_conv", net.dtype)(h)
    skips = [h]
    for level, mult in enumerate(net.channel_mult):
        for i in range(net.num_res_blocks):
            h = parts.res(h, int(net.channels * mult), f"down_{level}_{i}")
            h = parts.attend(h, f"down_{level}_{i}_attn", level)
            skips.append(h)
        if level != len(net.channel_mult) - 1:
            h = parts.move(h, f"down_{level}_sample", "down")
            skips.append(h)
    h = parts.res(h, h.shape[-1], "mid_0")
    h = parts.attend(h, "mid_attn") if mid_attention else h
    return parts.res(h, h.shape[-1], "mid_1"), skips


def _pyramid(layout: jax.Array, levels: int) -> dict[int, jax.Array]:
    """Return the layout as the blocks read it: height of a level -> [B, height, width, E]."""
    maps, here = {}, nn.silu(layout)
    for level in range(levels):
        here = downsample2(here) if level else here
        maps[here.shape[1]] = here
    return maps


def check_image_size(size: int, patch: int, levels: int) -> None:
    """Raise ValueError unless `size` is a multiple of patch * 2^(levels - 1)."""
    unit = patch * 2 ** (levels - 1)
    if size < unit or size % unit:
        raise ValueError(
            f"image size {size} cannot be halved by this U-Net: with patch={patch} and {levels} levels it must be a "
            f"multiple of {unit}"
        )
