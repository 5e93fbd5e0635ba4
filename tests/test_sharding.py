"""Which device holds which part of a parameter, and that training does not depend on it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_training
from jax.sharding import PartitionSpec

from ddpm_jax.parallel.mesh import batch_axes, batch_shards, data_sharding, make_mesh, replicated, shard_batch
from ddpm_jax.parallel.sharding import make_gather, parameter_specs, specs_like, used_dtypes
from ddpm_jax.training.programs import prepare_program
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import make_train_step

ALL, MIXED = {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 4}
RULES = (("dense/kernel", (None, None)), ("wide/kernel", (("fsdp",), None)), ("wide/bias", ("fsdp",)))
SHAPES = {
    "block_0": {
        "mlp_1": {"kernel": (256, 1024), "bias": (1024,)},
        "mlp_2": {"kernel": (1024, 256), "bias": (256,)},
        "qkv": {"kernel": (256, 768)},
    },
    "down_0_0": {
        "conv_1": {"kernel": (3, 3, 64, 128)},
        "norm_2": {"scale": (128,)},
        "conv_2": {"kernel": (3, 3, 128, 64)},
    },
    "odd": {"kernel": (129, 131)},
}
PARAMS = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def test_default_rules():
    specs = parameter_specs(PARAMS, make_mesh(ALL))
    block = specs["block_0"]
    assert block["mlp_1"] == {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec("tensor")}
    assert block["mlp_2"] == {"kernel": PartitionSpec("tensor", "fsdp"), "bias": PartitionSpec()}
    assert block["qkv"]["kernel"] == PartitionSpec(None, "fsdp")  # the largest axis
    conv = specs["down_0_0"]
    assert conv["conv_1"]["kernel"] == PartitionSpec(None, None, "fsdp", "tensor")
    assert conv["conv_2"]["kernel"] == PartitionSpec(None, None, "tensor", "fsdp")
    assert conv["norm_2"]["scale"] == PartitionSpec("tensor")
    assert specs["odd"]["kernel"] == PartitionSpec()  # no axis is even
    scanned = {"blocks": {"mlp_1": {"kernel": jax.ShapeDtypeStruct((3, 256, 1024), jnp.float32)}}}
    assert parameter_specs(scanned, make_mesh(ALL))["blocks"]["mlp_1"]["kernel"] == PartitionSpec(
        None, "fsdp", "tensor"
    )


def test_data_parallelism_splits_no_parameter():
    specs = parameter_specs(PARAMS, make_mesh({"data": -1}))
    assert all(not any(spec) for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)))


def test_a_rule_of_the_user_is_exact_and_the_first_that_matches_decides():
    rules = ((r"qkv/kernel$", (None, None)), (r"kernel$", (*(None,), ("data", "fsdp"))))
    params = {"qkv": PARAMS["block_0"]["qkv"], "mlp_1": {"kernel": PARAMS["block_0"]["mlp_1"]["kernel"]}}
    specs = parameter_specs(params, make_mesh(MIXED), rules)
    assert specs["qkv"]["kernel"] == PartitionSpec()
    assert specs["mlp_1"]["kernel"] == PartitionSpec(None, ("data", "fsdp"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            ("attention/kernel", (None, "tensor")),
            "'attention/kernel' matches no parameter; their paths are as block_0/mlp",
        ),
        (("qkv(", (None, None)), r"'qkv\(' is not a regular expression"),
        (("qkv/kernel", ("tensor",)), r"has 1 entries, and block_0/qkv/kernel has the shape \(256, 768\)"),
        (("qkv/kernel", ("model", None)), "names 'model', and the mesh has the axes data, fsdp, tensor"),
        (("odd/kernel", ("fsdp", None)), r"splits an axis of odd/kernel, of shape \(129, 131\), into 2 parts"),
        (("qkv/kernel", "tensor"), "must have a mesh axis or None for each axis, got 'tensor'"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        parameter_specs(PARAMS, make_mesh(ALL), (rule,))


def test_the_optimizer_state_is_split_like_the_parameters():
    specs = parameter_specs(PARAMS, make_mesh(ALL))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    state = jax.eval_shape(tx.init, PARAMS)
    found = specs_like(state, PARAMS, specs)
    adam = found[1][0]
    assert adam.mu == specs and adam.nu == specs
    assert adam.count == PartitionSpec()


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(ALL)
    assert batch_axes(mesh) == ("data", "fsdp") and batch_shards(mesh) == 4
    assert data_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    array = shard_batch({"x": np.arange(8.0)}, mesh)["x"]
    assert {shard.data.shape for shard in array.addressable_shards} == {(2,)}


def test_dtypes_in_which_parameters_are_used():
    half, names = jnp.bfloat16, ("in_remat", "exact", "in_a_call", "both", "in_a_loop", "in_a_branch", "unused")

    def function(params):
        x = jax.checkpoint(lambda w: w.astype(half) * 2)(params["in_remat"]).astype(jnp.float32)
        x = jax.jit(lambda x, w: x * w.astype(half))(x * params["exact"], params["in_a_call"])
        x = x * params["both"].astype(half) + params["both"]
        x = jax.lax.fori_loop(0, 2, lambda _, x: x * params["in_a_loop"].astype(half), x)
        return jax.lax.cond(x.sum() > 0, lambda w: w.astype(half), lambda w: -w.astype(half), params["in_a_branch"])

    found = used_dtypes(function, {name: jnp.ones(3) for name in names})
    # What runs in loops and branches is left as it is.
    assert {name for name, dtype in found.items() if dtype == half} == {"in_remat", "in_a_call"}


class WideTask(toy_training.ToyTask):
    """The toy with a layer before it whose weights are rounded to a dtype where they are used."""

    def __init__(self, dtype):
        self.dtype = dtype

    def init(self, key, batch):
        wide = {"kernel": jnp.eye(8, toy_training.FEATURES) * 0.5, "bias": jnp.zeros((8,))}
        return super().init(key, batch) | {"wide": wide}

    def loss(self, params, batch, key):
        wide = params["wide"]
        x = jnp.concatenate([batch["x"], batch["y"]], axis=1).astype(self.dtype) @ wide["kernel"].astype(self.dtype)
        x = x.astype(jnp.float32) + wide["bias"][:5][None]
        return super().loss(params, batch | {"x": x}, key)


def trained(axes, dtype=jnp.float32, rules=RULES, sam_rho=None):
    """Return the state after three steps of `WideTask` on a mesh, and the program's text."""
    mesh, task, tx = (
        make_mesh(axes, devices=jax.devices()[: np.prod(list(axes.values()))]),
        WideTask(dtype),
        optax.adamw(0.01),
    )
    rules = rules if "fsdp" in axes else ()
    batch = shard_batch(toy_training.toy_batch(0), mesh)
    key = jax.device_put(jax.random.key(1), replicated(mesh))
    state = create_state(task, tx, key, mesh, batch, rules)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    dtypes = used_dtypes(lambda params: task.loss(params, batch, key), state.params)
    assert [str(dtypes["wide"][name]) for name in ("kernel", "bias")] == [jnp.dtype(dtype).name, "float32"]
    gather = make_gather(mesh, specs, dtypes) if "fsdp" in axes else None
    parts = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(task, tx, ema_decay=0.9, gather=gather, sam_rho=sam_rho)
    step = jax.jit(step, out_shardings=(parts, replicated(mesh)))
    lowered = step.lower(state, batch, key)
    program = lowered.compile()
    for _ in range(3):
        state, metrics = program(state, batch, key)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == parts
    return jax.device_get((state, metrics)), program.as_text(), lowered.as_text()


