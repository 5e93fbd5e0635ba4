"""Tables, trajectories and bounds against OpenAI's published code, recorded by parity/make_published_diffusion.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import (
    RecordedNoise,
    ancestral_step,
    cosine_betas,
    ddim_step,
    example_keys,
    linear_betas,
    make_process,
    predict,
    q_sample,
    respace,
    respaced_timesteps,
    sample,
    static_threshold,
    vlb_terms,
)
from ddpm_jax.diffusion.likelihood import prior_kl
from ddpm_jax.diffusion.samplers import dpm_solver_step, plms_step, unipc_step

PUBLISHED = np.load(Path(__file__).parent / "data" / "published_diffusion.npz")
BETAS = {"linear": linear_betas, "cosine": cosine_betas}
RTOL = 1e-6


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def network(xt, t):
    level = t.astype(xt.dtype).reshape(-1, 1, 1, 1) / 1000.0
    return jnp.concatenate([0.8 * jnp.tanh(xt) + 0.1 * level, jnp.sin(3.0 * xt + level)], axis=-1)


def prediction(xt, t):
    return network(xt, t)[..., :3]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def recorded():
    """The initial noise, then that of every transition."""
    noises = np.concatenate([PUBLISHED["start"][None], PUBLISHED["noises"]])
    return RecordedNoise(jnp.asarray(nhwc(noises).swapaxes(0, 1)))


def close(ours, theirs):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=RTOL, atol=RTOL * scale)


@pytest.mark.parametrize("key", [name for name in PUBLISHED.files if name.startswith("betas/")])
def test_betas(key):
    _, schedule, steps = key.split("/")
    np.testing.assert_allclose(BETAS[schedule](int(steps)), PUBLISHED[key], rtol=1e-12)


@pytest.mark.parametrize("key", [name for name in PUBLISHED.files if name.startswith("timesteps/linear")])
def test_respaced_timesteps(key):
    _, _, steps, spec = key.split("/")
    assert respaced_timesteps(int(steps), spec) == list(PUBLISHED[key])


@pytest.mark.parametrize("key", [name for name in PUBLISHED.files if name.startswith("tables/")])
def test_tables_of_respaced_processes(key, float64):
    _, schedule, steps, spec = key.split("/")
    process = respace(make_process(BETAS[schedule](int(steps)), dtype=jnp.float64), spec)
    names = ("betas", "alpha_bar", "posterior_coef_x0", "posterior_coef_xt", "posterior_variance")
    for name, theirs in zip((*names, "posterior_log_variance"), PUBLISHED[key], strict=True):
        np.testing.assert_allclose(getattr(process, name), theirs, rtol=RTOL, atol=1e-15, err_msg=name)


# One schedule with the clip and the other without: every option is there, each compiles once.
LOOPS = [
    name
    for name in PUBLISHED.files
    if name.startswith("ddim/") or (name.startswith("ancestral/") and ("cosine" in name) == name.endswith("True"))
]


@pytest.mark.parametrize("key", LOOPS)
def test_trajectories(key, float64):
    sampler, schedule, option, *clip = key.split("/")
    process = respace(make_process(BETAS[schedule](1000), dtype=jnp.float64), "25")
    step = ancestral_step() if sampler == "ancestral" else ddim_step(float(option))
    learned = option == "learned_range"
    _, states = sample(
        process,
        network if learned else prediction,
        recorded(),
        (4, 4, 3),
        step=step,
        variance=option if sampler == "ancestral" else "fixed_small",
        x0_transform=None if clip == ["False"] else static_threshold(),
        trajectory=True,
    )
    close(states, nhwc(PUBLISHED[key]))


def test_a_network_of_the_mean_and_a_threshold(float64):
    """Their ancestral loop clips only the x0 that it reports, so leave the threshold out there; DDIM uses it."""
    process = make_process(linear_betas(25), dtype=jnp.float64)
    threshold = static_threshold()

    def draw(step, transform):
        return sample(process, prediction, recorded(), (4, 4, 3), step=step, prediction="mean", x0_transform=transform)

    theirs = {name: nhwc(PUBLISHED[f"mean/{name}"]) for name in ("ancestral/False", "ancestral/True", "ddim/True")}
    np.testing.assert_array_equal(theirs["ancestral/True"], theirs["ancestral/False"])
    close(draw(ancestral_step(), None), theirs["ancestral/True"])
    close(draw(ddim_step(), threshold), theirs["ddim/True"])
    assert np.abs(theirs["ddim/True"] - nhwc(PUBLISHED["mean/ddim/False"])).max() > 0.1
    # Here the mean follows from the clipped x0, (3), for every kind.
    t, xt = jnp.array([12, 12]), jnp.asarray(nhwc(PUBLISHED["start"]))
    read = predict(process, prediction(xt, t), xt, t, prediction="mean", x0_transform=threshold)
    alpha_bar = np.cumprod(1 - linear_betas(25))
    beta, last = linear_betas(25)[12], alpha_bar[11]
    c_x0, c_xt = beta * last**0.5 / (1 - alpha_bar[12]), (1 - last) * (1 - beta) ** 0.5 / (1 - alpha_bar[12])
    x0 = np.clip((np.asarray(prediction(xt, t)) - c_xt * np.asarray(xt)) / c_x0, -1, 1)
    assert (np.abs(x0) == 1).mean() > 0.1
    close(read.mean, c_x0 * x0 + c_xt * np.asarray(xt))


@pytest.mark.parametrize("schedule", BETAS)
def test_terms_of_the_variational_bound(schedule, float64):
    process = respace(make_process(BETAS[schedule](1000), dtype=jnp.float64), "25")
    x0, noises = jnp.asarray(nhwc(PUBLISHED["x0"])), jnp.asarray(nhwc(PUBLISHED["noises"]))

    @jax.jit
    def term(step):
        t = jnp.broadcast_to(step, (2,))
        xt = q_sample(process, x0, t, noises[step])
        output = network(xt, process.timestep_map[t])
        read = predict(
            process, output, xt, t, prediction="eps", variance="learned_range", x0_transform=static_threshold()
        )
        return vlb_terms(process, read, x0, xt, t)

    ours = np.stack([term(jnp.int32(step)) for step in range(25)])
    theirs = PUBLISHED[f"vlb/{schedule}"]
    close(ours[1:], theirs[1:])
    # Their CDF of the normal distribution at t = 0 is an approximation, by tanh.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0.02)
    np.testing.assert_allclose(prior_kl(process, x0), PUBLISHED[f"prior/{schedule}"], rtol=RTOL)


@pytest.mark.parametrize(
    ("name", "step"), [("dpm", dpm_solver_step(2)), ("unipc", unipc_step(2)), ("plms", plms_step())]
)
def test_solvers_of_diffusers(name, step, float64):
    """diffusers keeps its tables in float32.

    Into the data its PLMS extrapolates eps, where this one takes DDIM's step, which is x0 of the network.
    """
    timesteps = sorted(int(t) for t in PUBLISHED[f"{name}/timesteps"])
    assert len(timesteps) == 20
    process = respace(make_process(linear_betas(1000, 1e-4, 0.02), dtype=jnp.float64), timesteps)
    _, states = sample(
        process,
        prediction,
        example_keys(jax.random.key(0), 2),
        (4, 4, 3),
        step=step,
        x_init=jnp.asarray(nhwc(PUBLISHED["start"])),
        trajectory=True,
    )
    theirs = nhwc(PUBLISHED[f"{name}/states"])
    if name == "plms":
        before, t = jnp.asarray(theirs[-2]), jnp.zeros(2, jnp.int32)
        output = prediction(before, process.timestep_map[t])
        theirs = np.concatenate([theirs[:-1], predict(process, output, before, t, prediction="eps").x0[None]])
    np.testing.assert_allclose(states, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
