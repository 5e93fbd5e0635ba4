"""Samplers against distributions with closed-form denoisers, their order, and their independence of the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from ddpm_jax import (
    ancestral_step,
    classifier_free,
    cosine_betas,
    ddim_step,
    denoising_loss,
    example_keys,
    linear_betas,
    make_process,
    respace,
    sample,
    static_threshold,
    target,
)
from ddpm_jax.diffusion.samplers import time_grid

MEAN, STD = 0.3, 0.5
STEPS = {"ancestral": ancestral_step(), "ddim": ddim_step(), "ddim_half": ddim_step(0.5), "ddim_one": ddim_step(1.0)}
BETAS = {"linear": linear_betas(1000), "cosine": cosine_betas(1000)}


def _column(table, t, xt):
    return table[t].reshape(t.shape + (1,) * (xt.ndim - 1))


def _gaussian_denoiser(process, prediction="eps"):
    """The exact network for data N(MEAN, STD^2), from the original process."""

    def denoise(xt, t):
        alpha_bar = _column(process.alpha_bar, t, xt)
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        eps = jnp.sqrt(1 - alpha_bar) * (xt - jnp.sqrt(alpha_bar) * MEAN) / variance
        x0 = MEAN + jnp.sqrt(alpha_bar) * STD**2 * (xt - jnp.sqrt(alpha_bar) * MEAN) / variance
        return eps if prediction == "eps" else target(process, x0, eps, t, prediction=prediction)

    return denoise


def _gaussian_chain(alpha_bar, noise_variance):
    """Mean and variance of what a sampler returns on that data, by recursion over its steps in float64.

    x_there = a_there x0 + sqrt(s_there^2 - noise) eps + noise, with the exact x0 and eps, is linear in x_here.
    """
    mean, variance = 0.0, 1.0
    alpha, sigma = np.sqrt(np.append(1.0, alpha_bar)), np.sqrt(np.append(0.0, 1 - alpha_bar))
    for i in range(len(alpha_bar), 0, -1):
        total = (alpha[i] * STD) ** 2 + sigma[i] ** 2
        direction = np.sqrt(sigma[i - 1] ** 2 - noise_variance[i - 1])
        slope = (alpha[i - 1] * alpha[i] * STD**2 + direction * sigma[i]) / total
        mean = alpha[i - 1] * MEAN + slope * (mean - alpha[i] * MEAN)
        variance = slope**2 * variance + noise_variance[i - 1]
    return mean, variance


def _ddim_noise(alpha_bar, eta):
    previous = np.append(1.0, alpha_bar[:-1])
    return eta**2 * (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)


@pytest.mark.parametrize(
    ("name", "eta", "spec"),
    [
        ("ancestral", 1.0, "1000"),
        ("ddim", 0.0, "1000"),
        ("ancestral", 1.0, "20"),
        ("ddim", 0.0, "20"),
        ("ddim_half", 0.5, "20"),
    ],
)
def test_gaussian_data_come_back_with_the_exact_mean_and_variance(name, eta, spec):
    process = make_process(BETAS["cosine"])
    short, denoise = respace(process, spec), _gaussian_denoiser(process)
    n = 1024 if spec == "1000" else 16384
    x0 = jax.jit(lambda keys: sample(short, denoise, keys, (1,), step=STEPS[name]))(example_keys(jax.random.key(0), n))
    alpha_bar = np.cumprod(1 - BETAS["cosine"])[np.asarray(short.timestep_map)]
    mean, variance = _gaussian_chain(alpha_bar, _ddim_noise(alpha_bar, eta))
    assert float(x0.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(x0.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))
    if spec == "1000":  # the chain itself has nearly the data's distribution
        assert (mean, math.sqrt(variance)) == pytest.approx((MEAN, STD), rel=0.01)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_right_learned_variance_makes_ten_steps_exact(prediction):
    """With Gaussian data the reverse step is Gaussian, inside the learned range, and known: no discretisation error."""
    process = make_process(BETAS["linear"])
    short, n = respace(process, "10"), 16384
    denoise = _gaussian_denoiser(process, prediction)

    def with_variance(xt, t):
        index = jnp.searchsorted(short.timestep_map, t)
        alpha_bar = short.alpha_bar[index]
        x0_variance = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)  # of x0 given xt
        variance = short.posterior_variance[index] + short.posterior_coef_x0[index] ** 2 * x0_variance
        low, high = short.posterior_log_variance[index], short.log_betas[index]
        v = 2 * (jnp.log(variance) - low) / (high - low) - 1
        return jnp.concatenate([denoise(xt, t), jnp.broadcast_to(v[:, None], xt.shape)], axis=-1)

    def draw(keys):
        return sample(short, with_variance, keys, (1,), prediction=prediction, variance="learned_range")

    x0 = jax.jit(draw)(example_keys(jax.random.key(0), n))
    assert float(x0.mean()) == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n) + 1e-3)
    assert float(x0.std()) == pytest.approx(STD, rel=4 * math.sqrt(1 / (2 * n)) + 1e-3)


@pytest.mark.parametrize(("name", "spec"), [("ancestral", "500"), ("ddim", "200")])
def test_a_mixture_comes_back(name, spec):
    """Kolmogorov-Smirnov distance to 0.3 N(-0.6, 0.1^2) + 0.7 N(0.5, 0.2^2)."""
    weights, means, stds = jnp.array([0.3, 0.7]), jnp.array([-0.6, 0.5]), jnp.array([0.1, 0.2])
    process, n = make_process(BETAS["cosine"]), 3000
    short = respace(process, spec)

    def denoise(xt, t):  # xt [B, 1], components in the last axis
        alpha_bar = process.alpha_bar[t][:, None]
        variance = alpha_bar * stds[None] ** 2 + 1 - alpha_bar
        score = -(xt - jnp.sqrt(alpha_bar) * means[None]) / variance
        log_density = jnp.log(weights)[None] - 0.5 * score**2 * variance - 0.5 * jnp.log(variance)
        share = jax.nn.softmax(log_density, axis=-1)
        return -jnp.sqrt(1 - alpha_bar) * jnp.sum(share * score, axis=-1, keepdims=True)

    draw = jax.jit(lambda keys: sample(short, denoise, keys, (1,), step=STEPS[name]))
    x0 = np.sort(np.asarray(draw(example_keys(jax.random.key(1), n)))[:, 0])
    cdf = sum(
        w * 0.5 * (1 + np.vectorize(math.erf)((x0 - m) / (s * math.sqrt(2))))
        for w, m, s in zip((0.3, 0.7), (-0.6, 0.5), (0.1, 0.2), strict=True)
    )
    distance = np.abs(cdf - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / math.sqrt(n)  # p = 0.001


def test_ddim_converges_with_order_one():
    """Slope of the log error against the log step on the probability-flow ODE of Gaussian data, in float64."""
    with jax.enable_x64(True):
        z = np.linspace(-1.5, 1.5, 7)[:, None]
        keys = example_keys(jax.random.key(0), 7)

        @jax.jit
        def draw(process):
            alpha_bar = process.alpha_bar[-1]
            # The ODE keeps z = (x - alpha m) / std(x) constant along a path.
            x_init = jnp.sqrt(alpha_bar) * MEAN + jnp.sqrt(alpha_bar * STD**2 + 1 - alpha_bar) * z
            return sample(process, _gaussian_denoiser(process), keys, (1,), step=ddim_step(), x_init=x_init)

        lengths, errors = [100, 200, 400], []
        for num_steps in lengths:
            x0 = draw(make_process(linear_betas(num_steps), dtype=jnp.float64))
            assert x0.dtype == jnp.float64
            errors.append(np.abs(np.asarray(x0) - (MEAN + STD * z)).max())
    slope = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert -slope == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("schedule", "spec"), [("cosine", "1000"), ("linear", "25")])
def test_ddim_with_eta_one_is_ancestral(schedule, spec):
    process = make_process(BETAS[schedule])
    short, denoise, keys = respace(process, spec), _gaussian_denoiser(process, "v"), example_keys(jax.random.key(0), 8)
    draw = jax.jit(lambda keys, step: sample(short, denoise, keys, (3,), step=step, prediction="v"), static_argnums=1)
    np.testing.assert_allclose(draw(keys, ddim_step(1.0)), draw(keys, ancestral_step()), atol=2e-5)


def test_fixed_large_variance_adds_more_noise():
    process = make_process(BETAS["linear"])
    short, denoise, keys = respace(process, "50"), _gaussian_denoiser(process), example_keys(jax.random.key(0), 4096)
    small, large = (sample(short, denoise, keys, (1,), variance=name).std() for name in ("fixed_small", "fixed_large"))
    assert float(small) < STD < float(large)


def test_the_grid_and_the_network_calls_are_counted():
    process = respace(make_process(BETAS["cosine"]), "ddim20")
    grid = time_grid(process)
    np.testing.assert_array_equal(grid.t, [*range(950, -1, -50), -1])
    np.testing.assert_array_equal(grid.index, range(19, -2, -1))
    np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1.0, rtol=1e-6)
    ratio = (np.asarray(grid.alpha[:-1], np.float64) / np.asarray(grid.alpha[1:], np.float64)) ** 2
    np.testing.assert_allclose(grid.beta[:-1], 1 - ratio, rtol=1e-3)
    assert (float(grid.alpha[-1]), float(grid.sigma[-1]), float(grid.beta[-1])) == (1.0, 0.0, 0.0)

    called = []

    def denoise(xt, t):
        jax.debug.callback(lambda t: called.append(np.asarray(t).tolist()), t, ordered=True)
        return xt

    for step in (ancestral_step(), ddim_step()):
        called.clear()
        jax.block_until_ready(sample(process, denoise, example_keys(jax.random.key(0), 2), (1,), step=step))
        jax.effects_barrier()
        assert called == [[t, t] for t in range(950, -1, -50)]


def test_no_noise_enters_the_data():
    """On a process of one step every sampler returns the estimate of x0 itself."""
    process = respace(make_process(BETAS["cosine"]), [700])
    keys = example_keys(jax.random.key(0), 4)
    for step in (ancestral_step(), ddim_step(1.0)):
        x0 = sample(process, lambda xt, t: jnp.full_like(xt, 0.25), keys, (2,), step=step, prediction="x0")
        np.testing.assert_allclose(x0, 0.25, rtol=1e-6)


def test_ddim_is_deterministic_given_its_start():
    process = respace(make_process(BETAS["cosine"]), "10")
    x_init = jax.random.normal(jax.random.key(5), (3, 2))
    draw = jax.jit(lambda keys: sample(process, lambda xt, t: 0.5 * xt, keys, (2,), step=ddim_step(), x_init=x_init))
    draws = [draw(example_keys(jax.random.key(seed), 3)) for seed in (0, 1)]
    np.testing.assert_array_equal(*draws)


def test_trajectory_ends_in_the_sample():
    process, keys = respace(make_process(BETAS["cosine"]), "7"), example_keys(jax.random.key(0), 3)
    x0, states = sample(process, lambda xt, t: 0.5 * xt, keys, (2, 2), trajectory=True)
    assert states.shape == (7, 3, 2, 2)
    np.testing.assert_array_equal(states[-1], x0)
    np.testing.assert_array_equal(sample(process, lambda xt, t: 0.5 * xt, keys, (2, 2)), x0)


def test_x0_transform_bounds_the_sample():
    process, keys = respace(make_process(BETAS["cosine"]), "10"), example_keys(jax.random.key(0), 4)
    x0 = sample(process, lambda xt, t: -xt, keys, (4,), x0_transform=static_threshold())
    assert float(jnp.abs(x0).max()) == pytest.approx(1.0, abs=1e-6)


def test_example_keys_depend_on_the_index_alone():
    key = jax.random.key(3)
    whole = jax.random.key_data(example_keys(key, 8))
    np.testing.assert_array_equal(jax.random.key_data(example_keys(key, 4, start=4)), whole[4:])
    assert len(np.unique(np.asarray(whole), axis=0)) == 8


@pytest.fixture(scope="module")
def small():
    """A respaced process, and a guided elementwise denoiser with a learned variance."""
    process = make_process(BETAS["cosine"])

    def network(bias):
        def denoise(xt, t):
            x = xt + bias + 1e-3 * t.astype(xt.dtype).reshape(-1, 1, 1, 1)
            return jnp.concatenate([x / (1 + x * x), 0.5 * xt / (1 + xt * xt)], axis=-1)

        return denoise

    options = {"variance": "learned_range", "x0_transform": static_threshold()}
    denoise = classifier_free(network(0.3), network(0.0), 2.0)
    return respace(process, "12"), denoise, options


@pytest.fixture(scope="module")
def eight(small):
    """The ancestral sampler on that, its keys, and the eight samples it draws from them."""
    process, denoise, options = small
    draw = jax.jit(lambda keys: sample(process, denoise, keys, (4, 4, 3), **options))
    keys = example_keys(jax.random.key(0), 8)
    return draw, keys, np.asarray(draw(keys))


def test_pmap_and_shard_map_sample_and_train_the_same(small, eight):
    process, denoise, options = small
    _, keys, whole = eight
    x0, loss_keys = jnp.tanh(whole), jax.random.split(jax.random.key(2), 8)

    def loss(key, x0):
        return denoising_loss(process, denoise, key, x0, objective="hybrid", variance="learned_range")[0]

    def both(keys, loss_key, x0):
        return sample(process, denoise, keys, (4, 4, 3), **options), loss(loss_key, x0)

    images, losses = jax.pmap(both)(keys.reshape(8, 1), loss_keys, x0.reshape(8, 1, 4, 4, 3))
    np.testing.assert_array_equal(images.reshape(whole.shape), whole)
    np.testing.assert_allclose(losses[0], jax.jit(loss)(loss_keys[0], x0[:1]), rtol=1e-5)
    mesh, parts = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    part = lambda keys, loss_keys, x0: both(keys, loss_keys[0], x0)
    mapped = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(parts, parts, parts), out_specs=parts))
    images, mapped_losses = mapped(keys, loss_keys, x0)
    np.testing.assert_array_equal(images, whole)
    np.testing.assert_allclose(mapped_losses, losses[:, 0], rtol=1e-6)


def test_a_second_call_does_not_compile_again(small):
    process, denoise, options = small
    traces = []

    @jax.jit
    def draw(process, keys, bias):
        traces.append(None)
        return sample(process, lambda xt, t: denoise(xt + bias, t), keys, (4, 4, 3), **options)

    for seed in range(3):
        draw(process, example_keys(jax.random.key(seed), 2), jnp.float32(seed))
    assert len(traces) == 1
    assert draw._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": jax.random.key(0)}, "keys must be a vector of keys, .*one key"),
        ({"keys": jnp.zeros((2, 3), jnp.uint32)}, "keys must be a vector of keys"),
        ({"x_init": jnp.zeros((2, 4))}, r"x_init must have shape \(2, 3\)"),
        ({"prediction": "noise"}, "prediction='noise' must be one of"),
        ({"variance": "learned"}, "variance='learned' must be one of"),
        ({"variance": "learned_range"}, "2C = 6 channels"),
        ({"denoise": lambda xt, t: xt[:, :1]}, "needs an output of the shape of xt"),
    ],
)
def test_sample_errors(change, message):
    arguments = {"denoise": lambda xt, t: xt, "keys": example_keys(jax.random.key(0), 2), "shape": (3,), **change}
    with pytest.raises(ValueError, match=message):
        sample(make_process(BETAS["linear"]), **arguments)


def test_other_errors():
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match="must be in"):
            ddim_step(eta)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        example_keys(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="start=-1 must not be negative"):
        example_keys(jax.random.key(0), 2, start=-1)
