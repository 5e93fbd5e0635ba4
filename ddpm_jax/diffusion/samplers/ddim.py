"""DDIM: from deterministic to ancestral sampling (Song, Meng & Ermon 2021)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_number, is_known
from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.diffusion.samplers.noise import per_example_normal
from ddpm_jax.types import PredictFn, Step


def ddim_step(eta: float = 0.0) -> Step:
    """Return the step of DDIM (eqs. 12 and 16).

    x_there = alpha_there x0 + sqrt(sigma_there^2 - s^2) eps + s z,
    s = eta (sigma_there / sigma_here) sqrt(1 - alpha_here^2 / alpha_there^2).

    eta = 0 is deterministic, the first-order solver of the probability-flow ODE; eta = 1 has the distribution of
    ancestral sampling with the fixed_small variance. Any variance the network learned is not used. One network call a
    step.

    Args:
        eta: in [0, 1]; with 0 no noise is sampled, unless it is traced.

    Returns:
        A Step.

    Raises:
        ValueError: if eta is outside [0, 1]. A traced eta outside it gives NaN.
    """
    eta = check_number("eta", eta, lambda v: (v >= 0) & (v <= 1), "must be in [0, 1]")

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        prediction = predict_fn(xt, here)
        if is_known(eta) and eta == 0.0:
            return there.alpha * prediction.x0 + there.sigma * prediction.eps, carry
        share = eta**2 * here.beta / here.sigma**2  # s^2 / sigma_there^2, without a difference of squares
        towards_xt = there.sigma * jnp.sqrt(jnp.maximum(1.0 - share, 0.0))
        noise = there.sigma * jnp.sqrt(share) * per_example_normal(keys, xt)
        return there.alpha * prediction.x0 + towards_xt * prediction.eps + noise, carry

    return Step(update)
