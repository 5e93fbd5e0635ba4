"""Keys of every generator, old-style keys, and noise that another implementation recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import (
    RecordedNoise,
    ancestral_step,
    ddim_step,
    denoising_loss,
    drop,
    example_keys,
    linear_betas,
    make_process,
    respace,
    sample,
)
from ddpm_jax.diffusion.continuous import init_monotone
from ddpm_jax.diffusion.importance import importance_timesteps, loss_history
from ddpm_jax.diffusion.keys import key_vector, one_key, threefry
from ddpm_jax.diffusion.likelihood import dequantize, variational_bound
from ddpm_jax.diffusion.losses import log_normal_times, stratified_timesteps
from ddpm_jax.diffusion.samplers import (
    analytic_moments,
    predictor_corrector_step,
    repaint_step,
    reverse_diffusion_step,
    sdedit,
)
from ddpm_jax.diffusion.samplers.noise import per_example_normal, transition_keys

GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg")
SHORT = respace(make_process(linear_betas(1000)), "4")
SHAPE = (2, 3)
KNOWN = jnp.arange(2)[:, None] == 0
STEPS = {
    "ancestral": (ancestral_step(), ()),
    "ddim": (ddim_step(1.0), ()),
    "predictor_corrector": (predictor_corrector_step(reverse_diffusion_step(), corrector_steps=2), (3,)),
    "repaint": (repaint_step(jnp.ones((1, *SHAPE)), KNOWN, resample=2), (6,)),
}


def network(xt, t):
    return 0.5 * xt + 1e-4 * t.astype(xt.dtype).reshape(-1, 1, 1)


def drawn(keys, step, **options):
    return sample(SHORT, network, keys, SHAPE, step=step, prediction="x0", **options)


# ---- Generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", GENERATORS)
def test_noise_of_different_draws_is_independent(generator):
    """Of one example and its neighbour: transitions, draws in them in any order, candidates, stages."""
    keys = example_keys(jax.random.key(0, impl=generator), 2)
    paths = [(), (0,), (1,), (2,), *((a, b) for a in range(3) for b in range(3)), (1, 2, 0), (2, 1, 0), (0, 1, 2)]

    def noise(path):
        own = keys
        for number in path:
            own = transition_keys(own, number)
        return per_example_normal(own, jnp.zeros((2, 4000)))

    rows = np.concatenate([noise(path) for path in paths])
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.09  # 5.7 standard deviations


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("name", ["ancestral", "predictor_corrector", "repaint"])
def test_a_sample_does_not_depend_on_its_batch(generator, name):
    """With the generator of the key, and with it as JAX's default; for derived keys and for the user's own."""
    run = jax.jit(lambda keys: drawn(keys, STEPS[name][0]))
    with jax.default_prng_impl(generator):
        key = jax.random.key(7)
        whole = run(example_keys(key, 4))
        alone = [run(example_keys(key, 1, start=i)) for i in range(4)]
        own = jax.random.split(jax.random.key(8, impl=generator), 4)
        of_own = run(own)
        alone_of_own = [run(own[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(np.concatenate(alone), whole, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(alone_of_own), of_own, atol=1e-5)
    assert len(np.unique(np.concatenate([whole, of_own]).reshape(8, -1), axis=0)) == 8


@pytest.mark.parametrize("generator", GENERATORS)
def test_likelihood_noise_does_not_depend_on_the_batch(generator):
    keys = jax.random.split(jax.random.key(3, impl=generator), 3)
    images = jnp.tile(jnp.arange(12, dtype=jnp.uint8).reshape(1, 2, 2, 3), (3, 1, 1, 1))
    whole = dequantize(keys, images)
    np.testing.assert_array_equal(np.concatenate([dequantize(keys[i : i + 1], images[:1]) for i in range(3)]), whole)
    x0 = jnp.full((3, *SHAPE), 0.25)
    bound = jax.jit(lambda keys, x0: variational_bound(SHORT, network, keys, x0)["total"])
    np.testing.assert_allclose(
        np.concatenate([bound(keys[i : i + 1], x0[:1]) for i in range(3)]), bound(keys, x0), rtol=1e-5
    )


def test_other_generators_are_hashed_by_all_their_words():
    """Keys that differ in one word, or in the order of words, give different Threefry keys; Threefry's stay."""
    words = np.array([[1, 2, 3, 4], [2, 1, 3, 4], [3, 4, 1, 2], [1, 2, 4, 3], [1, 2, 3, 5], [0, 2, 3, 4]], np.uint32)
    for generator in GENERATORS[1:]:
        hashed = threefry(jax.random.wrap_key_data(words, impl=generator))
        assert str(jax.random.key_impl(hashed)) == "threefry2x32"
        assert len(np.unique(jax.random.key_data(hashed), axis=0)) == len(words)
        apart = [threefry(jax.random.wrap_key_data(words[i], impl=generator)) for i in range(len(words))]
        np.testing.assert_array_equal(jax.random.key_data(jnp.stack(apart)), jax.random.key_data(hashed))
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)
    assert threefry(keys) is keys


