"""Every public function of the functional core under JAX's modes, and its gradient.

A case is a function of two numbers: w[0] scales the network, w[1] the data. Each is run as float32 data under
``jax_enable_x64`` and in float64, traced under strict dtype promotion, run with ``checkify`` (so that every single
operation is checked for NaN), and its gradient is compared with a finite difference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from ddpm_jax import cosine_betas, example_keys, linear_betas, make_process
from ddpm_jax.diffusion import continuous, importance, likelihood, losses
from ddpm_jax.diffusion.guidance import (
    classifier_free,
    classifier_guided,
    drop,
    dynamic_threshold,
    implicit_gradient,
    log_prob_gradient,
    static_threshold,
)
from ddpm_jax.diffusion.process import predict, q_posterior, q_sample, respace, target
from ddpm_jax.diffusion.samplers import (
    analytic_moments,
    analytic_step,
    ancestral_step,
    average_of,
    ddim_step,
    dpm_solver_step,
    euler_maruyama_step,
    grey_of,
    heun_step,
    invert,
    plms_step,
    predictor_corrector_step,
    repaint_step,
    reverse_diffusion_step,
    sample,
    sdedit,
    unipc_step,
)
from ddpm_jax.diffusion.schedules import zero_terminal_snr

BETAS = {"cosine": cosine_betas(1000), "pure": zero_terminal_snr(linear_betas(1000))}
VP, VE, EDM = continuous.vp_linear(t_min=1e-3), continuous.ve(0.02, 5.0), continuous.edm(0.05, 5.0)
TIMES = {"vp": continuous.uniform_times(VP, 4), "edm": continuous.karras_times(EDM, 4)}
NOISE = np.random.default_rng(0).standard_normal((2, 4))


@functools.cache
def long(name, dtype):
    with jax.ensure_compile_time_eval():
        return make_process(BETAS[name], dtype=dtype)


@functools.cache
def grid(name, dtype):
    with jax.ensure_compile_time_eval():
        if name in BETAS:
            return respace(long(name, dtype), "4")
        return continuous.discretize({"vp": VP, "edm": EDM}[name], TIMES[name], dtype=dtype)


def key():
    return jax.random.key(0)


def keys():
    return example_keys(key(), 2)


def net(w):
    return lambda xt, t: w[0] * jnp.tanh(xt) + 0.1


def data(w):
    return 0.3 * w[1] * jnp.asarray(NOISE, w.dtype)


def noise_like(w):
    return jnp.asarray(NOISE[::-1].copy(), w.dtype)


STEPS = {
    "ancestral": ancestral_step,
    "ddim 1": lambda: ddim_step(1.0),
    "dpm 2": dpm_solver_step,
    "dpm 3": lambda: dpm_solver_step(3),
    "dpm sde": lambda: dpm_solver_step(2, sde=True),
    "unipc 3": lambda: unipc_step(3),
    "plms": plms_step,
    "heun": heun_step,
    "reverse": reverse_diffusion_step,
    "corrector": lambda: predictor_corrector_step(corrector_steps=2),
    "analytic, bounded": lambda: analytic_step(jnp.asarray([1.0, 0.5, 0.0, 0.8], jnp.float32), bound=1.0),
}


def sampled(where, step, prediction="x0", **options):
    def run(w):
        process = grid(where, w.dtype)
        start = w[1] * process.prior_std.astype(w.dtype) * noise_like(w)
        return sample(process, net(w), keys(), (4,), step=step(), prediction=prediction, x_init=start, **options)

    return run


def repainted(w):
    known = jnp.where(jnp.arange(4) < 2, data(w), jnp.inf)
    step = repaint_step(known, jnp.arange(4) < 2, resample=2)
    return sample(grid("cosine", w.dtype), net(w), keys(), (4,), step=step, prediction="x0")


def moments(w):
    return analytic_moments(grid("pure", w.dtype), net(w), keys(), data(w), prediction="v")


def by_moments(w):
    step = analytic_step(moments(w))
    return sample(grid("pure", w.dtype), net(w), keys(), (4,), step=step, prediction="v")


def restored(w):
    x0 = jnp.broadcast_to(data(w)[:, :1, None, None], (2, 2, 2, 3))
    grey, small = jnp.full((2, 2, 2, 1), w[0]), jnp.full((2, 1, 1, 3), w[0])
    return grey_of(grey)(x0), average_of(small, 2)(x0)


def read(w):
    process, t = long("cosine", w.dtype), jnp.asarray([0, 700], jnp.int32)
    xt = q_sample(process, data(w), t, noise_like(w))
    return (
        [
            predict(process, net(w)(xt, t), xt, t, prediction=prediction)
            for prediction in ("eps", "x0", "v", "score", "mean")
        ],
        [
            target(process, data(w), noise_like(w), t, prediction=prediction)
            for prediction in ("eps", "x0", "v", "score", "mean")
        ],
        predict(process, net(w)(xt, t), xt, t, prediction="x0", variance="fixed_large"),
        q_posterior(process, data(w), xt, t),
    )


def loss(where, **options):
    def run(w):
        wide = lambda xt, t: jnp.concatenate([net(w)(xt, t)] * 2, -1)
        network = wide if options.get("variance") == "learned_range" else net(w)
        at = {"t": jnp.asarray([0, 700], jnp.int32), "noise": noise_like(w)} if "noise" in options else {}
        return losses.denoising_loss(long(where, w.dtype), network, key(), data(w), **{**options, **at})

    return run


def loss_in_time(schedule, prediction, **options):
    return lambda w: losses.continuous_loss(schedule, net(w), key(), data(w), prediction=prediction, **options)


def learned(w):
    params = jax.tree.map(lambda each: each.astype(w.dtype), continuous.init_monotone(key(), 8))
    schedule = continuous.from_log_snr(
        continuous.monotone_log_snr({**params, "scale": params["scale"] + w[1]}, smallest=-4.0)
    )
    return losses.continuous_loss(schedule, net(w), key(), data(w), objective="likelihood")


def weights(w):
    log_snr = jnp.asarray([-5.0, 0.5], w.dtype) * w[1]
    made = [losses.min_snr(5.0, "eps"), losses.snr_power(0.5, 2.0, "v"), losses.p2(0.5, prediction="x0")]
    return [weighting(log_snr) for weighting in (*made, losses.edm_weighting(prediction="eps"))]


def terms(w):
    x = jnp.asarray([[-1.0, 1.0, 0.2, 0.9]] * 2, w.dtype)
    log_scale = -2.0 * jnp.ones_like(x) * w[1]
    return losses.discretized_log_likelihood(x, data(w), log_scale), losses.normal_kl(x, log_scale, data(w), -x)


def contrast(w):
    return losses.contrastive_loss(data(w), noise_like(w) * w[0], w[1])


def guided(w):
    cond, null = net(w), lambda xt, t: 0.5 * w[0] * xt
    denoise = classifier_free(cond, null, jnp.asarray([1.0, 2.0], jnp.float32), rescale=0.3, interval=(0, 700))
    return sample(
        grid("cosine", w.dtype),
        denoise,
        keys(),
        (4,),
        step=ddim_step(),
        prediction="x0",
        x0_transform=dynamic_threshold(),
    )


def several(w):
    denoise = classifier_free([net(w), lambda xt, t: 0.1 * xt], lambda xt, t: 0.2 * xt, [2.0, 1.0])
    return denoise(data(w), jnp.asarray([0, 700], jnp.int32))


def by_classifier(w):
    full = long("cosine", w.dtype)
    log_prob = lambda xt, t: -jnp.sum(w[0] * xt**2, axis=-1)
    denoise = classifier_guided(full, net(w), log_prob, 0.1, prediction="v")
    guide = implicit_gradient(full, net(w), lambda xt, t: 0.2 * xt, 0.1, prediction="v")
    steps = ddim_step(), ancestral_step(guide)
    out = [sample(grid("cosine", w.dtype), denoise, keys(), (4,), step=step, prediction="v") for step in steps]
    return out, log_prob_gradient(log_prob, data(w), jnp.zeros(2, jnp.int32))


def preconditioned(w):
    return continuous.edm_preconditioned(net(w))(data(w), jnp.asarray([0.05, 3.0], w.dtype))


def density(probe):
    def run(w):
        found, _ = likelihood.ode_log_likelihood(
            VP, net(w), keys(), data(w), prediction="x0", probe=probe, rtol=1e-6, atol=1e-6
        )
        return likelihood.bits_per_dimension(found, 4)

    return run


def flowed(w):
    start = w[1] * noise_like(w)
    return likelihood.ode_sample(VP, net(w), keys(), (4,), prediction="x0", x_init=start, rtol=1e-6, atol=1e-6)[0]


def bound(w):
    return likelihood.variational_bound(
        grid("cosine", w.dtype), net(w), keys(), data(w), prediction="x0", x0_transform=static_threshold(2.0)
    )


CASES = {
    **{f"{name}, pure": sampled("pure", step, "v") for name, step in STEPS.items()},
    "euler": sampled("vp", lambda: euler_maruyama_step(VP)),
    "churn": sampled("edm", lambda: heun_step(0.2)),
    "thresholded": sampled("cosine", ddim_step, "eps", x0_transform=dynamic_threshold(), trajectory=True),
    "repaint": repainted,
    "analytic moments": moments,
    "analytic, its moments": by_moments,
    "invert": lambda w: invert(grid("cosine", w.dtype), net(w), data(w), prediction="x0", iterations=2),
    "sdedit": lambda w: sdedit(grid("cosine", w.dtype), net(w), keys(), data(w), prediction="x0"),
    "measurements": restored,
    "predict and target": read,
    **{f"loss, {prediction}": loss("cosine", prediction=prediction) for prediction in ("score", "mean")},
    "loss, pure": loss("pure", prediction="v", weighting=losses.min_snr(5.0, "v")),
    "loss, hybrid": loss("cosine", objective="hybrid", variance="learned_range", noise=True),
    "loss, vlb": loss("pure", prediction="x0", objective="vlb", noise=True),
    "loss in time, likelihood": loss_in_time(continuous.cosine(), "v", objective="likelihood"),
    "loss in time, sub-VP": loss_in_time(continuous.sub_vp(), "eps"),
    "loss in time, EDM": loss_in_time(EDM, "x0", weighting=losses.edm_weighting()),
    "loss in time, learned": learned,
    "weightings": weights,
    "terms": terms,
    "contrast": contrast,
    "classifier-free": guided,
    "several conditions": several,
    "classifier": by_classifier,
    "preconditioned": preconditioned,
    "bound": bound,
    "prior": lambda w: likelihood.prior_kl(long("pure", w.dtype), data(w)),
}
ADAPTIVE = {
    "ode sample": flowed,
    "density": density("rademacher"),
}
TRACED = {f"density, {probe}": density(probe) for probe in ("gaussian", "exact")}
STOPPED = "loss, hybrid"  # the bound does not train the mean
AT, ALONG = np.array([0.8, 0.9]), np.array([1.0, 0.7])


def total(run):
    """The sum of all numbers that a case returns, each with a weight of its own."""

    def summed(w):
        leaves = jax.tree.leaves(run(w))
        assert all(leaf.dtype == w.dtype for leaf in leaves), [leaf.dtype for leaf in leaves]
        return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=w.dtype)).reshape(leaf.shape)) for leaf in leaves)

    return summed


def gradient_and_difference(run):
    """Both along one direction, in float64."""
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(total(run)))
        at, step = jnp.asarray(AT), 1e-5 * jnp.asarray(ALONG)
        return float(run(at)[1] @ ALONG), float(run(at + step)[0] - run(at - step)[0]) / 2e-5


@pytest.mark.parametrize("name", [name for name in CASES if name != STOPPED])
def test_gradients_are_those_of_a_finite_difference(name):
    gradient, difference = gradient_and_difference(CASES[name])
    assert gradient == pytest.approx(difference, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_no_operation_makes_nan_or_promotes_and_x64_changes_nothing(name):
    run, at = total(CASES[name]), jnp.asarray(AT, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):  # which is settled when a function is traced
        error, (value, gradient) = jax.jit(checkify.checkify(jax.value_and_grad(run), checkify.nan_checks))(at)
    error.throw()
    with jax.enable_x64(True):
        wide = jax.jit(run)(at)
    assert np.all(np.isfinite(gradient))
    assert float(wide) == pytest.approx(float(value), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_solvers(name):
    """The gradient is that of the steps taken, the finite difference also changes them: equal to the tolerance."""
    gradient, difference = gradient_and_difference(ADAPTIVE[name])
    assert gradient == pytest.approx(difference, rel=1e-3)
    run, at = total(ADAPTIVE[name]), jnp.asarray(AT, jnp.float32)
    with jax.debug_nans(True):
        value = jax.jit(run)(at)
    with jax.enable_x64(True):
        assert float(jax.jit(run)(at)) == pytest.approx(float(value), rel=1e-3)


@pytest.mark.parametrize("name", [*ADAPTIVE, *TRACED])
def test_strict_promotion(name):
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.value_and_grad(total((ADAPTIVE | TRACED)[name])), jnp.asarray(AT, jnp.float32))


def integers_and_tables(dtype):
    """Functions without a gradient, and those that make tables."""
    history = importance.loss_history(3, 2)
    t, weight = importance.importance_timesteps(key(), 4, history)
    history = importance.record_losses(history, t, jnp.ones(4, dtype))
    times = losses.stratified_times(key(), 4, VP), losses.log_normal_times(key(), 4)
    grids = (
        (VP, continuous.log_snr_times(VP, 2)),
        (EDM, continuous.karras_times(EDM, 2)),
        (VE, continuous.uniform_times(VE, 2)),
        (continuous.sub_vp(), [0.5, 0.1]),
        (continuous.cosine(2.0), [0.5, 0.1]),
    )
    return {
        "processes": [make_process(BETAS[name], dtype=dtype) for name in BETAS],
        "respaced": respace(make_process(BETAS["cosine"], dtype=dtype), "4"),
        "discretised": [continuous.discretize(*each, dtype=dtype) for each in grids],
        "importance": (history, weight, importance.timestep_probabilities(history)),
        "timesteps": (t, losses.stratified_timesteps(key(), 4, 10)),
        "times": times,
        "drop": drop(key(), 0.5, 4),
        "dequantize": likelihood.dequantize(keys(), jnp.asarray([[0, 255]] * 2, jnp.uint8)),
        "monotone": continuous.init_monotone(key(), 4),
    }


def test_tables_and_draws_under_every_mode():
    """float32 is float32 in a program with x64, and the same numbers."""
    plain = integers_and_tables(jnp.float32)
    with jax.enable_x64(True):
        wide = integers_and_tables(jnp.float32)
        integers_and_tables(jnp.float64)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        integers_and_tables(jnp.float32)
    for (path, one), other in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(wide), strict=True):
        name = jax.tree_util.keystr(path)
        assert one.dtype == other.dtype, name
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=name)
