"""configs/score_sde.py and configs/sr3.py: sizes, plain data, and samples of their smoke runs by every sampler."""

import hashlib
import json
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
from test_interop_score_sde import PUBLISHED, REFERENCE, published_state  # noqa: E402

import ddpm_jax  # noqa: E402
from ddpm_jax.cli import load_recipe  # noqa: E402
from ddpm_jax.diffusion.losses import inverse_snr  # noqa: E402
from ddpm_jax.parallel.mesh import make_mesh  # noqa: E402
from ddpm_jax.pipelines import Cascade  # noqa: E402
from ddpm_jax.storage.metadata import diffusion_from  # noqa: E402
from ddpm_jax.train import plain  # noqa: E402
from ddpm_jax.training import train  # noqa: E402
from ddpm_jax.training.abstract import AbstractStages  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {name: load_recipe(str(CONFIGS / f"{name}.py")) for name in ("score_sde", "sr3")}
VARIANTS = [(name, variant) for name, recipe in RECIPES.items() for variant in recipe.VARIANTS if variant != "smoke"]
ROW = re.compile(r"configs/(\w+)\.py:?(\w*) +.*?: ([\d.]+)M(?: \(paper: (\d+)M\))?")
SIZES = {(file, variant): row for r in RECIPES.values() for file, variant, *row in ROW.findall(r.__doc__)}


def one_device():
    return make_mesh({"data": -1}, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
    return directory


def check_score_weights(recipe, config):
    """The error of a score is weighted by sigma^2 (eq. 7), and no SDE has the numbers of another."""
    config.diffusion.prediction = "score"
    (stage,) = recipe.stages(config)
    schedule = stage.task.diffusion.continuous
    t = np.linspace(schedule.t_min, schedule.t_max, 9, dtype=np.float32)
    np.testing.assert_allclose(stage.task.weighting(schedule.log_snr(t)), schedule.sigma(t) ** 2, rtol=1e-4)
    config.diffusion.schedule = "vp" if config.diffusion.schedule == "ve" else "ve"
    with pytest.raises(ValueError, match="diffusion.schedule='v.*' with diffusion.time=.* use its variant"):
        recipe.stages(config)


@pytest.mark.parametrize("name,variant", VARIANTS)
def test_a_variant_is_plain_data_of_its_documented_size(name, variant, folder):
    """Within half of the last digit that is documented, and 1 % of the number in SR3's paper."""
    config = RECIPES[name].get_config(variant)
    config.data.update(path=str(folder), held_out=0.25)
    assert json.loads(json.dumps(plain(config.to_dict()))) == plain(config.to_dict())
    (stage,) = RECIPES[name].stages(config)
    abstract = AbstractStages((stage,), one_device())
    abstract.check(stage)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.state(stage).params))
    here, paper = SIZES[name, variant]
    assert abs(size / 1e6 - float(here)) <= 0.05
    if paper:
        assert abs(size / 1e6 / float(paper) - 1.0) <= 0.01
    if name == "score_sde":
        assert (stage.task.weighting is inverse_snr) == (stage.task.diffusion.schedule == "ve")
        check_score_weights(RECIPES[name], config)
        published = {"": "ve/cifar10_ncsnpp_continuous", "ve_deep": "ve/cifar10_ncsnpp_deep_continuous"}
        for place, sde in (("vp", "vp"), ("subvp", "sub_vp")):
            for own, theirs in (("", "ddpmpp"), ("_deep", "ddpmpp_deep"), ("_ncsnpp", "ncsnpp")):
                published[f"{sde}{own}"] = f"{place}/cifar10_{theirs}_continuous"
        if variant in published:
            model, metadata = PUBLISHED[published[variant]].model(), PUBLISHED[published[variant]].metadata()
            ours, theirs = stage.task.diffusion, diffusion_from(metadata["diffusion"])
            assert stage.task.model == model
            assert ours == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks(name):
    shapes, count = published_state(name)
    shapes["sigmas"] = [PUBLISHED[name].num_steps]
    found = json.dumps(sorted((key, shape) for key, shape in shapes.items()))
    assert hashlib.sha256(found.encode()).hexdigest() == str(REFERENCE[f"published/{name}/sha256"])
    assert count == REFERENCE[f"published/{name}/count"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of one step of score_sde's smoke."""
    recipe, workdir = RECIPES["score_sde"], tmp_path_factory.mktemp("score_sde") / "run"
    config = recipe.get_config("smoke")
    config.training.update(progress=False, num_steps=1, preview_every=0, eval_every=0)
    train(recipe.stages(config), workdir, pipeline=recipe.pipeline(config), mesh=one_device())
    return ddpm_jax.load(workdir)


def test_smoke_of_score_sde_is_sampled_by_every_sampler(base):
    for sampler in ("predictor_corrector", "reverse_diffusion", "euler_maruyama", "ancestral", "ddim", "heun", "unipc"):
        images = base.generate(1, sampler=sampler, steps=3)
        assert images.shape == (1, 16, 16, 3) and images.std() > 1
    with pytest.raises(ValueError, match="base_steps=1001|steps=1001|has 1000 steps"):
        base.generate(1, steps=1001)


def test_smoke_of_sr3_enlarges_the_images_of_a_cascade(base, tmp_path):
    recipe = RECIPES["sr3"]
    config = recipe.get_config("smoke")
    config.training.update(progress=False, num_steps=1, preview_every=0, eval_every=0)
    config.image_size, config.low_size, config.attention_resolutions = 32, 16, (16,)
    train(recipe.stages(config), tmp_path / "sr3", mesh=one_device())
    model = ddpm_jax.load(tmp_path / "sr3" / "upsampler")
    assert model.diffusion.continuous is not None and model.diffusion.time == "alpha_bar"
    cascade = Cascade(base.base, upsamplers=(model,))
    kwargs = {"steps": 2, "sampler": "ddim", "upsampler_steps": 2}
    images = cascade.generate(2, **kwargs)
    assert images.shape == (2, 32, 32, 3) and images.std() > 1
    assert (images != cascade.generate(2, **(kwargs | {"upsampler_steps": 4}))).any()


def test_what_cannot_be(folder):
    for recipe in RECIPES.values():
        with pytest.raises(ValueError, match="variant must be one of '', .*'huge'"):
            recipe.get_config("huge")
        with pytest.raises(ValueError, match="data.path is needed"):
            recipe.stages(recipe.get_config())
        config = recipe.get_config("smoke")
        config.attention_resolutions = (5,)
        with pytest.raises(ValueError, match="attention_resolutions has 5"):
            recipe.stages(config)
    config = RECIPES["sr3"].get_config("smoke")
    config.low_size = 5
    with pytest.raises(ValueError, match="low_size=5 must divide image_size=16"):
        RECIPES["sr3"].stages(config)
