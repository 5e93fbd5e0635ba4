"""Solvers of the diffusion ODE and SDE: order, exactness on closed-form data, special cases, network calls."""

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
)
from ddpm_jax.diffusion import continuous
from ddpm_jax.diffusion.samplers import (
    analytic_step,
    deis_step,
    dpm_solver_step,
    heun_step,
    invert,
    plms_step,
    predictor_corrector_step,
    unipc_step,
)
from ddpm_jax.diffusion.schedules import zero_terminal_snr

MEAN, STD = 0.3, 0.5
ODE = {
    "ddim": (ddim_step(), 1),
    "dpm_1": (dpm_solver_step(1), 1),
    "heun": (heun_step(), 2),
    "plms": (plms_step(), 2),
    "deis_1": (deis_step(1), 1),
    "deis_2": (deis_step(2), 2),
    "deis_3": (deis_step(3), 3),
    "dpm_2": (dpm_solver_step(2), 2),
    "dpm_3": (dpm_solver_step(3), 3),
    "unipc_1": (unipc_step(1), 2),
    "unipc_2": (unipc_step(2), 3),
}
SDE = {"dpm_sde_1": dpm_solver_step(1, sde=True), "dpm_sde_2": dpm_solver_step(2, sde=True)}


def gaussian_denoiser(process, std=STD):
    """The exact network, predicting x0, for data N(MEAN, std^2), from the original process."""

    def denoise(xt, t):
        alpha_bar = process.alpha_bar[t].reshape(t.shape + (1,) * (xt.ndim - 1))
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return MEAN + jnp.sqrt(alpha_bar) * std**2 * (xt - jnp.sqrt(alpha_bar) * MEAN) / variance

    return denoise


@pytest.mark.parametrize("name", ODE)
def test_the_error_falls_with_the_order_of_the_solver(name):
    """Slope of the log error against the log step on the probability-flow ODE of Gaussian data, in float64.

    From noise to a point short of the data: into the data every solver takes a step of order 1.
    """
    step, order = ODE[name]
    with jax.enable_x64(True):
        process = make_process(linear_betas(8001), dtype=jnp.float64)
        z = np.linspace(-1.5, 1.5, 7)[:, None]
        keys = example_keys(jax.random.key(0), 7)
        # The ODE keeps z = (x - alpha m) / std(x) constant along a path.
        at = lambda i: (process.alpha[i] * MEAN) + jnp.sqrt(1 - process.alpha_bar[i] * (1 - STD**2)) * z
        strides, errors = [80, 40, 20], []
        for stride in strides:
            short = respace(process, list(range(2400, 8001, stride)))
            draw = lambda keys, short=short: sample(
                short,
                gaussian_denoiser(process),
                keys,
                (1,),
                step=step,
                prediction="x0",
                x_init=at(8000),
                trajectory=True,
            )
            states = jax.jit(draw)(keys)[1]
            assert states.dtype == jnp.float64
            errors.append(float(jnp.abs(states[-2] - at(2400)).max()))
    slope = np.polyfit(np.log(strides), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", SDE)
def test_the_sde_keeps_the_mean_and_the_variance_of_the_data(name):
    process, n = make_process(cosine_betas(1000)), 16384
    draw = lambda keys: sample(
        respace(process, "200"), gaussian_denoiser(process), keys, (1,), step=SDE[name], prediction="x0"
    )
    x0 = jax.jit(draw)(example_keys(jax.random.key(0), n))
    assert float(x0.mean()) == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n) + 2e-3)
    assert float(x0.std()) == pytest.approx(STD, rel=4 * math.sqrt(1 / (2 * n)) + 5e-3)


def test_order_one_is_ddim():
    """eta = 0 of the ODE; the SDE's noise of order 1 is that of eta = 1."""
    process = make_process(cosine_betas(1000))
    short, keys = respace(process, "15"), example_keys(jax.random.key(0), 8)
    draw = jax.jit(
        lambda keys, step: sample(short, gaussian_denoiser(process), keys, (3,), step=step, prediction="x0"),
        static_argnums=1,
    )
    np.testing.assert_allclose(draw(keys, dpm_solver_step(1)), draw(keys, ddim_step()), atol=2e-5)
    np.testing.assert_allclose(draw(keys, deis_step(1)), draw(keys, ddim_step()), atol=2e-5)
    np.testing.assert_allclose(draw(keys, dpm_solver_step(1, sde=True)), draw(keys, ddim_step(1.0)), atol=2e-5)


