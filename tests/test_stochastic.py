"""Stochastic samplers and image editing against Gaussian data whose network is known."""

import math

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
    respace,
    sample,
    target,
)
from ddpm_jax.diffusion import continuous
from ddpm_jax.diffusion.process import predict, q_sample
from ddpm_jax.diffusion.samplers import (
    analytic_moments,
    analytic_step,
    average_of,
    dpm_solver_step,
    euler_maruyama_step,
    grey_of,
    heun_step,
    predictor_corrector_step,
    repaint_step,
    reverse_diffusion_step,
    sdedit,
    truncate,
)
from ddpm_jax.types import Step

MEAN, STD = 0.3, 0.5
N = 8192


def schedule_denoiser(schedule):
    def denoise(xt, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return sigma * (xt - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return denoise


VP, VE, EDM = continuous.vp_linear(t_min=1e-3), continuous.ve(0.01, 20.0), continuous.edm(0.01, 20.0)
SUB = continuous.sub_vp(t_min=1e-3)
CASES = {
    "reverse diffusion, VP": (VP, continuous.uniform_times(VP, 300), reverse_diffusion_step()),
    "reverse diffusion, VE": (VE, continuous.uniform_times(VE, 300), reverse_diffusion_step()),
    "Euler-Maruyama, VP": (VP, continuous.uniform_times(VP, 300), euler_maruyama_step(VP)),
    "Euler-Maruyama, sub-VP": (SUB, continuous.uniform_times(SUB, 300), euler_maruyama_step(SUB)),
    "Euler-Maruyama, VE": (VE, continuous.uniform_times(VE, 300), euler_maruyama_step(VE)),
    "ancestral, VE": (VE, continuous.uniform_times(VE, 300), ancestral_step()),
    "DDIM eta 1, VE": (VE, continuous.uniform_times(VE, 300), ddim_step(1.0)),
    "Heun with churn, EDM": (EDM, continuous.karras_times(EDM, 40), heun_step(0.2, sigma_min=0.05, sigma_max=10.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_gaussian_data_come_back(name):
    """To the discretisation of these numbers of steps, 2 %, and four standard errors."""
    schedule, times, step = CASES[name]
    process = continuous.discretize(schedule, times)
    draw = jax.jit(lambda keys: sample(process, schedule_denoiser(schedule), keys, (1,), step=step))
    x0 = np.asarray(draw(example_keys(jax.random.key(0), N)))
    assert x0.mean() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(N) + 0.01)
    assert x0.std() == pytest.approx(STD, rel=4 * math.sqrt(1 / (2 * N)) + 0.02)


def test_a_corrector_mends_a_poor_predictor_and_knows_no_neighbours():
    """From wrong noise (a fifth of its spread), Langevin steps find the marginals that the predictor alone misses."""
    process = continuous.discretize(VE, continuous.uniform_times(VE, 100))
    start = lambda keys: 4.0 * jax.vmap(lambda key: jax.random.normal(key, (64,)))(keys)

    def draw(keys, step):
        return sample(process, schedule_denoiser(VE), keys, (64,), step=step, x_init=start(keys))

    keys = example_keys(jax.random.key(0), 64)
    run = jax.jit(draw, static_argnums=1)
    corrected = predictor_corrector_step(corrector_steps=4, snr=0.16)
    x0 = np.asarray(run(keys, corrected))
    assert x0.mean() == pytest.approx(MEAN, abs=0.05) and x0.std() == pytest.approx(STD, rel=0.06)
    halves = np.concatenate([run(keys[i : i + 32], corrected) for i in (0, 32)])
    np.testing.assert_allclose(halves, x0, atol=1e-5)  # sums over an example are rounded in another order
    for snr in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"snr=.* must be in \(0, 1\)"):
            predictor_corrector_step(snr=snr)
    with pytest.raises(ValueError, match="corrector_steps=-1 must not be negative"):
        predictor_corrector_step(corrector_steps=-1)


def variance_after(variances, sigma, steps, snr=0.16):
    """The variance of Langevin steps on a Gaussian: v <- (1 - c / v_0)^2 v + 2 c from v = v_0, c = 2 (r sigma)^2."""
    exact, c = variances + sigma**2, 2.0 * (snr * sigma) ** 2
    v = exact
    for _ in range(steps):
        v = (1.0 - c / exact) ** 2 * v + 2.0 * c
    return v


@pytest.mark.parametrize("dimensions", [1, 3, 16, 64, 3072])
def test_langevin_steps_leave_a_gaussian_as_it_is_in_any_dimension(dimensions):
    """Forty steps at one noise level from exact draws, of condition number 1 and 1e4: within 5 standard errors of the
    closed form, which is within 1 / (1 - r^2) of the variance before."""
    sigma, n = 0.05, 16384 // dimensions + 16
    process = continuous.discretize(VE, [np.log(sigma / 0.01) / np.log(20.0 / 0.01)])
    step = predictor_corrector_step(
        Step(lambda predict_fn, keys, xt, here, there, carry: (xt, carry)), corrector_steps=40
    )

    @jax.jit
    def run(keys, start, table):
        denoise = lambda xt, t: sigma * xt / (table[None] + sigma**2)
        return sample(process, denoise, keys, (dimensions,), step=step, x_init=start)

    for condition in (1.0, 1e4):
        variances = np.geomspace(1.0 / condition, 1.0, dimensions)
        exact = variances + sigma**2
        start = np.random.default_rng(0).standard_normal((n, dimensions)) * np.sqrt(exact)
        x = np.asarray(run(example_keys(jax.random.key(0), n), jnp.asarray(start, jnp.float32), jnp.asarray(variances)))
        expected = variance_after(variances, sigma, 40)
        assert np.all(expected <= exact / (1 - 0.16**2))
        smallest = slice(0, -(-dimensions // 10))
        for part in (slice(None), smallest):
            ratio = np.mean(x[:, part] ** 2 / expected[part])
            assert ratio == pytest.approx(1.0, abs=5 * math.sqrt(2 / x[:, part].size))


def test_a_rare_mode_keeps_its_probability_under_the_corrector():
    """A mode of probability 0.001 in 3 dimensions; within 5 standard errors and a third for the step length."""
    n, rare = 16384, 0.001
    process = continuous.discretize(VE, continuous.uniform_times(VE, 100))
    means = jnp.asarray([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])

    def denoise(xt, t):
        sigma = VE.sigma(t)[:, None]
        away = xt[:, None] - means[None]
        log_share = jnp.log(jnp.asarray([[1 - rare, rare]])) - 0.5 * jnp.sum(away**2, -1) / (0.09 + sigma**2)
        return sigma * jnp.einsum("bk,bki->bi", jax.nn.softmax(log_share, -1), away) / (0.09 + sigma**2)

    run = jax.jit(lambda keys: sample(process, denoise, keys, (3,), step=predictor_corrector_step()))
    found = float((run(example_keys(jax.random.key(0), n))[:, 0] > 1.5).mean())
    assert found == pytest.approx(rare, abs=5 * math.sqrt(rare / n) + rare / 3)


@pytest.mark.parametrize("name", ["vp", "vp in 20 steps", "ve"])
def test_euler_maruyama_by_the_rates_of_the_steps(name):
    """Mean and variance of Gaussian data by the recursion of the published step in float64.

    x <- (1 + beta / 2) x + beta score + sqrt(beta) z of DDPM's chain, and of VE x + beta score + sqrt(beta) z with
    beta = sigma_here^2 - sigma_there^2 (score SDE, eqs. 9 and 11 in (3)); the last step is the estimate of x0.
    """
    if name == "ve":
        process = continuous.discretize(VE, continuous.uniform_times(VE, 50))
    else:
        process = respace(make_process(linear_betas(1000)), "20" if "20" in name else "1000")
    tables = ((process.alpha, 1.0), (process.sigma, 0.0))
    alpha, sigma = (np.append(np.asarray(table, np.float64)[::-1], end) for table, end in tables)
    mean, variance = 0.0, float(process.prior_std) ** 2
    for i in range(process.num_steps):
        own = (alpha[i] * STD) ** 2 + sigma[i] ** 2
        if i == process.num_steps - 1:  # E(x0 | x) = MEAN + alpha STD^2 / own (x - alpha MEAN)
            gain, shift = alpha[i] * STD**2 / own, MEAN - (alpha[i] * STD) ** 2 / own * MEAN
            noise = 0.0
        else:
            ratio = (alpha[i] / alpha[i + 1]) ** 2
            noise = sigma[i] ** 2 - ratio * sigma[i + 1] ** 2
            gain = 1 + (1 - ratio) / 2 - noise / own
            shift = noise / own * alpha[i] * MEAN
        mean, variance = gain * mean + shift, gain**2 * variance + noise

    def denoise(xt, t):
        index = jnp.searchsorted(process.timestep_map, t)
        a, s = (table[index][:, None] for table in (process.alpha, process.sigma))
        return s * (xt - a * MEAN) / ((a * STD) ** 2 + s**2)

    run = jax.jit(lambda keys: sample(process, denoise, keys, (4,), step=euler_maruyama_step()))
    x0 = np.asarray(run(example_keys(jax.random.key(0), N)))
    assert x0.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / x0.size) + 1e-4)
    assert x0.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / x0.size) + 1e-4)


def discrete_denoiser(process, std=STD):
    def denoise(xt, t):
        alpha_bar = process.alpha_bar[t].reshape(t.shape + (1,) * (xt.ndim - 1))
        return jnp.sqrt(1 - alpha_bar) * (xt - jnp.sqrt(alpha_bar) * MEAN) / (alpha_bar * std**2 + 1 - alpha_bar)

    return denoise


def test_the_analytic_variance_makes_ten_steps_exact():
    """The reverse step of isotropic Gaussian data is Gaussian with that variance; fixed_small is far too narrow."""
    process = make_process(linear_betas(1000))
    denoise = discrete_denoiser(process)
    data = MEAN + STD * jax.random.normal(jax.random.key(5), (1024, 4))
    moments = jax.jit(lambda keys: analytic_moments(process, denoise, keys, data))(
        example_keys(jax.random.key(4), 1024)
    )
    alpha_bar = np.cumprod(1 - linear_betas(1000))
    exact = (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    np.testing.assert_allclose(moments, exact, rtol=4.5 * math.sqrt(2 / (4 * 1024)))
    short = respace(process, "10")
    run = jax.jit(lambda keys, step: sample(short, denoise, keys, (4,), step=step), static_argnums=1)
    step = analytic_step(jnp.asarray(exact, jnp.float32)[short.timestep_map])
    x0, plain = (np.asarray(run(example_keys(jax.random.key(0), N), each)) for each in (step, ancestral_step()))
    assert x0.std() == pytest.approx(STD, rel=4 * math.sqrt(1 / (8 * N)) + 1e-3)
    assert plain.std() < 0.9 * STD
    bounded = np.asarray(run(example_keys(jax.random.key(0), N), analytic_step(jnp.zeros(10), bound=1e-6)))
    np.testing.assert_allclose(bounded, plain, atol=1e-3)


@pytest.mark.parametrize("gamma", [0.1, 0.4])
def test_churn_of_a_discrete_process_keeps_the_distribution(gamma):
    """Gaussian data, 100 of 1000 steps; without the exact amount of noise the variance would be far off."""
    process = make_process(cosine_betas(1000))
    short = respace(process, "100")
    step = heun_step(gamma, process=process)
    run = jax.jit(lambda keys: sample(short, discrete_denoiser(process), keys, (4,), step=step))
    x0 = np.asarray(run(example_keys(jax.random.key(0), N)))
    assert x0.mean() == pytest.approx(MEAN, abs=5 * STD / math.sqrt(x0.size) + 2e-3)
    assert x0.std() == pytest.approx(STD, rel=5 * math.sqrt(1 / (2 * x0.size)) + 0.01)


def test_churn_asks_the_network_at_its_own_timesteps_and_not_below():
    """One transition: s_hat is the largest of all levels up to (1 + gamma) s_here, and x has its variance there."""
    process, asked = make_process(linear_betas(1000)), []
    short = respace(process, "10")

    def denoise(xt, t):
        jax.debug.callback(lambda t: asked.append(int(t)), t[0])
        return xt

    sample(short, denoise, example_keys(jax.random.key(0), 1), (4,), step=heun_step(0.3, process=process))
    jax.effects_barrier()
    levels = np.sqrt(1 / np.cumprod(1 - linear_betas(1000).astype(np.float64)) - 1)
    expected = []
    kept = np.asarray(short.timestep_map)[::-1]
    for here, there in zip(kept, [*kept[1:], None]):
        expected.append(max(np.searchsorted(levels, 1.3 * levels[here] * (1 + 1e-6), side="right") - 1, here))
        expected += [] if there is None else [there]
    assert np.abs(np.array(asked) - np.array(expected)).max() <= 1 and min(asked) >= 0


@pytest.mark.parametrize("prediction", ["score", "mean"])
def test_the_other_prediction_types_are_read_back(prediction):
    process = make_process(cosine_betas(1000))
    keys = jax.random.split(jax.random.key(0), 2)
    x0, eps = (jax.random.normal(key, (5, 3)) for key in keys)
    t = jnp.asarray([1, 10, 300, 700, 900])
    xt = q_sample(process, x0, t, eps)
    output = target(process, x0, eps, t, prediction=prediction)
    read = predict(process, output, xt, t, prediction=prediction)
    # The mean holds c_x0 x0 with c_x0 as small as 1e-3: that much less of x0 is left in float32.
    np.testing.assert_allclose(read.x0, x0, atol=2e-4 if prediction == "score" else 5e-3)
    np.testing.assert_allclose(read.mean, predict(process, x0, xt, t, prediction="x0").mean, atol=1e-4)


def test_the_mean_is_refused_where_steps_are_left_out():
    process = respace(make_process(cosine_betas(1000)), "10")
    with pytest.raises(ValueError, match="prediction='mean' needs all the steps"):
        sample(process, lambda xt, t: xt, example_keys(jax.random.key(0), 1), (1,), prediction="mean")


def test_repaint_keeps_what_is_known_and_draws_the_rest_from_the_conditional():
    """Two correlated numbers, the first known: N(m2 + r (x1 - m1), s^2 (1 - r^2))."""
    process = respace(make_process(cosine_betas(1000)), "60")
    correlation, full = 0.8, make_process(cosine_betas(1000))
    covariance = jnp.asarray(STD**2 * np.array([[1, correlation], [correlation, 1]]), jnp.float32)

    def denoise(xt, t):
        alpha_bar = full.alpha_bar[t][:, None, None]
        total = alpha_bar * covariance[None] + (1 - alpha_bar) * jnp.eye(2)[None]
        from_mean = xt - jnp.sqrt(alpha_bar[..., 0]) * MEAN
        return jnp.sqrt(1 - alpha_bar[..., 0]) * jnp.linalg.solve(total, from_mean[..., None])[..., 0]

    n, x1 = 2048, 0.9
    known = jnp.broadcast_to(jnp.asarray([x1, jnp.nan]), (n, 2))
    mean, std = MEAN + correlation * (x1 - MEAN), STD * math.sqrt(1 - correlation**2)
    errors = {}
    for resample in (1, 15):
        step = repaint_step(jnp.nan_to_num(known), jnp.asarray([[True, False]]), resample=resample)
        draw = jax.jit(lambda keys, step=step: sample(process, denoise, keys, (2,), step=step))
        x0 = np.asarray(draw(example_keys(jax.random.key(0), n)))
        np.testing.assert_allclose(x0[:, 0], x1, rtol=1e-6)
        errors[resample] = abs(x0[:, 1].mean() - mean), abs(x0[:, 1].std() / std - 1)
    assert errors[15][0] < 0.03 and errors[15][1] < 0.25
    assert errors[15][0] < errors[1][0] / 3  # the two parts agree because of the repetitions
    with pytest.raises(ValueError, match="must not carry history"):
        repaint_step(known, known, step=dpm_solver_step(2))
    with pytest.raises(ValueError, match="resample=0"):
        repaint_step(known, known, resample=0)


def test_sdedit_keeps_more_of_the_guide_the_less_noise_it_adds():
    process = respace(make_process(cosine_betas(1000)), "50")
    denoise = discrete_denoiser(make_process(cosine_betas(1000)))
    guide = jnp.full((2048, 1), 0.8)
    keys = example_keys(jax.random.key(0), 2048)
    run = jax.jit(
        lambda strength: sdedit(process, denoise, keys, guide, strength=strength, step=ddim_step(1.0)), static_argnums=0
    )
    for strength in (0.2, 0.6, 1.0):
        # x_t = alpha x0 + sigma z; on Gaussian data x0 given x_t is Gaussian: its mean's slope is alpha s^2 / total.
        last = round(strength * 50) - 1
        alpha_bar = float(process.alpha_bar[last])
        slope = math.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
        expected = MEAN + slope * math.sqrt(alpha_bar) * (0.8 - MEAN)
        assert float(run(strength).mean()) == pytest.approx(expected, abs=4 * STD / math.sqrt(2048) + 0.01)
    assert truncate(process, 7).num_steps == 7
    with pytest.raises(ValueError, match="strength=0.0"):
        sdedit(process, denoise, keys, guide, strength=0.0)
    with pytest.raises(ValueError, match=r"num_steps=51 must be in \[1, 50\]"):
        truncate(process, 51)


def test_measurements_are_kept():
    process = respace(make_process(cosine_betas(1000)), "5")
    keys = example_keys(jax.random.key(0), 2)
    grey = jax.random.uniform(jax.random.key(1), (2, 4, 4, 1))
    small = jax.random.uniform(jax.random.key(2), (2, 2, 2, 3))

    @jax.jit
    def draw(grey, small):
        run = lambda keep: sample(
            process, lambda x, t: 0.4 * jnp.tanh(x), keys, (4, 4, 3), prediction="x0", x0_transform=keep
        )
        return run(grey_of(grey)), run(average_of(small, 2))

    coloured, larger = draw(grey, small)
    np.testing.assert_allclose(coloured.mean(-1, keepdims=True), grey, atol=1e-5)
    np.testing.assert_allclose(larger.reshape(2, 2, 2, 2, 2, 3).mean((2, 4)), small, atol=1e-5)
    assert float(jnp.abs(larger[:, ::2] - larger[:, 1::2]).max()) > 1e-3  # and not the measurement enlarged


def test_progress_is_reported_now_and_then():
    process, reported = respace(make_process(cosine_betas(1000)), "25"), []
    draw = jax.jit(
        lambda keys: sample(process, lambda xt, t: xt, keys, (1,), progress=reported.append, progress_every=10)
    )
    jax.block_until_ready(draw(example_keys(jax.random.key(0), 2)))
    jax.effects_barrier()
    assert sorted(reported) == [10, 20, 25]
    with pytest.raises(ValueError, match="progress_every=0"):
        sample(process, lambda xt, t: xt, example_keys(jax.random.key(0), 1), (1,), progress=print, progress_every=0)
