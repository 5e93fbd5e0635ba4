"""Binomial diffusion against matrices of transitions in float64, and the exact denoiser of the heartbeat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.toys import Heartbeat, SwissRoll
from ddpm_jax.diffusion.binomial import (
    binomial_bound,
    binomial_terms,
    q_posterior_bits,
    q_sample_bits,
    reverse_log_rates,
    sample_bits,
)
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.samplers import example_keys

T = 12
PROCESS = Diffusion("reciprocal", T, prediction="x0").process
BETAS = 1.0 / np.arange(T, 0, -1)
# Rows are x_{t-1}, columns x_t, both 0 and 1.
STEPS = np.array([[[1 - b / 2, b / 2], [b / 2, 1 - b / 2]] for b in BETAS])


def until(t):
    """Return q(x_t | x0) by multiplying transitions; x_{-1} is x0."""
    found = np.eye(2)
    for step in STEPS[: t + 1]:
        found = found @ step
    return found


@pytest.mark.parametrize("t", [0, 1, 5, T - 1])
def test_the_posterior_is_that_of_bayes_rule(t):
    for x0 in (0, 1):
        for xt in (0, 1):
            joint = until(t - 1)[x0] * STEPS[t][:, xt]
            expected = joint[1] / joint.sum()
            arrays = [jnp.full((1, 3), float(bit)) for bit in (x0, xt)]
            found = q_posterior_bits(PROCESS, *arrays, jnp.array([t]))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_rates_of_noised_bits():
    t = jnp.repeat(jnp.array([0, 5, T - 1]), 2)
    x0 = jnp.broadcast_to(jnp.tile(jnp.array([0.0, 1.0]), 3)[:, None], (6, 40_000))
    found = np.asarray(q_sample_bits(PROCESS, jax.random.key(0), x0, t)).mean(1)
    expected = [until(int(step))[bit][1] for step, bit in zip(t, x0[:, 0].astype(int))]
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / 200)


def test_a_term_is_the_divergence_in_bits():
    """For every x_t: KL of (3) and (4) of two numbers each, in float64; at t = 0 it is -log2 p(x0)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(T, 4)).astype(np.float32)
    x0, xt = (rng.integers(0, 2, (T, 4)) for _ in range(2))
    p, total = 1 / (1 + np.exp(-logits.astype(np.float64))), []
    for t in range(T):
        terms = []
        for i in range(4):
            joint = np.stack([until(t - 1)[b] * STEPS[t][:, xt[t, i]] for b in (0, 1)])
            posterior = joint / joint.sum(1, keepdims=True)
            q, model = posterior[x0[t, i]], (1 - p[t, i]) * posterior[0] + p[t, i] * posterior[1]
            terms.append(sum(a * np.log2(a / b) for a, b in zip(q, model) if a > 0))
        total.append(sum(terms))
    network = lambda xt, t: jnp.asarray(logits)
    arrays = [jnp.asarray(bits, jnp.float32) for bits in (x0, xt)]
    found = binomial_terms(PROCESS, network, *arrays, jnp.arange(T))
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda z: binomial_terms(PROCESS, lambda *_: z, *arrays, jnp.arange(T)).sum())
    assert np.isfinite(gradient(jnp.asarray(logits))).all()


def exact(process):
    """Return the denoiser of the heartbeat: the posterior over the five sequences gives the rate of every bit."""
    true = jnp.asarray(Heartbeat.sequences())

    def denoise(xt, t):
        keep = process.alpha_bar[t][:, None, None]
        rate = keep * true[None] + 0.5 * (1 - keep)
        weight = jax.nn.softmax(jnp.log(jnp.where(xt[:, None] == 1, rate, 1 - rate)).sum(-1))
        rate = jnp.clip(weight @ true, 1e-6, 1 - 1e-6)
        return jnp.log(rate) - jnp.log1p(-rate)

    return denoise


def test_the_exact_denoiser_has_the_likelihood_of_the_heartbeat():
    """The bound is above log2 5 = 2.322 bits, less with more steps, and samples are the five sequences."""
    true, gaps = np.asarray(Heartbeat.sequences()), []
    for steps in (20, 200):
        process = Diffusion("reciprocal", steps, prediction="x0").process
        x0 = jnp.tile(jnp.asarray(true), (40, 1))
        bound = jax.jit(lambda key, x0, process=process: binomial_bound(process, exact(process), key, x0))
        gaps.append(float(bound(jax.random.key(0), x0).mean()) - np.log2(5))
    assert 0.0 < gaps[1] < gaps[0] < 3.0 and gaps[1] < 0.4, gaps
    draw = jax.jit(lambda keys: sample_bits(process, exact(process), keys, (20,)))
    found = np.asarray(draw(example_keys(jax.random.key(1), 1000)))
    equal = (found[:, None] == true).all(-1)
    assert equal.any(1).mean() > 0.97 and np.abs(equal.mean(0) - 0.2).max() < 4 * 0.4 / 1000**0.5 + 0.01
    one, zero = reverse_log_rates(process, jnp.zeros((1, 20)), jnp.asarray(true[:1]), jnp.array([3]))
    np.testing.assert_allclose(np.exp(one) + np.exp(zero), 1.0, rtol=1e-5)


def test_toys_are_functions_of_the_seed_and_the_index():
    for kind, size in ((Heartbeat, 20), (SwissRoll, 2)):
        source = kind(3, length=500)
        first = np.stack([source[i]["vector"] for i in range(500)])
        assert first.shape == (500, size) and first.dtype == np.float32
        np.testing.assert_array_equal(first[7], kind(3, length=500)[7]["vector"])
        assert source.fingerprint() == kind(3, length=500).fingerprint() != kind(4, length=500).fingerprint()
    assert abs(first.std() - 1) < 0.1
    curve = SwissRoll.curve(np.linspace(0, 1, 2000))
    distance = np.linalg.norm(first[:, None] - curve, axis=-1).min(1)
    assert abs(distance.mean() - SwissRoll.noise * (2 / np.pi) ** 0.5) < 0.01
