"""Checkpoints: what comes back, what is refused, and what happens to damaged files and full disks."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_training import ToyTask, toy_batch

from ddpm_jax.diffusion.importance import LossHistory, loss_history, record_losses
from ddpm_jax.parallel.mesh import make_mesh, replicated
from ddpm_jax.storage import checkpoint as checkpoint_module
from ddpm_jax.storage.checkpoint import (
    CheckpointError,
    Checkpoints,
    restore_params,
)
from ddpm_jax.storage.checksum import checksum
from ddpm_jax.storage.config_difference import config_differences
from ddpm_jax.storage.lock import WorkdirInUse, lock_workdir
from ddpm_jax.training.state import TrainState, abstract_state

CONFIG = {"lr": 0.1, "model": {"width": 8, "levels": (1, 2)}, "training": {"log_every": 5}}
TX = optax.adam(0.1)
KEY = jax.random.key(0)


def make_state(step, width=50):
    """Random numbers, so that nothing is right by chance."""
    rng = np.random.default_rng(step)
    params = {"dense": {"kernel": rng.normal(size=(40, width)), "bias": rng.normal(size=(width,))}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    ema_params = jax.tree.map(lambda x: x + 1, params)
    state = TrainState(jnp.int32(step), params, ema_params, TX.init(params))
    return jax.device_put(state, replicated(make_mesh({"data": -1})))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(directory, *steps, data=None, config=CONFIG, keep=2, width=50):
    checkpoints = Checkpoints(directory, max_to_keep=keep)
    for step in steps:
        checkpoints.save(
            make_state(step, width).trees(),
            step=step,
            data=data or {"at": step},
            config=config,
            version="1.2",
            stage="toy",
        )
    checkpoints.close()


def restore(directory, **options):
    checkpoints = Checkpoints(directory)
    restored = checkpoints.restore_latest(abstract(make_state(0)).trees(), **({"config": CONFIG} | options))
    checkpoints.close()
    return restored


def state_of(restored):
    return TrainState.from_trees(restored.trees)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def files_of(directory, step):
    return sorted(path for path in (directory / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_round_trip_is_exact_and_old_ones_go(tmp_path):
    save(tmp_path, 1, 2, 3)
    restored = restore(tmp_path)
    state = make_state(3)
    assert_equal(state_of(restored), state)
    assert jax.tree.structure(state_of(restored)) == jax.tree.structure(state)
    assert restored.trees["params"]["dense"]["kernel"].sharding == state.params["dense"]["kernel"].sharding
    assert restored.data == {"at": 3}
    expected = {"format": 1, "version": "1.2", "stage": "toy", "step": 3, "num_parameters": 40 * 50 + 50}
    assert expected.items() <= restored.meta.items()
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_the_extra_state_of_a_task_comes_back(tmp_path):
    history = record_losses(loss_history(4, 2), jnp.array([0, 3, 3]), jnp.array([0.1, 0.2, 0.3]))
    state = make_state(3).replace(extra_state=jax.device_put(history, replicated(make_mesh({"data": -1}))))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state.trees(), step=3, data={}, config=CONFIG, version="1.2", stage="toy")
    checkpoints.close()
    found = state_of(Checkpoints(tmp_path).restore_latest(abstract(state).trees(), config=CONFIG, stage="toy"))
    assert_equal(found, state)
    assert isinstance(found.extra_state, LossHistory)


@pytest.mark.parametrize("data", [b"\x00\xffbytes", {"nested": [1, {"a": None}]}])
def test_data_position_comes_back(tmp_path, data):
    save(tmp_path, 1, data=data)
    assert restore(tmp_path).data == data


def test_nothing_there_is_none(tmp_path):
    assert restore(tmp_path) is None


def test_the_saved_arrays_are_copies(tmp_path):
    """The step donates its state right after a save has begun: the checkpoint must not see what comes next."""
    state = jax.device_put({"a": jnp.arange(2_000_000, dtype=jnp.float32)}, replicated(make_mesh({"data": -1})))
    expected = np.array(state["a"])
    train_state = TrainState(jnp.int32(1), state, jax.tree.map(jnp.copy, state), ())
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(train_state.trees(), step=1, data={}, config={}, version="", stage="toy")
    shape = abstract(train_state)
    jax.block_until_ready(step(train_state))
    checkpoints.wait()
    restored = checkpoints.restore_latest(shape.trees(), config={})
    checkpoints.close()
    np.testing.assert_array_equal(restored.trees["params"]["a"], expected)
    np.testing.assert_array_equal(restored.trees["ema_params"]["a"], expected)


@pytest.mark.parametrize("ema", [True, False])
def test_restore_params_needs_no_flags(tmp_path, ema):
    save(tmp_path, 7)
    params, config = restore_params(tmp_path, ema=ema)
    state = make_state(7)
    assert_equal(params, state.ema_params if ema else state.params)
    assert config == {"lr": 0.1, "model": {"width": 8, "levels": [1, 2]}, "training": {"log_every": 5}}
    assert len(params["dense"]["kernel"].sharding.device_set) == 1


def test_restore_params_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        restore_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_every_damaged_file_is_noticed(tmp_path):
    """Cut, emptied, removed or with one bit changed: the state is right, or the checkpoint before it is used."""
    save(tmp_path / "base", 1, 2)
    names = [path.relative_to(tmp_path / "base") for path in files_of(tmp_path / "base", 2)]
    fallbacks = 0
    largest = sorted(names, key=lambda name: -(tmp_path / "base" / name).stat().st_size)[:4]
    documents = [name for name in names if name.parts[-2:] in {("config", "metadata"), ("meta", "metadata")}]
    for number, (name, damage) in enumerate(
        (name, damage) for name in largest + documents for damage in ("cut", "remove", "flip")
    ):
        directory = tmp_path / str(number)
        subprocess.run(["cp", "-r", tmp_path / "base", directory], check=True)
        path, content = directory / name, bytearray((directory / name).read_bytes())
        if damage == "cut":
            os.truncate(path, len(content) // 2)
        elif damage == "remove":
            path.unlink()
        else:
            content[len(content) // 2] ^= 16
            path.write_bytes(content)
        try:
            restored = restore(directory)
        except CheckpointError as error:  # a changed bit in the config itself makes it another config
            assert damage == "flip" and "config" in name.parts, error
            continue
        step = int(state_of(restored).step)
        assert_equal(state_of(restored), make_state(step))
        assert restored.data == {"at": step}
        fallbacks += step == 1
    assert fallbacks >= 9  # small arrays are stored twice, and one copy is enough


def test_one_changed_bit_in_the_arrays_is_noticed(tmp_path, caplog):
    save(tmp_path, 1, 2, width=2000)
    largest = max(files_of(tmp_path, 2), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_latest(abstract(make_state(0, 2000)).trees(), config=CONFIG)
    checkpoints.close()
    assert_equal(state_of(restored), make_state(1, 2000))
    assert "does not match its checksum" in caplog.text


def test_a_truncated_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, caplog):
    save(tmp_path, 1, 2)
    largest = max(files_of(tmp_path, 2), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, logger="absl"):
        restored = restore(tmp_path)
    assert_equal(state_of(restored), make_state(1))
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(f"checkpoint {tmp_path}/checkpoints/2 cannot be read (" in message for message in messages)
    # It is out of the way, so that step 2 can be written again.
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["1", "unreadable-2"]
    save(tmp_path, 2)
    assert_equal(state_of(restore(tmp_path)), make_state(2))


def test_a_checkpoint_is_not_given_up_because_another_host_has_gone(tmp_path, monkeypatch):
    """The others end with the status of a missing host, for which the command looks at the cause."""
    save(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path)
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    monkeypatch.setattr(checkpoints._manager, "restore", mock.Mock(side_effect=gone))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for read in (
        lambda: checkpoints.restore_latest(abstract(make_state(0)).trees(), config=CONFIG),
        lambda: checkpoints.restore_tree("params"),
        checkpoints.read_config,
    ):
        with pytest.raises(CheckpointError, match="could not read checkpoint .*/checkpoints/2 together") as caught:
            read()
        assert caught.value.__cause__ is gone
    monkeypatch.undo()
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_when_none_can_be_read_it_is_an_error(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        for path in files_of(tmp_path, step):
            os.truncate(path, 0)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read \(steps \[2, 1\]\)"):
        restore(tmp_path)
    with pytest.raises(CheckpointError, match="none of the checkpoints in"):
        restore_params(tmp_path)


def test_another_config_is_refused_by_field(tmp_path):
    save(tmp_path, 1)
    config = {"lr": 0.2, "model": {"width": 8, "levels": [1, 2]}, "training": {"log_every": 50}, "dropout": 0.1}
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, config=config)
    assert "lr is 0.1 there and 0.2 here" in str(error.value)
    assert "dropout is absent there and 0.1 here" in str(error.value)
    assert "log_every" not in str(error.value) and "width" not in str(error.value)
    assert restore(tmp_path, config=config | {"lr": 0.1}, ignore={"dropout", "training.log_every"}) is not None
    lengths = ({"training": {"num_steps": steps}, "diffusion": {"num_steps": 10 * steps}} for steps in (5, 9))
    # The stage may go on for longer, not its process.
    assert config_differences(*lengths) == ["diffusion.num_steps is 50 there and 90 here"]


def test_config_differences():
    saved = {"a": {"b": 1, "c": {"d": 2}}, "empty": {}, "x": None}
    assert config_differences(saved, saved) == []
    assert config_differences(saved, {"a": {"b": 1, "c": {"d": 3}}, "empty": {}, "x": None}) == [
        "a.c.d is 2 there and 3 here"
    ]
    assert config_differences(saved, {"empty": {}, "x": None}, ignore={"a"}) == []
    assert config_differences(saved, {"a": {"b": 1}, "empty": {}, "x": None}, ignore={"a.c"}) == []


def test_another_network_is_refused_by_leaf(tmp_path):
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    wider = abstract(make_state(0, width=60))
    with pytest.raises(CheckpointError, match=r"params.dense.bias is float32\[50\] there and float32\[60\] here"):
        checkpoints.restore_latest(wider.trees(), config=CONFIG)
    other = abstract_state(ToyTask(), TX, KEY, make_mesh({"data": -1}), toy_batch(0))
    extra = other.replace(params=wider.params | {"head": wider.params["dense"]})
    with pytest.raises(CheckpointError, match="does not fit this network: params"):
        checkpoints.restore_latest(extra.trees(), config=CONFIG)
    checkpoints.close()


def test_another_optimizer_is_refused(tmp_path):
    save(tmp_path, 1)
    shape = abstract(make_state(0))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"optimizer\.opt_state.* and absent here"):
        checkpoints.restore_latest(shape.replace(opt_state=()).trees(), config=CONFIG)
    checkpoints.close()


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    subprocess.run(["cp", "-r", tmp_path / "checkpoints" / "1", leftover], check=True)
    checkpoints, state = Checkpoints(tmp_path), make_state(2)
    restored = checkpoints.restore_latest(abstract(state).trees(), config=CONFIG)
    assert int(state_of(restored).step) == 1
    # It is removed in the background, and before anything is written.
    checkpoints.save(state.trees(), step=2, data={}, config=CONFIG, version="1.2", stage="toy")
    checkpoints.close()
    assert not leftover.exists() and checkpoints.steps() == [1, 2]
    assert_equal(state_of(restore(tmp_path)), state)


def test_checksum_sees_bits_and_places_but_not_shardings():
    mesh = make_mesh({"data": -1})
    array = jnp.arange(64.0).reshape(16, 4)
    tree = {"a": array, "b": jnp.arange(3, dtype=jnp.bfloat16), "c": jnp.array([True, False])}
    value = checksum(tree)
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))
    assert checksum(tree | {"a": sharded}) == value
    assert checksum(tree | {"a": array.at[3, 2].add(1e-5)}) != value
    assert checksum(tree | {"a": array[::-1]}) != value
    assert checksum(tree | {"b": tree["b"][::-1]}) != value
    assert checksum(tree | {"c": ~tree["c"]}) != value


def test_checksum_of_small_and_large_arrays_is_one_sum(monkeypatch):
    """Words w_p at positions p of leaf i: sum (2i + 1) (2p + 1) w_p, on the host or by a program of any device."""
    tree = [np.array(3, np.int32), np.array([1.0, -2.0], np.float32), np.array([True, False]), np.zeros((2, 0))]
    words = [[3], [0x3F800000, 0xC0000000], [1, 0], []]
    rows = [(2 * i + 1) * (2 * p + 1) * word for i, row in enumerate(words) for p, word in enumerate(row)]
    assert checksum(tree) == sum(rows) % 2**32
    with jax.enable_x64(True):
        wide = [*tree, np.array([[1.5, 2.0**-40]]), np.arange(5, dtype=np.int64) << 33, np.arange(3, dtype=np.float16)]
        value = checksum(wide)
        monkeypatch.setattr("ddpm_jax.storage.checksum._SMALL", -1)
        assert checksum(jax.tree.map(jnp.asarray, wide)) == value


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB: one checkpoint of `make_state` fits, a second does not."""
    if os.geteuid() != 0:
        yield None
        return
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", mount], capture_output=True).returncode:
        yield None
        return
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_the_last_good_one(tmp_path, small_disk, monkeypatch):
    directory = small_disk or tmp_path
    checkpoints = Checkpoints(directory, max_to_keep=3)
    if small_disk is None:
        real_save = checkpoints._manager.save

        def full(step, **options):
            if step > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real_save(step, **options)

        monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError) as error:
        for step in range(1, 20):
            checkpoints.save(make_state(step).trees(), step=step, data={}, config=CONFIG, version="", stage="toy")
            checkpoints.wait()
    assert step > 1
    message = str(error.value)
    assert message.startswith("could not write ") and "\n" not in message
    assert message.endswith(f"No space left on device; the last good one is step {step - 1}")
    assert checkpoints.steps()[-1] == step - 1
    assert not list((directory / "checkpoints").glob("*tmp*"))
    assert_equal(state_of(restore(directory)), make_state(step - 1))


