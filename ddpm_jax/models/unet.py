"""The ADM U-Net (Dhariwal & Nichol 2021, section 3) of the decoder and the upsamplers, and its encoder path."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_count, is_finite, shown
from ddpm_jax.models.layers import (
    AttentionBlock,
    GroupNorm,
    Resample,
    ResBlock,
    TimeEmbedding,
    conv,
    depth_to_space,
    downsample2,
    rematerialized,
    space_to_depth,
    upsample2,
)
from ddpm_jax.models.spatial_transformer import SpatialTransformer


class UNet(nn.Module):
    """U-Net with BigGAN up/down blocks, adaptive group norm and attention at chosen levels.

    Attributes:
        channels: width of the first level, > 0; level i has int(channels * channel_mult[i]) channels.
        out_channels: channels of the output, > 0.
        channel_mult: multipliers of the width, one for each level, the finest first; each level but the last is
            followed by a downsampling by 2.
        num_res_blocks: residual blocks of each level in the encoder, >= 1; the decoder has one more.
        attention_resolutions: heights of the feature maps that have attention in an image of the size that the
            parameters are initialised with, where attention_levels is None. In use, the levels are those whose
            attention is in the parameters; `levels_of_resolutions` translates resolutions to levels.
        head_channels: channels of an attention head, where heads is None; divides the channels of its level.
        heads: number of attention heads at every level, in place of head_channels.
        conv_resample: learned convolutions (`Resample`) between levels, as in DDPM, in place of BigGAN's blocks.
        patch: side of the patches that the stem moves to channels (space to depth), >= 1, so that the first level has
            (H / patch) x (W / patch) positions; 1 in the published networks.
        scale_shift: adaptive group norm; False adds the embedding before the second norm, see `ResBlock`.
        mid_attention: attention between the middle's residual blocks; False and attention_levels=() give the network
            without attention that DALL-E 2 uses for upsampling.
        modulate: True scales and shifts the features of every block by `cond_map`, averaged down to its level, too.
        dropout: rate of dropout inside residual blocks, in [0, 1).
        groups: groups of the group norms; divides the channels of every level.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which blocks compute; parameters and the output convolution are float32.
        attention_levels: levels that have attention, 0 being the finest, so that a network has the same layers for
            images of every size; None takes attention_resolutions.
        spatial_transformer: attention is a `SpatialTransformer`, as in latent diffusion, and context is required.
        heads_up: number of heads in the decoder, in place of heads (num_heads_upsample of guided diffusion).
        pool_resample: average pooling and nearest neighbours between levels, without parameters
            (conv_resample=False with resblock_updown=False in guided diffusion); excludes conv_resample.
        norm_eps: epsilon of the group norms, but for those of a `SpatialTransformer`; 1e-6 in DDPM's code.
        frequency_shift: of the time embedding, 0 or 1, see `timestep_embedding`; 1 in DDPM's code.
        pad_after: of conv_resample, see `Resample`; True in DDPM's code.
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
    remat: bool | str = False
    dtype: Any = jnp.float32
    attention_levels: tuple[int, ...] | None = None
    spatial_transformer: bool = False
    heads_up: int | None = None
    pool_resample: bool = False
    norm_eps: float = 1e-5
    frequency_shift: int = 0
    pad_after: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        emb: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        cond_map: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Run the network.

        Args:
            x: float[B, H, W, C]; H and W are multiples of patch * 2^(levels - 1).
            t: float or int[B], timesteps.
            emb: float[B, 4 * channels], added to the time embedding, or None.
            context: float[B, M, D], tokens that the attention layers also attend to, or None.
            context_mask: bool[B, M], True at tokens that are attended to; None for all.
            cond_map: float[B, H / patch, W / patch, E], concatenated to the stem's output, or None.
            train: True turns dropout on, which needs an rng "dropout".

        Returns:
            float32[B, H, W, out_channels].

        Raises:
            ValueError: if H or W is no such multiple, or fields contradict each other.
        """
        check_blocks(self)
        check_image_size(x.shape[1], self.patch, len(self.channel_mult))
        check_image_size(x.shape[2], self.patch, len(self.channel_mult))
        time = TimeEmbedding(self.channels, 4 * self.channels, self.dtype, self.frequency_shift, name="time")(t)
        time = time if emb is None else time + emb.astype(self.dtype)
        cond_maps = _pyramid(cond_map, len(self.channel_mult)) if self.modulate and cond_map is not None else []
        blocks = Blocks(self, time, train, cond_maps, context, context_mask)
        h = space_to_depth(x.astype(self.dtype), self.patch)
        if cond_map is not None:
            h = jnp.concatenate([h, cond_map.astype(self.dtype)], axis=-1)
        h, skips = encode(blocks, h, self.mid_attention)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = blocks.res(h, int(self.channels * mult), f"up_{level}_{i}", level)
                h = blocks.attention(h, f"up_{level}_{i}_attn", level, self.heads_up)
            if level != 0:
                h = blocks.resample(h, f"up_{level}_sample", level - 1, "up")
        h = nn.silu(GroupNorm(self.groups, self.norm_eps, self.dtype, name="out_norm")(h))
        h = conv(self.out_channels * self.patch**2, 3, "out_conv", jnp.float32, zero=True)(h.astype(jnp.float32))
        return depth_to_space(h, self.patch)


class Blocks:
    """Factory of the blocks of a U-Net `net`, used inside its call; it holds the inputs that all blocks share."""

    def __init__(self, net: Any, time: jax.Array, train: bool, cond_maps: list, context: Any = None, mask: Any = None):
        self.net, self.time, self.train, self.cond_maps = net, time, train, cond_maps
        self.context, self.mask = context, mask
        self.block = rematerialized(ResBlock, net.remat, static_argnums=(3,))
        self.norms = {"eps": getattr(net, "norm_eps", 1e-5)}
        plain = not getattr(net, "spatial_transformer", False)
        kind, self.attention_norms = (AttentionBlock, self.norms) if plain else (SpatialTransformer, {})
        self.attention_block = rematerialized(kind, net.remat)
        if net.conv_resample and net.pool_resample:
            raise ValueError("conv_resample=True and pool_resample=True contradict each other; give one of them")
        levels, last = net.attention_levels, len(net.channel_mult) - 1
        if levels is not None and not all(0 <= level <= last for level in levels):
            raise ValueError(f"attention_levels={levels} must lie between 0 and {last}, the coarsest level")

    def res(self, h: jax.Array, features: int, name: str, level: int, resample: str | None = None) -> jax.Array:
        """Apply a residual block; level: of its output, which selects the conditioning map."""
        net = self.net
        fields = (features, resample, net.scale_shift, net.dropout, net.groups, net.dtype)
        block = self.block(*fields, **self.norms, name=name)
        return block(h, self.time, self.train, self.cond_maps[level] if self.cond_maps else None)

    def resample(self, h: jax.Array, name: str, level: int, direction: str) -> jax.Array:
        """Change the resolution by 2 to that of the level; direction: "up" or "down"."""
        if self.net.pool_resample:
            return {"up": upsample2, "down": downsample2}[direction](h)
        if self.net.conv_resample:
            after = getattr(self.net, "pad_after", False)
            return Resample(h.shape[-1], direction, self.net.dtype, after, name=name)(h)
        return self.res(h, h.shape[-1], name, level, direction)

    def attention(self, h: jax.Array, name: str, level: int | None = None, heads: int | None = None) -> jax.Array:
        """Apply attention, if the level has it; level: None for the middle. heads: in place of the network's."""
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
        block = self.attention_block(head, net.groups, net.dtype, **self.attention_norms, name=name)
        return block(h, self.context, self.mask)

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


