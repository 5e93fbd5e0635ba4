"""The ADM U-Net (Dhariwal & Nichol 2021, section 3) that the decoder and the upsamplers are built on."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import (
    AttentionBlock,
    GroupNorm,
    ResBlock,
    TimeEmbedding,
    conv,
    depth_to_space,
    downsample2,
    space_to_depth,
)


class UNet(nn.Module):
    """U-Net with BigGAN up/down blocks, adaptive group norm and attention at chosen resolutions.

    channels: width of the first level; level i has channels * channel_mult[i]. attention_resolutions: the feature
    map sizes (in pixels of the network's own grid, image size / patch) that have attention. patch: space-to-depth
    stem, so that the first level works on (size / patch)^2 positions; 1 is the published network. mid_attention:
    False gives the network without any attention that DALL-E 2 uses for upsampling. modulate: the layout, averaged down
    to each level, also scales and shifts the features of every block (see `ResBlock`).
    """

    channels: int
    out_channels: int
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int = 64
    patch: int = 1
    scale_shift: bool = True
    mid_attention: bool = True
    modulate: bool = False
    dropout: float = 0.0
    groups: int = 32
    remat: bool = False
    dtype: Any = jnp.float32

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
        block_class = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        attention_class = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        time = TimeEmbedding(self.channels, 4 * self.channels, self.dtype, name="time")(t)
        time = time if emb is None else time + emb.astype(self.dtype)

        layouts = _pyramid(layout, len(self.channel_mult)) if self.modulate and layout is not None else {}

        def res(h, features, name, resample=None):
            block = block_class(features, resample, self.scale_shift, self.dropout, self.groups, self.dtype, name=name)
            height = {None: h.shape[1], "up": 2 * h.shape[1], "down": h.shape[1] // 2}[resample]
            return block(h, time, train, layouts.get(height))

        def attend(h, name, wanted=None):
            if wanted is None:
                wanted = h.shape[1] in self.attention_resolutions
            if not wanted:
                return h
            return attention_class(self.head_channels, self.groups, self.dtype, name=name)(h, context, context_mask)

        h = space_to_depth(x.astype(self.dtype), self.patch)
        if layout is not None:
            h = jnp.concatenate([h, layout.astype(self.dtype)], axis=-1)
        h = conv(self.channels, 3, "in_conv", self.dtype)(h)
        skips = [h]
        levels = len(self.channel_mult)
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                h = attend(res(h, self.channels * mult, f"down_{level}_{i}"), f"down_{level}_{i}_attn")
                skips.append(h)
            if level != levels - 1:
                h = res(h, self.channels * mult, f"down_{level}_sample", "down")
                skips.append(h)
        h = attend(res(h, h.shape[-1], "mid_0"), "mid_attn", self.mid_attention)
        h = res(h, h.shape[-1], "mid_1")
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = attend(res(h, self.channels * mult, f"up_{level}_{i}"), f"up_{level}_{i}_attn")
            if level != 0:
                h = res(h, self.channels * mult, f"up_{level}_sample", "up")
        h = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="out_norm")(h))
        h = conv(self.out_channels * self.patch**2, 3, "out_conv", jnp.float32, zero=True)(h.astype(jnp.float32))
        return depth_to_space(h, self.patch)


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
