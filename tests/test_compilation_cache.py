"""The commands keep compiled programs on disk; nothing about that can make a command fail."""

import os
import stat
import subprocess
import sys

import jax
import pytest
from tiny_run import ROOT

from ddpm_jax import compilation_cache
from ddpm_jax.compilation_cache import cache_directory, prune, use_compilation_cache

PROGRAM = """
import sys
from absl import flags
from ddpm_jax import cli
def main():
    import jax, jax.monitoring
    seen = []
    jax.monitoring.register_event_listener(lambda name, **_: seen.append(name.rpartition("/")[2]))
    jax.jit(lambda x: x * 3)(1.0)
    print(*[name for name in seen if name in ("cache_hits", "cache_misses")], jax.config.jax_compilation_cache_dir)
cli.run(main, flags.FlagValues())
"""


def run(home, *flags, **variables):
    """Run a command that compiles one program. Returns (what the cache did, stderr)."""
    removed = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(home)}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | variables
    result = subprocess.run([sys.executable, "-c", PROGRAM, *flags], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split(), result.stderr


def test_a_second_process_compiles_nothing_and_a_damaged_entry_is_written_again(tmp_path):
    (*first, place), err = run(tmp_path)
    assert (first, err) == (["cache_misses"], "")
    assert place.startswith(f"{tmp_path}/ddpm_jax/jax/{jax.lib.__version__}-")
    assert stat.S_IMODE(os.stat(place).st_mode) == 0o700
    assert run(tmp_path) == (["cache_hits", place], "")
    (entry,) = (tmp_path / "ddpm_jax").rglob("*-cache")
    os.truncate(entry, entry.stat().st_size // 2)
    assert run(tmp_path) == (["cache_misses", place], "")
    assert run(tmp_path) == (["cache_hits", place], "")


@pytest.fixture
def unset(monkeypatch):
    """Let JAX have no cache directory, and give back the one of the tests."""
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_the_flag_turns_it_off(tmp_path):
    assert run(tmp_path / "no", "--nocompilation_cache") == (["None"], "")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("reason", ["variable", "empty variable", "option", "off"])
def test_what_the_user_says_counts(unset, tmp_path, monkeypatch, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no"))
    if "variable" in reason:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "" if "empty" in reason else str(tmp_path))
    elif reason == "option":
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", reason != "off")
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == (str(tmp_path) if reason == "option" else None)
    assert not (tmp_path / "no").exists()


def test_a_directory_that_cannot_be_used_costs_one_warning(unset, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=rf"no compilation cache: .*{tmp_path}/file/ddpm_jax") as seen:
        assert use_compilation_cache() is None
    assert len(seen) == 1 and jax.config.jax_compilation_cache_dir is None


def test_a_user_without_a_home_directory_costs_one_warning(unset, monkeypatch):
    """As in a container that runs under a number that no user has."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.warns(UserWarning, match="no compilation cache: Could not determine home directory"):
        assert use_compilation_cache() is None


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_directory_that_others_can_write_is_not_used(unset, tmp_path, monkeypatch, mode):
    """Programs in the cache are run, so its directory must belong to the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_directory().mkdir(parents=True)
    cache_directory().chmod(mode)
    with pytest.warns(UserWarning, match=f"other users can write into {tmp_path}"):
        assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_other_processors_have_another_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification ignores it
    here = cache_directory()
    assert ".cache" in here.parts or "Caches" in here.parts
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "flags : fpu sse avx512f")
    assert cache_directory().parent == here.parent and cache_directory() != here


def test_what_was_used_longest_ago_is_removed(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / f"jit_{name}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "jit_empty-cache").touch()
    (tmp_path / "other").write_bytes(b"x" * 1000)
    prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_middle-cache", "jit_new-cache", "other"]
