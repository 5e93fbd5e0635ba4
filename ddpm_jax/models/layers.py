"""Layers shared by the networks: normalisation, attention, time embedding, residual blocks.

Parameters are always float32; `dtype` is the compute type (bfloat16 on TPU). Norm statistics, softmax and the
sinusoids of t are computed in float32. Submodule names are checkpoint keys, so all of them are explicit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_indices
from ddpm_jax.models.attention import attention

Dtype = Any


def timestep_embedding(t: jax.Array, dim: int, max_period: float = 10_000.0, *, frequency_shift: int = 0) -> jax.Array:
    """Embed timesteps with sinusoids: `[cos(t f_i), sin(t f_i)]`, `f_i = max_period^(-i / (dim/2 - frequency_shift))`.

    "Attention is all you need" 3.5 in the order of the ADM, GLIDE and Karlo checkpoints. t: [B], integer or
    float. frequency_shift: 1 ends at 1 / max_period, as in DDPM's code; 0 just above it, as in ADM's. Returns
    float32[B, dim]; an odd dim is padded with a zero. Raises ValueError if dim is too small for frequency_shift.
    """
    half = dim // 2
    if frequency_shift and half <= frequency_shift:
        raise ValueError(f"{dim=} must be at least {2 * frequency_shift + 2} with {frequency_shift=}")
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - frequency_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


def _is_product(primitive: Any, *_: Any, **params: Any) -> bool:
    """Return whether an operation multiplies by weights: a convolution, or a matrix product without batch axes."""
    if primitive.name == "conv_general_dilated":
        return True
    return primitive.name == "dot_general" and not any(params["dimension_numbers"][1])


def rematerialized(block: Any, remat: bool | str, **options: Any) -> Any:
    """Return a module that computes again in the backward pass what it does not store.

    Args:
        block: a class of modules.
        remat: False stores all activations; True stores the block's input alone, for a third more computation;
            "products" stores the outputs of convolutions and of matrix products with weights too, and computes norms,
            activations and attention again, which costs little.
        **options: of `nn.remat`.

    Raises:
        ValueError: if remat is another value.
    """
    if remat not in (True, False, "products"):
        raise ValueError(f"{remat=} must be True, False or 'products'")
    if not remat:
        return block
    return nn.remat(block, policy=_is_product if remat == "products" else None, **options)


def rematerialized_function(function: Callable, remat: bool | str) -> Callable:
    """Return a function that computes again in the backward pass what `rematerialized` does."""
    return jax.checkpoint(function, policy=_is_product if remat == "products" else None) if remat else function


class Embed(nn.Embed):
    """A learned vector for each of ``num_embeddings`` ids (class labels, tokens): ``nn.Embed``, without wrong answers.

    Raises ValueError if ids are known and outside [0, num_embeddings); of traced ones outside the result is NaN.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Return the vectors. inputs: int[...] in [0, num_embeddings). Returns [..., features]."""
        check_indices(f"ids given to the embedding {self.name!r}", inputs, self.num_embeddings)
        inputs = jnp.asarray(inputs, jnp.int32)  # the number of ids need not fit into a smaller type
        inside = (inputs >= 0) & (inputs < self.num_embeddings)
        vectors = super().__call__(jnp.where(inside, inputs, 0))
        return jnp.where(inside[..., None], vectors, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(x: jax.Array, gain: jax.Array, offset: jax.Array, groups: int, eps: float) -> jax.Array:
    """Normalise groups of channels: `n = (x - mean) / sqrt(var + eps)`, `y = n * gain + offset` (Wu & He 2018).

    Mean and variance are those of an example's group, over all positions. x: float[B, ..., C]; gain, offset:
    float32[B, C]. Returns x's shape and dtype.

    The statistics are sums per channel, pooled to groups on the tiny [B, C] result, and what is left is one fused
    `x * a + c`. The gradient is written out, since it has the same form (g is that of y, m of a group's mean):

      dx = (gain g - m(gain g) - n m(gain g n)) / sqrt(var + eps),

    two sums per channel, then one fused `g * a + x * p + q`. Left to autodiff, XLA's CPU compiler fuses the sum
    that a chain of residual blocks adds up to into each of its uses, and recomputes it there. The price is that
    forward-mode differentiation (`jax.jvp`) is refused.
    """
    return _group_norm_forward(x, gain, offset, groups, eps)[0]


def _pooled(sums: jax.Array, groups: int) -> jax.Array:
    """Return each channel's mean over its group. [B, C] -> [B, C]."""
    b, channels = sums.shape
    return jnp.repeat(sums.reshape(b, groups, -1).mean(-1), channels // groups, axis=-1)


def _wide(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape(x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])


def _group_norm_forward(x: jax.Array, gain: jax.Array, offset: jax.Array, groups: int, eps: float) -> tuple:
    x32, space = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    mean = _pooled(x32.mean(space), groups)
    var = jnp.maximum(_pooled(jnp.square(x32).mean(space), groups) - jnp.square(mean), 0.0)
    inv = jax.lax.rsqrt(var + eps)
    a = inv * gain
    return (x32 * _wide(a, x) + _wide(offset - mean * a, x)).astype(x.dtype), (x, gain, mean, inv)


def _group_norm_backward(groups: int, eps: float, residuals: tuple, g: jax.Array) -> tuple:
    x, gain, mean, inv = residuals
    x32, g32, space = x.astype(jnp.float32), g.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    positions = math.prod(x.shape[1:-1])
    d_offset = g32.sum(space)
    d_gain = inv * (g32 * (x32 - _wide(mean, x))).sum(space)
    p = -jnp.square(inv) * _pooled(gain * d_gain, groups) / positions
    q = -inv * _pooled(gain * d_offset, groups) / positions - p * mean
    dx = g32 * _wide(inv * gain, x) + x32 * _wide(p, x) + _wide(q, x)
    return dx.astype(x.dtype), d_gain, d_offset


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class GroupNorm(nn.Module):
    """Group normalisation over NHWC (`group_norm`), with an optional scale and shift per example.

    `y = n * scale + bias` with learned scale and bias, then `y * (1 + s) + b` where given (AdaGN, ADM 3). Raises
    ValueError if groups do not divide C.

    Attributes:
        groups: number of groups.
        eps: added to the variance.
        dtype: of the result; statistics are float32.
    """

    groups: int = 32
    eps: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"groups={self.groups} must divide the number of channels, which is {channels}")
        gain = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)[None]
        offset = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)[None]
        if scale is not None:
            gain, offset = (v * (1.0 + scale.astype(jnp.float32)) for v in (gain, offset))
        if shift is not None:
            offset = offset + shift.astype(jnp.float32)
        gain, offset = (jnp.broadcast_to(v, (x.shape[0], channels)) for v in (gain, offset))
        return group_norm(x, gain, offset, self.groups, self.eps).astype(self.dtype)