@functools.cache
def trained_on_one_device():
    return trained({"data": 1})[0]


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}])
def test_a_step_is_the_same_on_every_mesh(axes):
    found, *_ = trained(axes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, trained_on_one_device())


def test_sharpness_aware_minimization_is_the_same_on_every_mesh():
    found, expected = (trained(axes, sam_rho=0.5)[0] for axes in ({"data": 2, "fsdp": 4}, {"data": 1}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    plain = trained_on_one_device()[0].params["wide"]["kernel"]
    assert np.abs(found[0].params["wide"]["kernel"] - plain).max() > 1e-3


def test_a_run_continues_on_other_devices(tmp_path):
    """Data parallel on 8 devices, then split over 4: as on one device from the first step to the last."""

    def go(workdir, num_steps, axes):
        devices = jax.devices()[: np.prod(list(axes.values()))]
        rules = RULES if "fsdp" in axes else ()
        options = {"loader": toy_training.ToyLoader(), "task": WideTask(jnp.float32), "rules": rules}
        return toy_training.run(workdir, num_steps=num_steps, mesh=make_mesh(axes, devices=devices), **options)

    for directory in ("one", "several"):
        (tmp_path / directory).mkdir()
    expected = go(tmp_path / "one", 8, {"data": 1})
    go(tmp_path / "several", 4, {"data": 8})
    found = go(tmp_path / "several", 8, {"data": 2, "fsdp": 2})
    assert found.params["wide"]["kernel"].sharding.spec == PartitionSpec("fsdp")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *map(jax.device_get, (found, expected))
    )


def test_sharded_weights_are_gathered_in_the_dtype_of_their_use_and_nothing_else_is_exchanged():
    _, text, lowered = trained({"fsdp": 8}, jnp.bfloat16)
    kinds = set(
        re.findall(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    )
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"} and "all-gather" in kinds
    # XLA for the CPU widens bfloat16; what the step says is in the program before XLA.
    gathered = re.findall(r"sharding_constraint %\S+ <@mesh, \[(?:\{\}(?:, )?)+\]> : tensor<(\S+)>", lowered)
    assert set(gathered) >= {"8x5xbf16", "8xf32"}, lowered


class TwiceTask(WideTask):
    """The toy after a function that the backward pass computes again."""

    def loss(self, params, batch, key):
        twice = jax.checkpoint(lambda kernel, x: jnp.tanh(x @ kernel[:5]))
        return super().loss(params, batch | {"x": twice(params["wide"]["kernel"], batch["x"])}, key)


@pytest.mark.parametrize("axes", [{"data": 2}, {"fsdp": 2}])
def test_gathering_leaves_to_the_network_what_is_computed_again(axes):
    mesh, task, tx = make_mesh(axes, devices=jax.devices()[:2]), TwiceTask(jnp.float32), optax.sgd(0.1)
    batch = shard_batch(toy_training.toy_batch(0), mesh)
    state = create_state(task, tx, jax.random.key(0), mesh, batch, RULES if "fsdp" in axes else ())
    gather = make_gather(mesh, jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)) if "fsdp" in axes else None
    step = make_train_step(task, tx, ema_decay=0.9, gather=gather)
    program = str(jax.make_jaxpr(step)(state, batch, jax.random.key(1)))
    assert len(re.findall(r"\btanh\b", program)) == 2


@pytest.mark.parametrize("axes", [{"data": 8}, MIXED, ALL])
def test_frozen_networks_are_split_between_the_steps(axes):
    """Each device holds a part of the weights, and computes the same; nothing but weights is exchanged."""
    mesh, rng = make_mesh(axes), np.random.default_rng(0)
    weights = {"clip": {"dense": {"kernel": rng.standard_normal((64, 128)).astype(np.float32)}, "scale": np.ones(3)}}
    batch = {"x": rng.standard_normal((8, 64)).astype(np.float32)}

    def prepare(models, batch):
        return batch | {"z": batch["x"] @ models["clip"]["dense"]["kernel"] * models["clip"]["scale"][0]}

    program, places = prepare_program(prepare, mesh, weights)
    placed = jax.tree.map(jax.device_put, weights, places)
    part = placed["clip"]["dense"]["kernel"].addressable_shards[0].data.size
    assert part == 64 * 128 // mesh.shape.get("fsdp", 1)
    found = program(placed, jax.device_put(batch, data_sharding(mesh)))
    np.testing.assert_allclose(found["z"], batch["x"] @ weights["clip"]["dense"]["kernel"], rtol=1e-5, atol=1e-5)
    text = program.lower(placed, jax.device_put(batch, data_sharding(mesh))).compile().as_text()
    assert ("all-gather(" in text) == ("fsdp" in axes)
    assert "all-to-all(" not in text and "collective-permute(" not in text
