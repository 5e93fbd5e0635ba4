"""Every recipe's :smoke trains, resumes bit for bit, samples, and is evaluated.

Left out of the default run, and run by its path in CI: pytest tests/recipes.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax.cli import load_recipe
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.pipelines import Cascade
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training import train

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {path.stem: load_recipe(str(path)) for path in sorted(CONFIGS.glob("*.py"))}


def newest(directory):
    """Return the step and the checksums of all trees of a stage's newest checkpoint."""
    step, _, meta = Checkpoints(directory, read_only=True).read_config()
    return step, meta["checksums"]


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, tmp_path_factory):
    """A recipe, its config, and its run of two steps a stage."""
    recipe, workdir = RECIPES[request.param], tmp_path_factory.mktemp(request.param) / "run"
    assert "smoke" in recipe.VARIANTS
    config = recipe.get_config("smoke")
    run(recipe, config, workdir)
    return recipe, config, workdir


def run(recipe, config, workdir):
    mesh = make_mesh({"data": -1}, devices=jax.devices()[: config.get("cpu_devices", 1)])
    description = recipe.pipeline(config) if hasattr(recipe, "pipeline") else None
    train(recipe.stages(config), workdir, pipeline=description, mesh=mesh)


def test_a_run_that_was_stopped_after_a_step_ends_as_one_that_was_not(trained, tmp_path):
    recipe, config, workdir = trained
    shutil.copytree(workdir, tmp_path / "parts")
    names = [stage.name for stage in recipe.stages(config) if not hasattr(stage.task, "fitted")]
    for name in names:
        (last,) = (tmp_path / "parts" / name / "checkpoints").glob("2")
        shutil.rmtree(last)
    assert [newest(tmp_path / "parts" / name)[0] for name in names] == [1] * len(names)
    run(recipe, config, tmp_path / "parts")
    for name in names:
        assert newest(tmp_path / "parts" / name) == newest(workdir / name)


def test_a_run_is_sampled(trained):
    _, _, workdir = trained
    pipeline = ddpm_jax.load(workdir)
    if not isinstance(pipeline, Cascade):
        pytest.skip("sampled by the tests of unCLIP and of upsamplers")
    labels = None if pipeline.labels is None else 0
    prompts = "a red circle" if pipeline.captioned else None
    first, again, other = (pipeline.generate(2, labels=labels, prompts=prompts, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (2, pipeline.image_size, pipeline.image_size, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()
