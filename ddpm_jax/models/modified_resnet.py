"""The ResNet image tower of CLIP: a ResNet-D with blurred strides that ends in attention (Radford et al. 2021, 2.4)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.adm import AttentionPool
from ddpm_jax.models.inception import BatchNorm

EXPANSION = 4  # channels of a bottleneck's output divided by those of its middle


class ModifiedResNet(nn.Module):
    """CLIP's ResNet. images: [B, S, S, 3] -> float32[B, features].

    Three 3 x 3 convolutions stand for the 7 x 7 of He et al. 2016; every stride of the blocks is an average pooling
    before a convolution of stride one (Zhang 2019, "Making convolutional networks shift-invariant again"); attention
    takes the place of the last average, and its output layer is the projection to CLIP's embedding. Channels are
    normalised by stored statistics, which are parameters here and are not updated: the network is for inference.

    Attributes:
        image_size: S, a multiple of 32.
        width: channels of the first blocks' middle; attention sees 32 x width.
        layers: how many bottlenecks each of the four stages has.
        features: of the embedding that it returns.
        head_channels: of a head of the attention.
        dtype: in which the convolutions compute; the attention is float32.

    Raises:
        ValueError: if the images have another shape, or the sizes do not divide as they must.
    """

    image_size: int
    width: int
    layers: tuple[int, int, int, int]
    features: int
    head_channels: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, width = self.image_size, self.width
        if images.shape[1:] != (size, size, 3) or size % 32:
            raise ValueError(
                f"images have shape {images.shape}; this CLIP takes [B, {size}, {size}, 3], a size that 32 must divide"
            )
        if width % 2 or 32 * width % self.head_channels:
            raise ValueError(f"width={width} must be even, and head_channels={self.head_channels} divide 32 times it")
        x = images.astype(self.dtype)
        for i, (features, stride) in enumerate(((width // 2, 2), (width // 2, 1), (width, 1)), 1):
            x = _conv(features, 3, self.dtype, f"conv{i}", stride)(x)
            x = nn.relu(BatchNorm(1e-5, name=f"bn{i}")(x))
        x = _shrink(x, 2)
        for stage, blocks in enumerate(self.layers):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                x = Bottleneck(width * 2**stage, stride, self.dtype, name=f"layer{stage + 1}_{i}")(x)
        return AttentionPool(self.head_channels, self.features, name="attnpool")(x.astype(jnp.float32))


class Bottleneck(nn.Module):
    """Residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions: [B, H, W, C] -> [B, H / stride, W / stride, 4 features].

    Where the stride or the channels differ, the skip connection averages by the stride and has a 1 x 1 convolution.

    Attributes:
        features: channels of the first two convolutions; the output has 4 times as many.
        stride: factor by which height and width are reduced.
        dtype: in which the convolutions compute.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = EXPANSION * self.features
        norm = lambda name: BatchNorm(1e-5, name=name)  # noqa: E731
        h = nn.relu(norm("bn1")(_conv(self.features, 1, self.dtype, "conv1")(x)))
        h = _shrink(nn.relu(norm("bn2")(_conv(self.features, 3, self.dtype, "conv2")(h))), self.stride)
        h = norm("bn3")(_conv(out, 1, self.dtype, "conv3")(h))
        if self.stride > 1 or x.shape[-1] != out:
            x = _conv(out, 1, self.dtype, "downsample_conv")(_shrink(x, self.stride))
            x = norm("downsample_bn")(x)
        return nn.relu(x + h)


def _conv(features: int, size: int, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(features, (size, size), stride, padding=size // 2, use_bias=False, dtype=dtype, name=name)


def _shrink(x: jax.Array, by: int) -> jax.Array:
    return nn.avg_pool(x, (by, by), (by, by)) if by > 1 else x
