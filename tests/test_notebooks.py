"""The notebooks run from top to bottom, as they do in Colab, and show what their text says."""

import json
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def run(monkeypatch):
    """Return the names that the code cells of a notebook leave behind; lines for the notebook's shell are left out."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def run(name):
        cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        names = {"__name__": "notebook"}
        for number, source in enumerate(sources):
            source = source.replace("%pip", "pass  # %pip")
            with jax.numpy_rank_promotion("allow"):
                exec(compile(source, f"{name}, code cell {number}", "exec"), names)
        return names

    yield run
    plt.close("all")


def test_two_dimensions(run):
    """The network beats noise, every sampler finds the roll, and guidance trades spread for right classes."""
    names = run("two_dimensions.ipynb")
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