@pytest.mark.parametrize("name", [*ODE, *SDE])
def test_one_point_of_data_comes_back_exactly(name):
    """The estimate of x0 is constant, so every difference of estimates is 0 and every solver exact."""
    step = ODE[name][0] if name in ODE else SDE[name]
    process = respace(make_process(linear_betas(1000)), "7")
    denoise = lambda xt, t: jnp.full_like(xt, -0.4)
    x0 = sample(process, denoise, example_keys(jax.random.key(0), 4), (2,), step=step, prediction="x0")
    np.testing.assert_allclose(x0, -0.4, rtol=5e-5)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (dpm_solver_step(2), [800, 600, 400, 200, 0]),
        (dpm_solver_step(3), [800, 600, 600, 400, 200, 0]),
        (unipc_step(3), [800, 600, 400, 200, 0]),
        (heun_step(), [800, 600, 600, 400, 400, 200, 200, 0, 0]),
        (plms_step(), [800, 600, 600, 400, 200, 0]),
        (deis_step(2), [800, 600, 400, 200, 0]),
        (deis_step(3), [800, 600, 600, 400, 200, 0]),
    ],
)
def test_the_network_is_called_where_it_should_be(step, expected):
    process, called = respace(make_process(cosine_betas(1000)), "ddim5"), []

    def denoise(xt, t):
        jax.debug.callback(lambda t: called.append(int(t[0])), t, ordered=True)
        return xt

    jax.block_until_ready(sample(process, denoise, example_keys(jax.random.key(0), 2), (1,), step=step))
    jax.effects_barrier()
    assert called == expected


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 4}, {"order": 3, "sde": True}])
def test_orders_are_checked(options):
    with pytest.raises(ValueError, match="must be 1, 2 or 3, and at most 2 with sde=True"):
        dpm_solver_step(**options)


def test_other_arguments_are_checked():
    for step in (unipc_step, deis_step):
        with pytest.raises(ValueError, match="order=4 must be 1, 2 or 3"):
            step(4)
    with pytest.raises(ValueError, match="gamma=0.5 must be in"):
        heun_step(0.5)
    with pytest.raises(ValueError, match="noise_scale=0.0 must be positive"):
        heun_step(noise_scale=0.0)
    process = respace(make_process(cosine_betas(1000)), "4")
    with pytest.raises(ValueError, match="needs a process of continuous.edm"):
        sample(process, lambda xt, t: xt, example_keys(jax.random.key(0), 1), (1,), step=heun_step(0.1))


def test_every_step_starts_from_pure_noise():
    """Process whose last alpha_bar is 0, with the exact x0 network of Gaussian data."""
    process = make_process(zero_terminal_snr(linear_betas(1000)))
    short = respace(process, "12")
    steps = [ancestral_step(), *(step for step, _ in ODE.values()), *SDE.values(), unipc_step(3)]
    steps += [predictor_corrector_step(), analytic_step(jnp.full(12, 0.9), bound=1.0), analytic_step(jnp.full(12, 0.9))]
    run = jax.jit(
        lambda keys: [
            sample(short, gaussian_denoiser(process), keys, (2,), step=step, prediction="x0") for step in steps
        ]
    )
    for x0 in run(example_keys(jax.random.key(0), 4)):
        assert np.all(np.abs(x0) < 5.0)  # which NaN is not
    untrained = sample(
        short,
        lambda xt, t: 0.0 * xt,
        example_keys(jax.random.key(0), 4),
        (2,),
        step=predictor_corrector_step(),
        prediction="v",
    )
    assert np.all(np.isfinite(untrained))


