"""Guidance: drop rates, independence, and the limits of classifier-free guidance, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import (
    ancestral_step,
    classifier_free,
    cosine_betas,
    ddim_step,
    drop,
    example_keys,
    make_process,
    predict,
    q_sample,
    respace,
    sample,
    static_threshold,
    target,
)
from ddpm_jax.diffusion.guidance import classifier_guided, dynamic_threshold, implicit_gradient, log_prob_gradient
from ddpm_jax.diffusion.samplers import time_grid

XT = jax.random.normal(jax.random.key(0), (4, 3, 3, 2))
T = jnp.arange(4, dtype=jnp.int32)


def _cond(xt, t):
    return jnp.sin(xt) + t.reshape(-1, 1, 1, 1)


def _null(xt, t):
    return jnp.cos(xt) - 0.5 * t.reshape(-1, 1, 1, 1)


def _with_variance(denoise, v):
    return lambda xt, t: jnp.concatenate([denoise(xt, t), jnp.full_like(xt, v)], axis=-1)


def _forbidden(xt, t):
    raise AssertionError("the null network was called")


def test_drop_rates_and_independence():
    n, image_rate, text_rate = 20000, 0.1, 0.5
    image_key, text_key = jax.random.split(jax.random.key(0))
    image, text = np.asarray(drop(image_key, image_rate, n)), np.asarray(drop(text_key, text_rate, n))
    assert image.dtype == bool
    keep = np.array([[1 - image_rate], [image_rate]]) * np.array([[1 - text_rate, text_rate]])
    counts = np.array([[np.sum((image == i) & (text == j)) for j in (True, False)] for i in (True, False)])
    assert ((counts - n * keep) ** 2 / (n * keep)).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_drop_at_its_ends_is_exact():
    assert bool(drop(jax.random.key(0), 0.0, 10000).all())
    assert not bool(drop(jax.random.key(0), 1.0, 10000).any())
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match="must be in"):
            drop(jax.random.key(0), rate, 4)


def test_a_dropped_condition_has_no_influence_and_a_kept_one_has():
    keep = drop(jax.random.key(1), 0.5, 64)[:, None]
    first, second = jax.random.normal(jax.random.key(2), (2, 64, 8))
    null = jnp.ones((64, 8))
    a, b = jnp.where(keep, first, null), jnp.where(keep, second, null)
    np.testing.assert_array_equal(np.all(np.asarray(a == b), axis=1), ~np.asarray(keep[:, 0]))


@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_one_is_the_conditional_network_alone(scale):
    np.testing.assert_array_equal(classifier_free(_cond, _forbidden, scale)(XT, T), _cond(XT, T))


def test_guidance_needs_a_null_condition():
    with pytest.raises(ValueError, match="null must be the network with its null condition, got None"):
        classifier_free(lambda xt, t: xt, None, 3.0)


def test_scale_zero_is_the_null_network():
    np.testing.assert_array_equal(classifier_free(_cond, _null, 0.0)(XT, T), _null(XT, T))


def test_scale_extrapolates():
    cond, null = np.asarray(_cond(XT, T)), np.asarray(_null(XT, T))
    np.testing.assert_allclose(classifier_free(_cond, _null, 3.0)(XT, T), null + 3 * (cond - null), rtol=1e-6)
    scales = jnp.array([0.0, 1.0, 2.5, -1.0])
    expected = null + np.asarray(scales).reshape(-1, 1, 1, 1) * (cond - null)
    np.testing.assert_allclose(jax.jit(classifier_free(_cond, _null, scales))(XT, T), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, jnp.full(4, 4.0)])
def test_the_variance_half_is_the_conditional_one(scale):
    guided = classifier_free(_with_variance(_cond, 0.25), _with_variance(_null, -0.5), scale)(XT, T)
    np.testing.assert_array_equal(guided[..., 2:], 0.25)
    plain = classifier_free(_cond, _null, scale)(XT, T)
    np.testing.assert_array_equal(guided[..., :2], plain)


def test_bfloat16_outputs_are_guided_in_float32():
    cond, null = (lambda xt, t: _cond(xt, t).astype(jnp.bfloat16)), (lambda xt, t: _null(xt, t).astype(jnp.bfloat16))
    guided = classifier_free(cond, null, 3.0)(XT, T)
    assert guided.dtype == jnp.float32
    a, b = np.asarray(cond(XT, T), np.float32), np.asarray(null(XT, T), np.float32)
    np.testing.assert_allclose(guided, b + 3 * (a - b), rtol=1e-6)


def test_guidance_errors():
    with pytest.raises(ValueError, match="cond and null must return"):
        classifier_free(_with_variance(_cond, 0.0), _null, 2.0)(XT, T)
    with pytest.raises(ValueError, match="cond and null must return"):
        classifier_free(lambda xt, t: xt[..., :1], lambda xt, t: xt[..., :1], 2.0)(XT, T)
    with pytest.raises(ValueError, match="one for each of 4 examples"):
        classifier_free(_cond, _null, jnp.ones(3))(XT, T)


def test_static_threshold():
    x0 = jnp.array([[-3.0, -0.2, 0.9, 2.0]])
    np.testing.assert_array_equal(static_threshold()(x0), jnp.array([[-1.0, -0.2, 0.9, 1.0]]))
    np.testing.assert_array_equal(static_threshold(2.5)(x0), jnp.array([[-2.5, -0.2, 0.9, 2.0]]))
    with pytest.raises(ValueError, match="bound=0 must be positive"):
        static_threshold(0)


def test_several_conditions_add_their_differences():
    second = lambda xt, t: 2.0 * xt
    cond, null, other = (np.asarray(f(XT, T)) for f in (_cond, _null, second))
    guided = classifier_free((_cond, second), _null, (2.0, jnp.array([0.0, 1.0, 2.0, 3.0])))(XT, T)
    scales = np.arange(4.0).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(guided, null + 2 * (cond - null) + scales * (other - null), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a scale for each condition, got 1 for 2"):
        classifier_free((_cond, second), _null, (2.0,))


def test_an_interval_guides_at_its_timesteps_alone():
    guided = classifier_free(_cond, _null, 3.0, interval=(1, 2))(XT, T)
    everywhere = classifier_free(_cond, _null, 3.0)(XT, T)
    np.testing.assert_array_equal(guided[1:3], everywhere[1:3])
    np.testing.assert_array_equal(guided[::3], _cond(XT, T)[::3])
    with pytest.raises(ValueError, match="interval=.* must be two timesteps"):
        classifier_free(_cond, _null, 3.0, interval=(2, 1))


def test_rescaling_brings_the_spread_back():
    guided = np.asarray(classifier_free(_cond, _null, 4.0)(XT, T))
    spread = lambda x: np.asarray(x).reshape(4, -1).std(axis=1)
    full = classifier_free(_cond, _null, 4.0, rescale=1.0)(XT, T)
    np.testing.assert_allclose(spread(full), spread(_cond(XT, T)), rtol=1e-5)
    half = classifier_free(_cond, _null, 4.0, rescale=0.5)(XT, T)
    np.testing.assert_allclose(half, 0.5 * (np.asarray(full) + guided), rtol=1e-5)
    with pytest.raises(ValueError, match="rescale=1.5 must be in"):
        classifier_free(_cond, _null, 4.0, rescale=1.5)


def test_dynamic_threshold_against_numpy():
    x0 = np.random.default_rng(0).normal(size=(3, 10, 10, 2)) * np.array([0.1, 1.0, 5.0]).reshape(3, 1, 1, 1)
    s = np.maximum(np.quantile(np.abs(x0).reshape(3, -1), 0.9, axis=1), 1.0).reshape(3, 1, 1, 1)
    out = np.asarray(dynamic_threshold(0.9)(jnp.asarray(x0, jnp.float32)))
    np.testing.assert_allclose(out, np.clip(x0, -s, s) / s, atol=1e-5)
    np.testing.assert_allclose(out[0], x0[0], atol=1e-6)  # already inside
    assert np.abs(out).max() == pytest.approx(1.0)
    for quantile, bound in ((0.0, 1.0), (1.1, 1.0), (0.9, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            dynamic_threshold(quantile, bound)


MEAN, STD, NOISE, SEEN = 0.3, 0.5, 0.4, 0.9
PROCESS = make_process(cosine_betas(1000))


def _x0_given_xt(xt, t):
    """Mean and variance of x0 given xt for data N(MEAN, STD^2)."""
    alpha_bar = PROCESS.alpha_bar[t][:, None]
    variance = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    total = alpha_bar * STD**2 + 1 - alpha_bar
    return MEAN + jnp.sqrt(alpha_bar) * STD**2 * (xt - jnp.sqrt(alpha_bar) * MEAN) / total, variance


def _network(prediction):
    def denoise(xt, t):
        x0 = _x0_given_xt(xt, t)[0]
        alpha, sigma = (v[t][:, None] for v in (PROCESS.alpha, PROCESS.sigma))
        return target(PROCESS, x0, (xt - alpha * x0) / sigma, t, prediction=prediction)

    return denoise


def _log_prob(xt, t):
    """log p(y = SEEN | xt) with y = x0 + N(0, NOISE^2), up to a constant of t."""
    mean, variance = _x0_given_xt(xt, t)
    return (-0.5 * (SEEN - mean) ** 2 / (variance + NOISE**2))[:, 0]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ["ddim", "ancestral"])
def test_the_exact_classifier_gives_the_exact_posterior(prediction, name):
    """Gaussian data seen through Gaussian noise have a Gaussian posterior."""
    n, short = 4096, respace(PROCESS, "500")
    if name == "ddim":
        step = ddim_step()
        denoise = classifier_guided(PROCESS, _network(prediction), _log_prob, 1.0, prediction=prediction)
    else:
        denoise, step = _network(prediction), ancestral_step(guide=lambda xt, t: log_prob_gradient(_log_prob, xt, t))
    draw = jax.jit(lambda keys: sample(short, denoise, keys, (1,), step=step, prediction=prediction))
    x0 = draw(example_keys(jax.random.key(0), n))
    variance = 1 / (1 / STD**2 + 1 / NOISE**2)
    mean = variance * (MEAN / STD**2 + SEEN / NOISE**2)
    assert float(x0.mean()) == pytest.approx(mean, abs=4 * variance**0.5 / n**0.5 + 5e-3)
    assert float(x0.std()) == pytest.approx(variance**0.5, rel=4 * (1 / (2 * n)) ** 0.5 + 1e-2)


def test_classifier_guidance_leaves_the_variance_half_and_scales_by_example():
    xt = q_sample(PROCESS, jnp.ones((3, 2)), jnp.array([5, 400, 900]), jnp.ones((3, 2)))
    t = jnp.array([5, 400, 900])
    log_prob = lambda xt, t: -jnp.sum(xt**2, axis=-1)
    double = lambda xt, t: jnp.concatenate([0.1 * xt, jnp.full_like(xt, 0.7)], axis=-1)
    out = np.asarray(classifier_guided(PROCESS, double, log_prob, jnp.array([0.0, 1.0, 2.0]))(xt, t))
    np.testing.assert_array_equal(out[:, 2:], np.float32(0.7))
    sigma = np.asarray(PROCESS.sigma)[np.asarray(t)][:, None]
    scale = np.array([[0.0], [1.0], [2.0]])
    np.testing.assert_allclose(out[:, :2], 0.1 * xt - sigma * scale * (-2 * np.asarray(xt)), rtol=1e-5)
    with pytest.raises(ValueError, match="log_prob must return one number an example"):
        log_prob_gradient(lambda xt, t: xt, xt, t)
    with pytest.raises(ValueError, match="prediction='noise' must be one of"):
        classifier_guided(PROCESS, double, log_prob, 1.0, prediction="noise")


def _of_gaussian(mean, std, prediction):
    """The exact network of data N(mean, std^2), by Bayes' rule."""

    def denoise(xt, t):
        alpha, sigma = (v[t][:, None] for v in (PROCESS.alpha, PROCESS.sigma))
        eps = sigma * (xt - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return target(PROCESS, (xt - sigma * eps) / alpha, eps, t, prediction=prediction)

    return denoise


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_implicit_gradient_is_that_of_the_log_ratio(prediction):
    """Against log N(xt; alpha m, alpha^2 s^2 + sigma^2) of both distributions, in numpy and float64."""
    xt, t = jnp.array([[0.3], [-1.2], [0.8]]), jnp.array([20, 400, 800])
    cond, null = (1.0, 0.3), (0.2, 0.9)
    scale = jnp.array([0.0, 1.0, 2.5])
    double = lambda xt, t: jnp.concatenate([_of_gaussian(*cond, prediction)(xt, t), jnp.full_like(xt, 0.7)], axis=-1)
    gradient = implicit_gradient(PROCESS, double, _of_gaussian(*null, prediction), scale, prediction=prediction)(xt, t)
    alpha_bar = np.asarray(PROCESS.alpha_bar, np.float64)[np.asarray(t)][:, None]
    slopes = [
        -(np.asarray(xt, np.float64) - np.sqrt(alpha_bar) * mean) / (alpha_bar * std**2 + 1 - alpha_bar)
        for mean, std in (cond, null)
    ]
    np.testing.assert_allclose(gradient, np.asarray(scale)[:, None] * (slopes[0] - slopes[1]), rtol=2e-4, atol=1e-5)
    assert gradient[0, 0] == 0


def test_guidance_is_weighted_by_the_learned_variance_of_every_channel():
    """Two channels alike but for the learned range: their means are shifted in proportion to their variances."""
    t, xt = jnp.array([300]), jnp.array([[0.4, 0.4]])
    network = lambda mean: (
        lambda xt, t: jnp.concatenate([_of_gaussian(mean, 0.5, "eps")(xt, t), jnp.array([[-1.0, 1.0]])], axis=-1)
    )
    guide = implicit_gradient(PROCESS, network(0.8), network(-0.3), 3.0)
    grid = time_grid(PROCESS)
    step, point, there = ancestral_step(guide), *(jax.tree.map(lambda a, i=i: a[i], grid) for i in (699, 700))
    keys = example_keys(jax.random.key(0), 1)
    predict_fn = lambda xt, point: predict(
        PROCESS, network(0.8)(xt, t), xt, t, prediction="eps", variance="learned_range"
    )
    moved = step.update(predict_fn, keys, xt, point, there, ())[0]
    still = ancestral_step().update(predict_fn, keys, xt, point, there, ())[0]
    variance = np.exp([float(PROCESS.posterior_log_variance[300]), float(PROCESS.log_betas[300])])
    assert int(point.t) == 300
    np.testing.assert_allclose((moved - still)[0], variance * np.asarray(guide(xt, t))[0], rtol=1e-3)
    with pytest.raises(ValueError, match="prediction='mean' must be one of"):
        implicit_gradient(PROCESS, network(0.8), network(0.8), prediction="mean")


def test_clip_guidance_moves_samples_towards_their_text():
    """GLIDE, section 2.4: the log probability is the dot product of a noised image's embedding and a text's."""
    texts = jnp.tile(jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), (64, 1))
    encode = lambda xt, t: xt / jnp.linalg.norm(xt, axis=-1, keepdims=True)
    log_prob = lambda xt, t: jnp.sum(encode(xt, t) * texts, axis=-1)
    short, keys = respace(PROCESS, "25"), example_keys(jax.random.key(0), 256)
    similarity = {}
    for scale in (0.0, 1.0, 3.0):
        denoise = classifier_guided(PROCESS, _of_gaussian(0.0, 1.0, "eps"), log_prob, scale)
        options = {"step": ddim_step(), "x0_transform": static_threshold(2.0)}
        x0 = jax.jit(lambda keys, denoise=denoise, options=options: sample(short, denoise, keys, (2,), **options))(keys)
        similarity[scale] = np.asarray(log_prob(x0, None))
    assert abs(similarity[0.0].mean()) < 0.2  # 4.5 standard errors of the mean of a random angle's cosine
    assert similarity[3.0].mean() > similarity[1.0].mean() + 0.1 > similarity[0.0].mean() + 0.2


def test_earlier_names_are_aliases():
    assert ddpm_jax.drop is ddpm_jax.keep_mask is ddpm_jax.guidance.drop
    names = {"grey_of": "colorization", "average_of": "super_resolution", "measured": "ddnm_projection"}
    for old, new in names.items():
        assert getattr(ddpm_jax.samplers, old) is getattr(ddpm_jax.samplers, new)
