"""The loop: it continues bit for bit, stops when it should, and says why."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from toy_training import BATCH, ToyLoader, ToyTask, run, toy_batch

from ddpm_jax.data.loader import make_loader
from ddpm_jax.storage.checkpoint import CheckpointError, Checkpoints, restore_params
from ddpm_jax.training.loop import Interrupted, TrainingDiverged
from ddpm_jax.training.metrics import MetricWriter, format_flops, read_metrics

ROOT = Path(__file__).parents[1]


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class Crash(Exception):
    """Stands for whatever may go wrong outside of the loop."""


class CrashingLoader(ToyLoader):
    def __init__(self, crash_at):
        super().__init__()
        self.crash_at = crash_at

    def __next__(self):
        if self.position + 1 == self.crash_at:
            raise Crash
        return super().__next__()


class SignallingLoader(ToyLoader):
    """Sends this process a signal while the given batch is fetched."""

    def __init__(self, signal_at, signum):
        super().__init__()
        self.signal_at, self.signum = signal_at, signum

    def __next__(self):
        batch = super().__next__()
        if self.position == self.signal_at:
            signal.raise_signal(self.signum)
        return batch


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return run(directory), directory


def test_a_run_leaves_what_it_should(uninterrupted):
    state, directory = uninterrupted
    assert int(state.step) == 12
    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    names = {"step", "time", "loss", "absolute", "grad_norm", "param_norm", "lr", "steps_per_second"}
    assert names | {"images_per_second", "flops_per_second", "input_bound"} == set(rows[-1])
    for row in rows:
        assert row["images_per_second"] == pytest.approx(BATCH * row["steps_per_second"])
    assert Checkpoints(directory, read_only=True).steps() == [8, 12]
    params, config = restore_params(directory)
    assert_same_bits(params, state.ema_params)
    assert config == {"lr": 0.05}


@pytest.mark.parametrize("crash_at", [1, 4, 7, 12])
def test_a_crash_at_any_step_changes_nothing_in_the_end(tmp_path, uninterrupted, crash_at):
    """Checkpoints are every 4 steps: a crash while batch 7 is fetched loses steps 5 and 6, which are made again."""
    with pytest.raises(Crash):
        run(tmp_path, loader=CrashingLoader(crash_at))
    loader = ToyLoader()
    assert_same_bits(run(tmp_path, loader=loader), uninterrupted[0])
    assert loader.served[0] == (crash_at - 1) // 4 * 4 + 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 6, 8, 10, 12]


@pytest.fixture
def heeded():
    """A shell starts programs in the background with SIGINT ignored, nohup with SIGHUP, and so they would stay."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_nothing_is_made_again(tmp_path, uninterrupted, signum, heeded):
    handler, first = signal.getsignal(signum), SignallingLoader(6, signum)
    with pytest.raises(Interrupted, match=rf"stopped by {signum.name} after step 6 of 12; .*/checkpoints/6") as error:
        run(tmp_path, loader=first)
    assert error.value.signum == signum
    assert signal.getsignal(signum) is handler
    second = ToyLoader()
    assert_same_bits(run(tmp_path, loader=second), uninterrupted[0])
    assert first.served + second.served == list(range(1, 13))


def test_a_signal_in_the_last_step_leaves_a_finished_stage(tmp_path, uninterrupted):
    with pytest.raises(Interrupted, match="after step 12 of 12"):
        run(tmp_path, loader=SignallingLoader(12, signal.SIGTERM))
    loader = ToyLoader()
    assert_same_bits(run(tmp_path, loader=loader), uninterrupted[0])
    assert loader.served == []


def test_it_runs_outside_the_main_thread(tmp_path, uninterrupted):
    states = []
    thread = threading.Thread(target=lambda: states.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_same_bits(states[0], uninterrupted[0])


def start_child(workdir, pause=0.0):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, ROOT / "tests" / "toy_training.py", workdir, "--num_steps", "24", "--pause", str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def served(workdir):
    path = workdir / "served.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def stop_after(child, workdir, count, signum):
    """Signal the child once it has fetched `count` batches."""
    deadline = time.monotonic() + 60
    while len(served(workdir)) < count:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signum)
    return child.communicate(timeout=60)


