"""DEIS: Adams-Bashforth in sigma / alpha, rho-AB of Zhang and Chen 2022, arXiv:2204.13902."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_static
from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.types import PredictFn, Step


def deis_step(order: int = 2) -> Step:
    """Return the step of rho-AB DEIS, of order 1, 2 or 3.

    With y = x / alpha and rho = sigma / alpha the probability-flow ODE is dy / d rho = eps. The step integrates,
    exactly over [rho_here, rho_there], the polynomial through eps here and at up to two points before, at their places
    in rho. With h = rho_here - rho_there, h_1 and h_2 the lengths of the steps before, eps_1 and eps_2 their estimates:

        x_there = alpha_there (x / alpha - h e)
        order 1  e = eps                                                       (DDIM)
        order 2  e = eps + d / 2                                               with d = (h / h_1) (eps - eps_1)
        order 3  e = eps + d / 2 + (h / 3 + h_1 / 2) / (h_1 + h_2) (d - d_1)   and d_1 = (h / h_2) (eps_1 - eps_2)

    The first steps are of the order that the estimates so far allow. One step of order 1 leaves an error of h^2 behind,
    below the rest for order 2; for order 3 it would be what counts, so that the first step looks at its end as well:

        x_there = x_ddim + alpha_there (1 - rho_there / rho_here) (x0_there - x0) / 2

    which is bounded near pure noise, where rho is about 20000 in the cosine schedule and the trapezoid of eps in rho is
    not. The step into the data is of order 1, so that samples end in an estimate of x0. One network call a step, two
    for the first step of order 3.

    Args:
        order: 1, 2 or 3.

    Returns:
        A Step.

    Raises:
        ValueError: if order is not one of these.
    """
    check_static("order", order, "since it decides what is compiled")
    if order not in (1, 2, 3):
        raise ValueError(f"{order=} must be 1, 2 or 3")

    before = order - 1  # estimates that are carried

    def init(xt: jax.Array) -> tuple:
        zero = jnp.zeros((), xt.dtype)
        return (jnp.zeros_like(xt),) * before, (zero,) * before, jnp.zeros((), jnp.int32)

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        del keys
        estimates, lengths, known = carry
        x0, eps = (prediction := predict_fn(xt, here)).x0, prediction.eps
        x = there.alpha * x0 + there.sigma * eps
        pure, into_data = here.alpha == 0.0, there.sigma == 0.0
        h = here.sigma / jnp.where(pure, 1.0, here.alpha) - there.sigma / there.alpha
        usable = jnp.where(into_data, 0, jnp.minimum(known, before))  # 0 from pure noise too, the first point
        more = lambda: -there.alpha * _extrapolated(h, eps, estimates, lengths, usable)
        if order == 3:
            share = 1.0 - there.sigma * here.alpha / (there.alpha * here.sigma)
            look = lambda: there.alpha * share * 0.5 * (predict_fn(x, there).x0 - x0)
            x = x + jax.lax.cond((known == 0) & ~into_data, look, more)
        elif order == 2:
            x = x + more()
        lengths = (jnp.where(pure, jnp.inf, h), *lengths)[:before]
        return x, ((eps, *estimates)[:before], lengths, known + 1)

    return Step(update, init)


def _extrapolated(h: jax.Array, eps: jax.Array, estimates: tuple, lengths: tuple, usable: jax.Array) -> jax.Array:
    """Return h (e - eps): what the ``usable`` estimates before add to the integral of order 1."""
    # Masked before dividing: where an estimate is missing the length is 0, and 0 / 0 would be NaN in the gradient.
    h_1, *h_2 = (jnp.where(usable >= k, length, 1.0) for k, length in enumerate(lengths, 1))
    d = jnp.where(usable >= 1, h / h_1 * (eps - estimates[0]), 0.0)
    if not h_2:
        return h * d / 2.0
    bent = usable >= 2
    h_1 = jnp.where(bent, h_1, 1.0)  # infinite after a step from pure noise
    d_1 = jnp.where(bent, h / h_2[0] * (estimates[0] - estimates[1]), 0.0)
    return h * (d / 2.0 + jnp.where(bent, (h / 3.0 + h_1 / 2.0) / (h_1 + h_2[0]) * (d - d_1), 0.0))
