"""Measures of samples during training, and the best parameters, which stay as a model directory."""

import math
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_pipelines

import ddpm_jax
from ddpm_jax import cli
from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation.during_training import SampleQuality
from ddpm_jax.evaluation.features import random_extractor
from ddpm_jax.evaluation.statistics import Moments
from ddpm_jax.evaluation.summary import Summary, write_statistics
from ddpm_jax.training.best import measure_and_keep, read_best, with_measures
from ddpm_jax.training.run import train
from ddpm_jax.training.stage import Training

CONFIGS = Path(__file__).parents[1] / "configs"


class Scripted:
    """Measures that were written down before."""

    def __init__(self, *values, higher_is_better=False):
        self.metric, self.higher_is_better, self._values = "fid", higher_is_better, iter(values)

    def __call__(self, model):
        return {"fid": next(self._values), "recall": 0.5}


def test_when_samples_are_measured():
    state = lambda step: types.SimpleNamespace(step=np.int32(step), ema_params=step)  # noqa: E731
    evaluate = lambda state, key: None if state.step == 8 else {"eval_loss": 1.0}  # noqa: E731
    both = with_measures(evaluate, lambda params, step: {"eval_fid": float(params + step)}, 4, 10)
    assert both(state(2), None) == {"eval_loss": 1.0}
    assert both(state(4), None) == {"eval_loss": 1.0, "eval_fid": 8.0}
    assert both(state(8), None) is None  # the hosts stop
    assert both(state(10), None) == {"eval_loss": 1.0, "eval_fid": 20.0}
    assert with_measures(None, lambda params, step: {"eval_fid": 0.0}, 4, 10)(state(4), None) == {"eval_fid": 0.0}


@pytest.mark.parametrize("higher,best", [(False, 2), (True, 4)])
def test_the_best_model_stays(tmp_path, higher, best):
    model, evaluation = tiny_pipelines.base(), Scripted(math.nan, 3.0, 1.0, 2.0, 4.0, math.nan, higher_is_better=higher)
    for step in range(6):
        params = tiny_pipelines.other(model.params) if step == best else model.params
        found = measure_and_keep(evaluation, model.network, model.metadata, tmp_path, params, step)
        assert (step == 0) == (read_best(tmp_path) is None)
    assert math.isnan(found["eval_fid"]) and found["eval_recall"] == 0.5
    assert read_best(tmp_path)["step"] == best
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [str(best), "best.json"]
    loaded = ddpm_jax.load(tmp_path / "best" / str(best))
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), dict(tiny_pipelines.other(model.params)))
    wrong = Scripted(1.0)
    wrong.metric = "kid"
    with pytest.raises(ValueError, match="metric='kid' of the evaluation must be one of fid, recall"):
        measure_and_keep(wrong, model.network, model.metadata, tmp_path, model.params, 5)


def test_samples_of_a_model_are_measured():
    images = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    sampling = Sampling("ddim", 1, threshold=1.0)
    how = {"num_images": 4, "batch_size": 4, "metrics": ("fid", "kid")}
    quality = SampleQuality(reference=ArraySource(images), sampling=sampling, **how)
    found = quality(tiny_pipelines.base("labels"))
    assert set(found) == {"fid", "kid"} and found["fid"] > 0
    assert quality(tiny_pipelines.base("labels")) == found
    with pytest.raises(ValueError, match="metrics=.* must be of fid, sfid"):
        SampleQuality(reference=ArraySource(images), metrics=("psnr",))


IMAGES = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"metric": "FID"}, r"metric='FID' must be a measure of metrics=\('fid',\): fid"),
        ({"metric": "kid"}, r"metric='kid' must be a measure of metrics=\('fid',\): fid"),
        ({"metrics": ("is", "pr"), "metric": "is"}, "must be a measure of .*: inception_score, precision, recall"),
        ({"metrics": "fid"}, "metrics='fid' must be of fid, sfid"),
        ({"num_images": 1}, "num_images=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"sampling": Sampling("analytic")}, "the sampler 'analytic'"),
    ],
)
def test_settings_of_a_measurement(options, message):
    with pytest.raises(ValueError, match=message):
        SampleQuality(reference=ArraySource(IMAGES), **options)


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    base = tiny_pipelines.base()
    score = SampleQuality(reference=ArraySource(IMAGES), metrics=("is",), metric="inception_score")
    with pytest.raises(ValueError, match="is cannot be measured: the features random have no classes"):
        score.check(base)
    file = tmp_path / "statistics.npz"
    summary = Summary("none", random_extractor().identity, "", 4, {"pool": Moments(128)})
    summary.moments["pool"].add(np.eye(4, 128))
    write_statistics(file, summary)
    kernel = SampleQuality(reference=str(file), metrics=("fid", "kid"))
    with pytest.raises(ValueError, match="kid cannot be measured: .* not the features of its images"):
        kernel.check(base)
    SampleQuality(reference=str(file)).check(base)
    with pytest.raises(ValueError, match="base is an upsampler"):
        score.check(tiny_pipelines.upsampler())


RECIPES = ["adm", "cascade", "cfg", "ddpm", "iddpm", "score_sde"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_line_of_a_recipe_sets_the_measurement(name):
    recipe = cli.load_recipe(f"{CONFIGS}/{name}.py")
    config = recipe.get_config("smoke")
    assert not recipe.stages(config)[0].training.evaluate_every
    config.evaluate.update(every=4, metrics="fid, pr", metric="recall", num_images=20)
    stage, *others = recipe.stages(config)
    assert stage.training.evaluate_every == 4 and not any(other.training.evaluate_every for other in others)
    quality = stage.evaluate
    assert (quality.metrics, quality.metric, quality.num_images) == (("fid", "pr"), "recall", 20)
    assert quality.higher_is_better and quality.reference is stage.source and quality.size == stage.task.x0.size
    config.evaluate.num_images = 1
    with pytest.raises(ValueError, match="evaluate: num_images=1 must be at least 2"):
        recipe.stages(config)


def test_what_evaluate_every_needs():
    with pytest.raises(ValueError, match="evaluate_every=3 must be a multiple of eval_every=2"):
        Training(batch_size=1, num_steps=1, learning_rate=1.0, eval_every=2, evaluate_every=3).check()


def test_noise_levels_that_are_not_trained_are_refused_before_training(tmp_path):
    """The ablation without noise, --config.augmentation.noise=0, needs the levels without noise too."""
    recipe = cli.load_recipe(f"{CONFIGS}/cascade.py")
    config = recipe.get_config("smoke")
    description = recipe.pipeline(config)
    config.augmentation.noise = 0.05
    with pytest.raises(ValueError, match=r"sample.noise_levels=\(0.1,\) must be in \[0, 0.05\]"):
        recipe.pipeline(config)
    with pytest.raises(ValueError, match="cannot sample up_32: its noise level 0.1 must be at most 0.05, the largest"):
        train(recipe.stages(config), tmp_path, pipeline=description)
    config.augmentation.noise = 0.0
    config.sample.noise_levels = (0.0,)
    assert recipe.pipeline(config).options == {"noise_levels": {"up_32": 0.0}}
    config.sample.truncated = True
    with pytest.raises(ValueError, match="sample.truncated=True needs sample.noise_levels above 0"):
        recipe.pipeline(config)
