"""DPM-Solver++: multistep solvers of the diffusion ODE and SDE in the log-SNR (Lu et al. 2022b, arXiv:2211.01095).

With lambda = log(alpha / sigma), h = lambda_there - lambda_here and the estimate x0(lambda), both have an exact
solution that is linear in x and an integral of x0 (propositions 4.1 and 4.2):

    ODE  x_there = (sigma_there / sigma_here) x + alpha_there (1 - e^-h) D
    SDE  x_there = (sigma_there / sigma_here) e^-h x + alpha_there (1 - e^-2h) D + sigma_there sqrt(1 - e^-2h) z

where D stands for a mean of x0 over the step, extrapolated from the estimates of the steps before.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_static
from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.diffusion.samplers.noise import per_example_normal
from ddpm_jax.types import PredictFn, Step

ORDERS = (1, 2, 3)


def dpm_solver_step(order: int = 2, *, sde: bool = False) -> Step:
    """Return the step of DPM-Solver++ (1S, 2M or 3M), or with ``sde`` of SDE-DPM-Solver++ (1 or 2M).

    With r_k the length in lambda of the k-th step before over h, and x0_k its estimate:

        order 1  D = x0                                                 (DDIM, or with sde its eta = 1)
        order 2  D = x0 + (x0 - x0_1) / (2 r_1)                         (algorithm 2, and its SDE form)
        order 3  (1 - e^-h) D = (1 - e^-h) x0 + phi_2 D1 - 2 phi_3 D2   with phi_2 = 1 - (1 - e^-h) / h and
                 phi_3 = phi_2 / h - 1/2, D1 = d_0 + r_1 D2, D2 = (d_0 - d_1) / (r_1 + r_2),
                 d_0 = (x0 - x0_1) / r_1, d_1 = (x0_1 - x0_2) / r_2     ("3M")

    Order 3 is exact for an x0 that is quadratic in lambda. The authors' code, and what follows it, has phi_3 without
    the 2, which leaves it of order 2.

    The first steps are of the order that the estimates so far allow, and one step of order 1 leaves an error of h^2
    behind. That is below the rest for order 2; for order 3 it would be what counts, so that its first step looks at its
    end as well (Heun's corrector in lambda). The step into the data is of order 1. One network call a step, two for the
    first step of order 3.

    Args:
        order: 1, 2 or 3.
        sde: True adds the noise of the reverse SDE; order at most 2.

    Returns:
        A Step.

    Raises:
        ValueError: if order is not one of these.
    """
    check_static("order", order, "since it decides what is compiled")
    check_static("sde", sde, "since it decides what is compiled")
    if order not in ORDERS or (sde and order == 3):
        raise ValueError(f"{order=} must be 1, 2 or 3, and at most 2 with sde=True")

    def init(xt: jax.Array) -> tuple:
        zero = jnp.zeros((), xt.dtype)
        return (jnp.zeros_like(xt),) * 2, (zero,) * 2, jnp.zeros((), jnp.int32)

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        known = carry[2]
        x0 = predict_fn(xt, here).x0
        h = jnp.log(there.alpha / here.alpha) - jnp.log(there.sigma / here.sigma)  # infinite into the data
        r_1, slope, bend = _differences(x0, h, carry, order, there.sigma > 0.0)
        if sde:
            decay = -jnp.expm1(-2.0 * h)
            x = there.sigma / here.sigma * jnp.exp(-h) * xt + there.alpha * decay * (x0 + 0.5 * slope)
            return x + there.sigma * jnp.sqrt(decay) * per_example_normal(keys, xt), _push(carry, x0, h)
        decay = -jnp.expm1(-h)
        x = there.sigma / here.sigma * xt + there.alpha * decay * x0
        if order == 3:
            look = lambda: there.alpha * decay * 0.5 * (predict_fn(x, there).x0 - x0)
            more = lambda: there.alpha * _third_order(h, decay, r_1, slope, bend, known)
            return x + jax.lax.cond((known == 0) & (there.sigma > 0.0), look, more), _push(carry, x0, h)
        return x + there.alpha * 0.5 * decay * slope, _push(carry, x0, h)

    return Step(update, init)


def _differences(x0: jax.Array, h: jax.Array, carry: tuple, order: int, extrapolate: jax.Array) -> tuple:
    """Return r_1 + r_2 beside r_1, the first and the second divided difference; 0 as far as estimates are missing."""
    (x0_1, x0_2), (h_1, h_2), known = carry
    usable = jnp.where(extrapolate, jnp.minimum(known, order - 1), 0)
    # Masked twice: where an estimate is missing, h may be infinite, and inf / inf would be NaN in the gradient.
    r_1, r_2 = (
        jnp.where(usable >= k, length / jnp.where(usable >= k, h, 1.0), 1.0) for k, length in ((1, h_1), (2, h_2))
    )
    slope = jnp.where(usable >= 1, (x0 - x0_1) / r_1, 0.0)
    bend = jnp.where(usable >= 2, slope - (x0_1 - x0_2) / r_2, 0.0)
    return (r_1, r_1 + r_2), slope, bend


def _third_order(h: jax.Array, decay: jax.Array, r: tuple, slope: jax.Array, bend: jax.Array, known: jax.Array):
    """Return what order 3 adds to order 1, over alpha_there; order 2 while only one estimate is known."""
    r_1, r_12 = (jnp.where(known >= 2, each, 1.0) for each in r)  # infinite after a step from pure noise
    finite = jnp.where(jnp.isfinite(h), h, 1.0)  # into the data, where slope and bend are 0
    first = slope + r_1 / r_12 * bend
    third = (1.0 - decay / finite) * first - 2.0 * ((finite - decay) / finite**2 - 0.5) * bend / r_12
    return jnp.where(known >= 2, third, 0.5 * decay * slope)


def _push(carry: tuple, x0: jax.Array, h: jax.Array) -> tuple:
    (x0_1, _), (h_1, _), known = carry
    return (x0, x0_1), (h, h_1), known + 1
