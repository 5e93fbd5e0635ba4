"""PLMS: linear multistep sampling on the manifold of the process (Liu et al. 2022, "PNDM", arXiv:2202.09778)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.samplers.grid import Point
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

    The first step has no history and takes the mean of eps here and at the end of DDIM's step, as in the published
    code. The weights are those of equal steps, which a grid has in t and the ODE does not: hence order 2. One network
    call a step, two for the first.
    """

    def init(xt: jax.Array) -> tuple:
        return (jnp.zeros_like(xt),) * 3, jnp.zeros((), jnp.int32)

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        del keys
        history, known = carry
        prediction = predict_fn(xt, here)
        eps = prediction.eps

        def transfer(e: jax.Array) -> jax.Array:
            # Of pure noise, alpha = 0, eps says nothing about x0.
            x0 = jnp.where(here.alpha > 0.0, (xt - here.sigma * e) / here.alpha, prediction.x0)
            return there.alpha * x0 + there.sigma * e

        def first() -> jax.Array:
            return (eps + predict_fn(transfer(eps), there).eps) / 2.0

        def extrapolated() -> jax.Array:
            weights = jnp.asarray(_WEIGHTS, xt.dtype)[jnp.minimum(known, 3)]
            return sum(weight * e for weight, e in zip(weights, (eps, *history), strict=True))

        mean = jax.lax.cond((known == 0) & (there.sigma > 0.0), first, extrapolated)
        return transfer(mean), ((eps, *history[:2]), known + 1)

    return Step(update, init)
