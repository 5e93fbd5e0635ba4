"""Continuous-time processes against their closed forms in float64, and their discretisation."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import example_keys, make_process, sample
from ddpm_jax.diffusion import continuous
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.losses import (
    continuous_loss,
    edm_weighting,
    inverse_snr,
    log_normal_times,
    stratified_times,
    sub_vp_variance,
    vp_variance,
)
from ddpm_jax.diffusion.samplers import heun_step
from ddpm_jax.diffusion.sampling import Sampling, sample_with
from ddpm_jax.storage.metadata import diffusion_from
from ddpm_jax.training import DiffusionTask, Embeddings

T = np.array([0.02, 0.3, 0.5, 0.77, 0.98])
B = 0.1 * T + 0.5 * T**2 * 19.9
BETA = 0.1 + 19.9 * T
CLOSED = {  # alpha, sigma, f, g^2
    "vp": (continuous.vp_linear(), np.exp(-B / 2), np.sqrt(1 - np.exp(-B)), -BETA / 2, BETA),
    "sub_vp": (continuous.sub_vp(), np.exp(-B / 2), 1 - np.exp(-B), -BETA / 2, BETA * (1 - np.exp(-2 * B))),
    "cosine": (
        continuous.cosine(),
        np.cos(np.pi * T / 2),
        np.sin(np.pi * T / 2),
        -np.pi / 2 * np.tan(np.pi * T / 2),
        np.pi * np.tan(np.pi * T / 2),
    ),
    "ve": (
        continuous.ve(0.01, 50.0),
        np.ones(5),
        0.01 * 5000.0**T,
        np.zeros(5),
        2 * (0.01 * 5000.0**T) ** 2 * np.log(5000.0),
    ),
    "edm": (continuous.edm(), np.ones(5), T, np.zeros(5), 2 * T),
}


@pytest.mark.parametrize("name", CLOSED)
def test_schedules_have_the_coefficients_of_their_papers(name):
    schedule, alpha, sigma, drift, diffusion = CLOSED[name]
    with jax.enable_x64(True):
        t = jnp.asarray(T)
        np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=1e-10)
        np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-10)
        np.testing.assert_allclose(schedule.log_snr(t), 2 * np.log(alpha / sigma), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(schedule.drift(t), drift, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(schedule.diffusion_squared(t), diffusion, rtol=1e-9)
    single = np.asarray(schedule.sigma(jnp.asarray(T, jnp.float32)))
    np.testing.assert_allclose(single, sigma, rtol=2e-5)


def test_a_shift_moves_the_log_snr_of_the_cosine_schedule():
    t = jnp.asarray(T, jnp.float32)
    moved = continuous.cosine(0.25).log_snr(t) - continuous.cosine().log_snr(t)
    np.testing.assert_allclose(moved, 2 * np.log(0.25), rtol=1e-4)


def test_a_preserving_schedule_becomes_the_discrete_process_of_its_betas():
    times = continuous.uniform_times(continuous.vp_linear(), 40)
    process = continuous.discretize(continuous.vp_linear(), times)
    up = times[::-1]
    alpha_bar = np.exp(-(0.1 * up + 0.5 * up**2 * 19.9))
    same = make_process(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
    for name in ("betas", "alpha_bar", "sigma", "posterior_coef_x0", "posterior_coef_xt", "log_snr"):
        np.testing.assert_allclose(getattr(process, name), getattr(same, name), rtol=3e-6, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(process.timestep_map, up, rtol=1e-6)
    assert process.timestep_map.dtype == jnp.float32


@pytest.mark.parametrize("name", ["sub_vp", "ve"])
def test_a_step_of_the_discrete_process_composes_to_the_marginals(name):
    """From one point to the next: alpha' = a alpha and sigma'^2 = a^2 sigma^2 + beta, (13) of process, in float64."""
    with jax.enable_x64(True):
        process = continuous.discretize(CLOSED[name][0], np.linspace(0.9, 0.1, 9), dtype=jnp.float64)
    process = jax.tree.map(np.asarray, process)
    alpha, sigma, betas = process.alpha, process.sigma, process.betas[1:]
    ratio = alpha[1:] / alpha[:-1]
    np.testing.assert_allclose(ratio**2 * sigma[:-1] ** 2 + betas, sigma[1:] ** 2, rtol=1e-12)
    # Bayes on two Gaussians: precision of x_{t-1} given x_t and x0.
    precision = 1 / sigma[:-1] ** 2 + ratio**2 / betas
    np.testing.assert_allclose(process.posterior_variance[1:], 1 / precision, rtol=1e-10)
    np.testing.assert_allclose(process.posterior_coef_x0[1:], alpha[:-1] / sigma[:-1] ** 2 / precision, rtol=1e-10)
    np.testing.assert_allclose(process.posterior_coef_xt[1:], ratio / betas / precision, rtol=1e-10)


def test_grids_of_times():
    schedule = continuous.vp_linear()
    times = continuous.log_snr_times(schedule, 9)
    assert (times[0], times[-1]) == (1.0, 1e-5) and np.all(np.diff(times) < 0)
    log_snr = -np.log(np.expm1(0.1 * times + 0.5 * times**2 * 19.9))
    np.testing.assert_allclose(log_snr, np.linspace(log_snr[0], log_snr[-1], 9), rtol=1e-9)
    i = np.arange(18)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(continuous.karras_times(continuous.edm(), 18), karras, rtol=1e-12)
    np.testing.assert_allclose(continuous.uniform_times(continuous.ve(), 3), [1.0, 0.5, 0.0])


def test_a_learned_schedule_decreases_between_its_end_points_and_learns():
    params = jax.tree.map(
        lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape),
        continuous.init_monotone(jax.random.key(0), 4),
    )
    log_snr = continuous.monotone_log_snr(params)
    values = np.asarray(log_snr(jnp.linspace(0.0, 1.0, 50)))
    np.testing.assert_allclose(values[[0, -1]], [5.0, -13.3], rtol=1e-6)
    assert np.all(np.diff(values) < 0)

    def loss(params):
        schedule = continuous.from_log_snr(continuous.monotone_log_snr(params))
        x0 = jnp.ones((16, 2))
        return continuous_loss(schedule, lambda xt, t: 0.5 * xt, jax.random.key(1), x0, objective="likelihood")[
            0
        ].mean()

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() and np.any(np.abs(g) > 0) for g in jax.tree.leaves(gradients))


def test_edm_preconditioning():
    x, sigma, d = np.array([[0.3, -2.0]]), 1.7, 0.5
    denoise = continuous.edm_preconditioned(lambda x, c: jnp.tanh(x) + c[:, None], d)
    total = sigma**2 + d**2
    raw = np.tanh(x / np.sqrt(total)) + np.log(sigma) / 4
    expected = d**2 / total * x + sigma * d / np.sqrt(total) * raw
    np.testing.assert_allclose(denoise(jnp.asarray(x, jnp.float32), jnp.asarray([sigma])), expected, rtol=1e-6)
    weight = edm_weighting(d)(jnp.log(1 / jnp.asarray([sigma]) ** 2))
    np.testing.assert_allclose(weight, (sigma**2 + d**2) / (sigma * d) ** 2, rtol=1e-5)
    for prediction, to_x0 in {"eps": sigma**2, "v": sigma**2 / (1 + sigma**2)}.items():
        weights = edm_weighting(d, prediction=prediction)(jnp.log(1 / jnp.asarray([sigma]) ** 2))
        np.testing.assert_allclose(weights, weight * to_x0, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_likelihood_objective_is_the_same_for_every_prediction_type(prediction):
    """E over the noise at a fixed t, data N(0.3, 0.5^2) and its exact network: rate alpha^2 s^2 / (2 var ln 2)."""
    schedule, n, s = continuous.vp_linear(), 20_000, 0.5
    keys = jax.random.split(jax.random.key(0), 2)
    x0 = 0.3 + s * jax.random.normal(keys[0], (n, 1))

    def denoise(xt, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        eps = sigma * (xt - alpha * 0.3) / (alpha**2 * s**2 + sigma**2)
        x0 = (xt - sigma * eps) / alpha
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}[prediction]

    at = jnp.full((n,), 0.4)
    loss, aux = continuous_loss(schedule, denoise, keys[1], x0, prediction=prediction, objective="likelihood", t=at)
    b = 0.1 * 0.4 + 0.5 * 0.16 * 19.9
    alpha2, sigma2, beta = np.exp(-b), 1 - np.exp(-b), 0.1 + 19.9 * 0.4
    expected = 0.5 * beta / sigma2 * alpha2 * s**2 / (alpha2 * s**2 + sigma2) / np.log(2)
    assert float(loss.mean()) == pytest.approx(expected * (1 - 1e-5), rel=4.5 * np.sqrt(2 / n))
    simple, _ = continuous_loss(schedule, denoise, keys[1], x0, prediction=prediction, t=at)
    np.testing.assert_array_equal(simple, aux["mse"])


def test_times_that_are_drawn():
    schedule = continuous.ve()
    times = np.asarray(stratified_times(jax.random.key(0), 1000, schedule))
    np.testing.assert_allclose(np.sort(times), (np.arange(1000) + np.sort(times)[0] * 1000 % 1) / 1000, atol=2e-6)
    logs = np.log(np.asarray(log_normal_times(jax.random.key(1), 20_000)))
    assert logs.mean() == pytest.approx(-1.2, abs=0.04) and logs.std() == pytest.approx(1.2, rel=0.03)


def test_heun_on_edm_follows_the_exact_path_with_order_two():
    """The path of x = m + s' z is known for Gaussian data; the denoiser is EDM's D, the network receives sigma."""
    denoise = lambda x, sigma: 0.3 + 0.25 / (0.25 + sigma[:, None] ** 2) * (x - 0.3)
    start, keys = jnp.asarray([[-80.0], [20.0], [100.0]]), example_keys(jax.random.key(0), 3)
    exact = 0.3 + 0.5 * (np.asarray(start) - 0.3) / np.sqrt(0.25 + 80.0**2)

    def error(num_steps):
        process = continuous.discretize(continuous.edm(), continuous.karras_times(continuous.edm(), num_steps))
        draw = jax.jit(lambda x: sample(process, denoise, keys, (1,), step=heun_step(), prediction="x0", x_init=x))
        return np.abs(np.asarray(draw(start)) - exact).max()

    coarse, fine = error(36), error(72)
    assert fine < 4e-3
    assert coarse / fine == pytest.approx(4.0, rel=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: continuous.vp_linear(0.0), "beta_min=0.0 must be positive"),
        (lambda: continuous.vp_linear(t_min=0.0), "t_min=0.0 must be inside"),
        (lambda: continuous.cosine(0.0), "shift=0.0 must be positive"),
        (lambda: continuous.cosine(t_max=1.0), "must be inside"),
        (lambda: continuous.ve(2.0, 1.0), "sigma_min=2.0 must be positive and below sigma_max=1.0"),
        (lambda: continuous.edm(0.0), "sigma_min=0.0"),
        (lambda: continuous.uniform_times(continuous.ve(), 0), "num_steps=0 must be at least 1"),
        (lambda: continuous.discretize(continuous.ve(), [0.1, 0.2]), "times must be a vector of decreasing numbers"),
        (lambda: continuous.discretize(continuous.edm(), [1.0, 0.0]), r"times must lie in \[0.002, 80\], got 0 to 1"),
        (
            lambda: continuous.discretize(continuous.from_log_snr(lambda t: 3.0 * t), [0.9, 0.1]),
            "must be finite and decrease",
        ),
        (lambda: continuous.edm_preconditioned(lambda x, c: x, 0.0), "sigma_data=0.0 must be positive"),
        (lambda: edm_weighting(-1.0), "sigma_data=-1.0 must be positive"),
        (lambda: edm_weighting(prediction="mean"), "prediction='mean' must be one of"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_v_is_refused_where_variance_is_not_preserved():
    process = continuous.discretize(continuous.ve(), [0.9, 0.5])
    with pytest.raises(ValueError, match="prediction='v' needs a process with alpha"):
        sample(process, lambda x, t: x, example_keys(jax.random.key(0), 1), (1,), prediction="v")
    with pytest.raises(ValueError, match="prediction='v' must be 'eps', 'x0', 'score', or where"):
        continuous_loss(continuous.ve(), lambda x, t: x, jax.random.key(0), jnp.ones((1, 1)), prediction="v")


# ---- As plain data ---------------------------------------------------------------------------------------------------


def test_a_discrete_process_is_linear_in_alpha_bar_between_its_steps():
    betas = np.array([0.1, 0.3, 0.5, 0.2])
    kept = np.append(1.0, np.cumprod(1.0 - betas))
    schedule = continuous.interpolated(betas)
    t = np.array([0.0, 0.25, 0.3, 0.5, 0.875, 1.0])
    with jax.enable_x64(True):
        alpha, sigma = schedule.alpha(jnp.asarray(t)), schedule.sigma(jnp.asarray(t))
    np.testing.assert_allclose(alpha**2, np.interp(4 * t, np.arange(5), kept), rtol=1e-12)
    np.testing.assert_allclose(sigma**2, 1.0 - np.asarray(alpha) ** 2, atol=1e-12)
    tiny = continuous.interpolated(np.full(2000, 1e-6))  # 1 - alpha_bar in float32 would be off by 6 %
    np.testing.assert_allclose(tiny.sigma(jnp.float32(0.0005)) ** 2, 1e-6, rtol=1e-4)


def test_the_cosine_process_between_two_log_snrs():
    schedule = continuous.cosine_log_snr(-8.0, 12.0)
    np.testing.assert_allclose(schedule.log_snr(jnp.array([0.0, 1.0])), [12.0, -8.0], rtol=1e-4)
    slope = np.diff(np.arctan(np.exp(-0.5 * np.asarray(schedule.log_snr(jnp.linspace(0.0, 1.0, 9))))))
    np.testing.assert_allclose(slope, slope.mean(), rtol=1e-3)  # the angle is linear in t
    with pytest.raises(ValueError, match="smallest=3 and largest=2 must be in"):
        continuous.cosine_log_snr(3, 2)


MEAN, STD = 0.4, 0.5
DIFFUSIONS = {
    "ve": Diffusion("ve", 1000, "score", span=(0.02, 30.0), time="sigma"),
    "vp": Diffusion("vp", 1000, "v"),
    "sub_vp": Diffusion("sub_vp", 1000, "eps", time="log_snr"),
    "cosine_log_snr": Diffusion("cosine_log_snr", 1000, "x0", span=(-12.0, 12.0), time="alpha_bar"),
    "linear": Diffusion("linear", 1000, "eps", "fixed_large", time="alpha_bar"),
}


def exact(diffusion):
    """Return the network of data N(MEAN, STD^2) that reads its noise level from what it is given."""

    def denoise(xt, t):
        if diffusion.time == "sigma":
            alpha, sigma = jnp.ones_like(t), t
        elif diffusion.schedule == "sub_vp":  # alpha and sigma = 1 - alpha^2 of the log-SNR
            ratio = jnp.exp(-0.5 * t)
            alpha = 0.5 * (jnp.sqrt(ratio**2 + 4.0) - ratio)
            sigma = 1.0 - alpha**2
        elif diffusion.time == "alpha_bar":
            alpha, sigma = jnp.sqrt(t), jnp.sqrt(1.0 - t)
        else:
            alpha, sigma = diffusion.continuous.alpha(t), diffusion.continuous.sigma(t)
        alpha, sigma = (v[:, None] for v in (alpha, sigma))
        eps = sigma * (xt - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x0 = (xt - sigma * eps) / alpha
        return {"eps": eps, "score": -eps / sigma, "x0": x0, "v": alpha * eps - sigma * x0}[diffusion.prediction]

    return denoise


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_process_is_sampled_exactly(name):
    """300 steps of the reverse diffusion, and 60 of DDIM, which lead to the data's distribution."""
    diffusion, keys = DIFFUSIONS[name], example_keys(jax.random.key(0), 4096)
    for sampler, steps in (("reverse_diffusion", 300), ("ddim", 60)):
        sampling = Sampling(sampler, steps).checked()
        x = np.asarray(sample_with(sampling, diffusion, exact(diffusion), keys, (1,)))
        error = STD / np.sqrt(x.size)
        assert abs(x.mean() - MEAN) < 4 * error + 0.01 and abs(x.std() / STD - 1.0) < 0.05, (sampler, x.mean(), x.std())
    short = diffusion.respaced(60)
    assert short.num_steps == 60 and short.prior_std == (30.0 if name == "ve" else 1.0)
    whole = diffusion.process
    np.testing.assert_array_equal([whole.sigma[0], whole.sigma[-1]], [short.sigma[0], short.sigma[-1]])
    with pytest.raises(ValueError, match="cannot start from pure noise"):
        sample_with(Sampling("ddim", (0, 100)).checked(), diffusion, exact(diffusion), keys, (1,))


