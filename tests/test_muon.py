"""Muon against numpy float64 and optax.contrib, which leaves it trains, and its state in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_networks import fast_jit, normal

from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.mesh import make_mesh, replicated
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training.muon import is_muon_weight, orthogonalize, scale_by_muon
from ddpm_jax.training.optimizer import make_optimizer, training_optimizer
from ddpm_jax.training.stage import Training
from ddpm_jax.training.state import TrainState

SHAPES = [(90, 24), (24, 90), (40, 40), (7, 1)]


def newton_schulz(x):
    """Jordan et al., as published, in float64; theirs transposes a tall matrix, which changes nothing but the cost."""
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def matrix(m, n, smallest, seed=0):
    """(u, v, float32 u diag(s) v^T) with orthonormal columns in u and v and s from 1 down to `smallest`."""
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u, v = (np.linalg.qr(rng.normal(size=(size, k)))[0] for size in (m, n))
    return u, v, (u * np.geomspace(1, smallest, k) @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [0.5, 0.02])
def test_orthogonalize_equals_the_ordinary_iteration(shape, smallest):
    x = matrix(*shape, smallest)[2]
    np.testing.assert_allclose(jax.jit(orthogonalize)(x), newton_schulz(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_bears_singular_values_whose_squares_float32_cannot_hold(shape):
    """Both iterations leave them small; the largest error of any direction is far below the size of the others, 1."""
    x = matrix(*shape, smallest=1e-6)[2]
    assert np.linalg.norm(np.asarray(jax.jit(orthogonalize)(x)) - newton_schulz(x), ord=2) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    u, v, x = matrix(*shape, smallest=0.02)
    result = np.asarray(orthogonalize(jnp.asarray(x)), np.float64)
    inner = u.T @ result @ v
    values = np.diag(inner)
    assert values.min() > 0.65 and values.max() < 1.25
    np.testing.assert_allclose(inner, np.diag(values), atol=1e-3)
    np.testing.assert_allclose(u @ inner @ v.T, result, atol=1e-3)  # and nothing beside them


def test_orthogonalize_does_not_depend_on_the_scale_and_leaves_zeros():
    x = normal(0, 30, 8)
    np.testing.assert_allclose(orthogonalize(1e-3 * x), orthogonalize(1e3 * x), atol=1e-3)
    np.testing.assert_array_equal(orthogonalize(jnp.zeros((30, 8))), np.zeros((30, 8)))


@pytest.mark.parametrize("count", [1, 4])
def test_devices_share_the_matrices_and_all_have_the_result(count):
    """Three matrices of one shape on four devices leave one without work; a kernel and a dense layer may be alike."""
    mesh = make_mesh({"data": count}, devices=jax.devices()[:count])
    shapes = {"a": (3, 3, 8, 16), "b": (72, 16), "c": (72, 16), "wide": (16, 72), "one": (5, 1)}
    grads = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    alone, shared = scale_by_muon(), scale_by_muon(mesh=mesh)
    expected, _ = jax.jit(alone.update)(grads, alone.init(grads))
    grads = jax.device_put(grads, replicated(mesh))
    updates, state = jax.jit(shared.update)(grads, shared.init(grads))
    for name, update in updates.items():
        np.testing.assert_allclose(update, expected[name], atol=2e-4)
        assert update.sharding.is_equivalent_to(replicated(mesh), update.ndim), name
        assert state.momentum[name].sharding.is_equivalent_to(replicated(mesh), update.ndim), name


def test_the_work_of_muon_is_divided_among_devices():
    """By the compiler's own count of a device's operations: eight matrices on four devices are two for each."""
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    grads = jax.device_put({f"layer_{k}": normal(k, 64, 32) for k in range(8)}, replicated(mesh))
    flops = []
    for tx in (scale_by_muon(), scale_by_muon(mesh=mesh)):
        compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()
        flops.append(compiled.cost_analysis()["flops"])
    assert 0.2 < flops[1] / flops[0] < 0.35


def test_scale_by_muon_equals_numpy():
    """Three steps of Nesterov momentum; a convolution's kernel is the matrix of its inputs and outputs."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 8, 16), "dense": (12, 36)}
    tx = scale_by_muon(beta=0.9)
    state = tx.init({name: jnp.ones(shape) for name, shape in shapes.items()})
    update = jax.jit(tx.update)
    m = {name: np.zeros(shape) for name, shape in shapes.items()}
    for size in (1.0, 3.0, 0.2):
        grads = {name: rng.normal(size=shape) * size for name, shape in shapes.items()}
        updates, state = update({name: jnp.asarray(g, jnp.float32) for name, g in grads.items()}, state)
        for name, g in grads.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            u = 0.9 * m[name] + 0.1 * g
            rows, columns = {"conv": (72, 16), "dense": (12, 36)}[name]
            expected = 0.2 * np.sqrt(max(rows, columns)) * newton_schulz(u.reshape(rows, columns))
            np.testing.assert_allclose(updates[name], expected.reshape(g.shape), rtol=0, atol=2e-4)
            np.testing.assert_allclose(state.momentum[name], m[name], rtol=0, atol=1e-6)
            # 0.2, less what the iteration leaves between 0.68 and 1.13.
            assert 0.15 < np.sqrt(np.mean(np.square(updates[name]))) < 0.22


