"""PLMS: linear multistep sampling on the manifold of the process (Liu et al. 2022, "PNDM", arXiv:2202.09778)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.types import PredictFn, Step

# Adams-Bashforth: the newest eps first (PNDM eq. 12, and the lower orders of its code).
_WEIGHTS = (
    (1.0, 0.0, 0.0, 0.0),
    (1.5, -0.5, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms_step() -> Step:
    """Return the step of PLMS, of order 2: DDIM with eps extrapolated from up to three steps before.

        e'      = (55 e - 59 e_1 + 37 e_2 - 9 e_3) / 24            (eq. 12; 2 and 3 terms while there is no more)
        x_there = alpha_there (x - sigma e') / alpha + sigma_there e'    (eq. 11)

    The weights are those of equal steps, which a grid has in t and the ODE does not: hence order 2. One network call a
    step, two for the first. The published code is followed except at the two ends of the grid:

    - The first step has no history, and the published code takes the mean of eps here and of eps at the end of DDIM's
      step. With r = (sigma / alpha) / (sigma_there / alpha_there) this is

          x_there = x_ddim + alpha_there (r - 1) / 2 (x0_there - x0)

      Here (r - 1) / 2 is taken as (r - 1) / max(2, r), which is at most 1. Up to r = 2 the step is the published one;
      beyond, near pure noise, the published one extrapolates the estimates of x0 without bound: r is 625 in 50 steps
      of the cosine schedule.
    - The step into the data is DDIM's, e' = e, as in the other multistep solvers: nothing after it corrects the error
      of an eps that is extrapolated from larger noise.
    """

    def init(xt: jax.Array) -> tuple:
        return (jnp.zeros_like(xt),) * 3, jnp.zeros((), jnp.int32)

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        del keys
        history, known = carry
        x0, eps = (prediction := predict_fn(xt, here)).x0, prediction.eps
        into_data = there.sigma == 0.0

        def first() -> jax.Array:
            x = there.alpha * x0 + there.sigma * eps
            high, low = here.sigma * there.alpha, there.sigma * here.alpha  # r = high / low, infinite from pure noise
            gain = (high - low) / jnp.maximum(2.0 * low, high)
            return x + there.alpha * gain * (predict_fn(x, there).x0 - x0)

        def extrapolated() -> jax.Array:
            weights = jnp.asarray(_WEIGHTS, xt.dtype)[jnp.where(into_data, 0, jnp.minimum(known, 3))]
            e = sum(weight * each for weight, each in zip(weights, (eps, *history), strict=True))
            # (x - sigma e') / alpha; where alpha is 0 there is no history, and e' = e.
            moved = x0 + here.sigma / jnp.where(here.alpha > 0.0, here.alpha, 1.0) * (eps - e)
            return there.alpha * moved + there.sigma * e

        x = jax.lax.cond((known == 0) & ~into_data, first, extrapolated)
        return x, ((eps, *history[:2]), known + 1)

    return Step(update, init)