def test_kill_9_and_sigterm_of_a_real_process(tmp_path):
    """Killed at a random step, stopped at another, then left alone: the bits of a run that nobody touched."""
    killed_at = random.randrange(2, 12)
    print(f"killed while it fetched batch {killed_at}")
    child = start_child(tmp_path, pause=0.05)
    stop_after(child, tmp_path, killed_at, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL

    before = len(served(tmp_path))
    child = start_child(tmp_path, pause=0.05)
    out, err = stop_after(child, tmp_path, before + 4, signal.SIGTERM)
    assert child.returncode == 143, err
    assert "toy: stopped by SIGTERM after step" in out
    stopped = served(tmp_path)
    continued_at = Checkpoints(tmp_path, read_only=True).steps()[-1]
    assert stopped[-1] == continued_at
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, continued_at + 1))

    child = start_child(tmp_path)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert served(tmp_path)[len(stopped) :] == list(range(continued_at + 1, 25))
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 25))

    whole = run(tmp_path / "whole", num_steps=24)
    final = json.loads((tmp_path / "final.json").read_text())
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole)}
    assert final == {name: np.asarray(leaf).tobytes().hex() for name, leaf in leaves.items()}


def test_the_grain_loader_continues_where_it_was(tmp_path):
    """Shuffled epochs of 24 records in batches of 16: the interruption falls into the second epoch."""

    class Records:
        def __len__(self):
            return 24

        def __getitem__(self, index):
            rng = np.random.default_rng(int(index))
            return {"x": rng.normal(size=5).astype(np.float32), "y": rng.normal(size=3).astype(np.float32)}

    class Crashing:
        def __init__(self, loader):
            self.loader, self.get_state, self.set_state, self.left = loader, loader.get_state, loader.set_state, 7

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise Crash
            return next(self.loader)

    def loader():
        return make_loader(Records(), batch_size=BATCH, seed=1)

    whole = run(tmp_path / "whole", loader=loader())
    with pytest.raises(Crash):
        run(tmp_path / "parts", loader=Crashing(loader()), checkpoint_every=3)
    assert_same_bits(run(tmp_path / "parts", loader=loader(), checkpoint_every=3), whole)


def test_a_finished_stage_is_returned_at_once(tmp_path, uninterrupted):
    state, directory = uninterrupted
    before = (directory / "metrics.jsonl").read_text()
    loader = ToyLoader()
    assert_same_bits(run(directory, loader=loader), state)
    assert loader.served == []
    assert (directory / "metrics.jsonl").read_text() == before


def test_one_device_and_eight_give_the_same_run(tmp_path):
    one, eight = (run(tmp_path / str(n), devices=jax.devices()[:n]) for n in (1, 8))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    rows = [read_metrics(tmp_path / str(n))[-1] for n in (1, 8)]
    flops = [row["flops_per_second"] / row["steps_per_second"] for row in rows]
    assert flops == pytest.approx([3 * 2 * BATCH * 5 * 3] * 2)  # three times one matrix product


