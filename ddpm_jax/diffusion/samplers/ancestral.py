"""Ancestral sampling: follow the reverse chain itself (DDPM algorithm 2)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.diffusion.samplers.noise import per_example_normal
from ddpm_jax.types import PredictFn, Step


def ancestral_step(guide: Callable[[jax.Array, jax.Array], jax.Array] | None = None) -> Step:
    """Return the step x_{t-1} = mean + exp(log_variance / 2) z, z ~ N(0, I), and no noise into the data.

    DDPM algorithm 2, line 4, with the mean and variance of ``process.predict``: the only step that uses a learned or
    fixed_large variance. One network call a step.

    Args:
        guide: (xt, t) -> the scaled gradient of log p(y | xt), [B, ...], by whose product with the variance, channel by
            channel, the mean is shifted (Dhariwal & Nichol 2021, algorithm 1); see ``guidance.log_prob_gradient``. t is
            the original timestep, int32[B].
    """

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        prediction = predict_fn(xt, here)
        mean = prediction.mean
        if guide is not None:
            mean = mean + prediction.variance * guide(xt, jnp.broadcast_to(here.t, xt.shape[:1]))
        std = jnp.where(there.sigma > 0.0, jnp.exp(0.5 * prediction.log_variance), 0.0)
        return mean + std * per_example_normal(keys, xt), carry

    return Step(update)
