"""Runs that are killed or stopped, in every stage, end with the bits of one that nobody touched.

By default two stages are killed and the other two stopped; DDPM_JAX_KILLS=3 kills and stops each three times.
"""

import itertools
import os
import random
import signal
import time

import jax
import numpy as np
import pytest
from tiny_run import STAGES, finish, start, train_flags

from ddpm_jax.storage.checkpoint import ARRAYS, Checkpoints
from ddpm_jax.training.metrics import read_metrics

KILLS = int(os.environ.get("DDPM_JAX_KILLS", "0"))
STEPS, EVERY = 36, 12


def command(workdir, *flags):
    logged = {f"{stage}__training__log_every": 1 for stage in STAGES}
    return [*train_flags(workdir, num_steps=STEPS, checkpoint_every=EVERY, **logged), *flags]


def last_step(workdir, stage):
    rows = read_metrics(workdir / stage)
    return rows[-1]["step"] if rows else 0


def wait_until(ready, process):
    """Wait for something that a process does."""
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop_at(process, workdir, stage, step, signum):
    """Signal a process once it has logged a step, or passed it. Returns (status, stderr)."""
    wait_until(lambda: last_step(workdir, stage) >= step, process)
    process.send_signal(signum)
    status, _, err = finish(process)
    return status, err


def assert_resumed_at(before, workdir, stage):
    """The log's lines from before the stop are unchanged: no step was repeated."""
    rows = read_metrics(workdir / stage)
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def trees(workdir, stage):
    checkpoints = Checkpoints(workdir / stage, read_only=True)
    assert checkpoints.steps()[-1] == STEPS
    restored = {name: checkpoints.restore_tree(name)[0] for name in ARRAYS}
    checkpoints.close()
    return restored


def assert_same_bits(workdir, reference):
    for stage in STAGES:
        ours, theirs = trees(workdir, stage), trees(reference, stage)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert [row["step"] for row in read_metrics(workdir / stage)] == list(range(1, STEPS + 1))
        losses = [[row["loss"] for row in read_metrics(directory / stage)] for directory in (workdir, reference)]
        assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, out, err = finish(start("train", *command(directory, "--noevaluate")))
    assert status == 0, err
    assert "trained clip, prior, decoder, upsampler" in out
    return directory


def test_kill_and_stop_in_every_stage_between_them_and_while_measuring(tmp_path, uninterrupted):
    """One run: killed or stopped in each stage, killed when CLIP's last checkpoint has appeared, so before or while
    embeddings are computed, and stopped while it measures. Meanwhile a second run in the same directory is refused.
    """
    workdir, stopped = tmp_path / "run", []
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    draw = random.Random(seed)
    both = (signal.SIGKILL, signal.SIGTERM)
    first = draw.randrange(2)
    for i, (stage, _) in enumerate(itertools.product(STAGES, range(max(1, KILLS)))):
        kill_and_stop(workdir, stage, both if KILLS else (both[(first + i) % 2],), stopped, draw)
        if not (workdir / "prior").exists():
            kill_after_clip(workdir)
    process = start("train", *command(workdir))
    wait_until(lambda: (workdir / ".lock").read_text() == str(process.pid), process)
    refused = finish(start("train", *command(workdir)))
    sentence = f"error: workdir {workdir} is in use by another run (pid {process.pid})\n"
    assert process.stdout.readline().startswith("trained clip, prior, decoder, upsampler")
    process.terminate()
    status, _, err = finish(process)
    assert refused == (1, "", sentence)
    assert status == 143 and "error: stopped by SIGTERM; what was finished is kept\n" in err
    assert not (workdir / "faithfulness.json").exists()

    status, out, err = finish(start("train", *command(workdir)))
    assert status == 0, err
    assert "| one object |" in out
    assert (workdir / "faithfulness.json").exists() and (workdir / "samples.png").exists()
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name]
    for stage, before in stopped:
        assert_resumed_at(before, workdir, stage)
    assert_same_bits(workdir, uninterrupted)


def kill_and_stop(workdir, stage, signals, stopped, draw):
    """Each signal comes at a random step of what is left, with a margin: the run goes on while it is on its way."""
    for i, signum in enumerate(signals):
        begin = last_step(workdir, stage)
        process = start("train", *command(workdir, "--noevaluate"))
        step = draw.randint(begin + 1, begin + max(1, (STEPS - 20 - begin) // (len(signals) - i)))
        status, err = stop_at(process, workdir, stage, step, signum)
        for earlier, before in stopped:
            assert_resumed_at(before, workdir, earlier)
        if signum == signal.SIGKILL:
            assert status == -signal.SIGKILL, err
            # A step that was logged but not saved is made again, so its line may change.
            saved = Checkpoints(workdir / stage, read_only=True).steps()
            stopped.append((stage, read_metrics(workdir / stage)[: saved[-1] if saved else 0]))
            continue
        assert status == 143, err
        after = last_step(workdir, stage)
        assert f"error: {stage}: stopped by SIGTERM after step {after} of {STEPS}; the same command continues" in err
        assert Checkpoints(workdir / stage, read_only=True).steps()[-1] == after
        stopped.append((stage, read_metrics(workdir / stage)))


def kill_after_clip(workdir):
    process = start("train", *command(workdir))
    wait_until((workdir / "clip" / "checkpoints" / str(STEPS)).exists, process)
    process.kill()
    finish(process)
    assert not (workdir / "prior" / "checkpoints" / str(STEPS)).exists()
