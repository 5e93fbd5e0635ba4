"""The training step: gradient, accumulation, moving average, and what it does with a loss that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_training import BATCH, TARGETS, ToyLoader, ToyTask, toy_batch

from ddpm_jax.diffusion.importance import importance_timesteps, loss_history, record_losses
from ddpm_jax.parallel.mesh import data_sharding, make_mesh, replicated, shard_batch
from ddpm_jax.training.state import abstract_state, count_parameters, create_state
from ddpm_jax.training.step import ema_decay_at, make_train_step


class NoiseFree(ToyTask):
    def loss(self, params, batch, key):
        error = batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"][None] - batch["y"]
        return jnp.mean(error**2, axis=-1), {"first": error[:, 0], "constant": jnp.float32(2.0)}


def start(task, tx, devices=None):
    mesh = make_mesh({"data": -1}, devices=devices)
    state = create_state(task, tx, jax.random.key(0), mesh, toy_batch(0))
    return state, shard_batch(next(ToyLoader()), mesh), mesh


def test_one_sgd_step_equals_numpy():
    """Mean squared error of a linear model: d/dW = 2 x^T e / (B N), d/db = 2 sum(e) / (B N)."""
    task, tx = NoiseFree(), optax.sgd(0.5)
    state, batch, _ = start(task, tx)
    x, y = (np.asarray(batch[name], np.float64) for name in "xy")
    kernel = np.asarray(state.params["dense"]["kernel"], np.float64)
    error = x @ kernel - y
    d_kernel, d_bias = 2 * x.T @ error / error.size, 2 * error.sum(0) / error.size

    schedule = optax.constant_schedule(0.5)
    new, metrics = jax.jit(make_train_step(task, tx, ema_decay=0.99, schedule=schedule))(
        state, batch, jax.random.key(1)
    )

    np.testing.assert_allclose(new.params["dense"]["kernel"], kernel - 0.5 * d_kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.params["dense"]["bias"], -0.5 * d_bias, rtol=1e-5, atol=1e-6)
    expected = {
        "loss": (error**2).mean(),
        "first": error[:, 0].mean(),
        "constant": 2.0,
        "grad_norm": np.sqrt((d_kernel**2).sum() + (d_bias**2).sum()),
        "param_norm": np.sqrt((kernel**2).sum()),
        "lr": 0.5,
        "finite": True,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert int(new.step) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sharpness_aware_minimization_on_a_quadratic(accumulate):
    """The gradient of the mean squared error at w + rho g / |g|, by hand; with micro-batches the mean of theirs."""
    task, tx, rho = NoiseFree(), optax.sgd(0.5), 0.3
    state, batch, _ = start(task, tx)
    x, y = (np.asarray(batch[name], np.float64) for name in "xy")
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)  # whose last weights are the bias
    w = np.concatenate([np.asarray(state.params["dense"]["kernel"], np.float64), np.zeros((1, y.shape[1]))])

    def gradient(w, x, y):
        error = x @ w - y
        return 2 * x.T @ error / error.size

    total = 0.0
    for part in range(accumulate):
        own = (x[part::accumulate], y[part::accumulate])
        g = gradient(w, *own)
        total += gradient(w + rho * g / np.linalg.norm(g), *own) / accumulate

    step = make_train_step(task, tx, ema_decay=0.99, accumulate=accumulate, sam_rho=rho)
    new, metrics = jax.jit(step, donate_argnums=0)(state, batch, jax.random.key(1))
    found = np.concatenate([new.params["dense"]["kernel"], new.params["dense"]["bias"][None]])
    np.testing.assert_allclose(found, w - 0.5 * total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(total), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.square(x @ w - y).mean(), rtol=1e-5)  # before the climb
    plain = w - 0.5 * gradient(w, x, y)
    assert np.abs(found - plain).max() > 1e-2


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulation_equals_one_large_batch(accumulate):
    task, tx = NoiseFree(), optax.adam(0.1)
    state, batch, _ = start(task, tx, devices=jax.devices()[:1])
    key = jax.random.key(1)
    whole, metrics = jax.jit(make_train_step(task, tx, ema_decay=0.5))(state, batch, key)
    parts, metrics_of_parts = jax.jit(make_train_step(task, tx, ema_decay=0.5, accumulate=accumulate))(
        state, batch, key
    )
    for a, b in zip(jax.tree.leaves((whole, metrics)), jax.tree.leaves((parts, metrics_of_parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_micro_batches_draw_different_noise():
    class Noise(ToyTask):
        def loss(self, params, batch, key):
            draw = jax.random.uniform(key)
            return 0.0 * batch["x"][:, 0] * params["dense"]["bias"][0], {"draw": draw, "square": draw**2}

    task, tx = Noise(), optax.sgd(0.1)
    state, batch, _ = start(task, tx)
    _, metrics = jax.jit(make_train_step(task, tx, ema_decay=0.5, accumulate=4))(state, batch, jax.random.key(1))
    assert metrics["square"] - metrics["draw"] ** 2 > 1e-4  # the variance of four equal draws is zero


def test_moving_average_equals_numpy():
    """ema_n = d_n ema_{n-1} + (1 - d_n) params_n with d_n = min(decay, (1 + n) / (10 + n)), n from 0."""
    task, tx, loader = ToyTask(), optax.sgd(0.1), ToyLoader()
    state, _, mesh = start(task, tx)
    step = jax.jit(make_train_step(task, tx, ema_decay=0.3))
    expected = np.asarray(state.params["dense"]["kernel"], np.float64)
    for n in range(6):
        state, _ = step(state, shard_batch(next(loader), mesh), jax.random.key(1))
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["dense"]["kernel"], np.float64)
        np.testing.assert_allclose(state.ema_params["dense"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_moving_average_without_warm_up():
    assert float(ema_decay_at(jnp.int32(0), 0.999)) == pytest.approx(0.1)
    assert float(ema_decay_at(jnp.int32(0), 0.999, warmup=False)) == pytest.approx(0.999)
    assert float(ema_decay_at(jnp.int32(10**6), 0.999)) == pytest.approx(0.999)


def test_the_same_on_one_device_and_on_eight():
    task, tx, finals = ToyTask(), optax.adam(0.05), []
    for devices in (jax.devices()[:1], jax.devices()):
        state, _, mesh = start(task, tx, devices)
        place, split, loader = replicated(mesh), data_sharding(mesh), ToyLoader()
        step = jax.jit(
            make_train_step(task, tx, ema_decay=0.9, accumulate=2),
            donate_argnums=0,
            in_shardings=(place, split, place),
            out_shardings=place,
        )
        for _ in range(10):
            state, metrics = step(state, shard_batch(next(loader), mesh), jax.random.key(1))
        finals.append(jax.device_get((state, metrics)))
    for a, b in zip(*map(jax.tree.leaves, finals), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_steps_have_their_own_noise():
    task, tx = ToyTask(), optax.sgd(0.0)
    state, batch, _ = start(task, tx)
    step = jax.jit(make_train_step(task, tx, ema_decay=0.9))
    state, first = step(state, batch, jax.random.key(1))
    _, second = step(state, batch, jax.random.key(1))
    assert float(first["loss"]) != float(second["loss"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    class Bad(ToyTask):
        def loss(self, params, batch, key):
            loss, metrics = super().loss(params, batch, key)
            # The square root of 0 is finite and its gradient is not.
            bad = jnp.nan if where == "loss" else jnp.sqrt(0.0 * params["dense"]["bias"][0])
            return loss + bad, metrics

    task, tx = Bad(), optax.adam(0.1)
    state, batch, _ = start(task, tx)
    new, metrics = jax.jit(make_train_step(task, tx, ema_decay=0.9))(state, batch, jax.random.key(1))
    assert not metrics["finite"]
    assert bool(jnp.isfinite(metrics["loss"])) == (where == "gradient")
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_is_born_replicated_and_can_be_donated():
    task, tx = ToyTask(), optax.adam(0.1)
    state, batch, mesh = start(task, tx)
    for leaf, shape in zip(
        jax.tree.leaves(state),
        jax.tree.leaves(abstract_state(task, tx, jax.random.key(0), mesh, toy_batch(0))),
        strict=True,
    ):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert count_parameters(state.params) == 5 * 3 + 3
    step = jax.jit(make_train_step(task, tx, ema_decay=0.9), donate_argnums=0)
    step(state, batch, jax.random.key(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_no_recompilation_after_the_first_step():
    task, tx = ToyTask(), optax.adam(0.1)
    state, batch, mesh = start(task, tx)
    step = jax.jit(make_train_step(task, tx, ema_decay=0.9), out_shardings=replicated(mesh))
    for _ in range(3):
        state, _ = step(state, batch, jax.device_put(jax.random.key(1), replicated(mesh)))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"sam_rho": 0.0}, "sam_rho=0.0 must be a positive number"),
        ({"sam_rho": np.inf}, "sam_rho=inf must be a positive number"),
    ],
)
def test_arguments_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        make_train_step(ToyTask(), optax.sgd(0.1), **({"ema_decay": 0.9} | bad))


def test_a_batch_that_cannot_be_cut_is_refused():
    task, tx = ToyTask(), optax.sgd(0.1)
    state, batch, _ = start(task, tx)
    with pytest.raises(ValueError, match=f"accumulate=3 must divide the batch, whose leading axis is {BATCH}"):
        make_train_step(task, tx, ema_decay=0.9, accumulate=3)(state, batch, jax.random.key(1))


def test_a_metric_with_a_taken_name_is_refused():
    class Clash(ToyTask):
        def loss(self, params, batch, key):
            loss, _ = super().loss(params, batch, key)
            return loss, {"lr": loss}

    task, tx = Clash(), optax.sgd(0.1)
    state, batch, _ = start(task, tx)
    with pytest.raises(ValueError, match=r"returns metrics named \['lr'\]"):
        make_train_step(task, tx, ema_decay=0.9)(state, batch, jax.random.key(1))


class Importance(ToyTask):
    """Samples a column of the targets by its losses so far, which are its extra state."""

    extra_state = loss_history(TARGETS, 2)

    def loss(self, params, batch, key, extra_state):
        column, weight = importance_timesteps(key, len(batch["x"]), extra_state)
        error = (batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"][None] - batch["y"]) ** 2
        loss = jnp.take_along_axis(error, column[:, None], axis=1)[:, 0]
        return weight * loss, {"column": column, "aux": {"column": column, "loss": loss}}

    def update_extra_state(self, extra_state, aux):
        return record_losses(extra_state, aux["column"], aux["loss"])


def expected_losses(state, batch, columns, before):
    """The last two losses at every column, sorted, in numpy: of the batch's order, after those before."""
    kernel, bias = (np.asarray(state.params["dense"][name], np.float64) for name in ("kernel", "bias"))
    error = (np.asarray(batch["x"], np.float64) @ kernel + bias - np.asarray(batch["y"], np.float64)) ** 2
    lists = [list(losses) for losses in before]
    for row, column in enumerate(columns):
        lists[column].append(error[row, column])
    return lists


