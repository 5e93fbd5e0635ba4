"""The variational bound against its expectation in closed form, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_ndtr

from ddpm_jax import cosine_betas, example_keys, linear_betas, make_process, respace
from ddpm_jax.diffusion import continuous
from ddpm_jax.diffusion.likelihood import (
    bits_per_dimension,
    dequantize,
    ode_log_likelihood,
    ode_sample,
    prior_kl,
    variational_bound,
)

MEAN, STD = 0.1, 0.5
BETAS = cosine_betas(12)
X0 = 2 * 150 / 255 - 1  # one value of 8-bit data


def expected_terms():
    """E over the noise of L_0 .. L_{T-1} for data at X0 and the exact denoiser of N(MEAN, STD^2), fixed_small."""
    alpha_bar = np.cumprod(1 - BETAS)
    previous = np.append(1.0, alpha_bar[:-1])
    variance = BETAS * (1 - previous) / (1 - alpha_bar)
    coefficient = BETAS * np.sqrt(previous) / (1 - alpha_bar)
    slope = np.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)  # of the estimate of x0 in xt
    at_zero = MEAN - slope * np.sqrt(alpha_bar) * MEAN
    # x0 - estimate = bias - slope sigma eps
    bias = X0 - at_zero - slope * np.sqrt(alpha_bar) * X0
    square = bias**2 + slope**2 * (1 - alpha_bar)
    terms = np.full(len(BETAS), np.nan)
    terms[1:] = 0.5 * coefficient[1:] ** 2 * square[1:] / variance[1:]
    # L_0 by Gauss-Hermite quadrature; at t = 0 the mean is the estimate of x0 and the variance that of t = 1.
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    mean = at_zero[0] + slope[0] * (np.sqrt(alpha_bar[0]) * X0 + np.sqrt(1 - alpha_bar[0]) * nodes)
    std = math.sqrt(variance[1])
    distance = np.abs(X0 - mean)  # by symmetry the bin lies in the lower tail, where logarithms of ndtr are exact
    upper, lower = log_ndtr((1 / 255 - distance) / std), log_ndtr((-1 / 255 - distance) / std)
    terms[0] = -np.sum(weights * (upper + np.log1p(-np.exp(lower - upper)))) / weights.sum()
    return terms / math.log(2)


def denoiser(process):
    def denoise(xt, t):
        alpha_bar = process.alpha_bar[t][:, None]
        total = alpha_bar * STD**2 + 1 - alpha_bar
        return MEAN + jnp.sqrt(alpha_bar) * STD**2 * (xt - jnp.sqrt(alpha_bar) * MEAN) / total

    return denoise


def test_every_term_has_its_expectation():
    process, n = make_process(BETAS), 20_000
    bound = jax.jit(
        lambda keys: variational_bound(process, denoiser(process), keys, jnp.full((n, 1), X0), prediction="x0")
    )
    bound = bound(example_keys(jax.random.key(0), n))
    assert bound["terms"].shape == bound["mse"].shape == (n, 12) and bound["total"].shape == (n,)
    error = np.asarray(bound["terms"], np.float64).std(0) / math.sqrt(n)
    np.testing.assert_array_less(np.abs(np.asarray(bound["terms"]).mean(0) - expected_terms()), 4.5 * error + 1e-5)
    np.testing.assert_allclose(bound["total"], bound["prior"] + bound["terms"].sum(1), rtol=1e-5)


def test_the_prior_term_is_the_divergence_of_two_gaussians():
    x0 = jnp.asarray([[0.5, -1.0], [0.0, 0.25]])
    alpha_bar = np.prod(1 - BETAS)
    variance = 1 - alpha_bar
    kl = 0.5 * (variance + alpha_bar * np.asarray(x0, np.float64) ** 2 - 1 - np.log(variance))
    np.testing.assert_allclose(prior_kl(make_process(BETAS), x0), kl.mean(1) / math.log(2), rtol=1e-3, atol=1e-9)


def test_an_example_does_not_depend_on_its_batch_and_a_shorter_model_has_fewer_terms():
    process = respace(make_process(linear_betas(1000)), "6")
    x0 = jnp.clip(jax.random.normal(jax.random.key(1), (4, 3)), -1, 1)
    keys = example_keys(jax.random.key(0), 4)
    bound = jax.jit(lambda keys, x0: variational_bound(process, lambda xt, t: 0.3 * xt, keys, x0)["total"])
    whole = np.asarray(bound(keys, x0))
    np.testing.assert_array_equal(np.concatenate([bound(keys[i : i + 1], x0[i : i + 1]) for i in range(4)]), whole)
    with pytest.raises(ValueError, match=r"keys must be one for each example, 4 of them, got 3"):
        variational_bound(process, lambda xt, t: xt, keys[:3], x0)
    large = x0.at[1].mul(3.0)
    with pytest.raises(ValueError, match=r"x0 must be 8-bit data in \[-1, 1\], got values from"):
        variational_bound(process, lambda xt, t: 0.3 * xt, keys, large)
    constant = jax.jit(lambda keys: variational_bound(process, lambda xt, t: 0.3 * xt, keys, x0)["total"])
    np.testing.assert_allclose(constant(keys), whole, rtol=1e-5)
    assert np.isnan(bound(keys, large)).tolist() == [i == 1 for i in range(len(x0))]


SCHEDULE = continuous.vp_linear(0.1, 40.0, t_min=1e-4)  # alpha is 4e-5 at t = 1, so the prior is N(0, I)
COVARIANCE = np.array([[0.4, 0.2], [0.2, 0.3]])


def gaussian_eps(xt, t):
    """The exact network for data N(MEAN, COVARIANCE) in two dimensions."""
    values, basis = (jnp.asarray(a, jnp.float32) for a in np.linalg.eigh(COVARIANCE))
    alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    return sigma * ((xt - alpha * MEAN) @ basis / (alpha**2 * values[None] + sigma**2)) @ basis.T


def exact_log_density(x, t=1e-4):
    b = 0.1 * t + 0.5 * t**2 * 39.9
    covariance = np.exp(-b) * COVARIANCE + (1 - np.exp(-b)) * np.eye(2)
    from_mean = np.asarray(x, np.float64) - np.exp(-b / 2) * MEAN
    square = np.einsum("bi,ij,bj->b", from_mean, np.linalg.inv(covariance), from_mean)
    return -0.5 * square - np.log(2 * np.pi) - 0.5 * np.log(np.linalg.det(covariance))


@pytest.fixture(scope="module")
def likelihood():
    run = lambda keys, x, probe: ode_log_likelihood(SCHEDULE, gaussian_eps, keys, x, probe=probe)
    return jax.jit(run, static_argnums=2)


def test_the_exact_likelihood_is_within_a_thousandth_of_a_bit(likelihood):
    x = jnp.asarray([[0.1, 0.2], [1.0, -0.5], [-2.0, 0.3]])
    found, calls = likelihood(example_keys(jax.random.key(0), 3), x, "exact")
    np.testing.assert_allclose(found / (2 * np.log(2)), exact_log_density(x) / (2 * np.log(2)), atol=1e-3)
    assert np.all(np.asarray(calls) > 10)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_estimated_likelihood_has_the_exact_mean(likelihood, probe):
    n, x = 256, jnp.asarray([0.4, -0.3])
    found, _ = likelihood(example_keys(jax.random.key(1), n), jnp.broadcast_to(x, (n, 2)), probe)
    found = np.asarray(found, np.float64)
    assert found.std() > 0
    assert found.mean() == pytest.approx(exact_log_density(x[None])[0], abs=4.5 * found.std() / math.sqrt(n) + 1e-3)
    if probe == "rademacher":
        alone, _ = likelihood(example_keys(jax.random.key(1), 2), jnp.broadcast_to(x, (2, 2)), probe)
        np.testing.assert_allclose(alone, found[:2], rtol=1e-5)


def test_the_flow_brings_noise_to_data():
    """Along an eigenvector the flow keeps x / std(x)."""
    values, basis = np.linalg.eigh(COVARIANCE)
    start = jnp.asarray(1.5 * basis.T, jnp.float32)
    keys = example_keys(jax.random.key(0), 2)
    x0, calls = jax.jit(lambda x: ode_sample(SCHEDULE, gaussian_eps, keys, (2,), x_init=x))(start)
    b = np.array([1e-4, 1.0]) * 0.1 + 0.5 * np.array([1e-8, 1.0]) * 39.9
    alpha = np.exp(-b / 2)
    std = np.sqrt(alpha[None] ** 2 * values[:, None] + 1 - alpha[None] ** 2)
    centre = basis.T @ np.full(2, MEAN)
    along = np.einsum("bi,ib->b", np.asarray(start), basis) - alpha[1] * centre
    other = -alpha[1] * centre[::-1]
    expected = alpha[0] * MEAN + (std[:, 0] / std[:, 1] * along)[:, None] * basis.T
    expected += (std[::-1, 0] / std[::-1, 1] * other)[:, None] * basis.T[::-1]
    np.testing.assert_allclose(x0, expected, atol=1e-3)
    assert calls.shape == (2,)
    drawn = jax.jit(lambda keys: ode_sample(SCHEDULE, gaussian_eps, keys, (2,))[0])(
        example_keys(jax.random.key(2), 2000)
    )
    np.testing.assert_allclose(np.cov(np.asarray(drawn).T), COVARIANCE, atol=0.05)


def test_bits_of_dequantized_data():
    """Uniform data on [-1, 1] have log p = -D log 2 and 8 bits a dimension."""
    np.testing.assert_allclose(bits_per_dimension(jnp.asarray([-6 * math.log(2)]), 6), [8.0], rtol=1e-6)
    images = jnp.asarray([[0, 255, 7]], jnp.uint8)
    spread = np.asarray(dequantize(example_keys(jax.random.key(0), 1), images))
    np.testing.assert_array_equal(np.floor((spread + 1) * 128), images)


def test_likelihood_errors():
    keys, x = example_keys(jax.random.key(0), 1), jnp.ones((2, 2))
    with pytest.raises(ValueError, match=r"keys must be one for each example, 2 of them, got 1"):
        ode_log_likelihood(SCHEDULE, gaussian_eps, keys, x)
    with pytest.raises(ValueError, match="probe='sobol' must be"):
        ode_log_likelihood(SCHEDULE, gaussian_eps, keys, x[:1], probe="sobol")
    with pytest.raises(ValueError, match="prediction='mean' must be"):
        ode_sample(SCHEDULE, gaussian_eps, keys, (2,), prediction="mean")
    with pytest.raises(ValueError, match=r"must return \(1, 2\) for one example, got \(2, 2\): a condition for each"):
        ode_sample(SCHEDULE, lambda xt, t: xt + x, keys, (2,))
    with pytest.raises(ValueError, match=r"x_init must have shape \(1, 2\)"):
        ode_sample(SCHEDULE, gaussian_eps, keys, (2,), x_init=x)
    with pytest.raises(ValueError, match="keys must be a vector of keys"):
        ode_sample(SCHEDULE, gaussian_eps, jax.random.key(0), (2,))


def test_each_example_has_its_condition():
    """A network that knows x0, which the flow then reaches."""
    cond = jnp.asarray([[-0.5], [0.2], [0.9]])
    draw = lambda keys: ode_sample(
        SCHEDULE, lambda xt, t, c: jnp.broadcast_to(c, xt.shape), keys, (1,), prediction="x0", cond=cond
    )
    np.testing.assert_allclose(jax.jit(draw)(example_keys(jax.random.key(0), 3))[0], cond, atol=0.05)


def test_the_prior_term_knows_the_prior_of_an_exploding_process():
    """Of N(x0, s^2) against N(0, s^2): x0^2 / (2 s^2) nats."""
    process = continuous.discretize(continuous.edm(0.01, 8.0), [8.0, 1.0, 0.01])
    np.testing.assert_allclose(prior_kl(process, jnp.asarray([[0.5, -1.0]])), [0.625 / 128 / math.log(2)], rtol=1e-4)
