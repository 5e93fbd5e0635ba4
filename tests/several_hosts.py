"""Runs of several processes on this machine, as hosts of a run: with a coordinator and collectives over TCP."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.storage.checkpoint import ARRAYS, Checkpoints

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).with_name("hosts_recipe.py")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def train_flags(workdir, *flags):
    return ["--config", RECIPE, "--workdir", workdir, *flags]


class HostRun:
    """Processes of one command; a context manager that kills what is left of them.

    Args:
        flags: of the command; a list of lists gives each host its own.
        hosts: the number of processes.
        devices: of each.
        command: of ddpm_jax.
        each: environment variables of a host, by its index.
        environ: environment variables of all.
    """

    def __init__(self, flags, *, hosts=2, devices=2, command="train", each=None, environ=None, wait=60):
        self.processes, port = [], free_port()
        for index in range(hosts):
            own = flags[index] if flags and isinstance(flags[0], list) else flags
            place = ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", hosts, "--process_id", index]
            place = [*place, "--initialization_timeout", wait] if hosts > 1 else []
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                # A cache of its own: what hosts write at the same time is not whole.
                "JAX_COMPILATION_CACHE_DIR": f"{jax.config.jax_compilation_cache_dir}/host{index}of{hosts}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "PYTHONPATH": str(ROOT),
            }
            environment |= (environ or {}) | (each or {}).get(index, {})
            program = [sys.executable, "-m", f"ddpm_jax.{command}", *map(str, [*own, *place])]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(program, env=environment, **pipes))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def __getitem__(self, index):
        return self.processes[index]

    def finish(self, timeout=300):
        """Return [(status, stdout, stderr), ...]."""
        deadline, found = time.monotonic() + timeout, []
        for process in self.processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            found.append((process.returncode, out, err))
        return found

    def wait_until(self, ready, timeout=300):
        """Wait for something that the processes do."""
        deadline = time.monotonic() + timeout
        while not ready():
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended, [process.communicate()[1] for process in ended]
            assert time.monotonic() < deadline
            time.sleep(0.01)


def trees(workdir, stage):
    """Return {path: array} of the newest checkpoint of a stage."""
    checkpoints = Checkpoints(Path(workdir) / stage, read_only=True)
    leaves = [jax.tree_util.tree_leaves_with_path({name: checkpoints.restore_tree(name)[0]}) for name in ARRAYS]
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for group in leaves for path, leaf in group}


def assert_same_bits(workdir, reference, stages=("clip", "head")):
    for stage in stages:
        ours, theirs = trees(workdir, stage), trees(reference, stage)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].tobytes() == theirs[name].tobytes(), (stage, name)


def assert_close(workdir, reference, stages=("clip", "head"), atol=1e-5):
    for stage in stages:
        ours, theirs = trees(workdir, stage), trees(reference, stage)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol, err_msg=f"{stage} {name}")
