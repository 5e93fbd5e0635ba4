"""DDIM inversion: the noise from which DDIM reproduces a given image (Song, Meng & Ermon 2021, section 4.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_data, check_static
from ddpm_jax.diffusion.process import GaussianProcess, predict
from ddpm_jax.diffusion.samplers.grid import time_grid
from ddpm_jax.types import Denoiser, PredictionType, Variance


def invert(
    process: GaussianProcess,
    denoise: Denoiser,
    x0: jax.Array,
    *,
    prediction: PredictionType = "eps",
    variance: Variance = "fixed_small",
    x0_transform: Callable[[jax.Array], jax.Array] | None = None,
    iterations: int = 1,
    trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Walk the time grid upwards, from the data to noise, undoing every step of ``ddim_step(eta=0)``.

    DDIM goes from x to x_low by eps(x, t). Its inverse solves for x, with k = 0 .. iterations - 1 and x^0 = x_low:

        e = eps(x^k, t),   x^{k+1} = (alpha / alpha_low) (x_low - sigma_low e) + sigma e

    One iteration is the usual inversion, of order 1; more come closer to the exact inverse where they converge, that
    is, where eps changes little over a step. Guidance and an ``x0_transform`` make it less of an inverse.

    Args:
        process: T steps, as for the sampling that is to bring x0 back.
        denoise: the network, as in ``sample``.
        x0: float[B, ...], data.
        prediction, variance, x0_transform: as in ``sample``.
        iterations: network calls at every step, at least 1.
        trajectory: also return the state after every step.

    Returns:
        xt at step T - 1, of the shape of x0, for ``sample(..., x_init=xt)``; with ``trajectory`` the pair of it and
        float32[T, B, ...], whose last entry it is.

    Raises:
        ValueError: if iterations < 1, or prediction, variance and the network's output contradict each other.
    """
    check_data(x0)
    check_static("trajectory", trajectory, "since it decides what is returned")
    check_static("iterations", iterations, "since it decides what is compiled")
    if iterations < 1:
        raise ValueError(f"{iterations=} must be at least 1")

    def transition(low: jax.Array, points: tuple) -> tuple[jax.Array, jax.Array | None]:
        below, point = points

        def closer(_: jax.Array, x: jax.Array) -> jax.Array:
            t, index = (jnp.broadcast_to(value, x.shape[:1]) for value in (point.t, point.index))
            output = denoise(x, t)
            eps = predict(
                process, output, x, index, prediction=prediction, variance=variance, x0_transform=x0_transform
            ).eps
            return point.alpha / below.alpha * (low - below.sigma * eps) + point.sigma * eps

        x = jax.lax.fori_loop(0, iterations, closer, low)
        return x, x if trajectory else None

    grid = jax.tree.map(lambda a: a[::-1], time_grid(process))  # from the data upwards
    points = jax.tree.map(lambda a: a[:-1], grid), jax.tree.map(lambda a: a[1:], grid)
    xt, states = jax.lax.scan(transition, x0.astype(process.betas.dtype), points)
    return (xt, states) if trajectory else xt
