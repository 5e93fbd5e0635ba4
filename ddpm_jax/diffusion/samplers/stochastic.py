"""The reverse SDE step by step, and Langevin correctors (Song et al. 2021, "score SDE", appendices D.2, F and G)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_number, check_static
from ddpm_jax.diffusion.continuous import Schedule
from ddpm_jax.diffusion.process import GaussianProcess, predict, q_sample
from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.diffusion.samplers.noise import (
    check_draws,
    check_entries,
    check_keys,
    per_example_normal,
    transition_keys,
)
from ddpm_jax.types import Denoiser, PredictFn, PredictionType, Step


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


def euler_maruyama_step(schedule: Schedule | None = None) -> Step:
    """Return the Euler-Maruyama step of the reverse SDE, (3) of ``continuous``; of weak order 1.

        x_there = x - (f x - g^2 score) dt + g sqrt(dt) z,   dt = t_here - t_there

    The step into the data is the estimate of x0. One network call a step.

    Args:
        schedule: the one that the process was made of by ``discretize``, for f and g. None takes the rates of the
            process's own steps, f dt = -(1 - a^2) / 2 with a = alpha_here / alpha_there and g^2 dt = beta, which for a
            discrete variance-preserving chain are those of its SDE, f dt = -beta / 2 (score SDE, appendix B).

    Raises:
        ValueError: in use, if a schedule is given and the process is not one of continuous time.
    """

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        into_data = there.sigma == 0.0
        if schedule is None:
            f_dt, g2_dt = 0.5 * (jnp.square(here.alpha / there.alpha) - 1.0), here.beta
        elif jnp.issubdtype(here.t.dtype, jnp.floating):
            dt = jnp.where(into_data, 0.0, here.t - there.t)
            f_dt, g2_dt = schedule.drift(here.t) * dt, schedule.diffusion_squared(here.t) * dt
        else:
            raise ValueError("euler_maruyama_step(schedule) needs a process made by continuous.discretize")
        prediction = predict_fn(xt, here)
        x = xt - f_dt * xt - g2_dt * prediction.eps / here.sigma + jnp.sqrt(g2_dt) * per_example_normal(keys, xt)
        return jnp.where(into_data, prediction.x0, x), carry

    return Step(update)


def predictor_corrector_step(predictor: Step | None = None, *, corrector_steps: int = 1, snr: float = 0.16) -> Step:
    """Return Langevin steps at each point before a predictor leaves it (score SDE, algorithms 4 and 5).

        x <- x + c score + sqrt(2 c) z,   c = 2 (alpha_here / alpha_there)^2 (r sigma_here)^2,   score = -eps / sigma

    The published rule is c = 2 (alpha_here / alpha_there)^2 (r |z| / |score|)^2 with norms averaged over the batch,
    which makes a sample depend on its batch. With the norms of one example c depends on x and z, and the distribution
    is wrong: in 3 dimensions its variance is 4 times too large, in 64 by 8 %. Here the norms are sqrt(D) and
    sqrt(D) / sigma, their expectations if E |eps|^2 = D. The published c is larger by D / E |eps|^2: about 1 where
    noise is large, and more where it is small and the data fill all dimensions.

    No variance of x_t is below sigma^2, so c < 2 sigma^2, which is r < 1, is stable for any data and any D. Where x_t
    has variance v, these steps alone settle at v / (1 - c / (2 v)), at most 1 / (1 - r^2) times too large: by 2.6 % for
    r = 0.16.

    1 + corrector_steps network calls a step.

    Args:
        predictor: ``reverse_diffusion_step()`` by default.
        corrector_steps: M >= 0.
        snr: r in (0, 1); 0.16 in the paper for images.

    Returns:
        A Step.

    Raises:
        ValueError: if an argument is out of its range.
    """
    check_static("corrector_steps", corrector_steps, "since it is compiled into the loop")
    if corrector_steps < 0:
        raise ValueError(f"{corrector_steps=} must not be negative")
    rule = "must be in (0, 1): from 1 on, Langevin steps diverge where the data are a point"
    snr = check_number("snr", snr, lambda v: (v > 0.0) & (v < 1.0), rule)
    predictor = reverse_diffusion_step() if predictor is None else predictor

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        check_draws(keys, xt, corrector_steps + 1, f"predictor_corrector_step with {corrector_steps=}")
        size = snr * here.alpha / there.alpha  # c = 2 (size sigma)^2; no root, whose gradient is infinite at alpha = 0

        def correct(number: jax.Array, x: jax.Array) -> jax.Array:
            z = per_example_normal(transition_keys(keys, number), x)
            return x + 2.0 * size * here.sigma * (z - size * predict_fn(x, here).eps)

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
        ValueError: if second_moment is not a vector, and in use, if it has not one entry for each step.
    """
    second_moment = jnp.asarray(second_moment)
    if bound is not None:
        bound = check_number("bound", bound, lambda v: v > 0, "must be positive")
    if second_moment.ndim != 1:
        raise ValueError(f"second_moment must have one entry for each step, got shape {second_moment.shape}")

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        if here.num_steps and here.num_steps != second_moment.shape[0]:
            raise ValueError(
                f"second_moment must have an entry for each of the {here.num_steps} steps that are sampled, got "
                f"{second_moment.shape[0]}: of all steps take moments[short.timestep_map]"
            )
        share = here.beta / jnp.square(here.sigma)
        left = jnp.clip(1.0 - second_moment[here.index].astype(xt.dtype), 0.0, 1.0)
        # From pure noise, alpha = 0, nothing is known of x0: its variance is the bound.
        pure, at_most = here.alpha == 0.0, 0.0 if bound is None else bound**2
        x0_variance = jnp.where(pure, at_most, jnp.square(here.sigma / jnp.where(pure, 1.0, here.alpha)) * left)
        if bound is not None:
            x0_variance = jnp.minimum(x0_variance, bound**2)
        variance = share * jnp.square(there.sigma) + jnp.square(there.alpha * share) * x0_variance
        noisy = there.sigma > 0.0
        std = jnp.where(noisy, jnp.sqrt(jnp.where(noisy, variance, 1.0)), 0.0)
        return predict_fn(xt, here).mean + std * per_example_normal(keys, xt), carry

    return Step(update)


