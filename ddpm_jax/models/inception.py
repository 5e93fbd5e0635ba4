"""The Inception network whose features the FID, the sFID and the Inception Score are measured in (Szegedy et al. 2016).

It is the graph of TensorFlow's inception-2015-12-05, not the one of torchvision: average pooling leaves its padding out
of the mean, and the last block pools by the maximum. Names are those of the file that carries its weights in PyTorch.
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

SIZE = 299
FEATURES = ("64", "192", "768", "2048", "logits_unbiased", "logits")


class BasicConv(nn.Module):
    """A convolution without bias, a batch norm with stored statistics and ReLU: [B, H, W, C] -> [B, h, w, features].

    Attributes:
        features: channels of the output.
        kernel: height and width of the kernel.
        stride: step of the convolution along both axes.
        pad: zeros on each side of the height and of the width.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = tuple((size, size) for size in self.pad)
        x = nn.Conv(self.features, self.kernel, self.stride, padding=pad, use_bias=False, name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x))


class BatchNorm(nn.Module):
    """Normalise channels by stored statistics: (x - mean) / sqrt(var + eps) * scale + bias, in x's dtype.

    Attributes:
        eps: added to the variance.
    """

    eps: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, zeros, ones = (x.shape[-1],), nn.initializers.zeros, nn.initializers.ones
        mean, var = self.param("mean", zeros, shape, jnp.float32), self.param("var", ones, shape, jnp.float32)
        scale, bias = self.param("scale", ones, shape, jnp.float32), self.param("bias", zeros, shape, jnp.float32)
        gain = scale * jax.lax.rsqrt(var + self.eps)
        return (x * gain[None, None, None] + (bias - mean * gain)[None, None, None]).astype(x.dtype)


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def _largest(x: jax.Array, stride: int = 2) -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), ((0, 0), (0, 0)) if stride == 2 else ((1, 1), (1, 1)))


class Mixed(nn.Module):
    """A block of parallel branches, concatenated.

    Attributes:
        kind: "a" to "e" as in the paper's figures 5 to 7.
        width: channels of the layers whose width varies between blocks of one kind.
        pool: of the pooling branch of kind "e".
    """

    kind: Literal["a", "b", "c", "d", "e"]
    width: int = 0
    pool: Literal["average", "max"] = "average"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate(getattr(self, f"_{self.kind}")(x), axis=-1)

    def _chain(self, x: jax.Array, name: str, layers: Sequence[tuple]) -> jax.Array:
        """Run convolutions name_1, name_2, ...; a layer is (features, kernel height, kernel width, stride)."""
        for i, (features, height, width, *stride) in enumerate(layers, 1):
            step = stride[0] if stride else 1
            pad = (0, 0) if step == 2 else (height // 2, width // 2)
            x = BasicConv(features, (height, width), step, pad, name=f"{name}_{i}")(x)
        return x

    def _one(self, x: jax.Array, features: int, name: str = "branch1x1") -> jax.Array:
        return BasicConv(features, name=name)(x)

    def _a(self, x: jax.Array) -> list[jax.Array]:
        return [
            self._one(x, 64),
            self._chain(x, "branch5x5", [(48, 1, 1), (64, 5, 5)]),
            self._chain(x, "branch3x3dbl", [(64, 1, 1), (96, 3, 3), (96, 3, 3)]),
            self._one(_average(x), self.width, "branch_pool"),
        ]

    def _b(self, x: jax.Array) -> list[jax.Array]:
        return [
            BasicConv(384, (3, 3), 2, name="branch3x3")(x),
            self._chain(x, "branch3x3dbl", [(64, 1, 1), (96, 3, 3), (96, 3, 3, 2)]),
            _largest(x),
        ]

    def _c(self, x: jax.Array) -> list[jax.Array]:
        n = self.width
        return [
            self._one(x, 192),
            self._chain(x, "branch7x7", [(n, 1, 1), (n, 1, 7), (192, 7, 1)]),
            self._chain(x, "branch7x7dbl", [(n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)]),
            self._one(_average(x), 192, "branch_pool"),
        ]

    def _d(self, x: jax.Array) -> list[jax.Array]:
        return [
            self._chain(x, "branch3x3", [(192, 1, 1), (320, 3, 3, 2)]),
            self._chain(x, "branch7x7x3", [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)]),
            _largest(x),
        ]

    def _e(self, x: jax.Array) -> list[jax.Array]:
        split = lambda x, name: [  # noqa: E731
            BasicConv(384, (1, 3), pad=(0, 1), name=f"{name}a")(x),
            BasicConv(384, (3, 1), pad=(1, 0), name=f"{name}b")(x),
        ]
        return [
            self._one(x, 320),
            *split(self._chain(x, "branch3x3", [(384, 1, 1)]), "branch3x3_2"),
            *split(self._chain(x, "branch3x3dbl", [(448, 1, 1), (384, 3, 3)]), "branch3x3dbl_3"),
            self._one(_average(x) if self.pool == "average" else _largest(x, 1), 192, "branch_pool"),
        ]


