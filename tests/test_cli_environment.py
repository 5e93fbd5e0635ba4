"""The commands and what is around them: packages, devices, the C library."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import types

import jax
import pytest
from tiny_run import ROOT, train_flags

from ddpm_jax import cli


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return result.returncode, result.stdout, result.stderr


def test_sampling_from_a_weights_file_loads_nothing_for_training():
    modules = (
        "import ddpm_jax.cli, ddpm_jax.pipelines, ddpm_jax.data.image_grid, sys; ddpm_jax.pipelines.load(); "
        "print(*sys.modules)"
    )
    status, out, err = run_python(modules)
    assert status == 0, err
    heavy = {"orbax", "grain", "tensorflow", "clu", "scipy", "optax", "tensorstore", "ml_collections"}
    heavy &= {name.partition(".")[0] for name in out.split()}
    # jax itself imports scipy, and flax optax, in some versions.
    _, base, _ = run_python("import jax, flax.linen, sys; print(*sys.modules)")
    assert heavy <= {name.partition(".")[0] for name in base.split()}
    assert "ddpm_jax.storage.checkpoint" not in out.split()


def test_every_core_is_a_device_unless_told_otherwise(monkeypatch):
    code = "from ddpm_jax import cli; cli.use_cpu_devices({}); import jax; print(len(jax.devices()))"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    assert [int(run_python(code.format(count))[1]) for count in (3, "")] == [3, len(os.sched_getaffinity(0))]
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    assert int(run_python(code.format(3))[1]) == 5


# The packages of the extras; what the bare install has, itself or by flax: jax, flax, numpy, optax, orbax, absl.
EXTRAS = {"clu", "diffrax", "ftfy", "grain", "ml_collections", "PIL", "regex", "safetensors", "scipy", "tqdm"}


def test_every_module_names_the_extra_that_is_missing():
    """A module loads without the extras, or says what to install; and so do the functions that import them later."""
    code = f"""
import importlib, pkgutil, sys
import jax, flax, numpy
for name in {sorted(EXTRAS - {"scipy"} | {"scipy.ndimage"})}:
    sys.modules[name] = None
import ddpm_jax, ddpm_jax.extras
def attempt(name, call):
    try:
        call()
        print(name, "-")
    except (ModuleNotFoundError, SystemExit) as error:
        print(name, str(error).replace(" ", "_"))
for module in pkgutil.walk_packages(ddpm_jax.__path__, "ddpm_jax."):
    attempt(module.name, lambda: importlib.import_module(module.name))
from ddpm_jax import pipelines
from ddpm_jax.diffusion import likelihood
from ddpm_jax.data import tokenizer, transforms
from ddpm_jax.data import image_grid
attempt("load", pipelines.load)
attempt("ClipTokenizer", tokenizer.ClipTokenizer)
attempt("clip_pixels", lambda: transforms.clip_pixels([numpy.zeros((5, 5, 3), numpy.uint8)], 4))
attempt("grid", lambda: image_grid.grid(numpy.zeros((1, 4, 4, 3), numpy.uint8)))
attempt("save_png", lambda: image_grid.save_png("a.png", numpy.zeros((4, 4, 3), numpy.uint8)))
attempt("likelihood", lambda: likelihood._solve(None, 0.0, 1.0, None, 0.1, 0.1))
"""
    status, out, err = run_python(code)
    assert status == 0, err
    said = dict(line.split() for line in out.splitlines())
    assert {name for name, text in said.items() if text == "-"} >= {"ddpm_jax.training.step", "ddpm_jax.models.clip"}
    sentence = re.compile(r"(error:_)?the_package_\w+_is_not_installed;_install_ddpm_jax\[(train|ode)\].*")
    assert not [text for text in said.values() if text != "-" and not sentence.fullmatch(text)]
    assert said["load"] == "-"  # the bundled weights need nothing else
    needed = {"ddpm_jax.training.loop": "tqdm", "ddpm_jax.data.loader": "grain", "grid": "PIL"}
    needed |= {"ClipTokenizer": "regex", "clip_pixels": "PIL", "save_png": "PIL", "ddpm_jax.evaluation.oracle": "scipy"}
    for name, package in needed.items():
        assert said[name] == f"the_package_{package}_is_not_installed;_install_ddpm_jax[train]"
    assert said["likelihood"] == "the_package_diffrax_is_not_installed;_install_ddpm_jax[ode]"


@pytest.mark.parametrize("missing,needed_at", [("ml_collections", "import"), ("grain", "training")])
def test_a_bare_install_is_told_what_to_install(missing, needed_at, tmp_path):
    flags = ["train", *train_flags(tmp_path / "run")] if needed_at == "training" else ["sample", "--help"]
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; sys.argv = {flags!r}; "
        f"runpy.run_module('ddpm_jax.{flags[0]}', run_name='__main__', alter_sys=True)"
    )
    status, _, err = run_python(code)
    assert status == 1
    rest = ", which has all that the commands need" if needed_at == "import" else ""
    assert err.splitlines()[-1] == f"error: the package {missing} is not installed; install ddpm_jax[train]{rest}"
    assert "Traceback" not in err


@pytest.fixture
def restarted(monkeypatch):
    """Return restarted() -> the environment that the program was started again with, or None."""
    started = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append((program, arguments)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ddpm_jax.train", "--config", "x"])
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "environ", {name: os.environ[name] for name in os.environ if name != "GLIBC_TUNABLES"})

    def run():
        started.clear()
        cli.keep_memory()
        assert started in ([], [(sys.executable, ["python", "-m", "ddpm_jax.train", "--config", "x"])])
        return os.environ.get("GLIBC_TUNABLES") if started else None

    return run


def test_training_starts_again_once_with_a_c_library_that_keeps_memory(restarted):
    assert "glibc.malloc.hugetlb=1" in restarted()
    assert restarted() is None  # the variable is set now


@pytest.mark.parametrize("reason", ["said", "accelerator", "another library"])
def test_training_leaves_the_c_library_alone(restarted, monkeypatch, reason):
    if reason == "said":
        os.environ["GLIBC_TUNABLES"] = ""
    elif reason == "another library":
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    else:
        monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_platforms=None))
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here" if name == "libtpu" else found(name))
    assert restarted() is None