def test_a_run_on_eight_devices_continues_on_one(tmp_path, uninterrupted):
    with pytest.raises(Crash):
        run(tmp_path, loader=CrashingLoader(7), devices=jax.devices())
    continued = run(tmp_path, devices=jax.devices()[:1])
    for a, b in zip(jax.tree.leaves(continued), jax.tree.leaves(uninterrupted[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingDiverged) as error:
        run(tmp_path, loader=ToyLoader(nan_at=7), log_every=100)
    message = str(error.value)
    assert "toy: step 7 is not finite (loss nan, gradient norm nan)" in message
    assert f"the last good checkpoint is {tmp_path}/checkpoints/4" in message
    assert Checkpoints(tmp_path, read_only=True).steps() == [4]
    params, _ = restore_params(tmp_path, ema=False)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_a_loss_that_is_not_finite_at_once(tmp_path):
    with pytest.raises(TrainingDiverged, match="step 1 is not finite .* no checkpoint was saved"):
        run(tmp_path, loader=ToyLoader(nan_at=1))


def test_another_config_is_refused(tmp_path, uninterrupted):
    with pytest.raises(CheckpointError, match="lr is 0.05 there and 0.1 here"):
        run(uninterrupted[1], config={"lr": 0.1})


def test_another_stage_is_refused(uninterrupted):
    with pytest.raises(CheckpointError, match="is of stage 'toy', and this is stage 'prior'"):
        run(uninterrupted[1], name="prior")


def test_fewer_steps_than_were_made_are_refused(uninterrupted):
    with pytest.raises(CheckpointError, match="is of step 12, and num_steps=8 is less"):
        run(uninterrupted[1], num_steps=8)


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(tmp_path):
    run(tmp_path, num_steps=6)
    assert int(run(tmp_path, num_steps=10).step) == 10
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "bad", [{"num_steps": 0}, {"log_every": 0}, {"checkpoint_every": 0}, {"preview_every": -1}, {"max_to_keep": 0}]
)
def test_numbers_without_meaning_are_refused(tmp_path, bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        run(tmp_path, **bad)
    assert not list(tmp_path.iterdir())


def test_a_loader_that_ends_is_refused(tmp_path):
    class Short(ToyLoader):
        def __next__(self):
            if self.position == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match="the loader ended after step 3; it must be endless"):
        run(tmp_path, loader=Short())


def test_previews_do_not_touch_the_training(tmp_path, uninterrupted):
    assert_same_bits(run(tmp_path, preview_every=5), uninterrupted[0])
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == [f"step_{step:06d}_{kind}.png" for step in (5, 10, 12) for kind in ("ema", "raw")]
    colours = {name: Image.open(tmp_path / "previews" / name).getpixel((20, 20)) for name in names}
    assert colours["step_000010_raw.png"] != colours["step_000010_ema.png"]


def test_previews_are_of_the_example_and_of_one_noise(tmp_path):
    """Prepared by the frozen networks, like a batch."""
    seen = []

    class Watching(ToyTask):
        def prepare(self, frozen, batch):
            return batch | {"y": batch["y"] + frozen}

        def preview(self, params, batch, key):
            seen.append((batch, jax.random.key_data(key)))
            return super().preview(params, batch, key)

    run(tmp_path, task=Watching(), frozen=np.float32(3.0), num_steps=3, preview_every=2)
    assert len(seen) == 4  # both sets of parameters, at step 2 and at the last
    for batch, key in seen:
        np.testing.assert_array_equal(batch["x"], toy_batch(0)["x"])
        np.testing.assert_array_equal(batch["y"], toy_batch(0)["y"] + 3.0)
        np.testing.assert_array_equal(key, seen[0][1])


def test_evaluations_need_batches(tmp_path):
    for bad in ({"eval_every": 2}, {"eval_every": -1, "eval_batches": list}):
        with pytest.raises(ValueError, match=rf"eval_every={bad['eval_every']} must be 0 \(never\), or more with"):
            run(tmp_path, **bad)
    assert not list(tmp_path.iterdir())


def test_frozen_networks_run_before_the_step_and_outside_of_it(tmp_path):
    class WithEncoder(ToyTask):
        def prepare(self, frozen, batch):
            return {"x": batch["x"], "y": batch["y"] - batch["y"] + frozen["shift"]}

        def loss(self, params, batch, key):
            loss, _ = super().loss(params, batch, key)
            return loss, {"target": batch["y"][:, 0]}

    run(tmp_path, task=WithEncoder(), frozen={"shift": np.float32(3.0)}, num_steps=2)
    assert read_metrics(tmp_path)[-1]["target"] == pytest.approx(3.0)


def test_the_loss_is_traced_for_the_step_and_for_its_operations(tmp_path):
    """Tracing a deep network takes seconds before the first step."""
    traces = []

    class Counted(ToyTask):
        def loss(self, *arguments):
            traces.append(arguments)
            return super().loss(*arguments)

    run(tmp_path, task=Counted())
    assert len(traces) == 2


def test_accumulation_in_the_loop_counts_all_operations(tmp_path):
    run(tmp_path, num_steps=2, accumulate=2)
    row = read_metrics(tmp_path)[-1]
    assert row["flops_per_second"] / row["steps_per_second"] == pytest.approx(3 * 2 * BATCH * 5 * 3)


def test_a_full_disk_while_training(tmp_path, monkeypatch):
    """The error of the background write comes up, and the stage continues from what was good."""

    class Full(Checkpoints):
        def save(self, trees, *, step, **options):
            if step > 4:
                self.wait()
                self._writing_step = step
                with self._writing():
                    raise OSError(28, "No space left on device")
            super().save(trees, step=step, **options)

    monkeypatch.setattr("ddpm_jax.training.loop.Checkpoints", Full)
    with pytest.raises(CheckpointError, match="of step 8 .*No space left on device; the last good one is step 4"):
        run(tmp_path)
    monkeypatch.undo()
    loader = ToyLoader()
    run(tmp_path, loader=loader)
    assert loader.served == list(range(5, 13))


def test_metrics_keep_each_step_once(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": math.nan if step == 2 else step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    writer = MetricWriter(tmp_path, start_step=2)
    writer.write(3, {"loss": 30})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, None), (3, 30)]


