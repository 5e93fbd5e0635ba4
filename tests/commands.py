"""Running the commands in the tests' own process, and what their tests share."""

import contextlib
import os
import runpy
import shutil
import subprocess
import sys
import warnings

import pytest
from absl import logging as absl_logging
from tiny_run import ROOT

SMOKE = f"{ROOT / 'configs' / 'shapes.py'}:smoke"
A_WORD = "a small red star on a white background"


@contextlib.contextmanager
def as_command(program, *argv):
    """Run a command in this process; its end is a SystemExit, and what it does to logging does not last."""
    logger = absl_logging.get_absl_logger()
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        patch.setattr(sys, "argv", [program, *map(str, argv)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        yield lambda: runpy.run_module(f"ddpm_jax.{program}", run_name="__main__", alter_sys=True)
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def assert_one_sentence(result, status, *parts):
    """The last line of stderr is the only one that is not a warning, and says what is wanted."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == status, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0]


def listing(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@contextlib.contextmanager
def small_disk(path, size):
    """Mount a disk of `size` bytes, where the system lets us."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