# ---- Old-style keys --------------------------------------------------------------------------------------------------


def test_old_style_keys_are_those_of_the_new_style():
    old, new = jax.random.PRNGKey(5), jax.random.key(5)
    x0 = jnp.full((2, *SHAPE), 0.25)
    with_one = {
        "denoising_loss": lambda key: denoising_loss(SHORT, network, key, x0)[0],
        "drop": lambda key: drop(key, 0.5, 8),
        "stratified_timesteps": lambda key: stratified_timesteps(key, 8, 100),
        "log_normal_times": lambda key: log_normal_times(key, 8),
        "importance_timesteps": lambda key: importance_timesteps(key, 8, loss_history(10))[0],
        "example_keys": lambda key: jax.random.key_data(example_keys(key, 3)),
    }
    for name, run in with_one.items():
        np.testing.assert_array_equal(run(old), run(new), err_msg=name)
    images = jnp.zeros((2, *SHAPE), jnp.uint8)
    with_many = {
        "sample": lambda keys: drawn(keys, ancestral_step()),
        "sdedit": lambda keys: sdedit(SHORT, network, keys, x0),
        "variational_bound": lambda keys: variational_bound(SHORT, network, keys, x0)["total"],
        "analytic_moments": lambda keys: analytic_moments(SHORT, network, keys, x0),
        "dequantize": lambda keys: dequantize(keys, images),
    }
    olds, news = jax.random.split(old), jax.random.split(new)
    for name, run in with_many.items():
        run = jax.jit(run)
        np.testing.assert_array_equal(run(olds), run(news), err_msg=name)
        np.testing.assert_array_equal(run(np.asarray(olds)), run(news), err_msg=name)
    with jax.default_prng_impl("rbg"):
        wide = jax.random.PRNGKey(5)
        same = threefry(jax.random.key(5))
    assert wide.shape == (4,)
    np.testing.assert_array_equal(jax.random.key_data(threefry(one_key(wide))), jax.random.key_data(same))


@pytest.mark.parametrize(
    ("keys", "got"),
    [
        (0, "int 0"),
        ([jax.random.key(0)], r"a list of 1 \(jnp.stack"),
        (jax.random.key(0), r"key<fry>\[\], one key"),
        (jax.random.PRNGKey(0), r"uint32\[2\], one key"),
        (jnp.zeros((2, 3)), r"float32\[2, 3\]"),
        (None, "NoneType None"),
        (jax.random.split(jax.random.key(0), (2, 2)), r"key<fry>\[2, 2\], keys of shape \(2, 2\)"),
    ],
)
def test_what_is_no_vector_of_keys_is_refused(keys, got):
    with pytest.raises(ValueError, match="keys must be a vector of keys, one for each example.*got " + got):
        drawn(keys, ancestral_step())
    with pytest.raises(ValueError, match="keys must be a vector of keys"):
        dequantize(keys, jnp.zeros((1, 2), jnp.uint8))


@pytest.mark.parametrize("key", [0, [0, 1], jax.random.split(jax.random.key(0)), np.zeros(2), None])
def test_what_is_not_one_key_is_refused(key):
    for run in (
        lambda: example_keys(key, 2),
        lambda: drop(key, 0.5, 2),
        lambda: denoising_loss(SHORT, network, key, jnp.zeros((2, *SHAPE))),
        lambda: stratified_timesteps(key, 2, 10),
        lambda: init_monotone(key, 4),
    ):
        with pytest.raises(ValueError, match=r"key must be one key, as from jax.random.key\(0\), got"):
            run()


def test_the_number_of_keys():
    with pytest.raises(ValueError, match="keys must be one for each example, 3 of them, got 2"):
        key_vector(jax.random.split(jax.random.key(0)), 3)
    with pytest.raises(ValueError, match="n must be known outside of jit, since it is a shape"):
        jax.jit(lambda n: example_keys(jax.random.key(0), n))(3)
    first = jax.jit(lambda start: jax.random.key_data(example_keys(jax.random.key(0), 2, start)))(3)
    np.testing.assert_array_equal(first, jax.random.key_data(example_keys(jax.random.key(0), 5))[3:])


# ---- Recorded noise --------------------------------------------------------------------------------------------------


def record(keys, draws):
    """Write down the noise of keys in the documented layout: [B, T + 1, *draws, *shape]."""
    like = jnp.zeros((len(keys), *SHAPE))

    def of_transition(number):
        own = transition_keys(keys, number)
        if not draws or number == 0:
            return jnp.broadcast_to(per_example_normal(own, like).reshape(-1, *[1] * len(draws), *SHAPE), shape)
        return jnp.stack([per_example_normal(transition_keys(own, m), like) for m in range(*draws)], axis=1)

    shape = (len(keys), *draws, *SHAPE)
    return RecordedNoise(jnp.stack([of_transition(i) for i in range(SHORT.num_steps + 1)], axis=1))