@pytest.mark.parametrize("name,weighting", [("ve", inverse_snr), ("vp", vp_variance), ("sub_vp", sub_vp_variance)])
def test_weights_that_make_the_error_of_a_score_that_of_the_noise(name, weighting):
    """sigma^2 in float64 by the SDEs' formulas, with the published spans."""
    t = np.array([1e-3, 0.02, 0.5, 1.0])
    b = 0.1 * t + 0.5 * 19.9 * t**2
    sigma = {"ve": 0.01 * 5000.0**t, "vp": np.sqrt(-np.expm1(-b)), "sub_vp": -np.expm1(-b)}[name]
    alpha = np.ones(4) if name == "ve" else np.exp(-b / 2)
    log_snr = 2 * np.log(alpha / sigma)
    np.testing.assert_allclose(weighting(jnp.asarray(log_snr, jnp.float32)), sigma**2, rtol=2e-5)
    np.testing.assert_allclose(Diffusion(name).continuous.log_snr(t), log_snr, atol=1e-3)


def test_the_published_span_is_the_default():
    assert Diffusion("vp", span=(0.1, 20)) == Diffusion("vp") != Diffusion("vp", span=(0.1, 10.0))
    assert Diffusion("ve", span=[0.01, 50.0]).replace(schedule="cosine_log_snr") == Diffusion("cosine_log_snr")


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_task_trains_at_every_time(name):
    """The loss of the exact network is its closed form, which is the mean over times of the error that is left."""
    diffusion, count = DIFFUSIONS[name], 2**14
    weighting = inverse_snr if diffusion.prediction == "score" else None

    class Network(nn.Module):
        @nn.compact
        def __call__(self, xt, t, *, train=False):
            assert t.dtype == jnp.float32
            return self.param("scale", nn.initializers.ones, (), jnp.float32) * exact(diffusion)(xt, t)

    class Normal(Embeddings):
        def __call__(self, batch, key=None):
            return batch["x"]

    kwargs = {"diffusion": diffusion, "x0": Normal(1), "weighting": weighting, "timesteps": "stratified"}
    task = DiffusionTask(model=Network(), **kwargs)
    batch = {"x": MEAN + STD * jax.random.normal(jax.random.key(1), (count, 1))}
    params = task.init(jax.random.key(0), batch)
    loss = jax.jit(task.loss)(params, batch, jax.random.key(2))[0].mean()
    schedule, t = diffusion.continuous, np.linspace(0.0, 1.0, 20_001)[1:-1]
    with jax.enable_x64(True):
        alpha, sigma = (np.asarray(f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma))
    of_eps = 1.0 - sigma**2 / (alpha**2 * STD**2 + sigma**2)
    of_x0 = (sigma / alpha) ** 2 * of_eps
    want = {"eps": of_eps, "score": of_eps, "x0": of_x0, "v": of_eps / alpha**2}[diffusion.prediction].mean()
    np.testing.assert_allclose(loss, want, rtol=0.05)
    np.testing.assert_allclose(task.eval_loss(params, batch, jax.random.key(3))[0].mean(), want, rtol=0.05)