def test_tensorboard_without_tensorflow_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.delitem(sys.modules, "clu.metric_writers.summary_writer", raising=False)
    run(tmp_path, num_steps=2, tensorboard=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2]


def test_tensorboard_is_not_imported_unasked(tmp_path):
    code = "import sys, ddpm_jax.training.loop; assert not {'tensorflow', 'clu', 'PIL', 'grain'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_progress_bar(tmp_path, capsys, monkeypatch):
    """Lines where stderr is a file or a pipe, one that is drawn again and again on a terminal."""
    run(tmp_path / "lines", progress=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("toy: 100% (12/12 steps), ")
    monkeypatch.setattr("ddpm_jax.progress._redraws", lambda: True)
    run(tmp_path / "bar", progress=True)
    bar = capsys.readouterr().err
    assert "toy: 100%" in bar and "12/12" in bar and bar.count("\r") > 1
    for text in (line, bar):
        assert "loss " in text and " images/s" in text and "FLOP/s" in text


def test_a_preview_that_is_not_finite_stops_the_run(tmp_path):
    class Overflowing(ToyTask):
        def preview(self, params, batch, key):
            raise FloatingPointError("its pixels contain NaN or infinity")

    with pytest.raises(TrainingDiverged, match="the preview of step 8 failed: its pixels contain NaN") as error:
        run(tmp_path, task=Overflowing(), preview_every=8)
    assert str(error.value).endswith(f"the last checkpoint is {tmp_path}/checkpoints/8")
    assert Checkpoints(tmp_path, read_only=True).steps() == [4, 8]


def test_format_flops():
    assert format_flops(45.13e9) == "45.1 GFLOP/s"
    assert format_flops(1.26e12) == "1.3 TFLOP/s"


def test_a_profile_is_written_once_or_a_warning(tmp_path, caplog):
    run(tmp_path, num_steps=2, profile_steps=(2, 9))
    assert list((tmp_path / "profile").rglob("*.xplane.pb")) and not caplog.records
    with caplog.at_level("WARNING"):
        run(tmp_path, num_steps=2, profile_steps=(2, 9))
        run(tmp_path, num_steps=3, profile_steps=(1, 2))
    assert [record.getMessage() for record in caplog.records] == [
        "toy: no profiler trace of steps 2 to 9 is written: it makes no more steps",
        "toy: no profiler trace of steps 1 to 2 is written: it makes steps 3 to 3",
    ]
