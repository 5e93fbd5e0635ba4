"""Heun's method on the probability-flow ODE, and EDM's stochastic form of it (Karras et al. 2022, algorithms 1, 2)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_number, check_static, is_known
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.diffusion.samplers.noise import per_example_normal
from ddpm_jax.types import PredictFn, Step


def heun_step(
    gamma: float = 0.0,
    *,
    sigma_min: float = 0.0,
    sigma_max: float = math.inf,
    noise_scale: float = 1.0,
    process: GaussianProcess | None = None,
) -> Step:
    """Return Heun's step, of order 2, for y = x / alpha along s = sigma / alpha, where the ODE is dy/ds = eps.

        y'      = y + (s_there - s_here) eps(y, s_here)                       (Euler: DDIM)
        y_there = y + (s_there - s_here) (eps(y, s_here) + eps(y', s_there)) / 2

    EDM's algorithm 1, lines 4 to 8, for any alpha. With r = s_here / s_there the same step is

        x_there = x_ddim + alpha_there (r - 1) / 2 (x0_there - x0),   x0_there the estimate at x_ddim

    On a process of ``continuous.edm`` the step is the published one, which extrapolates the estimates of x0 where r > 2
    and needs the paper's 18 steps or more. On others, where r has no bound near pure noise (s is 20 000 at the end of
    the cosine schedule), (r - 1) / 2 is taken as (r - 1) / max(2, r): the same up to r = 2, and at most 1.

    The step into the data is Euler's, since s is 0 there (line 6). Two network calls a step, one for this.

    With ``gamma`` noise is added first, up to s_hat = (1 + gamma) s_here (algorithm 2, lines 4 to 6), for networks that
    can be asked there: those that receive sigma as t (``continuous.edm``), and those of a discrete process, for which
    s_hat is rounded down to the nearest of all timesteps, not below s_here.

    Args:
        gamma: S_churn / N of the paper, in [0, sqrt(2) - 1].
        sigma_min, sigma_max: S_tmin and S_tmax, between which s_here must lie for noise to be added.
        noise_scale: S_noise, the standard deviation of that noise, > 0.
        process: all steps of the discrete process, for gamma > 0; not respaced.

    Returns:
        A Step.

    Raises:
        ValueError: if an argument is out of its range, and in use, for gamma > 0 without the process where the
            network's t is not sigma. A traced gamma out of its range gives NaN.
    """
    most = math.sqrt(2.0) - 1.0 + 1e-9
    gamma = check_number("gamma", gamma, lambda v: (v >= 0.0) & (v <= most), "must be in [0, sqrt(2) - 1]")
    check_static("sigma_min, sigma_max and noise_scale", (sigma_min, sigma_max, noise_scale), "since they are compared")
    if not (noise_scale > 0.0 and 0.0 <= sigma_min <= sigma_max):
        raise ValueError(f"{noise_scale=} must be positive and {sigma_min=} not above {sigma_max=}")

    def churned(keys: jax.Array, xt: jax.Array, here: Point) -> tuple[jax.Array, Point]:
        if not here.time_is_sigma:
            if process is None or not jnp.issubdtype(here.t.dtype, jnp.integer):
                raise ValueError(
                    f"{gamma=} needs a process of continuous.edm, with alpha = 1 and a network that receives sigma, or "
                    "all steps of a discrete one, as process="
                )
            where = lambda ratio: jnp.where((ratio >= sigma_min) & (ratio <= sigma_max), gamma, 0.0)  # noqa: E731
            return _noised(process, keys, xt, here, where, noise_scale)
        inside = (here.sigma >= sigma_min) & (here.sigma <= sigma_max)
        share = jnp.where(inside, gamma, 0.0)
        sigma = here.sigma * (1.0 + share)
        spread = noise_scale * here.sigma * jnp.sqrt(share * (2.0 + share))  # sqrt(sigma_hat^2 - sigma^2)
        return xt + spread * per_example_normal(keys, xt), here.replace(sigma=sigma, t=sigma)

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        if not is_known(gamma) or gamma:
            xt, here = churned(keys, xt, here)
        first = predict_fn(xt, here)
        x = there.alpha * first.x0 + there.sigma * first.eps

        def corrected() -> jax.Array:
            high, low = here.sigma * there.alpha, there.sigma * here.alpha  # r = high / low, infinite from pure noise
            gain = (high - low) / (2.0 * low if here.time_is_sigma else jnp.maximum(2.0 * low, high))
            return x + there.alpha * gain * (predict_fn(x, there).x0 - first.x0)

        return jax.lax.cond(there.sigma > 0.0, corrected, lambda: x), carry

    return Step(update)


def _noised(
    process: GaussianProcess,
    keys: jax.Array,
    xt: jax.Array,
    here: Point,
    gamma: Callable[[jax.Array], jax.Array],
    noise_scale: float,
) -> tuple[jax.Array, Point]:
    """Add noise up to one of the timesteps of a discrete process; gamma: of sigma / alpha."""
    ratio = lambda at: at.sigma / jnp.where(at.alpha == 0.0, 1.0, at.alpha)  # noqa: E731
    wanted = ratio(here) * (1.0 + jnp.where(here.alpha > 0.0, gamma(ratio(here)), 0.0))
    levels = jnp.where(process.alpha == 0.0, jnp.inf, ratio(process))
    step = jnp.maximum(jnp.searchsorted(levels, wanted, side="right") - 1, here.t)
    alpha, sigma = process.alpha[step], process.sigma[step]
    scale = jnp.where(here.alpha > 0.0, alpha / jnp.where(here.alpha > 0.0, here.alpha, 1.0), 1.0)
    spread = noise_scale * jnp.sqrt(jnp.maximum(jnp.square(sigma) - jnp.square(scale * here.sigma), 0.0))
    spread = jnp.where(step > here.t, spread, 0.0)  # without what rounding leaves of a difference
    x = scale * xt + spread * per_example_normal(keys, xt)
    return x, here.replace(alpha=alpha, sigma=sigma, t=process.timestep_map[step])
