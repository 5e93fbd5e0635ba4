"""The noise process against Bayes' rule and products in float64 numpy, and its identities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import (
    ancestral_step,
    cosine_betas,
    ddim_step,
    example_keys,
    linear_betas,
    make_process,
    predict,
    q_posterior,
    q_sample,
    respace,
    respaced_timesteps,
    sample,
    static_threshold,
    target,
)
from ddpm_jax.diffusion.schedules import reciprocal_betas, zero_terminal_snr

BETAS = {"linear": linear_betas(1000), "cosine": cosine_betas(1000)}
PREDICTIONS = ("eps", "x0", "v")


def _batch(seed=0, shape=(6, 2, 3, 4), num_steps=1000):
    keys = jax.random.split(jax.random.key(seed), 3)
    x0 = jnp.clip(jax.random.normal(keys[0], shape), -1, 1)
    eps = jax.random.normal(keys[1], shape)
    t = jnp.array([0, 1, num_steps // 10, num_steps // 2, num_steps - 2, num_steps - 1], jnp.int32)
    return x0, eps, t


def _bayes(betas, x0, xt, t):
    """Mean and variance of x_{t-1} given x_t and x0, by multiplying the two Gaussian densities, float64."""
    alpha_bar = np.append(1.0, np.cumprod(1 - betas))[t]  # alpha_bar of the step before
    prior_mean, prior_variance = np.sqrt(alpha_bar) * x0, 1 - alpha_bar
    slope, variance = np.sqrt(1 - betas[t]), betas[t]  # xt = slope x_{t-1} + noise
    precision = 1 / prior_variance + slope**2 / variance
    return (prior_mean / prior_variance + slope * xt / variance) / precision, 1 / precision


@pytest.mark.parametrize("schedule", BETAS)
def test_tables_are_float64_products(schedule):
    betas = BETAS[schedule]
    process = make_process(betas)
    alpha_bar = np.cumprod(1 - betas)
    expected = {
        "betas": betas,
        "alpha_bar": alpha_bar,
        "alpha_bar_prev": np.append(1, alpha_bar[:-1]),
        "alpha": np.sqrt(alpha_bar),
        "sigma": np.sqrt(1 - alpha_bar),
        "log_snr": np.log(alpha_bar / (1 - alpha_bar)),
        "log_betas": np.log(betas),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(process, name), values, rtol=2e-7, atol=1e-7 * (name == "log_snr"))
    assert process.num_steps == 1000
    assert np.all(np.diff(process.alpha_bar) < 0)
    assert all(table.shape == (1000,) for table in jax.tree.leaves(process.replace(prior_std=process.betas)))
    assert float(process.prior_std) == 1.0
    assert {table.dtype.name for table in jax.tree.leaves(process)} == {"float32", "int32"}


@pytest.mark.parametrize("schedule", BETAS)
def test_posterior_is_bayes_rule(schedule):
    betas, rng = BETAS[schedule], np.random.default_rng(0)
    for t in (1, 2, 10, 500, 998, 999):
        x0, xt = rng.normal(size=2)
        mean, variance = _bayes(betas, x0, xt, t)
        arguments = (jnp.full((1, 1), x0, jnp.float32), jnp.full((1, 1), xt, jnp.float32), jnp.array([t]))
        got_mean, got_variance, got_log = q_posterior(make_process(betas), *arguments)
        np.testing.assert_allclose(got_mean, [[mean]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got_variance, [[variance]], rtol=1e-6)
        np.testing.assert_allclose(got_log, [[np.log(variance)]], rtol=1e-6)


def test_posterior_at_the_last_step_is_x0():
    process = make_process(BETAS["cosine"])
    x0, xt, t = jnp.full((1, 2), 0.3), jnp.full((1, 2), 5.0), jnp.zeros(1, jnp.int32)
    mean, variance, log_variance = q_posterior(process, x0, xt, t)
    np.testing.assert_allclose(mean, x0, rtol=1e-6)
    np.testing.assert_array_equal(variance, 0.0)
    np.testing.assert_array_equal(log_variance, jnp.full((1, 2), process.posterior_log_variance[1]))


def test_q_sample_composes_single_steps():
    betas = BETAS["linear"][:40]
    process = make_process(betas)
    x0 = np.array([[0.7]])
    mean, variance = x0, 0.0
    for beta in betas:  # equation (1), forty times
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    t = jnp.array([39])
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    np.testing.assert_allclose(q_sample(process, jnp.asarray(x0, jnp.float32), t, zero), mean, rtol=1e-6)
    np.testing.assert_allclose(q_sample(process, zero, t, one), [[np.sqrt(variance)]], rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_predict_inverts_target(prediction, variance):
    process = make_process(BETAS["linear"])
    x0, eps, t = _batch()
    xt = q_sample(process, x0, t, eps)
    read = predict(
        process, target(process, x0, eps, t, prediction=prediction), xt, t, prediction=prediction, variance=variance
    )
    # x0 from eps divides by alpha, 0.006 at the last step; eps from x0 divides by sigma, 0.01 at the first.
    np.testing.assert_allclose(read.x0, x0, atol=1e-4)
    np.testing.assert_allclose(read.eps, eps, atol=1e-4)
    np.testing.assert_allclose(read.mean, q_posterior(process, x0, xt, t)[0], atol=2e-6)


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("destination", PREDICTIONS)
def test_kinds_convert_into_each_other(source, destination):
    process = make_process(BETAS["cosine"])
    x0, eps, t = _batch(num_steps=900)  # alpha is 0.15 there: every prediction type determines the others
    xt = q_sample(process, x0, t, eps)
    read = predict(process, target(process, x0, eps, t, prediction=source), xt, t, prediction=source)
    np.testing.assert_allclose(
        target(process, read.x0, read.eps, t, prediction=destination),
        target(process, x0, eps, t, prediction=destination),
        atol=1e-4,
    )


@pytest.mark.parametrize("schedule", BETAS)
def test_fixed_variances(schedule):
    betas = BETAS[schedule]
    process = make_process(betas)
    x0, eps, t = _batch()
    alpha_bar = np.cumprod(1 - betas)
    tilde = betas * (1 - np.append(1, alpha_bar[:-1])) / (1 - alpha_bar)
    small = predict(process, eps, x0, t, prediction="eps")
    large = predict(process, eps, x0, t, prediction="eps", variance="fixed_large")
    np.testing.assert_allclose(small.variance[:, 0, 0, 0], tilde[t], rtol=1e-6)
    np.testing.assert_allclose(small.log_variance[1:, 0, 0, 0], np.log(tilde[t[1:]]), rtol=1e-6)
    np.testing.assert_allclose(large.variance[:, 0, 0, 0], np.where(t == 0, tilde[1], betas[t]), rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(large.log_variance), large.variance, rtol=1e-6)
    assert small.variance.shape == large.log_variance.shape == x0.shape


def test_learned_range_interpolates_logs():
    betas = BETAS["cosine"]
    process = make_process(betas)
    x0, eps, t = _batch()
    alpha_bar = np.cumprod(1 - betas)
    tilde = betas * (1 - np.append(1, alpha_bar[:-1])) / (1 - alpha_bar)
    tilde[0] = tilde[1]
    for v in (-1.0, -0.3, 1.0):
        output = jnp.concatenate([eps, jnp.full_like(eps, v)], axis=-1)
        read = predict(process, output, x0, t, prediction="eps", variance="learned_range")
        expected = betas[t] ** ((1 + v) / 2) * tilde[t] ** ((1 - v) / 2)
        np.testing.assert_allclose(read.variance[:, 1, 2, 3], expected, rtol=1e-5)
        np.testing.assert_allclose(read.x0, predict(process, eps, x0, t, prediction="eps").x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_transform_changes_eps_and_mean_with_it(prediction):
    process = make_process(BETAS["cosine"])
    x0, eps, t = _batch()
    xt = q_sample(process, x0, t, eps)
    clipped = predict(process, 3.0 * eps, xt, t, prediction=prediction, x0_transform=static_threshold(0.5))
    assert float(jnp.abs(clipped.x0).max()) == 0.5
    np.testing.assert_allclose(q_sample(process, clipped.x0, t, clipped.eps), xt, atol=1e-5)
    np.testing.assert_allclose(clipped.mean, q_posterior(process, clipped.x0, xt, t)[0])


@pytest.mark.parametrize("schedule", BETAS)
def test_respacing_to_all_steps_is_the_identity(schedule):
    process = make_process(BETAS[schedule])
    again = respace(process, "1000")
    for field in dataclasses.fields(process):
        if field.name != "alpha_bar_low":
            np.testing.assert_allclose(getattr(again, field.name), getattr(process, field.name), rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("spec", ["250", "10,10,3,2,2", "ddim50", "fast27", [0, 1, 2, 998, 999]])
@pytest.mark.parametrize("schedule", BETAS)
def test_respaced_process_has_the_same_marginals_and_exact_betas(schedule, spec):
    betas = BETAS[schedule]
    kept = respaced_timesteps(1000, spec)
    short = respace(make_process(betas), spec)
    alpha_bar = np.cumprod(1 - betas)[kept]
    expected = 1 - alpha_bar / np.append(1, alpha_bar[:-1])
    np.testing.assert_array_equal(short.timestep_map, kept)
    np.testing.assert_allclose(short.alpha_bar, alpha_bar, rtol=1e-7)
    np.testing.assert_allclose(short.betas, expected, rtol=1e-7)
    reference = make_process(expected)
    np.testing.assert_allclose(short.posterior_log_variance, reference.posterior_log_variance, rtol=1e-6)


def test_respacing_twice_composes():
    process = make_process(BETAS["cosine"])
    twice, once = respace(respace(process, "100"), "ddim10"), respace(process, respaced_timesteps(1000, "100")[::10])
    np.testing.assert_array_equal(twice.timestep_map, once.timestep_map)
    np.testing.assert_allclose(twice.betas, once.betas, rtol=1e-6)


def test_a_single_step_has_finite_tables():
    process = respace(make_process(BETAS["cosine"]), [999])
    assert all(bool(jnp.all(jnp.isfinite(table))) for table in jax.tree.leaves(process))


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("step", [ancestral_step(), ddim_step(0.0), ddim_step(1.0)])
def test_a_process_that_ends_in_pure_noise_gives_a_point_back(prediction, step):
    """All data are one point c: the exact network is known, and every sampler must return c."""
    process = respace(make_process(zero_terminal_snr(linear_betas(1000))), "10")
    assert process.zero_terminal and process.alpha_bar[-1] == 0.0
    c = jnp.asarray([0.3, -0.7])
    full = make_process(zero_terminal_snr(linear_betas(1000)))

    def denoise(xt, t):
        alpha, sigma = full.alpha[t][:, None], full.sigma[t][:, None]
        x0 = jnp.broadcast_to(c, xt.shape)
        return x0 if prediction == "x0" else alpha * (xt - alpha * x0) / sigma - sigma * x0

    x0 = sample(process, denoise, example_keys(jax.random.key(0), 4), (2,), step=step, prediction=prediction)
    np.testing.assert_allclose(x0, np.broadcast_to(c, (4, 2)), atol=1e-3)


def test_pure_noise_says_nothing_about_x0_through_eps():
    process = make_process(reciprocal_betas(10))
    xt, t = jnp.ones((2, 3)), jnp.array([9, 0])
    with pytest.raises(ValueError, match="prediction='eps' cannot give x0 at the last step, where alpha_bar is 0"):
        predict(process, xt, xt, t, prediction="eps")
    for prediction in ("x0", "v"):
        assert all(
            np.isfinite(field).all() for field in jax.tree.leaves(predict(process, xt, xt, t, prediction=prediction))
        )


def test_networks_may_be_bfloat16_and_xt_of_any_rank():
    process = make_process(BETAS["linear"])
    for shape in [(6,), (6, 5), (6, 2, 3, 4, 5)]:
        x0, eps, t = _batch(shape=shape)
        options = {"prediction": "v", "variance": "fixed_large"}
        read = jax.eval_shape(lambda *a, o=options: predict(process, *a, **o), eps.astype(jnp.bfloat16), x0, t)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(read)} == {"float32"}
        assert {leaf.shape for leaf in jax.tree.leaves(read)} == {shape}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_process([1.0, 0.5]), r"betas must be inside \(0, 1\)"),
        (lambda: make_process([1.0]), "or 1 at the last of several steps"),
        (lambda: make_process([0.0, 0.5]), r"betas must be inside \(0, 1\)"),
        (lambda: make_process([0.1, np.nan]), r"betas must be inside \(0, 1\)"),
        (lambda: make_process([]), "at least 1 step"),
        (lambda: make_process([[0.1]]), "must be a vector"),
        (lambda: make_process([0.1, 0.2], timestep_map=[0]), "timestep_map must have one entry a step"),
        (lambda: respace(make_process([0.1, 0.2]), "3"), "selects 3 steps where there are only 2"),
    ],
)
def test_process_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        (4, {"prediction": "noise"}, "prediction='noise' must be one of"),
        (4, {"prediction": "eps", "variance": "large"}, "variance='large' must be one of"),
        (4, {"prediction": "eps", "variance": "learned_range"}, "needs an output with 2C = 8 channels, got output"),
        (8, {"prediction": "eps"}, "variance='fixed_small' needs an output of the shape of xt"),
    ],
)
def test_predict_errors(channels, options, message):
    process = make_process(BETAS["linear"])
    xt, t = jnp.zeros((2, 3, 3, 4)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        predict(process, jnp.zeros((2, 3, 3, channels)), xt, t, **options)


def test_shape_errors():
    process = make_process(BETAS["linear"])
    x, t = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="eps must have the shape of x0"):
        q_sample(process, x, t, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="t must be integers of shape"):
        q_sample(process, x, jnp.zeros(3, jnp.int32), x)
    with pytest.raises(ValueError, match="t must be integers of shape"):
        q_sample(process, x, jnp.zeros(2), x)
    with pytest.raises(ValueError, match="prediction='noise' must be one of"):
        target(process, x, x, t, prediction="noise")
