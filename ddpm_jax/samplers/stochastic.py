"""The reverse SDE step by step, and Langevin correctors (Song et al. 2021, "score SDE", appendices D.2, F and G)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.continuous import Schedule
from ddpm_jax.process import GaussianProcess, predict, q_sample
from ddpm_jax.samplers.grid import Point
from ddpm_jax.samplers.noise import check_keys, per_example_normal, transition_keys
from ddpm_jax.types import Denoiser, Kind, PredictFn, Step


def reverse_diffusion_step() -> Step:
    """Return the reverse diffusion sampler (eq. 46), the forward step (13) of ``process`` turned round.

        x_there = (2 - a) x + beta score + sqrt(beta) z,   a = alpha_here / alpha_there,   score = -eps / sigma

    without noise into the data. One network call a step.
    """

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        score = -predict_fn(xt, here).eps / here.sigma
        mean = (2.0 - here.alpha / there.alpha) * xt + here.beta * score
        std = jnp.where(there.sigma > 0.0, jnp.sqrt(here.beta), 0.0)
        return mean + std * per_example_normal(keys, xt), carry

    return Step(update)


def euler_maruyama_step(schedule: Schedule) -> Step:
    """Return the Euler-Maruyama step of the reverse SDE, (3) of ``continuous``; of weak order 1.

        x_there = x - (f x - g^2 score) dt + g sqrt(dt) z,   dt = t_here - t_there

    The step into the data is the estimate of x0. One network call a step.

    Args:
        schedule: the one that the process was made of by ``discretize``, for f and g.

    Raises:
        ValueError: in use, if the process is not one of continuous time.
    """

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        if not jnp.issubdtype(here.t.dtype, jnp.floating):
            raise ValueError("euler_maruyama_step needs a process made by continuous.discretize, whose t is a time")
        prediction = predict_fn(xt, here)
        into_data = there.sigma == 0.0
        dt = jnp.where(into_data, 0.0, here.t - there.t)
        g2 = schedule.diffusion_squared(here.t)
        velocity = schedule.drift(here.t) * xt + g2 * prediction.eps / here.sigma
        x = xt - velocity * dt + jnp.sqrt(g2 * dt) * per_example_normal(keys, xt)
        return jnp.where(into_data, prediction.x0, x), carry

    return Step(update)


def predictor_corrector_step(predictor: Step | None = None, *, corrector_steps: int = 1, snr: float = 0.16) -> Step:
    """Return Langevin steps at each point before a predictor leaves it (algorithms 4 and 5).

        x <- x + c score + sqrt(2 c) z,   c = 2 (alpha_here / alpha_there)^2 (r |z| / |score|)^2

    with the norms of each example by itself: the published code takes their means over the batch, so that a sample
    depends on its neighbours. It is a rule for many dimensions, where norms hardly vary: in two, a score that happens
    to be small makes a step without bound. 1 + corrector_steps network calls a step.

    Args:
        predictor: ``reverse_diffusion_step()`` by default.
        corrector_steps: M >= 0.
        snr: r > 0; 0.16 in the paper for pictures.

    Returns:
        A Step.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if corrector_steps < 0 or snr <= 0.0:
        raise ValueError(f"{corrector_steps=} must not be negative and {snr=} must be positive")
    predictor = reverse_diffusion_step() if predictor is None else predictor

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        def correct(number: jax.Array, x: jax.Array) -> jax.Array:
            score = -predict_fn(x, here).eps / here.sigma
            z = per_example_normal(transition_keys(keys, number), x)
            # A score of zero, of an untrained network, moves nothing.
            ratio = jnp.where(_norm(score) > 0.0, _norm(z) / _norm(score), 0.0)
            size = 2.0 * jnp.square(here.alpha / there.alpha * snr * ratio)
            return x + size * score + jnp.sqrt(2.0 * size) * z

        xt = jax.lax.fori_loop(1, corrector_steps + 1, correct, xt)
        return predictor.update(predict_fn, transition_keys(keys, 0), xt, here, there, carry)

    return Step(update, predictor.init)


def analytic_step(second_moment: jax.Array, bound: float | None = None) -> Step:
    """Return ancestral sampling with the optimal variance (Bao et al. 2022, "Analytic-DPM", theorem 1).

    variance = beta_tilde + c_x0^2 (sigma / alpha)^2 (1 - E |eps_hat|^2 / D), the best of all isotropic ones

    and no noise into the data. One network call a step, and a table that is estimated once for a model.

    Args:
        second_moment: float32[T], E |eps_hat(x_t)|^2 / D at the steps of the process that is sampled; from
            ``analytic_moments`` at the original steps, take ``moments[short.timestep_map]``.
        bound: half the width of the data's range, 1 for [-1, 1]: the variance of x0 given x_t is at most its square
            (theorem 2). None does not bound it.

    Raises:
        ValueError: if second_moment is not a vector.
    """
    if second_moment.ndim != 1:
        raise ValueError(f"second_moment must have one entry for each step, got shape {second_moment.shape}")

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        share = here.beta / jnp.square(here.sigma)
        left = jnp.clip(1.0 - second_moment[here.index], 0.0, 1.0)
        # From pure noise, alpha = 0, nothing is known of x0: its variance is the bound.
        x0_variance = jnp.where(
            here.alpha > 0.0, jnp.square(here.sigma / here.alpha) * left, 0.0 if bound is None else bound**2
        )
        if bound is not None:
            x0_variance = jnp.minimum(x0_variance, bound**2)
        variance = share * jnp.square(there.sigma) + jnp.square(there.alpha * share) * x0_variance
        std = jnp.where(there.sigma > 0.0, jnp.sqrt(variance), 0.0)
        return predict_fn(xt, here).mean + std * per_example_normal(keys, xt), carry

    return Step(update)


def analytic_moments(
    process: GaussianProcess, denoise: Denoiser, keys: jax.Array, x0: jax.Array, *, kind: Kind = "eps"
) -> jax.Array:
    """Return E |eps_hat(x_t)|^2 / D at every step, the Monte-Carlo estimate that ``analytic_step`` needs (eq. 8).

    Args:
        process: T steps, usually all of them; ``denoise`` is called T times, in one ``lax.scan``.
        denoise: the network, without guidance.
        keys: typed keys [B], for the noise.
        x0: float[B, ..., C], data; the more examples, the better.
        kind: what the network predicts. A learned variance half is not used.

    Returns:
        float32[T], to be stored beside the model.

    Raises:
        ValueError: if keys are not typed keys, one an example.
    """
    check_keys(keys, x0.shape[0])
    x0 = x0.astype(process.betas.dtype)

    def moment(_: None, step: jax.Array) -> tuple[None, jax.Array]:
        t = jnp.broadcast_to(step, x0.shape[:1])
        xt = q_sample(process, x0, t, per_example_normal(transition_keys(keys, step), x0))
        output = denoise(xt, process.timestep_map[t])[..., : x0.shape[-1]]
        return None, jnp.mean(jnp.square(predict(process, output, xt, t, kind=kind).eps))

    return jax.lax.scan(moment, None, jnp.arange(process.num_steps, dtype=jnp.int32))[1]


def _norm(x: jax.Array) -> jax.Array:
    """Return each example's norm, [B, 1, ...]."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)), keepdims=True))