class Inception(nn.Module):
    """The network. x: float32[B, 299, 299, 3] in [-1, 1], as `prepare` makes it.

    Returns a dictionary: "64", "192", "768" and "2048", the means over positions of as many features; "logits" and
    "logits_unbiased" (without the bias, which the Inception Score of the original code leaves out), float32[B, 1008];
    and "spatial", float32[B, 17, 17, 7], the features of sFID.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        mean, found = lambda x: x.mean((1, 2)), {}  # noqa: E731
        x = BasicConv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = BasicConv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = _largest(BasicConv(64, (3, 3), pad=(1, 1), name="Conv2d_2b_3x3")(x))
        found["64"] = mean(x)
        x = BasicConv(80, name="Conv2d_3b_1x1")(x)
        x = _largest(BasicConv(192, (3, 3), name="Conv2d_4a_3x3")(x))
        found["192"] = mean(x)
        for name, width in (("b", 32), ("c", 64), ("d", 64)):
            x = Mixed("a", width, name=f"Mixed_5{name}")(x)
        x = Mixed("b", name="Mixed_6a")(x)
        for name, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = Mixed("c", width, name=f"Mixed_6{name}")(x)
            if name == "d":
                found["spatial"] = x[..., :7]  # of branch1x1, which is mixed_6/conv of the TensorFlow graph
        found["768"] = mean(x)
        x = Mixed("e", name="Mixed_7b")(Mixed("d", name="Mixed_7a")(x))
        x = Mixed("e", pool="max", name="Mixed_7c")(x)
        found["2048"] = mean(x)
        kernel = self.param("fc_kernel", nn.initializers.lecun_normal(), (2048, 1008), jnp.float32)
        bias = self.param("fc_bias", nn.initializers.zeros, (1008,), jnp.float32)
        found["logits_unbiased"] = found["2048"] @ kernel
        return found | {"logits": found["logits_unbiased"] + bias[None]}


def prepare(images: jax.Array, resize: Literal["tensorflow", "half_pixel"] = "tensorflow") -> jax.Array:
    """Bring images to the network's size and range.

    The resize decides the number that comes out: published FIDs of the original code and of torch-fidelity use
    TensorFlow 1's bilinear resize, which takes dst * in / out without half a pixel's shift; pytorch-fid uses the half
    pixel. Neither averages when it shrinks.

    Args:
        images: uint8[B, H, W, 3] or float32 in [0, 255].
        resize: which of the two.

    Returns:
        float32[B, 299, 299, 3] in [-1, 1]: (x - 128) / 128 in the one, 2 x / 255 - 1 in the other.
    """
    if resize not in ("tensorflow", "half_pixel"):
        raise ValueError(f"{resize=} must be 'tensorflow' or 'half_pixel'")
    x = jnp.asarray(images, jnp.float32)
    if resize == "half_pixel":
        shape = (x.shape[0], SIZE, SIZE, x.shape[-1])
        return jax.image.resize(x, shape, "linear", antialias=False) / 127.5 - 1.0
    return (_stretch(_stretch(x, 2), 1) - 128.0) / 128.0


def _stretch(x: jax.Array, axis: int) -> jax.Array:
    """Resize one axis as TensorFlow 1 does."""
    size = x.shape[axis]
    place = jnp.arange(SIZE, dtype=jnp.float32) * (size / SIZE)
    low = jnp.floor(place).astype(jnp.int32)
    share = (place - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    first, second = jnp.take(x, low, axis), jnp.take(x, jnp.minimum(low + 1, size - 1), axis)
    return first + (second - first) * share
