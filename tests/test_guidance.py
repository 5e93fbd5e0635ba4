"""Guidance: drop rates, independence, and the limits of classifier-free guidance, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import classifier_free, drop, static_threshold

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