def test_too_little_space_is_noticed_before_the_start(tmp_path, monkeypatch):
    state = make_state(0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for free, enough in ((int(2.5 * size), True), (int(2.5 * size) - 1, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path, usage=usage: usage)
        if enough:
            checkpoints.check_space(state.trees())
            continue
        with pytest.raises(CheckpointError, match=f"{int(2.5 * size)} bytes are needed and {free} are available"):
            checkpoints.check_space(state.trees())
    checkpoints.close()


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="max_to_keep=0 must be at least 1"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_lock(tmp_path):
    workdir = tmp_path / "run"
    with lock_workdir(workdir):
        message = rf"workdir {workdir} is in use by another run \(pid {os.getpid()}\)"
        with pytest.raises(WorkdirInUse, match=message), lock_workdir(workdir):
            pass
    with lock_workdir(workdir):
        pass


def test_lock_ends_with_the_process(tmp_path):
    root = str(Path(__file__).parents[1])
    code = (
        "import sys, time; from ddpm_jax.storage.lock import lock_workdir\n"
        "with lock_workdir(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(WorkdirInUse, match=rf"\(pid {holder.pid}\)"), lock_workdir(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with lock_workdir(tmp_path):
        pass


def test_lock_of_an_impossible_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="workdir .* cannot be used: "), lock_workdir(tmp_path / "file" / "run"):
        pass


def test_documents_are_plain_json(tmp_path):
    save(tmp_path, 1)
    text = (tmp_path / "checkpoints" / "1" / "config" / "metadata").read_text()
    assert json.loads(text) == {"lr": 0.1, "model": {"width": 8, "levels": [1, 2]}, "training": {"log_every": 5}}
