"""Stop every command at random moments: `python tests/signals.py --count 50 [--command train ...] [--seed N]`.

SIGTERM or SIGINT comes at a moment that is uniform over the whole duration of the command, from the start of the
interpreter to its end. A process must end with status 143 or 130 (or by the signal itself, before the package has
handlers and after it is done), never with 0 unless all was written, without a traceback, with one line of error, and
leave every result whole or absent and no temporary file. A stopped training run is continued, stopped again, and after
every ten signals left alone: it must end with the bits of a run that nobody touched, and no checkpoint may be lost.
"""

import argparse
import collections
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import conftest  # noqa: F401 (how the tests compile)
import test_interop_karlo
from tiny_run import ROOT, STAGES, train_flags

COMMANDS = ("sample", "evaluate", "convert", "train")
STEPS, EVERY, SIGNALS_PER_RUN = 8, 2, 10
# The system takes this long to take back a process that has ended.
LAST_SECONDS = 0.5
BAD = ("Traceback", "Exception ignored", "Error in", "Fatal Python", 'File "')


class Fault(Exception):
    """A command did what it must not."""


class Bench:
    """Working directories of the commands, and their output without a signal."""

    def __init__(self, base, draw):
        self.base, self.draw = base, draw
        self.workdir, self.source = base / "reference", base / "karlo"
        self.durations, self.reference, self.chain = {}, {}, None

    def flags(self, command, out):
        workdir = self.workdir
        if command == "train":
            logged = {f"{stage}__log_every": 1 for stage in STAGES}
            previews = {"decoder__preview_every": 4}
            return train_flags(out, num_steps=STEPS, checkpoint_every=EVERY, **logged, **previews)
        return {
            "sample": ["--prompt", "a small red star", "--workdir", workdir, "--out", out / "image.png"],
            "evaluate": ["--workdir", workdir, "--out", out, "--num_captions", "2"],
            "convert": ["--from", "karlo", "--src", self.source, "--out", out / "converted"],
        }[command]

    def start(self, command, out):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(self.base / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        del environment["GLIBC_TUNABLES"]  # `ddpm_jax.train` sets it and starts again
        program = [sys.executable, "-m", f"ddpm_jax.{command}", *map(str, self.flags(command, out))]
        # A group of its own: Ctrl-C at the terminal is for this program.
        return subprocess.Popen(
            program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def undisturbed(self, command, out):
        out.mkdir(exist_ok=True)
        begin = time.monotonic()
        process = self.start(command, out)
        _, err = process.communicate(timeout=900)
        if process.returncode:
            raise Fault(f"{command} fails undisturbed: {err}")
        return time.monotonic() - begin

    def prepare(self, command):
        if command == "convert" and not self.source.exists():
            test_interop_karlo.write_directory(self.source)
            (self.source / "model_index.json").write_text('{"_class_name": "UnCLIPPipeline"}')
        if command != "convert" and not self.workdir.exists():
            self.undisturbed("train", self.workdir)
        for number in range(2):  # the first one fills the compilation cache
            out = self.base / f"{command}-{number}"
            self.durations[command] = self.undisturbed(command, out)
            self.reference[command] = contents(out)
            if number:
                shutil.rmtree(out)

    def once(self, command, number):
        """Stop the command once. Returns (moment, signal, status)."""
        if command != "train":
            out = self.base / f"{command}-try"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
        elif self.chain is None:
            self.chain = out = self.base / f"chain-{number}"
            out.mkdir()
        else:
            out = self.chain
        before = checkpoints(out) if command == "train" else {}
        number, moment = self.draw.choice([15, 2]), self.draw.uniform(0, self.durations[command])
        process = self.start(command, out)
        time.sleep(moment)
        running, begin = process.poll() is None, time.monotonic()
        if running:
            process.send_signal(number)
        try:
            _, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Fault(f"signal {number} after {moment:.2f} s: still running 120 s later") from None
        status = process.returncode
        try:
            if status == 0 and running and time.monotonic() - begin > LAST_SECONDS:
                raise Fault("the signal was swallowed")
            self.check(command, out, status, err, number)
            if command == "train":
                self.check_checkpoints(out, before)
        except Fault as fault:
            raise Fault(f"signal {number} after {moment:.2f} s, status {status}: {fault}\n{err}") from None
        return moment, number, status if running else "had ended"

    def check(self, command, out, status, err, number):
        lines = [line for line in re.split(r"[\n\r]", err) if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        bad = [line for line in lines if any(word in line for word in BAD)]
        if bad:
            raise Fault(f"a traceback: {bad[0]}")
        if status not in (0, 128 + number, -number):
            raise Fault("another status")
        if status == 0 and command != "train" and contents(out) != self.reference[command]:
            raise Fault("status 0, and not all was written")
        if len(errors) != (1 if status == 128 + number else 0):
            raise Fault(f"{len(errors)} lines of error")
        left = [path for path in out.rglob("*") if "tmp" in path.name]
        if left:
            raise Fault(f"{left} is left")
        if command != "train":
            found = contents(out)
            odd = [name for name in found if found[name] != self.reference[command].get(name)]
            if odd:
                raise Fault(f"{odd} is not whole")

    def check_checkpoints(self, out, before):
        after = checkpoints(out)
        for stage, step in before.items():
            if after.get(stage, 0) < step:
                raise Fault(f"the checkpoint of step {step} of {stage} is lost")

    def finish_chain(self):
        """Let the stopped training run end, and compare its bits."""
        out, self.chain = self.chain, None
        self.undisturbed("train", out)
        left = [path for path in out.rglob("*") if "tmp" in path.name or "unreadable" in path.name]
        if left:
            raise Fault(f"{left} is left")
        for stage in STAGES:
            if trees(out, stage) != trees(self.workdir, stage):
                raise Fault(f"{stage} has other bits than an undisturbed run")
        for name in ("samples.png", "faithfulness.json"):
            if (out / name).read_bytes() != (self.workdir / name).read_bytes():
                raise Fault(f"{name} is another one")
        shutil.rmtree(out)


def contents(directory):
    """Return a digest of every file, by its name; of a model card without the paths."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def checkpoints(workdir):
    """Return the newest step of every stage that has one."""
    found = {}
    for stage in STAGES:
        steps = [int(path.name) for path in (workdir / stage / "checkpoints").glob("*") if path.name.isdecimal()]
        found |= {stage: max(steps)} if steps else {}
    return found


def trees(workdir, stage):
    """Return the bytes of all arrays of the last checkpoint."""
    import jax
    import numpy as np

    from ddpm_jax.storage.checkpoint import ARRAYS, Checkpoints

    kept = Checkpoints(workdir / stage, read_only=True)
    leaves = [jax.tree_util.tree_leaves_with_path(kept.restore_tree(name)[0]) for name in ARRAYS]
    kept.close()
    return [(str(path), np.asarray(leaf).tobytes()) for group in leaves for path, leaf in group]


def stop_at_random(command, count, seed, base):
    """Return a counter of (signal, status), and raise Fault at the first fault."""
    bench = Bench(base, random.Random(f"{seed} {command}"))
    bench.prepare(command)
    print(f"{command}: {bench.durations[command]:.1f} s undisturbed", flush=True)
    table = collections.Counter()
    for number in range(count):
        moment, signum, status = bench.once(command, number)
        name = signal.Signals(signum).name
        print(f"{command} {number}: {name} after {moment:.2f} s, status {status}", flush=True)
        table[name, status] += 1
        ended = command == "train" and status in (0, "had ended")
        if command == "train" and (ended or (number + 1) % SIGNALS_PER_RUN == 0 or number + 1 == count):
            bench.finish_chain()
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--command", nargs="*", default=COMMANDS)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    # A program in the background of a shell ignores SIGINT, and so would the commands.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for command in arguments.command:
        with tempfile.TemporaryDirectory() as base:
            table = stop_at_random(command, arguments.count, arguments.seed, Path(base))
        print(
            f"{command}: " + ", ".join(f"{k[0]} -> {k[1]}: {n}" for k, n in sorted(table.items(), key=str)), flush=True
        )


if __name__ == "__main__":
    main()
