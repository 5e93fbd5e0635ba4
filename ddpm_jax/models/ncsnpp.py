"""NCSN++ and DDPM++, the U-Nets of score SDEs (Song et al. 2021, appendix H), and SR3's, which is made of their blocks.

- NCSN++: FIR resampling, BigGAN's residual blocks, skip connections over sqrt(2), an input pyramid, added at every
  level; with Fourier features of log sigma for VE, and sinusoids of t for VP and sub-VP.
- DDPM++: BigGAN's residual blocks, skip connections over sqrt(2), sinusoids of t; for VP and sub-VP.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_count, is_finite, shown
from ddpm_jax.models.layers import (
    AttentionBlock,
    GroupNorm,
    Resample,
    TimeEmbedding,
    conv,
    downsample2,
    rematerialized,
    upsample2,
)
from ddpm_jax.models.resampling import FirConv, fir_downsample2, fir_upsample2
from ddpm_jax.models.unet import check_blocks, check_image_size

EMBEDDINGS = ("fourier", "positional")
PYRAMIDS = ("none", "skip", "residual")
COMBINERS = ("sum", "cat")
EPS = 1e-6


class NCSNpp(nn.Module):
    """NCSN++ and DDPM++ (`models/ncsnpp.py` of the published code); what is given as t is a field's choice.

    Attributes:
        channels: width of the first level, > 0; level i has int(channels * channel_mult[i]) channels.
        out_channels: channels of the output, > 0.
        channel_mult: multipliers of the width, one for each level, the finest first.
        num_res_blocks: residual blocks of each level in the encoder, >= 1; the decoder has one more.
        attention_levels: levels that have attention, 0 being the finest; the middle always has.
        dropout: rate of dropout inside residual blocks, in [0, 1).
        biggan: the resolution changes inside of residual blocks; False changes it by `Resample`, as DDPM does, or with
            `conv_resample` off without parameters.
        conv_resample: of biggan=False.
        fir_taps: of the filter of all changes of resolution; () averages and repeats pixels.
        skip_rescale: sums of a skip connection are divided by sqrt(2).
        output_pyramid: "skip" adds the output of every level, enlarged, "residual" adds enlarged features to the
            features of every level; "none" has an output at the finest level alone.
        input_pyramid: "skip" adds the image, made smaller, to the features of every level, "residual" features of it;
            "none" reads it at the finest level alone.
        combine: how input_pyramid="skip" joins: "sum" or "cat".
        embedding: "fourier" embeds log(t / sigma_unit), t being the noise level sigma, and "positional" time_scale * t,
            or with sigma_range the place of sigma between its ends.
        fourier_scale: > 0, standard deviation of the frequencies, which are not trained.
        time_scale: > 0, of embedding="positional"; published networks of continuous time in [0, 1] have 999.
        sigma_range: (smallest, largest) sigma of embedding="positional", in units of sigma_unit: the sinusoids are of
            time_scale log(largest / sigma) / log(largest / smallest), as published for N = time_scale + 1 noise levels.
        sigma_unit: > 0, unit of sigma in the embedding; 2 for networks that were trained on images in [0, 1], whose
            noise is half of that of images in [-1, 1].
        scale_by_sigma: the output is divided by sigma, for networks that predict the score.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which blocks compute; parameters and the output convolution are float32.
    """

    channels: int
    out_channels: int = 3
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attention_levels: tuple[int, ...] = (1,)
    dropout: float = 0.1
    biggan: bool = True
    conv_resample: bool = True
    fir_taps: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    skip_rescale: bool = True
    output_pyramid: str = "none"
    input_pyramid: str = "none"
    combine: str = "sum"
    embedding: str = "positional"
    fourier_scale: float = 16.0
    time_scale: float = 999.0
    sigma_range: tuple[float, float] | None = None
    sigma_unit: float = 1.0
    scale_by_sigma: bool = False
    remat: bool | str = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, emb: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Predict the process' output, float32[B, H, W, out_channels].

        Args:
            xt: float[B, H, W, C], in [-1, 1] where it is clean; H and W are multiples of 2^(levels - 1).
            t: float[B]: sigma where it is embedded or divides the output, and the time or another level else.
            emb: float[B, 4 * channels], added to the embedding of t, or None.
            train: True turns dropout on, which needs an rng "dropout".

        Raises:
            ValueError: if H or W is no such multiple, or fields contradict each other.
        """
        self._check(xt)
        t = t.astype(jnp.float32)
        time = self._embedded(t)
        blocks = _Blocks(self, time if emb is None else time + emb.astype(self.dtype), train)
        x = xt.astype(self.dtype)
        h, skips = self._encode(blocks, x)
        pyramid = None
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = blocks.res(h, int(self.channels * mult), f"up_{level}_{i}")
            if level in self.attention_levels:
                h = blocks.attention(h, f"up_{level}_attn")
            if self.output_pyramid != "none":
                h, pyramid = self._grown(blocks, h, pyramid, level)
            if level != 0:
                h = blocks.resample(h, f"up_{level}_sample", "up")
        out = pyramid if self.output_pyramid == "skip" else blocks.output(h, "out")
        return out / t[:, None, None, None] if self.scale_by_sigma else out

    def _check(self, x: jax.Array) -> None:
        check_blocks(self)
        for size in x.shape[1:3]:
            check_image_size(size, 1, len(self.channel_mult))
        choices = {"embedding": EMBEDDINGS, "output_pyramid": PYRAMIDS, "input_pyramid": PYRAMIDS, "combine": COMBINERS}
        for name, options in choices.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, options))}")
        if self.output_pyramid == "skip" and x.shape[-1] != self.out_channels:
            raise ValueError(
                f"out_channels={self.out_channels} must be those of the image, {x.shape[-1]}, with "
                "output_pyramid='skip'"
            )
        if self.sigma_range is not None and not 0.0 < self.sigma_range[0] < self.sigma_range[1]:
            raise ValueError(f"sigma_range={self.sigma_range} must be two positive numbers, the smaller one first")
        if self.sigma_range is not None and self.embedding != "positional":
            raise ValueError(f"sigma_range={self.sigma_range} is of embedding='positional', not of {self.embedding!r}")
        for name in ("sigma_unit", "time_scale", "fourier_scale"):
            if not is_finite(getattr(self, name)) or getattr(self, name) <= 0.0:
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a positive number")
        check_count("out_channels", self.out_channels)
        if any(not 0 <= level < len(self.channel_mult) for level in self.attention_levels):
            raise ValueError(f"attention_levels={self.attention_levels} must lie in [0, {len(self.channel_mult)})")

    def _embedded(self, t: jax.Array) -> jax.Array:
        """Return the embedding of the time or the noise level, [B, 4 * channels]."""
        width = 4 * self.channels
        if self.embedding == "fourier":
            fourier = FourierEmbedding(self.channels, width, self.fourier_scale, self.dtype, name="time")
            return fourier(jnp.log(t / self.sigma_unit))
        place = t
        if self.sigma_range is not None:
            smallest, largest = self.sigma_range
            place = jnp.log(largest * self.sigma_unit / t) / math.log(largest / smallest)
        return TimeEmbedding(self.channels, width, self.dtype, 1, name="time")(self.time_scale * place)

    def _encode(self, blocks: "_Blocks", x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Run the encoder and the middle; return their output and the features of the skip connections."""
        pyramid, h = x, conv(self.channels, 3, "in_conv", self.dtype)(x)
        skips, last = [h], len(self.channel_mult) - 1
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                h = blocks.res(h, int(self.channels * mult), f"down_{level}_{i}")
                if level in self.attention_levels:
                    h = blocks.attention(h, f"down_{level}_{i}_attn")
                skips.append(h)
            if level == last:
                continue
            h = blocks.resample(h, f"down_{level}_sample", "down")
            name = f"down_{level}_pyramid"
            if self.input_pyramid == "skip":
                pyramid = blocks.plain(pyramid, "down")
                joined = conv(h.shape[-1], 1, name, self.dtype)(pyramid)
                h = joined + h if self.combine == "sum" else jnp.concatenate([joined, h], axis=-1)
            elif self.input_pyramid == "residual":
                h = pyramid = blocks.rescaled(blocks.learned(pyramid, h.shape[-1], name, "down") + h)
            skips.append(h)
        h = blocks.res(h, h.shape[-1], "mid_0")
        h = blocks.attention(h, "mid_attn")
        return blocks.res(h, h.shape[-1], "mid_1"), skips

    def _grown(self, blocks: "_Blocks", h: jax.Array, pyramid: jax.Array | None, level: int) -> tuple:
        """Return the features of a level of the decoder, and the output pyramid with it."""
        name = f"up_{level}_pyramid"
        if self.output_pyramid == "skip":
            own = blocks.output(h, name)
            return h, own if pyramid is None else blocks.plain(pyramid, "up") + own
        if pyramid is None:
            norm = nn.silu(blocks.norm(h, f"{name}_norm"))
            return h, conv(h.shape[-1], 3, f"{name}_conv", self.dtype)(norm)
        h = blocks.rescaled(blocks.learned(pyramid, h.shape[-1], name, "up") + h)
        return h, h


class _Blocks:
    """Factory of the blocks of a network, used inside its call; it holds the inputs that all blocks share."""

    def __init__(self, net: NCSNpp, emb: jax.Array, train: bool):
        self.net, self.emb, self.train = net, emb, train
        self.res_block = rematerialized(ResBlockPP, net.remat, static_argnums=(3,))
        self.attention_block = rematerialized(AttentionBlock, net.remat)

    def res(self, h: jax.Array, features: int, name: str, resample: str | None = None) -> jax.Array:
        net = self.net
        block = self.res_block(
            features, resample, net.biggan, net.fir_taps, net.skip_rescale, net.dropout, net.dtype, name=name
        )
        return block(h, self.emb, self.train)

    def attention(self, h: jax.Array, name: str) -> jax.Array:
        width = h.shape[-1]
        return self.rescaled(self.attention_block(width, groups_of(width), self.net.dtype, EPS, name=name)(h))

    def resample(self, h: jax.Array, name: str, direction: str) -> jax.Array:
        """Change the resolution of features by 2."""
        if self.net.biggan:
            return self.res(h, h.shape[-1], name, direction)
        if self.net.conv_resample:
            return self.learned(h, h.shape[-1], name, direction)
        return self.plain(h, direction)

    def plain(self, x: jax.Array, direction: str) -> jax.Array:
        """Change the resolution by 2 without parameters."""
        return resampled(x, direction, self.net.fir_taps)

    def learned(self, x: jax.Array, features: int, name: str, direction: str) -> jax.Array:
        """Change the resolution by 2 with a convolution."""
        taps, dtype = self.net.fir_taps, self.net.dtype
        if taps:
            return FirConv(features, direction, taps, dtype, name=name)(x)
        return Resample(features, direction, dtype, pad_after=True, name=name)(x)

    def rescaled(self, total: jax.Array) -> jax.Array:
        """Divide the sum of a skip connection by sqrt(2), if the network does."""
        return rescaled(total) if self.net.skip_rescale else total

    def norm(self, h: jax.Array, name: str, dtype: Any = None) -> jax.Array:
        return GroupNorm(groups_of(h.shape[-1]), EPS, dtype or self.net.dtype, name=name)(h)

    def output(self, h: jax.Array, name: str) -> jax.Array:
        """Return an output of the network, float32."""
        h = nn.silu(self.norm(h, f"{name}_norm", jnp.float32))
        return conv(self.net.out_channels, 3, f"{name}_conv", jnp.float32, zero=True)(h)


class ResBlockPP(nn.Module):
    """Residual block of NCSN++ and DDPM++ (`models/layerspp.py`).

    `h = conv_2(dropout(silu(GN(conv_1(resample(silu(GN(x)))) + Dense(silu(emb))))))` and `skip(resample(x)) + h`, over
    sqrt(2). conv_2 starts at zero. x: [B, H, W, C]; emb: [B, E].

    Attributes:
        features: channels of the output.
        resample: None, "up" or "down" (by 2).
        project: the skip connection has a 1 x 1 convolution where the resolution changes, and not only where the number
            of channels does.
        fir_taps, skip_rescale, dropout: see `NCSNpp`.
        dtype: in which the layers compute; parameters are float32.
    """

    features: int
    resample: str | None = None
    project: bool = True
    fir_taps: tuple[float, ...] = ()
    skip_rescale: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, train: bool = False) -> jax.Array:
        norm = lambda h, name: GroupNorm(groups_of(h.shape[-1]), EPS, self.dtype, name=name)(h)
        h = nn.silu(norm(x, "norm_1"))
        if self.resample is not None:
            h, x = (resampled(each, self.resample, self.fir_taps) for each in (h, x))
        h = conv(self.features, 3, "conv_1", self.dtype)(h)
        h = h + nn.Dense(self.features, dtype=self.dtype, name="emb")(nn.silu(emb))[:, None, None, :]
        h = nn.silu(norm(h, "norm_2"))
        h = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(h)
        h = conv(self.features, 3, "conv_2", self.dtype, zero=True)(h)
        if x.shape[-1] != self.features or (self.project and self.resample is not None):
            x = conv(self.features, 1, "skip", self.dtype)(x)
        return rescaled(x + h) if self.skip_rescale else x + h


class FourierEmbedding(nn.Module):
    """Random Fourier features, then Dense, SiLU, Dense (Tancik et al. 2020; score SDE, appendix H).

    `[sin(2 pi w v), cos(2 pi w v)]`, `w ~ N(0, scale^2)`; the frequencies are parameters that get no gradient.
    v: float32[B] -> dtype[B, width].

    Attributes:
        channels: number of frequencies.
        width: size of the embedding.
        scale: standard deviation of the frequencies.
        dtype: in which the dense layers compute; the features are float32.
    """

    channels: int
    width: int
    scale: float = 16.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, v: jax.Array) -> jax.Array:
        w = self.param("frequencies", nn.initializers.normal(self.scale), (self.channels,), jnp.float32)
        angles = 2.0 * jnp.pi * v.astype(jnp.float32)[:, None] * jax.lax.stop_gradient(w)[None]
        h = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(self.dtype)
        h = nn.Dense(self.width, dtype=self.dtype, name="dense_0")(h)
        return nn.Dense(self.width, dtype=self.dtype, name="dense_1")(nn.silu(h))


def resampled(x: jax.Array, direction: str, taps: tuple[float, ...]) -> jax.Array:
    """Return an image of twice ("up") or half ("down") the resolution, by a FIR filter, or with () the plain mean."""
    if taps:
        return (fir_upsample2 if direction == "up" else fir_downsample2)(x, taps)
    return (upsample2 if direction == "up" else downsample2)(x)


def rescaled(total: jax.Array) -> jax.Array:
    """Divide by sqrt(2)."""
    return total * total.dtype.type(math.sqrt(0.5))


def groups_of(channels: int) -> int:
    """Return the number of groups of the published group norms: a quarter of the channels, at most 32."""
    return min(channels // 4, 32)
