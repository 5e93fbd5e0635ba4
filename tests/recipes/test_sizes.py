"""The table of docs/systems.md: the parameters of every network of a recipe at its published size, by eval_shape."""

import functools
import math
import re
from pathlib import Path

import jax
import pytest

from ddpm_jax.cli import load_recipe
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.training.abstract import AbstractStages

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)\.py:?(\w*)` \| (\w+) \| ([\d.]+)M \| (-|[\d.]+[MB]) \|(.*?)\|$", re.M)
ROWS = {match[:3]: match[3:] for match in ROW.findall((ROOT / "docs" / "systems.md").read_text())}
UNITS = {"M": 1e6, "B": 1e9}
DATA = {"glide": "zeros:image=256x256,captions", "diffusion2015": None}


@functools.cache
def stages(name, variant):
    """The stages of a recipe in shapes, with the data of ImageNet; what is not generated is not there."""
    recipe = load_recipe(str(ROOT / "configs" / f"{name}.py"))
    config = recipe.get_config(variant)
    path = DATA.get(name, "zeros:image=64x64,labels=1000")
    if path is not None and not config.data.path:
        config.data.path = path
    return AbstractStages(recipe.stages(config), make_mesh({"data": -1}, devices=jax.devices()[:1]))


def count(name, variant, stage):
    abstract = stages(name, variant)
    params = abstract.state(abstract.stages[stage]).params
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_network_has_the_size_of_the_table(row):
    """To the digits of the table; within 1 % of the published number, or the table says why not."""
    here, published, note = ROWS[row]
    found, (_, _, digits) = count(*row), here.partition(".")
    assert abs(found / 1e6 - float(here)) <= 0.5 * 10.0 ** -len(digits) + 1e-9, found
    if published != "-" and abs(found / (float(published[:-1]) * UNITS[published[-1]]) - 1) > 0.01:
        assert note.strip(), f"{found:,} is not within 1 % of {published}, and the table does not say why"


def test_every_system_has_a_row():
    systems = {"adm", "cascade", "cfg", "ddpm", "diffusion2015", "glide", "iddpm", "score_sde", "sr3"}
    assert {name for name, *_ in ROWS} >= systems
