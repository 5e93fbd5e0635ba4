"""Likelihood of data under a diffusion model, and sampling, by its probability-flow ODE; and the variational bound.

What uses the ODE needs diffrax (``pip install "ddpm_jax[ode]"``), which is imported when it is called.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ddpm_jax.checks import is_known
from ddpm_jax.diffusion.continuous import Schedule
from ddpm_jax.diffusion.keys import key_vector
from ddpm_jax.diffusion.losses import normal_kl, vlb_terms
from ddpm_jax.diffusion.process import GaussianProcess, predict, q_sample, to_x0_eps
from ddpm_jax.diffusion.samplers.noise import check_entries, check_keys, per_example_normal, transition_keys
from ddpm_jax.extras import needs_extra
from ddpm_jax.types import Denoiser, PredictionType, Variance


def variational_bound(
    process: GaussianProcess,
    denoise: Denoiser,
    keys: jax.Array,
    x0: jax.Array,
    *,
    prediction: PredictionType = "eps",
    variance: Variance = "fixed_small",
    x0_transform: Callable[[jax.Array], jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Return the negative variational bound of each example, L_T + sum_t L_t (DDPM eq. 5), in bits per dimension.

    Every L_t is estimated with one noise sample; the average over examples, and over calls with other keys, is the
    bound. The published numbers of DDPM, Improved DDPM and ADM are this, with x0 clipped (``static_threshold``).

    Args:
        process: T steps; a respaced one gives the bound of the shorter model.
        denoise: the network, as in ``sample``. It is called T times, in one ``lax.scan``.
        keys: typed keys [B], from ``example_keys``; example i uses keys[i] alone.
        x0: float[B, ..., C], 8-bit data in [-1, 1].
        prediction, variance, x0_transform: as in ``sample``.

    Returns:
        "total" and "prior" (L_T, without parameters), float32[B]; "terms" (L_0 .. L_{T-1}) and "mse" (the mean squared
        error of eps), float32[B, T].

    Raises:
        ValueError: if shapes do not fit, prediction, variance and the network's output contradict each other, or x0 is
            not in [-1, 1]. Under jit, where x0 is not known, L_0 and the total of such an example are NaN.
    """
    keys = check_entries(check_keys(keys, x0.shape[0]), process.num_steps)
    x0 = x0.astype(process.betas.dtype)
    inside = jnp.max(jnp.abs(x0), axis=tuple(range(1, x0.ndim))) <= 1.0 + 1e-5
    if not isinstance(inside, jax.core.Tracer) and not bool(inside.all()):
        raise ValueError(f"x0 must be 8-bit data in [-1, 1], got values from {x0.min():g} to {x0.max():g}")
    mean = lambda x: jnp.mean(x, axis=tuple(range(1, x.ndim)))  # noqa: E731

    def term(_: None, step: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        t = jnp.broadcast_to(step, x0.shape[:1])
        eps = per_example_normal(transition_keys(keys, step), x0)
        xt = q_sample(process, x0, t, eps)
        output = denoise(xt, process.timestep_map[t])
        step = predict(process, output, xt, t, prediction=prediction, variance=variance, x0_transform=x0_transform)
        return None, (vlb_terms(process, step, x0, xt, t), mean((step.eps - eps) ** 2))

    _, (terms, mse) = jax.lax.scan(term, None, jnp.arange(process.num_steps, dtype=jnp.int32))
    prior = prior_kl(process, x0)
    # log(-1): under debug_nans NaN must not be made where it is not used.
    terms = terms.at[0].add(jnp.log(jnp.where(inside, 1.0, -1.0).astype(terms.dtype)))
    return {"total": prior + terms.sum(0), "prior": prior, "terms": terms.T, "mse": mse.T}


def prior_kl(process: GaussianProcess, x0: jax.Array) -> jax.Array:
    """Return L_T = KL(q(x_T | x0) || N(0, prior_std^2)) in bits per dimension, float32[B] (DDPM eq. 5).

    x0: float[B, ...]; prior_std is the process', 1 where variance is preserved.
    """
    mean = process.alpha[-1] * x0.astype(process.betas.dtype)
    log_variance = jnp.broadcast_to(2.0 * jnp.log(process.sigma[-1]), mean.shape)
    prior = jnp.broadcast_to(2.0 * jnp.log(process.prior_std), mean.shape)
    kl = normal_kl(mean, log_variance, jnp.zeros_like(mean), prior)
    return jnp.mean(kl, axis=tuple(range(1, x0.ndim))) / math.log(2.0)


def ode_log_likelihood(
    schedule: Schedule,
    denoise: Denoiser,
    keys: jax.Array,
    x0: jax.Array,
    *,
    prediction: PredictionType = "eps",
    probe: Literal["rademacher", "gaussian", "exact"] = "rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    cond: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Return log p(x0), in nats, under the probability-flow ODE (Song et al. 2021, "score SDE", eqs. 39 and 40).

        log p(x0) = log p_prior(x_T) + integral of div v(x_t, t) dt over [t_min, t_max],   dx = v dt, (4) of continuous

    with the divergence estimated without bias by e . grad(v . e), E e e^T = I (Hutchinson), one e an example. Solved by
    diffrax' Tsit5 with a separate step size for every example, so that none depends on its batch.

    Args:
        schedule: from ``continuous``; x0 is taken to be data at t_min.
        denoise: the network; it is called with one example at a time, [1, ..., C] and t float32[1], mapped over the
            batch by ``vmap``, so that what differs between examples cannot be closed over: that is ``cond``.
        keys: typed keys [B], for the probes; example i uses keys[i] alone.
        x0: float[B, ..., C].
        prediction: "eps", "x0", "v" or "score".
        probe: the distribution of e; "exact" takes the whole trace, one backward pass for each dimension.
        rtol, atol: of the adaptive solver; atol is of the data's unit.
        cond: a tree of arrays [B, ...], one condition for each example; with it the network is called as
            ``denoise(xt, t, cond)``, cond being [1, ...] too.

    Returns:
        log p(x0), float32[B], and the network calls of each example, int32[B].

    Raises:
        ImportError: without diffrax.
        ValueError: for an unknown probe or prediction, or if keys or the network's output do not fit.
    """
    if probe not in ("rademacher", "gaussian", "exact"):
        raise ValueError(f"{probe=} must be 'rademacher', 'gaussian' or 'exact'")
    keys = key_vector(keys, x0.shape[0])
    velocity = _velocity(schedule, denoise, prediction)

    def one(key: jax.Array, x: jax.Array, cond: Any) -> tuple[jax.Array, jax.Array]:
        draw = jax.random.normal if probe == "gaussian" else jax.random.rademacher
        e = draw(key, x.shape, x.dtype)

        def field(t: jax.Array, state: tuple, args: Any) -> tuple[jax.Array, jax.Array]:
            # Reverse mode: networks may refuse the other one.
            v, pull = jax.vjp(lambda x: velocity(x, t, cond), state[0])
            if probe == "exact":
                rows = jax.lax.map(lambda row: jnp.sum(pull(row)[0] * row), _basis(v))
                return v, jnp.sum(rows)
            return v, jnp.sum(pull(e)[0] * e)

        start = (x, jnp.zeros((), x.dtype))
        (end, divergence), calls = _solve(field, schedule.t_min, schedule.t_max, start, rtol, atol)
        scaled = end / schedule.prior_std
        prior = -0.5 * jnp.sum(jnp.square(scaled)) - x.size * (
            0.5 * math.log(2 * math.pi) + math.log(schedule.prior_std)
        )
        return prior + divergence, calls

    return jax.vmap(one)(keys, x0.astype(jnp.promote_types(x0.dtype, jnp.float32)), cond)


def ode_sample(
    schedule: Schedule,
    denoise: Denoiser,
    keys: jax.Array,
    shape: tuple[int, ...],
    *,
    prediction: PredictionType = "eps",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    x_init: jax.Array | None = None,
    cond: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Sample with the probability-flow ODE with an adaptive solver (score SDE, section 4.3), from t_max to t_min.

    Args:
        schedule, denoise, prediction, rtol, atol, cond: as in ``ode_log_likelihood``.
        keys: typed keys [B]; sample i is a function of keys[i] alone.
        shape: of one example.
        x_init: float[B, *shape] to start from, instead of noise.

    Returns:
        x at t_min, float32[B, *shape], and the network calls of each example, int32[B].

    Raises:
        ImportError: without diffrax.
        ValueError: for an unknown prediction type, or if keys, x_init or the network's output do not fit.
    """
    keys = check_keys(keys)
    if x_init is None:
        like = jnp.zeros((keys.shape[0], *shape), jnp.float32)
        x_init = schedule.prior_std * per_example_normal(transition_keys(keys, 0), like)
    if x_init.shape != (keys.shape[0], *shape):
        raise ValueError(f"x_init must have shape {(keys.shape[0], *shape)} (keys, *shape), got {x_init.shape}")
    velocity = _velocity(schedule, denoise, prediction)

    def one(x: jax.Array, cond: Any) -> tuple[jax.Array, jax.Array]:
        return _solve(lambda t, x, args: velocity(x, t, cond), schedule.t_max, schedule.t_min, x, rtol, atol)

    return jax.vmap(one)(x_init, cond)


def bits_per_dimension(log_likelihood: jax.Array, dimensions: int, bins: int = 256) -> jax.Array:
    """Convert log p of dequantised data in [-1, 1] to bits per dimension of the discrete data.

    -log2 p / D + log2(bins / 2): a bin of data in [-1, 1] is 2 / bins wide. With x = 2 (k + u) / bins - 1, u ~ U(0, 1)
    (``dequantize``), its mean is an upper bound of the discrete negative log-likelihood (Theis et al. 2016, 3.1).

    Args:
        log_likelihood: float[B], nats.
        dimensions: D.
        bins: values that a dimension can take.
    """
    half = math.log2(bins / 2.0) if is_known(bins) else jnp.log2(bins / 2.0)
    return -log_likelihood / (dimensions * math.log(2.0)) + half


def dequantize(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Spread 8-bit data evenly over their bins: 2 (k + u) / 256 - 1, u ~ U(0, 1). uint8[B, ...] -> float32[B, ...]."""
    keys = key_vector(keys, images.shape[0])
    u = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], jnp.float32))(keys)
    return (images.astype(jnp.float32) + u) / 128.0 - 1.0


def _velocity(
    schedule: Schedule, denoise: Callable, prediction: PredictionType
) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """Return v of the ODE for one example: x, t [], its condition -> dx/dt."""
    schedule.check_prediction(prediction)

    def velocity(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        t = jnp.asarray(t, x.dtype)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        given = () if cond is None else (jax.tree.map(lambda value: value[None], cond),)
        output = denoise(x[None], t[None], *given)
        if output.shape != (1, *x.shape):
            raise ValueError(
                f"the network must return {(1, *x.shape)} for one example, got {output.shape}: a condition for each "
                "example goes in as cond, and a learned variance must be cut off"
            )
        _, eps = to_x0_eps(output[0].astype(x.dtype), x, alpha, sigma, prediction)
        return schedule.drift(t) * x + 0.5 * schedule.diffusion_squared(t) * eps / sigma

    return velocity


def _solve(field: Callable, start: float, end: float, state: Any, rtol: float, atol: float) -> tuple[Any, jax.Array]:
    """Return the state at ``end`` and the number of evaluations of the field."""
    with needs_extra("ode"):
        import diffrax  # needed here alone

    # diffrax brings the state to the dtype of the times: under jax_enable_x64 that of Python numbers is float64.
    dtype = jax.tree.leaves(state)[0].dtype
    start, end = jnp.asarray(start, dtype), jnp.asarray(end, dtype)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        start,
        end,
        None,
        state,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=100_000,
    )
    last = jax.tree.map(lambda values: values[-1], solution.ys)
    # Tsit5 has six new stages a step, and one at the start.
    return last, (6 * solution.stats["num_steps"] + 1).astype(jnp.int32)


def _basis(v: jax.Array) -> jax.Array:
    return jnp.eye(v.size, dtype=v.dtype).reshape(v.size, *v.shape)
