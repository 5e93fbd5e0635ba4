"""Attention of latent diffusion: pixels as tokens of a transformer that also reads a context."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.attention import attention
from ddpm_jax.models.layers import GroupNorm, HeadProjections
from ddpm_jax.models.transformer import gelu


class SpatialTransformer(nn.Module):
    """A block of a transformer over pixels, around which they are normed and projected (Rombach et al. 2022, E.2.1).

    `h = in(GN(x))`, then `h + attn(ln_1(h))`, `h + cross(ln_2(h), context)`, `h + mlp(ln_3(h))` with a gated mlp,
    `a * gelu(g)` (GEGLU, Shazeer 2020), and `x + out(h)`. Queries, keys and values have no bias.

    x: [B, H, W, C]; context: [B, M, D]; context_mask: bool[B, M], True at tokens that are attended to, or None for
    all. The output projection is initialised to zero. Raises ValueError without a context, or if head_channels does not
    divide C.

    Attributes:
        head_channels: channels of an attention head; divides C.
        groups: groups of the norm; divides C.
        dtype: in which the layers compute; parameters are float32.
    """

    head_channels: int = 64
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, context_mask: jax.Array | None = None):
        b, height, width, c = x.shape
        if context is None:
            raise ValueError("a U-Net with spatial_transformer=True needs a context, which its attention reads")
        if c % self.head_channels:
            raise ValueError(f"head_channels={self.head_channels} must divide the {c} channels of the level")
        dense = lambda features, name, **options: nn.Dense(features, dtype=self.dtype, name=name, **options)  # noqa: E731
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)  # noqa: E731
        fields = (c // self.head_channels, self.head_channels, False, False, self.dtype)
        project = lambda parts, name: HeadProjections(parts, *fields, name=name)  # noqa: E731
        mask = None if context_mask is None else context_mask[:, None, None, :]
        h = dense(c, "in")(GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x).reshape(b, height * width, c))
        q, k, v = project(3, "qkv")(norm("ln_1")(h))
        h = h + dense(c, "attn_out")(attention(q, k, v).reshape(h.shape))
        (q,) = project(1, "cross_q")(norm("ln_2")(h))
        k, v = project(2, "cross_kv")(context.astype(self.dtype))
        h = h + dense(c, "cross_out")(attention(q, k, v, mask).reshape(h.shape))
        value, gate = jnp.split(dense(8 * c, "mlp_1")(norm("ln_3")(h)), 2, axis=-1)
        h = h + dense(c, "mlp_2")(value * gelu(gate))
        return x + dense(c, "out", kernel_init=nn.initializers.zeros)(h).reshape(x.shape)