def assert_history(history, lists):
    np.testing.assert_array_equal(history.counts, [len(losses) for losses in lists])
    for row, losses in zip(np.asarray(history.losses), lists, strict=True):
        np.testing.assert_allclose(np.sort(row[: len(losses)]), np.sort(losses[-2:]), rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_an_extra_state_holds_the_last_loss_of_every_example_and_weighs_the_next_step(devices):
    """Against lists in numpy and float64, and the weighted gradient by hand."""
    task, tx = Importance(), optax.sgd(0.1)
    state, batch, _ = start(task, tx, devices=jax.devices()[:devices])
    step = jax.jit(make_train_step(task, tx, ema_decay=0.9))
    columns, _ = importance_timesteps(jax.random.fold_in(jax.random.key(1), 0), BATCH, task.extra_state)
    lists = expected_losses(state, batch, columns, [[]] * TARGETS)
    first, metrics = step(state, batch, jax.random.key(1))
    assert "aux" not in metrics
    assert_history(first.extra_state, lists)

    columns, weight = importance_timesteps(jax.random.fold_in(jax.random.key(1), 1), BATCH, first.extra_state)
    assert np.ptp(np.asarray(weight)) > 0.1
    second, _ = step(first, batch, jax.random.key(1))
    assert_history(second.extra_state, expected_losses(first, batch, columns, lists))
    x, y = (np.asarray(batch[name], np.float64) for name in "xy")
    kernel = np.asarray(first.params["dense"]["kernel"], np.float64)
    error = (x @ kernel + np.asarray(first.params["dense"]["bias"], np.float64) - y) * np.eye(TARGETS)[
        np.asarray(columns)
    ]
    gradient = 2 * x.T @ (error * np.asarray(weight)[:, None]) / BATCH
    np.testing.assert_allclose(second.params["dense"]["kernel"], kernel - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_an_extra_state_sees_every_micro_batch():
    """Each draws columns of its own, by the extra state before the step."""
    task, tx, parts = Importance(), optax.sgd(0.1), 4
    state, batch, _ = start(task, tx, devices=jax.devices()[:1])
    new, _ = jax.jit(make_train_step(task, tx, ema_decay=0.9, accumulate=parts))(state, batch, jax.random.key(1))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), 0), parts)
    columns = np.concatenate([importance_timesteps(key, BATCH // parts, task.extra_state)[0] for key in keys])
    order = np.arange(BATCH).reshape(-1, parts).T.ravel()
    cut = {name: np.asarray(value)[order] for name, value in batch.items()}
    assert_history(new.extra_state, expected_losses(state, cut, columns, [[]] * TARGETS))


def test_a_step_that_is_not_made_leaves_the_extra_state():
    task, tx = Importance(), optax.sgd(0.1)
    state, batch, _ = start(task, tx, devices=jax.devices()[:1])
    batch = batch | {"x": batch["x"].at[3].set(jnp.nan)}
    new, metrics = jax.jit(make_train_step(task, tx, ema_decay=0.9))(state, batch, jax.random.key(1))
    assert not bool(metrics["finite"])
    np.testing.assert_array_equal(new.extra_state.counts, 0)