@pytest.mark.parametrize("steps", ["2", "3", "10"])
def test_few_steps_from_almost_pure_noise_extrapolate_little(steps):
    """alpha is 5e-5 at the end of the cosine schedule: differences of eps over alpha were up to 140 000."""
    process = make_process(cosine_betas(1000))
    short, keys = respace(process, steps), example_keys(jax.random.key(0), 512)
    solvers = {name: ODE[name][0] for name in ("ddim", "plms", "heun", "dpm_2", "unipc_2", "deis_2", "deis_3")}
    run = jax.jit(
        lambda keys: {
            name: sample(short, gaussian_denoiser(process), keys, (1,), step=step, prediction="x0")
            for name, step in solvers.items()
        }
    )
    for name, x0 in run(keys).items():
        assert float(jnp.std(x0)) < 1.6 * STD, name
        assert float(x0.mean()) == pytest.approx(MEAN, abs=0.15 * STD), name


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_samples_of_discrete_points_end_in_them(prediction):
    """100 points, 50 steps: at the last step the network's x0 is one of them, unless a sample lies in between."""
    process = make_process(cosine_betas(1000))
    points = jnp.stack(jnp.meshgrid(jnp.linspace(-1.0, 1.0, 10), jnp.linspace(-1.0, 1.0, 10)), -1).reshape(100, 2)

    def denoise(xt, t):
        alpha, sigma = process.alpha[t], process.sigma[t]
        distances = jnp.sum((xt[:, None] - alpha[:, None, None] * points[None]) ** 2, axis=-1)
        x0 = jax.nn.softmax(-0.5 * distances / sigma[:, None] ** 2, axis=-1) @ points
        return x0 if prediction == "x0" else (xt - alpha[:, None] * x0) / sigma[:, None]

    short, keys = respace(process, "50"), example_keys(jax.random.key(0), 1000)
    solvers = {name: ODE[name][0] for name in ("ddim", "plms", "heun", "dpm_2", "unipc_2", "deis_2", "deis_3")}
    run = jax.jit(
        lambda keys: {
            name: sample(short, denoise, keys, (2,), step=step, prediction=prediction) for name, step in solvers.items()
        }
    )
    for name, x0 in run(keys).items():
        distance = np.linalg.norm(np.asarray(x0)[:, None] - np.asarray(points), axis=-1).min(1)
        assert (distance > 0.02).mean() <= 0.003, name


def test_churn_is_for_networks_that_receive_sigma():
    process = continuous.discretize(continuous.ve(), [0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"gamma=0.1 needs a process of continuous.edm"):
        sample(process, lambda xt, t: xt, example_keys(jax.random.key(0), 1), (1,), step=heun_step(0.1))


def test_inversion_is_undone_by_sampling():
    """To rounding when the fixed point is found; after one iteration the error is that of an order 1 method."""
    with jax.enable_x64(True):
        process = make_process(linear_betas(1000), dtype=jnp.float64)
        denoise, keys = gaussian_denoiser(process), example_keys(jax.random.key(0), 5)
        data = jnp.linspace(-1.0, 1.0, 5)[:, None]

        def there_and_back(steps, iterations):
            short = respace(process, steps)

            def run(x0):
                xt = invert(short, denoise, x0, prediction="x0", iterations=iterations)
                return sample(short, denoise, keys, (1,), step=ddim_step(), prediction="x0", x_init=xt)

            return np.abs(np.asarray(jax.jit(run)(data)) - data).max()

        errors = [there_and_back(steps, 1) for steps in ("50", "100", "200")]
        assert there_and_back("50", 40) < 1e-9
    assert errors[0] / errors[2] == pytest.approx(4.0, rel=0.25)


def test_inversion_finds_the_noise_of_the_exact_flow():
    """On Gaussian data the probability-flow ODE keeps (x - alpha m) / std(x)."""
    process = make_process(linear_betas(1000))
    data = jnp.linspace(-1.0, 1.0, 5)[:, None]
    denoise = gaussian_denoiser(process)
    xt, states = jax.jit(lambda x0: invert(process, denoise, x0, prediction="x0", trajectory=True))(data)
    alpha, variance = process.alpha[-1], 1 - process.alpha_bar[-1] * (1 - STD**2)
    np.testing.assert_allclose(xt, alpha * MEAN + jnp.sqrt(variance) * (data - MEAN) / STD, atol=0.02)
    assert states.shape == (1000, 5, 1)
    np.testing.assert_array_equal(states[-1], xt)
    with pytest.raises(ValueError, match="iterations=0 must be at least 1"):
        invert(process, gaussian_denoiser(process), data, iterations=0)