def encode(blocks: Blocks, h: jax.Array, mid_attention: bool) -> tuple[jax.Array, list[jax.Array]]:
    """Run the encoder path and the middle; return their output and the features of the skip connections."""
    net = blocks.net
    h = conv(int(net.channels * net.channel_mult[0]), 3, "in_conv", net.dtype)(h)
    skips = [h]
    last = len(net.channel_mult) - 1
    for level, mult in enumerate(net.channel_mult):
        for i in range(net.num_res_blocks):
            h = blocks.res(h, int(net.channels * mult), f"down_{level}_{i}", level)
            h = blocks.attention(h, f"down_{level}_{i}_attn", level)
            skips.append(h)
        if level != last:
            h = blocks.resample(h, f"down_{level}_sample", level + 1, "down")
            skips.append(h)
    h = blocks.res(h, h.shape[-1], "mid_0", last)
    h = blocks.attention(h, "mid_attn") if mid_attention else h
    return blocks.res(h, h.shape[-1], "mid_1", last), skips


def _pyramid(cond_map: jax.Array, levels: int) -> list[jax.Array]:
    """Return the conditioning map, averaged down to each level, [B, height, width, E], the finest first."""
    maps = [nn.silu(cond_map)]
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
    if levels < 1:
        raise ValueError("channel_mult=() must have a number for each level, at least one")
    heights = [size >> level for level in range(levels)]
    for resolution in resolutions:
        if resolution not in heights:
            raise ValueError(
                f"attention_resolutions has {resolution}, and the levels' feature maps have heights "
                f"{', '.join(map(str, heights))}"
            )
    return levels_of_resolutions(resolutions, size, levels)


def check_blocks(net: Any) -> None:
    """Raise ValueError if the fields of a U-Net's levels and residual blocks are out of their ranges."""
    check_count("num_res_blocks", net.num_res_blocks)
    if not is_finite(net.dropout) or not 0.0 <= net.dropout < 1.0:
        raise ValueError(f"dropout={shown(net.dropout)} must be in [0, 1)")
    check_count("channels", net.channels)
    for mult in net.channel_mult:
        if not is_finite(mult) or int(net.channels * mult) < 1:
            raise ValueError(f"channel_mult={net.channel_mult} gives a level of channels={net.channels} no channel")


def check_image_size(size: int, patch: int, levels: int) -> None:
    """Raise ValueError unless `size` is a multiple of patch * 2^(levels - 1)."""
    unit = patch * 2 ** (levels - 1)
    if size < unit or size % unit:
        raise ValueError(
            f"image size {size} cannot be halved by this U-Net: with patch={patch} and {levels} levels it must be a "
            f"multiple of {unit}"
        )