def test_one_update_is_that_of_optax():
    """The first alone: optax corrects the bias of the momentum, which mixes later gradients in other parts."""
    params = {"conv": normal(1, 3, 3, 8, 16), "dense": normal(2, 12, 36)}
    grads = {"conv": normal(3, 3, 3, 8, 16), "dense": normal(4, 12, 36)}
    numbers = {
        "conv": optax.contrib.MuonDimensionNumbers((0, 1, 2), 3),
        "dense": optax.contrib.MuonDimensionNumbers(0, 1),
    }
    reference = optax.contrib.muon(0.03, consistent_rms=0.2, weight_decay=0.1, muon_weight_dimension_numbers=numbers)
    expected = fast_jit(lambda: reference.update(grads, reference.init(params), params)[0])()
    ours = optax.chain(scale_by_muon(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.03))
    updates = fast_jit(lambda: ours.update(grads, ours.init(params), params)[0])()
    for name in params:
        error = np.linalg.norm(updates[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-3, name


def muon_leaves(params):
    """The names of the leaves that Muon trains, and of the kernels that it does not."""
    leaves = {
        "/".join(key.key for key in path): is_muon_weight(path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    rest = {name.removesuffix("/kernel") for name, muon in leaves.items() if not muon and name.endswith("/kernel")}
    return {name for name, muon in leaves.items() if muon}, rest


def test_which_leaves_of_a_unet_are_muons():
    unet = UNet(32, 3, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=32)
    arguments = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, jnp.int32), None, jnp.zeros((1, 2, 16))
    params = jax.eval_shape(unet.init, jax.random.key(0), *arguments)
    plain = {"conv_1", "conv_2", "emb"}
    blocks = {"down_0_0": plain, "down_0_sample": plain, "down_1_0": plain | {"skip"}, "mid_0": plain, "mid_1": plain}
    blocks |= {name: plain | {"skip"} for name in ("up_0_0", "up_0_1", "up_1_0", "up_1_1")} | {"up_1_sample": plain}
    attention = {"qkv", "context_kv", "out"}
    blocks |= {f"{name}_attn": attention for name in ("down_1_0", "mid", "up_1_0", "up_1_1")}
    expected = {f"params/{block}/{layer}/kernel" for block, layers in blocks.items() for layer in layers}
    muon, rest = muon_leaves(params)
    assert muon == expected | {"params/in_conv/kernel"}
    assert rest == {"params/out_conv", "params/time/dense_0", "params/time/dense_1"}


def test_tables_vectors_and_biases_are_not_muons():
    zeros = jnp.zeros
    params = {
        "words": {"embedding": zeros((9, 4))},
        "layout": {"kernel": zeros((4, 6)), "bias": zeros(6)},
        "unet": {"time": {"dense_0": {"kernel": zeros((4, 4))}}, "out_conv": {"kernel": zeros((3, 3, 4, 3))}},
        "position": zeros((5, 4)),
        "attention": {"kernel": zeros((4, 2, 3)), "bias": zeros((2, 3))},  # three axes: not one of this package's
        "mlp": {"dense_0": {"kernel": zeros((4, 4))}},  # has the name, but not in "time"
        "log_scale": zeros(()),
    }
    assert muon_leaves(params)[0] == {"mlp/dense_0/kernel"}


FIELDS = {"learning_rate": 0.1, "warmup_steps": 2, "decay": "linear", "final_fraction": 0.0}
FIELDS |= {"b1": 0.8, "b2": 0.9, "eps": 1e-6, "weight_decay": 0.03, "clip_norm": 0.5}
MUON = {"optimizer": "muon", "muon_learning_rate": 0.02}


def nested(leaves):
    """{"dense": {"kernel": float32}} from {"dense/kernel": float64}."""
    tree = {}
    for name, value in leaves.items():
        module, leaf = name.split("/")
        tree.setdefault(module, {})[leaf] = jnp.asarray(value, jnp.float32)
    return tree


def stage_optimizer(fields):
    return training_optimizer(Training(batch_size=8, num_steps=10, **fields))


def test_a_stage_with_muon_equals_numpy():
    """One clip over all leaves, one weight decay, one shape of schedule; two peaks."""
    rng = np.random.default_rng(0)
    tx, schedule = stage_optimizer(FIELDS | MUON)
    shapes = {"dense/kernel": (6, 4), "dense/bias": (4,), "out_conv/kernel": (3, 3, 4, 3)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = nested(values)
    state, update = tx.init(params), jax.jit(tx.update)
    zeros = {name: np.zeros(shape) for name, shape in shapes.items()}
    momentum, first, second = dict(zeros), dict(zeros), dict(zeros)
    for n, rise in enumerate([0.5, 1.0, 1.0, 7 / 8], start=1):
        grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        updates, state = update(nested(grads), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(schedule(n - 1), 0.1 * rise, rtol=1e-6)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 0.5
        for name, g in grads.items():
            g = g * 0.5 / norm
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            adam = first[name] / (1 - 0.8**n) / (np.sqrt(second[name] / (1 - 0.9**n)) + 1e-6)
            decay = 0 if name == "dense/bias" else 0.03 * values[name]
            if name == "dense/kernel":
                muon = 0.2 * np.sqrt(6) * newton_schulz(0.95 * momentum[name] + 0.05 * g)
                values[name] = values[name] - 0.02 * rise * (muon + decay)
            else:
                values[name] = values[name] - 0.1 * rise * (adam + decay)
    for name, value in values.items():
        module, leaf = name.split("/")
        np.testing.assert_allclose(params[module][leaf], value, rtol=0, atol=1e-5)


def test_a_stage_with_adamw_does_not_look_at_the_learning_rate_of_muon():
    params = {"dense": {"kernel": normal(0, 6, 4)}}
    grads = {"dense": {"kernel": normal(1, 6, 4)}}
    expected, _ = make_optimizer(**FIELDS, total_steps=10)
    run = lambda tx: fast_jit(lambda: tx.update(grads, tx.init(params), params))()
    expected, state = run(expected)
    for fields in ({"optimizer": "adamw", "muon_learning_rate": None}, MUON | {"optimizer": "adamw"}):
        tx, _ = stage_optimizer(FIELDS | fields)
        updates, ours = run(tx)
        np.testing.assert_array_equal(updates["dense"]["kernel"], expected["dense"]["kernel"])
        assert jax.tree.structure(ours) == jax.tree.structure(state)


def test_a_checkpoint_brings_the_state_back_bit_for_bit(tmp_path):
    shapes = {"conv/kernel": (3, 3, 4, 8), "conv/bias": (8,), "dense/kernel": (6, 24), "words/embedding": (5, 8)}
    rng = np.random.default_rng(0)
    params = nested({name: rng.normal(size=shape) for name, shape in shapes.items()})
    tx, _ = make_optimizer(**FIELDS, **MUON, total_steps=10)
    grads = jax.tree.map(lambda x: x + 0.1, params)
    update = jax.jit(tx.update)
    opt_state = update(grads, tx.init(params), params)[1]
    state = TrainState(jnp.int32(1), params, jax.tree.map(jnp.copy, params), opt_state)
    state = jax.device_put(state, replicated(make_mesh({"data": -1}, devices=jax.devices()[:2])))
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    momentum = [leaf for path, leaf in leaves if ".momentum" in jax.tree_util.keystr(path)]
    assert [leaf.shape for leaf in momentum] == [(3, 3, 4, 8), (6, 24)] and all(np.any(leaf) for leaf in momentum)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state.trees(), step=1, data={}, config={}, version="0", stage="toy")
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = TrainState.from_trees(checkpoints.restore_latest(abstract.trees(), config={}).trees)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(
        np.testing.assert_array_equal,
        update(grads, restored.opt_state, restored.params),
        update(grads, state.opt_state, state.params),
    )


def test_the_state_can_be_donated():
    """Two leaves with one buffer would make the first step fail, or read what another leaf has written."""
    shapes = {f"{name}/{leaf}": shape for name in "abc" for leaf, shape in (("kernel", (5, 5)), ("bias", (5,)))}
    tx, _ = make_optimizer(**FIELDS, **MUON, total_steps=10)

    def make():
        params = nested({name: np.ones(shape) for name, shape in shapes.items()})
        return params, tx.init(params)

    def step(state, grads):
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    expected, state = make(), make()
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    kept, donated = jax.jit(step), jax.jit(step, donate_argnums=0)
    for seed in range(2):
        before, grads = state, nested({name: normal(seed, *shape) for name, shape in shapes.items()})
        state, expected = donated(state, grads), kept(expected, grads)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"optimizer": "sgd"}, 'optimizer=\'sgd\' must be one of "adamw", "muon"'),
        ({"muon_learning_rate": None}, "muon_learning_rate=None must be a positive number with optimizer"),
        ({"muon_learning_rate": 0.0}, "muon_learning_rate=0.0 must be"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate=-1.0 must be"),
        ({"muon_learning_rate": float("nan")}, "muon_learning_rate=nan must be"),
        ({"muon_learning_rate": float("inf")}, "muon_learning_rate=inf must be"),
    ],
)
def test_arguments_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**(FIELDS | MUON | bad), total_steps=10)


def test_what_is_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"x must be a matrix, got shape \(3, 3, 8, 16\)"):
        orthogonalize(jnp.zeros((3, 3, 8, 16)))
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        scale_by_muon().init({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
    for beta in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"beta={beta} must be in"):
            scale_by_muon(beta)
