"""Importance sampling of timesteps: the history against a plain loop, the estimate without bias, less variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from ddpm_jax.diffusion.importance import (
    LossHistory,
    importance_timesteps,
    loss_history,
    record_losses,
    timestep_probabilities,
)

STEPS, LENGTH = 7, 3
SIZES = np.array([9.0, 3.0, 1.0, 0.5, 0.3, 0.2, 0.1])


def full_history():
    return LossHistory(jnp.asarray(np.tile(SIZES[:, None], LENGTH), jnp.float32), jnp.full(STEPS, LENGTH, jnp.int32))


def test_the_history_keeps_the_last_losses_of_every_step():
    """Against lists, with batches in which a step occurs more often than its history is long."""
    rng = np.random.default_rng(0)
    history, expected = loss_history(STEPS, LENGTH), [[] for _ in range(STEPS)]
    record = jax.jit(record_losses)
    for _ in range(6):
        t, losses = rng.integers(0, STEPS, 12), rng.uniform(size=12)
        t[:5] = 2
        history = record(history, jnp.asarray(t, jnp.int32), jnp.asarray(losses, jnp.float32))
        for step, loss in zip(t, losses, strict=True):
            expected[step].append(np.float32(loss))
        for step in range(STEPS):
            count = int(history.counts[step])
            assert count == len(expected[step])
            kept = np.asarray(history.losses[step, : min(count, LENGTH)])
            np.testing.assert_array_equal(np.sort(kept), np.sort(np.array(expected[step][-LENGTH:], np.float32)))


def test_probabilities_follow_the_second_moment():
    losses = np.random.default_rng(1).uniform(size=(STEPS, LENGTH))
    history = LossHistory(jnp.asarray(losses, jnp.float32), jnp.full(STEPS, LENGTH, jnp.int32))
    size = np.sqrt((losses**2).mean(1))
    expected = 0.99 * size / size.sum() + 0.01 / STEPS
    np.testing.assert_allclose(timestep_probabilities(history, 0.01), expected, rtol=1e-6)


@pytest.mark.parametrize("counts", [[3] * 6 + [2], [0] * 7])
def test_steps_are_uniform_until_every_history_is_full(counts):
    history = full_history().replace(counts=jnp.asarray(counts, jnp.int32))
    np.testing.assert_allclose(timestep_probabilities(history), 1 / STEPS, rtol=1e-6)
    np.testing.assert_allclose(importance_timesteps(jax.random.key(0), 5, history)[1], 1.0, rtol=1e-6)


def test_huge_losses_do_not_overflow():
    history = full_history().replace(losses=full_history().losses.at[0].set(1e30))
    expected = 0.999 * np.eye(STEPS)[0] + 0.001 / STEPS
    np.testing.assert_allclose(timestep_probabilities(history), expected, rtol=1e-5)


def test_losses_of_zero_leave_the_steps_uniform():
    history = full_history().replace(losses=jnp.zeros((STEPS, LENGTH)))
    np.testing.assert_allclose(timestep_probabilities(history), 1 / STEPS, rtol=1e-6)


def test_the_estimate_is_unbiased_and_varies_less():
    n = 20_000
    t, weight = importance_timesteps(jax.random.key(0), n, full_history())
    p = np.asarray(timestep_probabilities(full_history()), np.float64)
    counts = np.bincount(np.asarray(t), minlength=STEPS)
    assert scipy.stats.chisquare(counts, n * p / p.sum()).pvalue > 1e-3
    estimates = SIZES[np.asarray(t)] * np.asarray(weight, np.float64)
    uniform = SIZES[np.random.default_rng(0).integers(0, STEPS, n)]
    assert estimates.mean() == pytest.approx(SIZES.mean(), rel=5e-3)
    assert estimates.std() < 0.05 * uniform.std()


def test_a_loss_that_is_not_finite_is_not_recorded():
    before = full_history()
    after = record_losses(before, jnp.array([1, 2]), jnp.array([0.5, jnp.nan]))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_errors():
    with pytest.raises(ValueError, match="num_steps=0 and length=10 must be at least 1"):
        loss_history(0)
    with pytest.raises(ValueError, match="uniform=1.5 must be in"):
        timestep_probabilities(full_history(), 1.5)
    with pytest.raises(ValueError, match="vectors of one length"):
        record_losses(full_history(), jnp.array([1]), jnp.zeros(2))
