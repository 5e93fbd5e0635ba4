"""The notebooks run from top to bottom, as they do in Colab, and show what their text says."""

import importlib.util
import json
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from packaging.requirements import Requirement
from programs import compile_manipulations_quickly

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def code_cells(name):
    """Return the sources of a notebook's code cells; it begins with one."""
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    assert cells[0]["cell_type"] == "code"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def run():
    """Return run(notebook, {text: what stands in its place}) -> the names that its code cells leave behind."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def run(name, replaced=None):
        names = {"__name__": "notebook"}
        for number, source in enumerate(code_cells(name)):
            for old, new in (replaced or {}).items():
                source = source.replace(old, new)
            with jax.numpy_rank_promotion("allow"):
                exec(compile(source, f"{name}, code cell {number}", "exec"), names)
        return names

    yield run
    plt.close("all")


class Bare:
    """An environment without the package, in which the first cell is run; `installed` is what it gives to pip."""

    def __init__(self, monkeypatch, place, *, gpu=False, tpu=False, missing=True):
        self.installed, find, exists = [], importlib.util.find_spec, Path.exists
        monkeypatch.chdir(place)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if missing and name == "ddpm_jax" else find(name)
        )
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
        monkeypatch.setattr(Path, "exists", lambda p: tpu if str(p).startswith("/dev/") else exists(p))
        monkeypatch.setattr(subprocess, "run", self._pip)

    def _pip(self, command, *, check):
        assert command[:-1] == [sys.executable, "-m", "pip", "install", "-q"] and check
        self.installed.append(command[-1])

    def first_cell(self, name, answer=None):
        def ask(question):
            assert answer is not None, question
            return answer

        exec(code_cells(name)[0], {"__name__": "notebook", "input": ask})
        return self.installed


ALL = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
ADDRESS = "https://host.example/owner/ddpm_jax"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("accelerator", ["", "gpu", "tpu"])
def test_the_first_cell_installs_the_package_in_a_new_environment(monkeypatch, tmp_path, name, accelerator):
    extra = {"": set(), "gpu": {"cuda"}, "tpu": {"tpu"}}[accelerator]
    (found,) = Bare(monkeypatch, tmp_path, **({accelerator: True} if accelerator else {})).first_cell(name, ADDRESS)
    wanted = Requirement(found)
    assert (wanted.name, wanted.url) == ("ddpm_jax", f"git+{ADDRESS}")
    assert wanted.extras == {"examples"} | extra
    assert wanted.extras <= set(metadata("ddpm_jax").get_all("Provides-Extra"))


@pytest.mark.parametrize("name", ALL)
def test_the_first_cell_installs_the_clone_that_the_notebook_lies_in(monkeypatch, name):
    assert Bare(monkeypatch, NOTEBOOKS).first_cell(name) == [f"{NOTEBOOKS.parent}[examples]"]


@pytest.mark.parametrize("name", ALL)
def test_the_first_cell_does_nothing_where_the_package_is_installed(monkeypatch, tmp_path, name):
    assert Bare(monkeypatch, tmp_path, gpu=True, missing=False).first_cell(name) == []


def test_two_dimensions(run):
    """The network beats noise, every sampler finds the roll, and guidance trades spread for right classes."""
    smaller = {"swiss_roll(data_key, 512)": "swiss_roll(data_key, 192)", "key(4), 2000)": "key(4), 1000)"}
    names = run("two_dimensions.ipynb", smaller)
    assert names["losses"][-100:].mean() < 0.5 * names["losses"][:20].mean()
    roll = np.asarray(names["swiss_roll"](names["jax"].random.key(9), 4000))
    for name, points in names["samples"].items():
        points = np.asarray(points)
        distances = np.sqrt(((points[:, None] - roll[None]) ** 2).sum(-1))
        nearest = distances.min(1)
        assert np.median(nearest) < 0.05, name
        assert np.quantile(distances.min(0), 0.9) < 0.1, name  # no part of the roll is left out
        if "1000" in name:
            assert np.quantile(nearest, 0.9) < 0.05
    assert names["fidelity"] == sorted(names["fidelity"]) and names["fidelity"][-1] > 0.99
    assert names["diversity"] == sorted(names["diversity"], reverse=True)


def test_own_images(run, monkeypatch, tmp_path):
    """A folder is made, a stage trains on it for a few steps, and what it leaves is loaded and sampled."""
    monkeypatch.chdir(tmp_path)
    smaller = {
        "SIZE, STEPS, CHANNELS = 16, 300, 64": "SIZE, STEPS, CHANNELS = 16, 6, 32",
        "(1, 1), 1, ()": "(1,), 1, ()",
    }
    names = run("own_images.ipynb", smaller)
    assert len(names["source"]) == 200 and names["names"] == ("moon", "sun")
    assert [row["step"] for row in names["rows"]] == list(range(1, 7))
    assert [row["step"] for row in names["evaluated"]] == [2, 4, 6]
    assert (tmp_path / "runs/own_images/base/previews/step_000006_ema.png").exists()
    assert names["samples"].shape == (16, 16, 16, 3) and names["samples"].dtype == np.uint8
    assert names["x0"].shape == (4, 16, 16, 3) and np.isfinite(names["x0"]).all()


def test_manipulations(run, monkeypatch):
    """With a tiny pipeline in place of the bundled one: each manipulation begins, or ends, with the decoded image."""
    compile_manipulations_quickly(monkeypatch)
    tiny = {"ddpm_jax.load()": "__import__('tiny_pipelines').unclip()", "ShapesSource(7, 64": "ShapesSource(7, 16"}
    names = run("manipulations.ipynb", tiny | {"STEPS, COUNT = 50, 4": "STEPS, COUNT = 2, 2"})
    images, again = names["images"], names["again"]
    assert again.shape == images.shape == (2, 16, 16, 3)
    for same in (names["varied"][:, 0], names["changed"][:, 0]):
        np.testing.assert_array_equal(same, again)
    # The first of a pair has the noise of the pair in the upsampler, as when it is decoded alone.
    np.testing.assert_array_equal(names["between"][0, 0], again[0])
    assert (names["fresh"][:, 0] != names["fresh"][:, 1]).any() and len(names["dims"]) == 4
    assert np.abs(names["filled"][:, :, :8].astype(int) - images[:, :, :8]).max() <= 1
    np.testing.assert_allclose(names["probabilities"].sum(-1), 1.0, atol=1e-5)
