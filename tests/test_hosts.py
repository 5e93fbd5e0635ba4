"""Two processes train together, stop together, and go on after one of them was killed."""

import os
import shutil
import signal
import socket

import pytest
from several_hosts import HostRun, assert_close, assert_same_bits, train_flags

from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training.metrics import read_metrics

NAME = socket.gethostname()
STEPS = 12


def last_step(workdir, stage="head"):
    rows = read_metrics(workdir / stage)
    return rows[-1]["step"] if rows else 0


def assert_all(found, status, sentence=None):
    assert [each[0] for each in found] == [status] * len(found), found
    for _, _, err in found:
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (sentence is not None), err
        assert sentence is None or sentence in errors[0], err
        assert "Traceback" not in err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hosts") / "run"
    with HostRun(train_flags(directory)) as run:
        found = run.finish()
    assert_all(found, 0)
    assert [out.count("trained clip, head") for _, out, _ in found] == [1, 0]  # the first host alone says so
    return directory


def test_a_signal_at_one_stops_both_and_a_kill_of_one_ends_the_other(tmp_path, uninterrupted):
    """Stopped by a signal at the second, then the first is killed; two hosts go on with the same bits, one within 1e-5.

    The first host is the one with the coordination service, so the other one loses that too.
    """
    workdir, slow = tmp_path / "run", {"DDPM_JAX_TEST_SLOW": "head:0.02"}
    with HostRun(train_flags(workdir), environ=slow) as run:
        run.wait_until(lambda: last_step(workdir) >= 2)
        run[1].send_signal(signal.SIGTERM)
        found = run.finish()
    step = Checkpoints(workdir / "head", read_only=True).steps()[-1]
    assert_all(found, 143, f"head: stopped by SIGTERM on host 1 ({NAME}) after step {step} of {STEPS}; the same")
    with HostRun(train_flags(workdir), environ=slow) as run:
        run.wait_until(lambda: last_step(workdir) > step)
        run[0].kill()
        found = run.finish()
    assert found[0][0] == -signal.SIGKILL
    assert_all([found[1]], 75, f"host 0 ({NAME}) is missing")
    shutil.copytree(workdir, tmp_path / "one")
    for directory, hosts in ((workdir, 2), (tmp_path / "one", 1)):
        with HostRun(train_flags(directory), hosts=hosts, devices=4 // hosts) as run:
            assert_all(run.finish(), 0)
        assert [row["step"] for row in read_metrics(directory / "head")] == list(range(1, STEPS + 1))
    assert_same_bits(workdir, uninterrupted)
    assert_close(tmp_path / "one", uninterrupted)


def test_hosts_that_were_started_otherwise_are_refused_before_any_computation(tmp_path):
    flags = [train_flags(tmp_path / "run", f"--config.head.training.seed={seed}") for seed in (0, 1)]
    with HostRun(flags) as run:
        found = run.finish()
    assert_all(found, 2, f"the hosts disagree: --config.head.training.seed is 0 on host 0 ({NAME}) and 1 on host 1")
    assert not os.path.exists(tmp_path / "run")
