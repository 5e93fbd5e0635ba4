"""Sample i depends on key i alone: not on the batch, nor on the others in it, nor on how many devices share it.

Its noise is the same bit for bit. What a program computes from it may round otherwise in a batch of another size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddpm_jax import classifier_free, example_keys, linear_betas, make_process, respace, sample, static_threshold
from ddpm_jax.diffusion.continuous import discretize, edm, karras_times, uniform_times, vp_linear
from ddpm_jax.diffusion.samplers import (
    analytic_step,
    ancestral_step,
    ddim_step,
    dpm_solver_step,
    euler_maruyama_step,
    heun_step,
    plms_step,
    predictor_corrector_step,
    repaint_step,
    reverse_diffusion_step,
    sdedit,
    unipc_step,
)
from ddpm_jax.diffusion.samplers.noise import _threefry_bits, per_example_normal

SHAPE = (4, 4, 3)
SHORT = respace(make_process(linear_betas(1000)), "6")
VP = vp_linear()
CONTINUOUS = discretize(VP, uniform_times(VP, 6))
EDM = discretize(edm(), karras_times(edm(), 6))
IMAGE = jnp.linspace(-1, 1, 48).reshape(1, *SHAPE)

SAMPLERS = {
    "ancestral": (SHORT, ancestral_step()),
    "ddim": (SHORT, ddim_step()),
    "ddim_half": (SHORT, ddim_step(0.5)),
    "dpm_solver_2": (SHORT, dpm_solver_step(2)),
    "dpm_solver_3": (SHORT, dpm_solver_step(3)),
    "dpm_solver_sde": (SHORT, dpm_solver_step(2, sde=True)),
    "unipc": (SHORT, unipc_step()),
    "plms": (SHORT, plms_step()),
    "analytic": (SHORT, analytic_step(0.5 * jnp.ones(6))),
    "reverse_diffusion": (SHORT, reverse_diffusion_step()),
    "predictor_corrector": (SHORT, predictor_corrector_step()),
    "euler_maruyama": (CONTINUOUS, euler_maruyama_step(VP)),
    "heun_churn": (EDM, heun_step(0.3)),
    "repaint": (SHORT, repaint_step(IMAGE, jnp.arange(4)[:, None, None] < 2, resample=2)),
}


def network(bias):
    """An elementwise "network" of x0, whose output is bounded, so that no sampler enlarges a rounding error."""

    def denoise(xt, t):
        x = xt + bias + 1e-3 * t.astype(xt.dtype).reshape(-1, 1, 1, 1)
        return x / (1 + x * x)

    return denoise


def spread(keys):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))


def agrees(draw):
    """Compare eight samples with the same drawn one by one, in reverse and on eight devices."""
    # Rounding where the noise is 80 times the data, or eps becomes x0 at alpha = 0.006, is some 1e-5 of the data.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-4)
    keys = example_keys(jax.random.key(0), 8)
    whole = np.asarray(draw(keys))
    assert len(np.unique(whole.reshape(8, -1), axis=0)) == 8
    assert np.isfinite(whole).all()
    close(np.concatenate([draw(keys[i : i + 1]) for i in range(8)]), whole)
    close(draw(keys[::-1])[::-1], whole)
    shared = draw(spread(keys))
    assert len(shared.sharding.device_set) == 8
    assert not shared.sharding.is_fully_replicated
    close(shared, whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step(name):
    process, step = SAMPLERS[name]
    denoise = classifier_free(network(0.3), network(0.0), 2.0)
    options = {"prediction": "x0", "x0_transform": static_threshold()}
    agrees(jax.jit(lambda keys: sample(process, denoise, keys, SHAPE, step=step, **options)))


def test_sdedit():
    guide = lambda keys: jnp.broadcast_to(IMAGE, (len(keys), *SHAPE))  # noqa: E731
    agrees(jax.jit(lambda keys: sdedit(SHORT, network(0.1), keys, guide(keys), prediction="x0")))


@pytest.mark.parametrize("size", [1, 6, 7])
def test_bits_are_those_of_jax(size):
    keys = jax.random.key_data(example_keys(jax.random.key(3), 4))
    counters = jnp.arange(size, dtype=jnp.uint32)
    expected = [jax.extend.random.threefry_2x32(key, counters) for key in keys]
    np.testing.assert_array_equal(_threefry_bits(keys, size), expected)


def test_noise_is_the_same_in_every_batch_and_on_eight_devices():
    draw = jax.jit(lambda keys: per_example_normal(keys, jnp.zeros((len(keys), *SHAPE))))
    keys = example_keys(jax.random.key(0), 8)
    whole = np.asarray(draw(keys))
    np.testing.assert_array_equal(np.concatenate([draw(keys[i : i + 1]) for i in range(8)]), whole)
    np.testing.assert_array_equal(draw(spread(keys)), whole)


def test_noise_is_that_of_jax_when_it_uses_both_words_too():
    keys = example_keys(jax.random.key(1), 8)
    with jax.threefry_partitionable(False):
        expected = [jax.random.normal(key, (5, 3)) for key in keys]
    np.testing.assert_array_equal(per_example_normal(keys, jnp.zeros((8, 5, 3))), expected)


def test_noise_is_normal():
    noise = np.asarray(per_example_normal(example_keys(jax.random.key(2), 64), jnp.zeros((64, 1000))))
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(noise) - np.eye(64)).max() < 0.15  # 4.7 standard deviations


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_noise_from_keys_of_other_generators(impl):
    """It stays where its key is, and is the same alone, under vmap and on eight devices."""
    keys = example_keys(jax.random.key(0, impl=impl), 8)
    like = jnp.zeros((8, 3))
    whole = np.asarray(per_example_normal(keys, like))
    assert len(np.unique(whole)) == 24
    for i in range(8):
        np.testing.assert_array_equal(whole[i], per_example_normal(keys[i : i + 1], like[:1])[0])
    nested = jax.vmap(lambda key: per_example_normal(key[None], like[:1])[0])(keys)
    np.testing.assert_array_equal(nested, whole)
    shared = jax.jit(lambda keys: per_example_normal(keys, like))(spread(keys))
    assert not shared.sharding.is_fully_replicated
    np.testing.assert_array_equal(shared, whole)


def test_noise_in_another_dtype():
    keys = example_keys(jax.random.key(0), 2)
    noise = per_example_normal(keys, jnp.zeros((2, 3), jnp.bfloat16))
    assert noise.dtype == jnp.bfloat16
    np.testing.assert_array_equal(noise[1], jax.random.normal(keys[1], (3,), jnp.bfloat16))
