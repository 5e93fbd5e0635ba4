"""The ADM U-Net (Dhariwal & Nichol 2021, section 3) that the decoder and the upsamplers are built on, and its half."""

from collections.abc import Sequence
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
    upsample2,
)
from ddpm_jax.models.spatial_transformer import SpatialTransformer


class UNet(nn.Module):
    """U-Net with BigGAN up/down blocks, adaptive group norm and attention at chosen levels.

    channels: width of the first level; level i has channels * channel_mult[i]. attention_levels: the levels that have
    attention, 0 being the finest; a network has the same layers for images of every size. attention_resolutions: in
    place of attention_levels (None), the heights of feature maps that have attention in an image of the size that the
    parameters are initialised with; in use, the levels whose attention the parameters have (`levels_of_resolutions`
    translates resolutions). patch: space-to-depth stem, so that the first level works on (size / patch)^2 positions; 1
    is the published network. mid_attention: False gives the network without any attention that DALL-E 2 uses for
    upsampling. modulate: the layout, averaged down to each level, also scales and shifts the features of every block
    (see `ResBlock`). heads: number of heads at every level, in place of heads of head_channels; heads_up: another
    number on the way up (num_heads_upsample of guided diffusion). conv_resample: `Resample` between levels, as before
    BigGAN's blocks. pool_resample: average pooling and nearest neighbours between levels, without parameters
    (conv_resample=False with resblock_updown=False of guided diffusion). spatial_transformer: attention is a
    `SpatialTransformer`, as in latent diffusion.
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
    heads_up: int | None = None
    pool_resample: bool = False

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
        Raises ValueError if the image size cannot be halved as often as the network has levels, or fields contradict
        each other.
        """
        check_image_size(x.shape[1], self.patch, len(self.channel_mult))
        check_image_size(x.shape[2], self.patch, len(self.channel_mult))
        time = TimeEmbedding(self.channels, 4 * self.channels, self.dtype, name="time")(t)
        time = time if emb is None else time + emb.astype(self.dtype)
        layouts = _pyramid(layout, len(self.channel_mult)) if self.modulate and layout is not None else []
        parts = Parts(self, time, train, layouts, context, context_mask)
        h = space_to_depth(x.astype(self.dtype), self.patch)
        if layout is not None:
            h = jnp.concatenate([h, layout.astype(self.dtype)], axis=-1)
        h, skips = contract(parts, h, self.mid_attention)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = parts.res(h, int(self.channels * mult), f"up_{level}_{i}", level)
                h = parts.attend(h, f"up_{level}_{i}_attn", level, self.heads_up)
            if level != 0:
                h = parts.move(h, f"up_{level}_sample", level - 1, "up")
        h = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="out_norm")(h))
        h = conv(self.out_channels * self.patch**2, 3, "out_conv", jnp.float32, zero=True)(h.astype(jnp.float32))
        return depth_to_space(h, self.patch)


