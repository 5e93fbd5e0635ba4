"""Recipes: every variant is plain data and describes stages that work. tests/recipes trains them, and tests sizes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.cli import load_recipe
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.pipelines import PipelineDescription
from ddpm_jax.train import plain
from ddpm_jax.training import train
from ddpm_jax.training.abstract import AbstractStages

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = ("shapes", "ddpm", "iddpm", "adm", "cascade", "cfg", "glide", "unclip")
FILES = {name: load_recipe(str(CONFIGS / f"{name}.py")) for name in RECIPES}
EVERY = [(name, variant) for name, module in FILES.items() for variant in module.VARIANTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with labels and captions."""
    directory = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        path = directory / ("cats", "dogs")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text("a red circle")
    return directory


def make_config(name, variant, folder):
    config = FILES[name].get_config(variant)
    if "path" in config.data and not config.data.path:
        config.data.path = str(folder)
    return config


def own_mesh(config):
    """The devices of the recipe, not the eight of the tests: the more there are, the longer a step takes to compile."""
    return make_mesh({"data": -1}, devices=jax.devices()[: config.cpu_devices])


@pytest.mark.parametrize("name,variant", EVERY)
def test_a_variant_is_plain_data_and_describes_a_pipeline_of_its_stages(name, variant, folder):
    config = make_config(name, variant, folder)
    assert json.loads(json.dumps(plain(config.to_dict()))) == plain(config.to_dict())
    stages, description = FILES[name].stages(config), FILES[name].pipeline(config)
    assert isinstance(description, PipelineDescription)
    used = [place for role in description.models.values() for place in ([role] if isinstance(role, str) else role)]
    assert sorted(used) == sorted(stage.name for stage in stages)


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_variant_is_named(name):
    with pytest.raises(ValueError, match="variant must be one of '', .*'huge'"):
        FILES[name].get_config("huge")


@pytest.mark.parametrize("name", ["ddpm", "iddpm", "adm", "cascade", "cfg", "glide", "unclip"])
def test_data_is_needed(name):
    with pytest.raises(ValueError, match="data.path is needed: "):
        FILES[name].stages(FILES[name].get_config())


def test_class_conditions_need_labels(folder):
    config = make_config("ddpm", "small", folder)
    config.class_conditional = True
    (stage,) = FILES["ddpm"].stages(config)
    assert stage.task.conditions[0].names == ("cats", "dogs") and stage.task.model.num_classes == 3
    config.data.path = "shapes"
    with pytest.raises(ValueError, match="class_conditional=True needs labels, which shapes has not"):
        FILES["ddpm"].stages(config)


def test_fields_of_unclip_that_cannot_be_are_refused(folder):
    config = make_config("unclip", "smoke", folder)
    config.sample.tile = 31
    with pytest.raises(
        ValueError, match="sample.tile=31 must be a multiple of 2 pixels, so that tiles fit the network"
    ):
        FILES["unclip"].pipeline(config)
    with config.unlocked():
        config.upsamplers = ("up_256", "foo")
    with pytest.raises(ValueError, match=r"upsamplers=\('up_256', 'foo'\) must be some of 'up_256', 'up_1024'"):
        FILES["unclip"].stages(config)


def test_both_priors_of_shapes_can_be_trained_and_evaluated(tmp_path):
    config = FILES["shapes"].get_config("smoke")
    config.priors, config.prior.embed_norm, config.sample.prior.l2_clamp = "both", "standardize", True
    for stage in ("prior", "ar_prior"):
        config[stage].training.eval_every = 2
    abstract = AbstractStages(FILES["shapes"].stages(config), own_mesh(config))
    for name in ("statistics", "prior", "codes", "ar_prior"):
        abstract.check(abstract.stages[name])
    needs = {name: dict(abstract.stages[name].needs) for name in ("prior", "ar_prior")}
    assert needs["prior"] == {"clip": "clip", "statistics": "statistics"}
    assert needs["ar_prior"] == {"clip": "clip", "codes": "codes"}
    models = FILES["shapes"].pipeline(config).models
    assert models["statistics"] == "statistics"
    without = PipelineDescription("UnCLIP", {role: place for role, place in models.items() if role != "statistics"})
    with pytest.raises(ValueError, match="its prior is the stage prior, which is trained with 'statistics'"):
        train(FILES["shapes"].stages(config), tmp_path, names=[], pipeline=without)
    config.prior.embed_norm = "l2"
    with pytest.raises(ValueError, match="prior.embed_norm='l2' must be 'scale' or 'standardize'"):
        FILES["shapes"].stages(config)