def conv(features: int, size: int, name: str, dtype: Dtype, zero: bool = False) -> nn.Conv:
    """Build a size x size convolution that preserves the resolution; `zero` starts it at zero."""
    kernel = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    pad = size // 2
    return nn.Conv(features, (size, size), padding=((pad, pad), (pad, pad)), kernel_init=kernel, dtype=dtype, name=name)


def upsample2(x: jax.Array) -> jax.Array:
    """Double the resolution by nearest neighbour. [B, H, W, C] -> [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample2(x: jax.Array) -> jax.Array:
    """Halve the resolution by averaging 2 x 2. [B, H, W, C] -> [B, H/2, W/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
    """Fold patch x patch pixels into channels. [B, H, W, C] -> [B, H/p, W/p, p*p*C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
    """Undo space_to_depth. [B, H, W, p*p*C] -> [B, H*p, W*p, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * patch, w * patch, c // patch**2)


class TimeEmbedding(nn.Module):
    """Sinusoids of t, then Dense, SiLU, Dense (ADM: width 4 x channels). t: [B] -> dtype[B, width].

    Attributes:
        channels: number of sinusoids.
        width: size of the embedding.
        dtype: in which the dense layers compute; the sinusoids are float32.
        frequency_shift: 0 or 1, see `timestep_embedding`.
    """

    channels: int
    width: int
    dtype: Dtype = jnp.float32
    frequency_shift: int = 0

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        h = timestep_embedding(t, self.channels, frequency_shift=self.frequency_shift).astype(self.dtype)
        h = nn.Dense(self.width, dtype=self.dtype, name="dense_0")(h)
        return nn.Dense(self.width, dtype=self.dtype, name="dense_1")(nn.silu(h))


class ResBlock(nn.Module):
    """BigGAN residual block with adaptive group norm, as ADM has it (guided diffusion, section 3).

    `h = conv1(resample(silu(GN(x))))`, `h = conv2(dropout(silu(GN(h) * (1 + scale) + shift)))`, and
    `skip(resample(x)) + h`, where (scale, shift) is a projection of the embedding. conv2 starts at zero. Without
    `scale_shift` the projection is added before the second norm.

    emb: float[B, E], or None for an unconditional network, such as an autoencoder.
    cond_map: float[B, H, W, E] at the size of the output; its projection is added to (scale, shift) at each position
    (spatially adaptive normalisation, Park et al. 2019).

    Attributes:
        features: channels of the output.
        resample: None, "up" or "down" (by 2).
        scale_shift: adaptive group norm.
        dropout: rate, in [0, 1).
        groups: groups of the norms; divides the channels of input and output.
        dtype: in which the layers compute; parameters are float32.
        eps: of the norms.
    """

    features: int
    resample: str | None = None
    scale_shift: bool = True
    dropout: float = 0.0
    groups: int = 32
    dtype: Dtype = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self, x: jax.Array, emb: jax.Array | None, train: bool = False, cond_map: jax.Array | None = None
    ) -> jax.Array:
        norm = lambda name: GroupNorm(self.groups, self.eps, self.dtype, name=name)  # noqa: E731
        resample: Callable = {None: lambda y: y, "up": upsample2, "down": downsample2}[self.resample]
        h = conv(self.features, 3, "conv_1", self.dtype)(resample(nn.silu(norm("norm_1")(x))))
        x = resample(x)
        width = 2 * self.features if self.scale_shift else self.features
        if emb is not None:
            emb = nn.Dense(width, dtype=self.dtype, name="emb")(nn.silu(emb))
        if emb is None:
            h = norm("norm_2")(h)
        elif cond_map is not None:
            if not self.scale_shift:
                raise ValueError("cond_map needs scale_shift=True, got scale_shift=False")
            init = nn.initializers.normal(0.02)
            here = nn.Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name="layout_emb")(cond_map)
            scale, shift = jnp.split(emb[:, None, None, :] + here, 2, axis=-1)
            h = norm("norm_2")(h).astype(jnp.float32) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
            h = h.astype(self.dtype)
        elif self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm("norm_2")(h, scale, shift)
        else:
            h = norm("norm_2")(h + emb[:, None, None, :])
        h = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(nn.silu(h))
        h = conv(self.features, 3, "conv_2", self.dtype, zero=True)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, "skip", self.dtype)(x)
        return x + h


