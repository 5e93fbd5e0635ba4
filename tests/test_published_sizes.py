"""Every published network at its full size: its tables' names and shapes are those of the reference."""

import collections
import functools
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import published_sizes
from published_sizes import EXPECTED, ROWS, Network, digest, lines, ours, size, theirs

from ddpm_jax.interop import noised_clip

EXPECTED = json.loads(EXPECTED.read_text())
UNITS = {"B": 1e9, "M": 1e6, "": 1.0}
TRACED = (
    (published_sizes, "_init"),
    (published_sizes, "guided_shapes"),
    (noised_clip, "noised_clip_shapes"),
)


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Tracing takes the time here, and several files hold the same network under other names."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in TRACED:
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


def test_every_network_of_the_file_has_a_row():
    assert set(ROWS) == set(EXPECTED)


@pytest.mark.parametrize("name", ROWS)
def test_the_names_and_shapes_are_those_of_the_reference(name):
    network = ROWS[name].build()
    names = [key for entry in network.table for key in entry.theirs]
    assert max(collections.Counter(names).values()) == 1
    assert sorted(entry.ours for entry in network.table) == sorted(ours(network))
    written = theirs(network)
    assert (len(written), size(written)) == (EXPECTED[name]["tensors"], EXPECTED[name]["numbers"])
    assert digest(written) == EXPECTED[name]["sha256"]
    value, _, unit = ROWS[name].published.partition(" ")
    if value:
        # Dhariwal & Nichol say it to a million; the others round to one digit or two.
        far = 1e6 if ROWS[name].family == "guided diffusion" else 0.15 * float(value) * UNITS[unit]
        assert size(ours(network)) == pytest.approx(float(value) * UNITS[unit], abs=far)


def test_another_network_is_told_apart(monkeypatch):
    """The table says so when a name differs."""
    row = published_sizes.ROWS["64x64_classifier"]
    whole = row.build()
    table = [entry._replace(theirs=tuple(f"x.{key}" for key in entry.theirs)) for entry in whole.table]
    monkeypatch.setitem(ROWS, "64x64_classifier", row._replace(build=lambda: Network(table, whole.shapes)))
    assert list(lines(["64x64_classifier"], EXPECTED))[-1].endswith("| 307 DIFFER |")
    monkeypatch.setitem(ROWS, "64x64_classifier", row._replace(build=lambda: whole))
    assert list(lines(["64x64_classifier"], EXPECTED))[-1].endswith("| 307 agree |")