def test_what_a_process_of_continuous_time_refuses():
    for fields, message in (
        ({"schedule": "vp", "prediction": "mean"}, "prediction='mean' must be 'eps', 'x0', 'score'"),
        ({"schedule": "ve", "prediction": "v"}, "prediction='v' must be 'eps', 'x0', 'score'"),
        ({"schedule": "ve", "variance": "learned_range"}, "variance='learned_range' is of discrete time"),
        ({"schedule": "linear", "span": (0.1, 1.0)}, "span=.* is of 'vp', 'sub_vp', 've', .*, not of 'linear'"),
        ({"schedule": "ve", "span": (0.1, "x")}, "span=.* must be two numbers"),
        ({"schedule": "ve", "span": (3.0, 1.0)}, "sigma_min=3.0 must be positive and below sigma_max=1.0"),
        ({"schedule": "vpsde"}, "schedule='vpsde' must be one of .*'vp', 'sub_vp', 've'"),
        ({"time": "gamma"}, "time='gamma' must be one of 't', 'sigma', 'alpha_bar', 'log_snr'"),
    ):
        with pytest.raises(ValueError, match=message):
            Diffusion(**fields)
    network, kwargs = nn.Dense(1), {"x0": Embeddings(1)}
    with pytest.raises(ValueError, match="timesteps='importance' is of discrete time"):
        DiffusionTask(model=network, diffusion=Diffusion("ve"), timesteps="importance", **kwargs)
    with pytest.raises(ValueError, match="objective='hybrid' trains the variance"):
        DiffusionTask(model=network, diffusion=Diffusion("ve"), objective="hybrid", **kwargs)
    assert diffusion_from(json.loads(json.dumps(dataclasses.asdict(DIFFUSIONS["ve"])))) == DIFFUSIONS["ve"]