class Resample(nn.Module):
    """Change of resolution by 2 with a learned 3 x 3 convolution (DDPM, improved diffusion).

    Attributes:
        features: channels of the output.
        direction: "down" halves height and width by a stride of 2, "up" doubles them before the convolution.
        dtype: in which the convolution computes.
        pad_after: of "down": True pads by one pixel at the bottom and on the right only, as DDPM's code does; False
            pads all sides, as improved diffusion does.
    """

    features: int
    direction: str
    dtype: Dtype = jnp.float32
    pad_after: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.direction == "up":
            return conv(self.features, 3, "conv", self.dtype)(upsample2(x))
        pad = (0, 1) if self.pad_after else (1, 1)
        return nn.Conv(self.features, (3, 3), strides=2, padding=(pad, pad), dtype=self.dtype, name="conv")(x)


class HeadProjections(nn.Module):
    """A dense layer to the queries, keys and values of attention heads.

    In half precision these are products with parts of the kernel, since a TPU would copy the result of one product to
    split it. x: [B, N, C] -> `parts` arrays [B, N, heads, features]. The parameters are those of `nn.Dense`, kernel
    [C, parts * heads * features] and bias.

    Attributes:
        parts: arrays that are returned.
        heads, features: heads and the channels of each.
        by_head: True if the columns of the kernel are ordered (heads, parts, features), as in ADM; False if (parts,
            heads, features).
        use_bias: add a bias.
        dtype: in which the layer computes; parameters are float32.
    """

    parts: int
    heads: int
    features: int
    by_head: bool
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        width = self.parts * self.heads * self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        every, bias = range(self.parts), jnp.zeros((width,), x.dtype) if bias is None else bias
        if x.dtype.itemsize > 2:
            y = x @ kernel + bias[None, None]
            found = [self._part(y, part) for part in every]
        else:
            found = [x @ self._part(kernel, part) + self._part(bias[None, None], part) for part in every]
        return [y.reshape(*x.shape[:-1], self.heads, self.features) for y in found]

    def _part(self, weights: jax.Array, part: int) -> jax.Array:
        """Return the columns of a part. [..., parts * heads * features] -> [..., heads * features]."""
        before, middle = weights.shape[:-1], (self.heads, self.parts)
        if self.by_head:
            return weights.reshape(*before, *middle, self.features)[..., part, :].reshape(*before, -1)
        return weights.reshape(*before, self.parts, -1)[..., part, :]


class AttentionBlock(nn.Module):
    """Self-attention over pixels whose keys and values are preceded by those of a context (GLIDE 3, ADM 3).

    x: [B, H, W, C]; context: [B, M, D] or None; context_mask: bool[B, M], True at tokens that are attended to. The
    output projection is initialised to zero.

    Attributes:
        head_channels: channels of an attention head; divides C.
        groups: groups of the norm; divides C.
        dtype: in which the layers compute; parameters are float32.
        eps: of the norm.
    """

    head_channels: int = 64
    groups: int = 32
    dtype: Dtype = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, context_mask: jax.Array | None = None):
        b, height, width, c = x.shape
        if c % self.head_channels:
            raise ValueError(f"head_channels={self.head_channels} must divide the {c} channels of the level")
        heads, n = c // self.head_channels, height * width
        h = GroupNorm(self.groups, self.eps, self.dtype, name="norm")(x).reshape(b, n, c)
        project = functools.partial(HeadProjections, heads=heads, features=self.head_channels, by_head=True)
        q, k, v = project(3, dtype=self.dtype, name="qkv")(h)
        mask = None
        if context is not None:
            context_k, context_v = project(2, dtype=self.dtype, name="context_kv")(context)
            k, v = jnp.concatenate([context_k, k], axis=1), jnp.concatenate([context_v, v], axis=1)
            if context_mask is not None:
                mask = jnp.pad(context_mask, ((0, 0), (0, n)), constant_values=True)[:, None, None, :]
        h = attention(q, k, v, mask).reshape(b, n, c)
        h = nn.Dense(c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")(h)
        return x + h.reshape(x.shape)