@pytest.mark.parametrize("name", STEPS)
def test_recorded_noise_is_used_as_it_would_be_drawn(name):
    step, draws = STEPS[name]
    keys = example_keys(jax.random.key(1), 3)
    noise, run = record(keys, draws), jax.jit(lambda keys: drawn(keys, step))
    whole = run(noise)
    np.testing.assert_allclose(whole, run(keys), atol=1e-6)
    np.testing.assert_allclose(run(RecordedNoise(noise.values[1:2])), whole[1:2], atol=1e-6)
    mapped = jax.vmap(lambda own: drawn(jax.tree.map(lambda v: v[None], own), step)[0])(noise)
    np.testing.assert_allclose(mapped, whole, atol=1e-6)


def test_recorded_noise_in_closed_form():
    """A network that returns x0 = 0: DDIM with eta 1 multiplies and adds what it is given."""
    values = np.random.default_rng(0).normal(size=(2, 5, 3))
    zero = lambda xt, t: jnp.zeros_like(xt)
    run = lambda noise: sample(SHORT, zero, noise, (3,), step=ancestral_step(), prediction="x0", trajectory=True)
    _, states = jax.jit(run)(RecordedNoise(jnp.asarray(values, jnp.float32)))
    alpha_bar = np.cumprod(1 - linear_betas(1000))[np.asarray(SHORT.timestep_map)]
    before, x = np.append(1, alpha_bar[:-1]), values[:, 0]
    for number, i in enumerate((3, 2, 1, 0), 1):
        beta = 1 - alpha_bar[i] / before[i]
        std = np.sqrt(beta * (1 - before[i]) / (1 - alpha_bar[i]))
        x = (1 - before[i]) * np.sqrt(1 - beta) / (1 - alpha_bar[i]) * x + std * values[:, number]
        np.testing.assert_allclose(states[number - 1], x, rtol=1e-4, atol=1e-5)


def test_recorded_noise_of_sdedit_and_the_bound():
    keys, x0 = example_keys(jax.random.key(2), 2), jnp.full((2, *SHAPE), 0.25)
    noise = record(keys, ())
    half = RecordedNoise(noise.values[:, :3])
    run = jax.jit(lambda keys: sdedit(SHORT, network, keys, x0, strength=0.5, prediction="x0"))
    np.testing.assert_allclose(run(half), run(keys), atol=1e-6)
    bound = jax.jit(lambda keys: variational_bound(SHORT, network, keys, x0)["total"])
    np.testing.assert_allclose(bound(noise), bound(keys), rtol=1e-6)


def test_recorded_noise_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must have 5 entries along axis 1.*got shape \(2, 4, 2, 3\)"):
        drawn(RecordedNoise(jnp.zeros((2, 4, *SHAPE))), ancestral_step())
    with pytest.raises(ValueError, match=r"for samples of \(2, 2, 3\); of one draw it has \(2, 2, 4\)"):
        drawn(RecordedNoise(jnp.zeros((2, 5, 2, 4))), ancestral_step())
    with pytest.raises(ValueError, match="recorded noise must be for 3 examples"):
        sdedit(SHORT, network, RecordedNoise(jnp.zeros((2, 3, *SHAPE))), jnp.zeros((3, *SHAPE)))
    with pytest.raises(ValueError, match="for samples of"):  # without an axis of draws
        drawn(RecordedNoise(jnp.zeros((2, 5, *SHAPE))), STEPS["predictor_corrector"][0])
    with pytest.raises(ValueError, match="M at least 3 for predictor_corrector_step with corrector_steps=2, got M = 2"):
        drawn(RecordedNoise(jnp.ones((2, 5, 2, *SHAPE))), STEPS["predictor_corrector"][0])
    repaint = repaint_step(jnp.zeros((2, *SHAPE)), jnp.ones((2, *SHAPE)), resample=2)  # draws 0, 1, 2, 3 and 4
    with pytest.raises(ValueError, match="M at least 5 for repaint_step with resample=2, got M = 4"):
        drawn(RecordedNoise(jnp.ones((2, 5, 4, *SHAPE))), repaint)
    assert np.isfinite(drawn(RecordedNoise(jnp.ones((2, 5, 5, *SHAPE))), repaint)).all()
    for estimate in (variational_bound, analytic_moments):
        with pytest.raises(ValueError, match=r"at least 4 entries along axis 1, .*got shape \(2, 3, 2, 3\)"):
            estimate(SHORT, network, RecordedNoise(jnp.ones((2, 3, *SHAPE))), jnp.zeros((2, *SHAPE)))
    with pytest.raises(ValueError, match="one key"):
        drop(RecordedNoise(jnp.zeros((2, 5))), 0.5, 2)
