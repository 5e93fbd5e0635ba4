"""Signals end a command with 128 + n and one sentence, wherever they hit it. `signals.py` does so at random moments."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny_run import ROOT

from ddpm_jax.stopping import SIGNALS, StopRequest
from ddpm_jax.temporary import remove_temporary_paths, temporary_path


@pytest.fixture(autouse=True)
def heeded():
    """A shell starts programs in the background with SIGINT ignored, which their children inherit."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(arguments, path=(), **options):
    """Run python in a process of its own. Returns (status, stdout, stderr)."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, **options
    )
    return result.returncode, result.stdout, result.stderr


def main_that(*lines):
    """Return a program that runs a command whose main has the lines given."""
    body = "".join(f"    {line}\n" for line in lines)
    return (
        "import ctypes, gc, hashlib, os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from absl import flags\n"
        "from ddpm_jax import cli\n"
        "sys.argv = ['test', '--nocompilation_cache'][: 1 + hasattr(cli, 'as_utf8')]\n"
        f"def main():\n{body}"
        "    print('ran on', flush=True)\n"
        "cli.run(main, flags.FlagValues())\n"
    )


def stopped(number):
    name = signal.Signals(number).name
    return 128 + number, "", f"error: stopped by {name}; what was finished is kept\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_inside_of_a_garbage_collection(number):
    """JAX has such a callback: an exception raised in it is printed as ignored, and the program runs on."""
    callback = f"gc.callbacks.append(lambda *_: (signal.raise_signal({int(number)}), time.sleep(0.01)))"
    assert run(["-c", main_that(callback, "gc.collect()")]) == stopped(number)


def test_a_signal_while_the_main_thread_is_in_c_code():
    """Python runs no handler then, as while XLA compiles; a temporary directory is removed all the same."""
    code = main_that(
        "from ddpm_jax.temporary import temporary_path",
        "with temporary_path(sys.argv[0] + '.tmp') as path:",
        "    path.mkdir()",
        "    (path / 'half').write_text('half')",
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()",
        "    begin = time.monotonic()",
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 30_000_000)",
    )
    begin = time.monotonic()
    hashed = run(["-c", code], cwd=os.environ.get("TMPDIR", "/tmp"))
    assert hashed == stopped(signal.SIGTERM)
    assert time.monotonic() - begin < 60
    assert not os.path.exists(os.path.join(os.environ.get("TMPDIR", "/tmp"), "test.tmp"))


def test_ignored_signals_stay_ignored():
    """As under nohup, and as a shell starts programs in the background."""
    code = main_that("os.kill(os.getpid(), signal.SIGHUP)", "time.sleep(0.3)")
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + code
    assert run(["-c", code]) == (0, "ran on\n", "")


def test_interrupts_during_imports(tmp_path):
    """While the package is imported by the system's default, from main on with one sentence; never by a traceback."""
    interrupt = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
    flags = ["-m", "ddpm_jax.sample", "--prompt", "a small red star", "--out", str(tmp_path / "a.png")]
    for package, expected in (("flax", (-signal.SIGINT, "", "")), ("tqdm", stopped(signal.SIGINT))):
        place = tmp_path / package
        place.mkdir()
        (place / f"{package}.py").write_text(interrupt)
        assert run(flags, path=[place]) == expected
    assert not (tmp_path / "a.png").exists()


def test_the_package_changes_no_handler_of_a_program_that_imports_it():
    code = "import signal; import ddpm_jax; print(signal.getsignal(2) is signal.default_int_handler)"
    assert run(["-c", code]) == (0, "True\n", "")


# ---- Training loops --------------------------------------------------------------------------------------------------


@pytest.fixture
def received():
    """Put a handler into place that lists the signals that come to it."""
    found = []
    previous = {number: signal.signal(number, lambda number, frame: found.append(number)) for number in SIGNALS}
    yield found
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_a_loop_records_the_first_signal_and_passes_on_a_later_one(received, monkeypatch):
    with pytest.raises(KeyError), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # the same request, delivered twice
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGTERM and received == []
        monkeypatch.setattr("ddpm_jax.stopping.REPEAT_SECONDS", 0.0)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        raise KeyError
    assert received == [signal.SIGINT]


def test_a_signal_that_the_loop_did_not_act_on_is_for_its_caller(received):
    with StopRequest():
        signal.raise_signal(signal.SIGHUP)
        assert received == []
    assert received == [signal.SIGHUP]


def test_outside_of_the_main_thread_nothing_is_handled(received):
    stops = []

    def loop():
        with StopRequest() as stop:
            stops.append(stop)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert stops[0].signum is None


def test_temporary_paths_are_removed(tmp_path):
    with temporary_path(tmp_path / "file.tmp") as file, temporary_path(tmp_path / "directory.tmp") as directory:
        file.write_text("half")
        (directory / "deep").mkdir(parents=True)
        remove_temporary_paths()
        assert not list(tmp_path.iterdir())
        file.write_text("whole")
        file.rename(tmp_path / "file")
        directory.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