class Parts:
    """The blocks of a U-Net `net`, made inside its call, with all that is the same for each of them."""

    def __init__(self, net: Any, time: jax.Array, train: bool, layouts: list, context: Any = None, mask: Any = None):
        self.net, self.time, self.train, self.layouts = net, time, train, layouts
        self.context, self.mask = context, mask
        self.block = nn.remat(ResBlock, static_argnums=(3,)) if net.remat else ResBlock
        kind = SpatialTransformer if getattr(net, "spatial_transformer", False) else AttentionBlock
        self.attention = nn.remat(kind) if net.remat else kind
        if net.conv_resample and net.pool_resample:
            raise ValueError("conv_resample=True and pool_resample=True contradict each other; give one of them")
        levels, last = net.attention_levels, len(net.channel_mult) - 1
        if levels is not None and not all(0 <= level <= last for level in levels):
            raise ValueError(f"attention_levels={levels} must lie between 0 and {last}, the coarsest level")

    def res(self, h: jax.Array, features: int, name: str, level: int, resample: str | None = None) -> jax.Array:
        """Apply a residual block; level: that of its output, whose layout it reads."""
        net = self.net
        block = self.block(features, resample, net.scale_shift, net.dropout, net.groups, net.dtype, name=name)
        return block(h, self.time, self.train, self.layouts[level] if self.layouts else None)

    def move(self, h: jax.Array, name: str, level: int, resample: str) -> jax.Array:
        """Change the resolution to that of the level."""
        if self.net.pool_resample:
            return {"up": upsample2, "down": downsample2}[resample](h)
        if self.net.conv_resample:
            return Resample(h.shape[-1], resample, self.net.dtype, name=name)(h)
        return self.res(h, h.shape[-1], name, level, resample)

    def attend(self, h: jax.Array, name: str, level: int | None = None, heads: int | None = None) -> jax.Array:
        """Apply attention; at a level only if it is one of those that have it. heads: in place of the network's."""
        net = self.net
        if level is not None and not self._chosen(level, h):
            return h
        heads = net.heads if heads is None else heads
        if heads is None:
            head = net.head_channels
        elif heads < 1 or h.shape[-1] % heads:
            raise ValueError(f"{heads=} must be at least 1 and divide the {h.shape[-1]} channels of the level")
        else:
            head = h.shape[-1] // heads
        return self.attention(head, net.groups, net.dtype, name=name)(h, self.context, self.mask)

    def _chosen(self, level: int, h: jax.Array) -> bool:
        """Return whether a level has attention."""
        net, size = self.net, getattr(self.net, "image_size", None)
        if net.attention_levels is not None:
            return level in net.attention_levels
        if size is not None:
            return size >> level in net.attention_resolutions
        if not net.is_initializing():
            return any(net.has_variable("params", f"{side}_{level}_0_attn") for side in ("down", "up"))
        wanted = [side in net.attention_resolutions for side in h.shape[1:3]]
        if wanted[0] != wanted[1]:
            raise ValueError(
                f"attention_resolutions={net.attention_resolutions} is for square images; level {level} of this one "
                f"has {h.shape[1]} x {h.shape[2]} positions, so give attention_levels"
            )
        return wanted[0]


def contract(parts: Parts, h: jax.Array, mid_attention: bool) -> tuple[jax.Array, list[jax.Array]]:
    """Return what the way down and the middle make of the stem, and the features to skip to the way up."""
    net = parts.net
    h = conv(int(net.channels * net.channel_mult[0]), 3, "in_conv", net.dtype)(h)
    skips = [h]
    last = len(net.channel_mult) - 1
    for level, mult in enumerate(net.channel_mult):
        for i in range(net.num_res_blocks):
            h = parts.res(h, int(net.channels * mult), f"down_{level}_{i}", level)
            h = parts.attend(h, f"down_{level}_{i}_attn", level)
            skips.append(h)
        if level != last:
            h = parts.move(h, f"down_{level}_sample", level + 1, "down")
            skips.append(h)
    h = parts.res(h, h.shape[-1], "mid_0", last)
    h = parts.attend(h, "mid_attn") if mid_attention else h
    return parts.res(h, h.shape[-1], "mid_1", last), skips


def _pyramid(layout: jax.Array, levels: int) -> list[jax.Array]:
    """Return the layout as the blocks of each level read it, [B, height, width, E]."""
    maps = [nn.silu(layout)]
    for _ in range(1, levels):
        maps.append(downsample2(maps[-1]))
    return maps


def levels_of_resolutions(resolutions: Sequence[int], size: int, levels: int) -> tuple[int, ...]:
    """Return the levels whose feature maps have one of the resolutions as their height.

    size: height of the first level's feature map, the image size divided by `UNet.patch`.
    """
    return tuple(level for level in range(levels) if size >> level in resolutions)


def attention_levels(resolutions: Sequence[int], size: int, levels: int) -> tuple[int, ...]:
    """Return the levels that have attention, see `levels_of_resolutions`.

    Raises:
        ValueError: if no level has one of the resolutions.
    """
    heights = [size >> level for level in range(levels)]
    for resolution in resolutions:
        if resolution not in heights:
            raise ValueError(
                f"attention_resolutions has {resolution}, and the levels' feature maps have heights "
                f"{', '.join(map(str, heights))}"
            )
    return levels_of_resolutions(resolutions, size, levels)


def check_image_size(size: int, patch: int, levels: int) -> None:
    """Raise ValueError unless `size` is a multiple of patch * 2^(levels - 1)."""
    unit = patch * 2 ** (levels - 1)
    if size < unit or size % unit:
        raise ValueError(
            f"image size {size} cannot be halved by this U-Net: with patch={patch} and {levels} levels it must be a "
            f"multiple of {unit}"
        )