def analytic_moments(
    process: GaussianProcess, denoise: Denoiser, keys: jax.Array, x0: jax.Array, *, prediction: PredictionType = "eps"
) -> jax.Array:
    """Return E |eps_hat(x_t)|^2 / D at every step, the Monte-Carlo estimate that ``analytic_step`` needs (eq. 8).

    Args:
        process: T steps, usually all of them; ``denoise`` is called T times, in one ``lax.scan``.
        denoise: the network, without guidance.
        keys: keys [B], for the noise; or ``RecordedNoise``, values[:, t] for step t.
        x0: float[B, ..., C], data; the more examples, the better.
        prediction: what the network predicts. A learned variance half is not used.

    Returns:
        float32[T], to be stored beside the model.

    Raises:
        ValueError: if keys are not keys [B] or ``RecordedNoise`` of at least T entries along axis 1.
    """
    keys = check_entries(check_keys(keys, x0.shape[0]), process.num_steps)
    x0 = x0.astype(process.betas.dtype)

    def moment(_: None, step: jax.Array) -> tuple[None, jax.Array]:
        t = jnp.broadcast_to(step, x0.shape[:1])
        xt = q_sample(process, x0, t, per_example_normal(transition_keys(keys, step), x0))
        output = denoise(xt, process.timestep_map[t])[..., : x0.shape[-1]]
        return None, jnp.mean(jnp.square(predict(process, output, xt, t, prediction=prediction).eps))

    return jax.lax.scan(moment, None, jnp.arange(process.num_steps, dtype=jnp.int32))[1]
