"""Sampling of large images by tiles, with the memory that a tile needs.

The network runs on overlapping tiles one after the other, and their outputs are averaged at every step of the sampler
(MultiDiffusion, Bar-Tal et al. 2023, whose least-squares problem the weighted average solves). A network without
attention and without statistics over positions, whose receptive field reaches at most a quarter of the overlap, gives
the whole image's output exactly. Group norms take their statistics from the tile in place of the image, which is an
approximation; a network that was trained on crops saw the statistics of crops.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_count
from ddpm_jax.types import Denoiser


def tiled_denoiser(
    network: Callable[..., jax.Array], images: Mapping[str, jax.Array], *, tile: int, overlap: int, unit: int = 1
) -> Denoiser:
    """Return a denoiser that runs a network on tiles.

    Args:
        network: (xt, t, **images) -> output [B, tile, tile, K], for tiles of xt and of the images.
        images: conditioning images float[B, H / f, W / f, C], each for a factor f >= 1, which are cut with xt.
        tile: side of a tile in pixels of xt; an image that is not larger is not cut.
        overlap: of neighbouring tiles, at least, in pixels; less than `tile`.
        unit: in pixels; tiles begin at multiples of it, so that the network's downsampling falls on the same pixels as
            in the whole image.

    Returns:
        (xt, t) -> float32[B, H, W, K], for xt float[B, H, W, C].

    Raises:
        ValueError: if tile and overlap are not multiples of unit and of every factor, or overlap is not below tile;
            when the denoiser is called, if a side of xt is no multiple of them.
    """
    check_count("tile", tile)
    if not isinstance(overlap, int) or not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} must be a number of pixels in [0, {tile}), below {tile=}")

    def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
        height, width = xt.shape[1:3]
        factors = {name: _factor(name, image.shape, xt.shape) for name, image in images.items()}
        step = int(np.lcm.reduce([unit, *factors.values()]))
        for name, value in {"tile": tile, "overlap": overlap, "the image's height": height, "width": width}.items():
            if value % step:
                raise ValueError(f"{name}={value} must be a multiple of {step} pixels, so that tiles fit the network")
        (rows, row_weights), (columns, column_weights) = (_axis(side, tile, overlap) for side in (height, width))
        sides = min(tile, height), min(tile, width)
        places = jnp.asarray([(i, j) for i in range(len(rows)) for j in range(len(columns))])
        rows, columns = jnp.asarray(rows), jnp.asarray(columns)

        def output(place: jax.Array) -> jax.Array:
            start = rows[place[0]], columns[place[1]]
            own = {name: _cut(image, start, sides, factors[name]) for name, image in images.items()}
            return network(_cut(xt, start, sides, 1), t, **own).astype(jnp.float32)

        def add(total: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
            at = (0, rows[place[0]], columns[place[1]], 0)
            weights = row_weights[place[0]][:, None] * column_weights[place[1]][None, :]
            part = jax.lax.dynamic_slice(total, at, (total.shape[0], *sides, total.shape[3]))
            part = part + weights[None, :, :, None] * output(place)
            return jax.lax.dynamic_update_slice(total, part, at), None

        channels = jax.eval_shape(output, places[0]).shape[-1]
        return jax.lax.scan(add, jnp.zeros((*xt.shape[:3], channels), jnp.float32), places)[0]

    return denoise


def _factor(name: str, small: tuple[int, ...], large: tuple[int, ...]) -> int:
    factor = large[1] // small[1]
    if tuple(factor * side for side in small[1:3]) != tuple(large[1:3]):
        raise ValueError(f"{name} has {small[1]} x {small[2]} pixels, no whole part of {large[1]} x {large[2]}")
    return factor


def _cut(image: jax.Array, start: tuple[Any, Any], sides: tuple[int, int], factor: int) -> jax.Array:
    """Return a tile of an image that is smaller by a factor."""
    at, size = [place // factor for place in start], [side // factor for side in sides]
    return jax.lax.dynamic_slice(image, (0, *at, 0), (image.shape[0], *size, image.shape[3]))


def _axis(side: int, tile: int, overlap: int) -> tuple[np.ndarray, jax.Array]:
    """Return where the tiles begin along an axis, and the weights of their pixels, which sum to 1 at every pixel.

    Where two tiles overlap, the weight falls from 1 to 0 in the middle half of the overlap: the outer quarters, of
    which the network has not seen all surroundings, count nothing.
    """
    if tile >= side:
        return np.zeros(1, np.int32), jnp.ones((1, side), jnp.float32)
    starts = np.array([min(start, side - tile) for start in range(0, side - overlap, tile - overlap)], np.int32)
    weights = np.ones((len(starts), tile))
    pixels = np.arange(tile) + 0.5
    for number in range(len(starts) - 1):
        shared = starts[number] + tile - starts[number + 1]
        if shared:
            rising = np.clip((pixels - shared / 4) / (shared / 2), 0, 1)
            weights[number + 1] *= rising
            weights[number] *= rising[::-1]
    total = np.zeros(side)
    for start, own in zip(starts, weights, strict=True):
        total[start : start + tile] += own
    return starts, jnp.asarray([own / total[s : s + tile] for s, own in zip(starts, weights, strict=True)], jnp.float32)
