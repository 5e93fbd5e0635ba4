"""Changes of resolution by 2 with a FIR filter (StyleGAN2's upfirdn2d), as NCSN++ has them (Song et al. 2021).

A filter is a row of taps h that is applied along both axes, normalised so that a constant image stays what it is:

    upfirdn:  y[n] = sum_j h[K - 1 - j] z[down n + j],   z: x with up - 1 zeros after each pixel, then padded with zeros

Pixels outside of the image are zero. The filters are separable and short, so each is a sum of K shifted copies along an
axis, which XLA fuses; upsampling leaves the products with inserted zeros out.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Taps = Sequence[float]


def fir_downsample2(x: jax.Array, taps: Taps) -> jax.Array:
    """Filter and take every second pixel. [B, H, W, C] -> [B, H/2, W/2, C]; taps: at least 2, (1, 3, 3, 1) published.

    Raises:
        ValueError: if the taps are fewer than 2, or their sum is 0.
    """
    before, after = _split(len(taps) - 2)
    return _filtered(x, _normalized(taps), (before, after), 2)


def fir_upsample2(x: jax.Array, taps: Taps) -> jax.Array:
    """Insert zeros between pixels and filter. [B, H, W, C] -> [B, 2H, 2W, C]; taps: as `fir_downsample2`.

    Raises:
        ValueError: if the taps are fewer than 2, or their sum is 0.
    """
    before, after = _split(len(taps) - 2)
    h = 2.0 * _normalized(taps)[::-1]
    for axis in (1, 2):
        x = _stuffed_along(x, axis, h, before + 1, after)
    return x


class FirConv(nn.Module):
    """3 x 3 convolution that halves or doubles the resolution, with a FIR filter before or after it (StyleGAN2).

    x: [B, H, W, C] -> [B, H/2, W/2, features] or [B, 2H, 2W, features].

    Attributes:
        features: channels of the output.
        direction: "down" filters and takes a convolution of stride 2; "up" takes a convolution of the image with zeros
            inserted, and filters.
        taps: of the filter, at least 2.
        dtype: in which the convolution computes.
    """

    features: int
    direction: str
    taps: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = _normalized(self.taps)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if self.direction == "down":
            x = convolve(_filtered(x, h, _split(len(h)), 1), kernel, (2, 2), "VALID")
        else:
            before, after = _split(len(h) - 4)
            x = convolve(x, kernel, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2))
            x = _filtered(x, 2.0 * h, (before + 1, after + 1), 1)
        return x + bias[None, None, None]


def _split(pad: int) -> tuple[int, int]:
    """Return the padding before and after, of which the first is the larger."""
    return (pad + 1) // 2, pad // 2


def _normalized(taps: Taps) -> np.ndarray:
    h = np.asarray(taps, np.float64)
    if h.ndim != 1 or h.size < 2 or h.sum() == 0.0:
        raise ValueError(f"fir_taps={tuple(taps)} must be at least two numbers whose sum is not 0")
    return h / h.sum()


def _filtered(x: jax.Array, h: np.ndarray, pad: tuple[int, int], down: int) -> jax.Array:
    """Return the image, padded, filtered along both axes, and every `down`th pixel of it."""
    for axis in (1, 2):
        wide = _padded(x, axis, *pad)
        count = (wide.shape[axis] - len(h)) // down + 1
        part = lambda j: jax.lax.slice_in_dim(wide, j, j + down * (count - 1) + 1, down, axis)  # noqa: B023, E731
        x = sum(x.dtype.type(tap) * part(j) for j, tap in enumerate(h[::-1]))
    return x


def _stuffed_along(x: jax.Array, axis: int, h: np.ndarray, before: int, after: int) -> jax.Array:
    """Return sum_j h[j] z[n + j], z: x with a zero after each pixel, padded; h: already reversed."""
    size, phases = x.shape[axis], []
    wide = _padded(x, axis, len(h), len(h))
    for phase in (0, 1):  # of n; z is not zero where n + j - before is even
        total = None
        for j in range((before - phase) % 2, len(h), 2):
            start = len(h) + (phase + j - before) // 2
            part = x.dtype.type(h[j]) * jax.lax.slice_in_dim(wide, start, start + size, axis=axis)
            total = part if total is None else total + part
        phases.append(total)
    shape = list(x.shape)
    shape[axis] = 2 * size
    return jnp.stack(phases, axis=axis + 1).reshape(shape)


def _padded(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (before, after, 0)  # negative ones cut
    return jax.lax.pad(x, jnp.zeros((), x.dtype), pad)
