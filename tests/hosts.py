"""Kill and stop hosts at random moments: `python tests/hosts.py [--kills 20] [--stops 10] [--seed N] [--patience 1]`.

Two processes with four CPU devices each train the two stages of hosts_recipe.py. SIGKILL comes to one of them at a
moment that is uniform over the duration of an undisturbed run, or during a save, an embedding or an evaluation. The
other one must end with status 75 within 80 s and name the first. The run is started again, killed again, and after
every four kills left alone: it must end with the bits of a run that nobody touched, and with the same records in each
step. Half of such runs are also finished by one process with eight devices, and by two with two each: within 1e-5.

SIGTERM comes to one of the two, at random steps: both must stop after the same step, with status 143 and a checkpoint.

The times are those of two cores that have nothing else to do; --patience multiplies them on a busy machine.
"""

import argparse
import collections
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401 (how the tests compile)
from several_hosts import HostRun, assert_close, assert_same_bits, train_flags

from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training.metrics import read_metrics

SLOW = {"DDPM_JAX_TEST_SLOW": "embed:0.02,eval:0.02,head:0.005"}
MOMENTS = ("any", "save", "any", "embedding", "any", "evaluation")
KILLS_PER_RUN = 4
PATIENCE = 1.0


def start(workdir, seen, devices=4, **options):
    shutil.rmtree(seen, ignore_errors=True)
    seen.mkdir()
    return HostRun(
        train_flags(workdir),
        environ=SLOW | {"DDPM_JAX_TEST_SEEN": str(seen)},
        wait=round(40 * PATIENCE),
        devices=devices,
        **options,
    )


def is_here(moment, workdir, seen):
    """Return whether a run is at a moment of a kind."""
    if moment == "save":
        return any(workdir.glob("*/checkpoints/*.orbax-checkpoint-tmp*"))
    return (seen / {"embedding": "embed", "evaluation": "eval"}[moment]).exists()


def kill(workdir, seen, moment, draw, duration):
    """Kill one of two. Returns (what was met, whether the run had ended before)."""
    victim, seconds, begin = draw.randrange(2), draw.uniform(0, duration), time.monotonic()
    with start(workdir, seen) as run:
        if moment == "evaluation":
            # Held-out records are read for their embeddings too; those of an evaluation come after the first step.
            while run[0].poll() is None and not (workdir / "head" / "metrics.jsonl").exists():
                time.sleep(0.005)
            (seen / "eval").unlink(missing_ok=True)
        while run[0].poll() is None and not (
            time.monotonic() - begin > seconds if moment == "any" else is_here(moment, workdir, seen)
        ):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        ended = run[victim].poll() is not None
        run[victim].kill()
        begin = time.monotonic()
        found = run.finish(120 * PATIENCE)
    if ended:
        assert [status for status, _, _ in found] == [0, 0], found
        return moment, True
    status, _, err = found[1 - victim]
    waited = time.monotonic() - begin
    assert found[victim][0] == -signal.SIGKILL, found
    # Before they have met, the other one waits for a process that comes; after the end, it has ended.
    early = "did not come" in err or "did not answer" in err
    assert status in (75, 0) and (status == 0 or early or f"host {victim} (" in err), found
    assert "Traceback" not in err, err
    assert early or waited < 80 * PATIENCE, waited
    where = f"after {seconds:.1f} s" if moment == "any" else f"in {'an' if moment[0] == 'e' else 'a'} {moment}"
    print(f"  host {victim} killed {where}: the other one ended with {status} after {waited:.1f} s", flush=True)
    return moment, False


def assert_ended(found):
    assert all(status == 0 for status, _, _ in found), found


def compare(workdir, reference, close=False):
    (assert_close if close else assert_same_bits)(workdir, reference)
    for stage in ("clip", "head"):
        names = ["step", *(["record", "record_squared"] if stage == "head" else [])]
        ours, theirs = ([[row[n] for n in names] for row in read_metrics(d / stage)] for d in (workdir, reference))
        assert ours == theirs, (ours, theirs)
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name]


def kill_at_random(base, kills, draw, reference, duration):
    table, number, runs = collections.Counter(), 0, 0
    while number < kills:
        workdir, ended = base / f"run{runs}", False
        for _ in range(KILLS_PER_RUN):
            if number == kills or ended:
                break
            moment, ended = kill(workdir, base / "seen", MOMENTS[number % len(MOMENTS)], draw, duration)
            number += not ended
            table[moment] += not ended
        copies = {"two hosts": ({}, False)}
        if runs % 2 == 0:
            copies |= {"one host": ({"hosts": 1, "devices": 8}, True), "four devices": ({"devices": 2}, True)}
        for name, (options, close) in copies.items():
            own = base / f"run{runs}-{name.replace(' ', '-')}"
            shutil.copytree(workdir, own)
            with start(own, base / "seen", **options) as run:
                assert_ended(run.finish(600 * PATIENCE))
            compare(own, reference, close)
            print(f"run {runs}, finished by {name}: {'within 1e-5' if close else 'the same bits'}", flush=True)
            shutil.rmtree(own)
        runs += 1
    return table


def stop_at_random(base, stops, draw):
    for number in range(stops):
        workdir = base / f"stopped{number}"
        stage, step, victim = draw.choice(["clip", "head"]), draw.randrange(1, 10), draw.randrange(2)
        with start(workdir, base / "seen") as run:
            run.wait_until(lambda: any(r["step"] >= step for r in read_metrics(workdir / stage)), 300 * PATIENCE)  # noqa: B023
            time.sleep(draw.uniform(0, 0.1))
            run[victim].send_signal(signal.SIGTERM)
            found = run.finish(120 * PATIENCE)
        assert [status for status, _, _ in found] == [143, 143], found
        said = {line for _, _, err in found for line in err.splitlines() if line.startswith("error: ")}
        assert len(said) == 1, said
        print(f"stop {number}: {said.pop()}", flush=True)
        for each in ("clip", "head"):
            rows = read_metrics(workdir / each)
            saved = (
                Checkpoints(workdir / each, read_only=True).steps() if (workdir / each / "checkpoints").exists() else []
            )
            # The line of a step whose evaluation was left out is written when the run continues.
            assert not rows or saved[-1] in (rows[-1]["step"], rows[-1]["step"] + 1), (rows[-1]["step"], saved)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--patience", type=float, default=1.0)
    arguments = parser.parse_args()
    global PATIENCE
    PATIENCE = arguments.patience
    print(f"seed {arguments.seed}", flush=True)
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        for _ in range(2):  # the first one fills the compilation cache
            shutil.rmtree(base / "reference", ignore_errors=True)
            begin = time.monotonic()
            with start(base / "reference", base / "seen") as run:
                assert_ended(run.finish(600 * PATIENCE))
            duration = time.monotonic() - begin
        print(f"{duration:.1f} s undisturbed", flush=True)
        stop_at_random(base, arguments.stops, draw)
        table = kill_at_random(base, arguments.kills, draw, base / "reference", duration)
    print(", ".join(f"{name}: {count}" for name, count in table.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
