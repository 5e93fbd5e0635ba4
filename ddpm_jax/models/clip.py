"""CLIP: an image tower and a text tower trained to agree (Radford et al. 2021)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.models.modified_resnet import ModifiedResNet
from ddpm_jax.models.text_encoder import TextEncoder, end_position
from ddpm_jax.models.transformer import Transformer, gelu


class VisionTransformer(nn.Module):
    """ViT with a class token and a norm before the blocks, as CLIP has it. images: [B, S, S, 3] -> [B, width].

    An empty stem is the published CLIP, except for the initialisation of the position embeddings.

    Attributes:
        image_size: S, a multiple of patch.
        patch: side of a patch in pixels, a multiple of 2^len(stem).
        width: channels of the tokens; a multiple of heads.
        layers: number of transformer blocks, >= 1.
        heads: number of attention heads.
        stem: widths of 3 x 3 convolutions of stride 2 before the patches (Xiao et al. 2021, "Early convolutions help
            transformers see better"), which small data sets need.
        activation: of the MLPs.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which the layers compute; parameters are float32.
        mlp_width: width of the MLPs' hidden layer; 4 * width if None.
        scan: True runs the blocks in a loop, see `Transformer`.
    """

    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    stem: tuple[int, ...] = ()
    activation: Callable = gelu
    remat: bool | str = False
    dtype: Any = jnp.float32
    mlp_width: int | None = None
    scan: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        b, size = images.shape[0], self.image_size
        if images.shape[1:] != (size, size, 3) or size % self.patch:
            raise ValueError(
                f"images have shape {images.shape}; this CLIP takes [B, {size}, {size}, 3], a size that "
                f"patch={self.patch} must divide"
            )
        if self.patch % 2 ** len(self.stem):
            raise ValueError(
                f"patch={self.patch} must be a multiple of {2 ** len(self.stem)}, by which the {len(self.stem)} layers "
                "of the stem shrink the image"
            )
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)  # noqa: E731
        x = images
        for i, features in enumerate(self.stem):
            x = nn.Conv(features, (3, 3), strides=2, padding=1, use_bias=False, dtype=self.dtype, name=f"stem_{i}")(x)
            x = nn.relu(norm(f"stem_ln_{i}")(x))
        p = (self.patch // 2 ** len(self.stem),) * 2
        x = nn.Conv(self.width, p, strides=p, padding="VALID", use_bias=False, dtype=self.dtype, name="patch")(x)
        x = x.reshape(b, -1, self.width)
        init = nn.initializers.normal(self.width**-0.5)
        first = self.param("class", init, (self.width,), jnp.float32).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, self.width)), x], axis=1)
        position = self.param("position", _sincos_2d, (x.shape[1], self.width), jnp.float32)
        x = norm("ln_pre")(x + position[None].astype(self.dtype))
        options = (self.activation, self.remat, self.dtype, self.mlp_width, self.scan)
        x = Transformer(self.layers, self.heads, *options, name="transformer")(x)
        return norm("ln_post")(x[:, 0])


def _sincos_2d(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Start the positions of a class token and a square grid of patches at sines and cosines of row and column.

    Neighbours begin alike and far patches differ, at the amplitude of the patches themselves; from small random vectors
    the place of an object is what CLIP learns last.
    """
    del key
    count, width = shape
    side, quarter = math.isqrt(count - 1), width // 4
    frequencies = np.pi / 2 * np.arange(1, quarter + 1) / quarter * side / 2
    angles = ((np.arange(side) + 0.5) / side)[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(waves, side, axis=0), np.tile(waves, (side, 1))
    table = np.zeros(shape)
    table[1:, : 4 * quarter] = np.concatenate([rows, columns], axis=1)
    return jnp.asarray(table, dtype)


class CLIP(nn.Module):
    """Two towers and a temperature (CLIP 2.3).

    `log_scale` is initialised to ln(1 / 0.07) and clamped so that the scale is at most 100. `encode_image` and
    `encode_text` do not normalise the embeddings; `normalize` does.

    Attributes:
        vision: the image tower, or None for a text tower alone, where only `encode_text` can be called. The last layer
            of a ResNet is the projection, so that its `features` must be embed_dim.
        text: the text tower, or None for an image tower alone.
        embed_dim: D > 0, size of the embeddings.
    """

    vision: VisionTransformer | ModifiedResNet | None
    text: TextEncoder | None
    embed_dim: int

    def setup(self):
        project = lambda width: nn.Dense(  # noqa: E731
            self.embed_dim, use_bias=False, kernel_init=nn.initializers.normal(width**-0.5)
        )
        if isinstance(self.vision, ModifiedResNet):
            if self.vision.features != self.embed_dim:
                raise ValueError(f"the ResNet's features={self.vision.features} must be embed_dim={self.embed_dim}")
        elif self.vision is not None:
            self.image_projection = project(self.vision.width)
        if self.text is not None:
            self.text_projection = project(self.text.width)
        self.log_scale = self.param("log_scale", lambda _: jnp.asarray(math.log(1 / 0.07), jnp.float32))

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Embed images in [-1, 1], float32[B, S, S, 3]. Returns float32[B, embed_dim], not normalised."""
        z = self.vision(images).astype(jnp.float32)
        return z if isinstance(self.vision, ModifiedResNet) else self.image_projection(z)

    def encode_text(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embed tokens, int32[B, L], with mask bool[B, L] True at real tokens.

        Returns (float32[B, embed_dim] not normalised, hidden states [B, L, width]).
        """
        hidden = self.text(tokens)
        last = jnp.take_along_axis(hidden, end_position(mask)[:, None, None], axis=1)[:, 0]
        return self.text_projection(last.astype(jnp.float32)), hidden

    def __call__(self, images: jax.Array, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (z_image, z_text, log_scale): unit embeddings float32[B, embed_dim] and the clamped log scale."""
        z_image, z_text = normalize(self.encode_image(images)), normalize(self.encode_text(tokens, mask)[0])
        return z_image, z_text, _at_most(self.log_scale, math.log(100.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _at_most(x: jax.Array, high: float) -> jax.Array:
    """Return min(x, high), with a gradient that may still bring x down from above."""
    return jnp.minimum(x, high)


_at_most.defvjp(
    lambda x, high: (jnp.minimum(x, high), x), lambda high, x, g: (jnp.where((x > high) & (g < 0), 0.0, g),)
)


def normalize(z: jax.Array) -> jax.Array:
    """Scale the last axis to unit length; a zero vector stays zero instead of becoming NaN."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), axis=-1, keepdims=True), 1e-12))
