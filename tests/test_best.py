"""Measures of samples during training, and the best parameters, which stay as a model directory."""

import types

import jax
import numpy as np
import pytest
import tiny_pipelines

import ddpm_jax
from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation.during_training import SampleQuality
from ddpm_jax.training.best import measure_and_keep, read_best, with_measures
from ddpm_jax.training.stage import Training


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
    model, evaluation = tiny_pipelines.base(), Scripted(3.0, 1.0, 2.0, 4.0, higher_is_better=higher)
    for step in (1, 2, 3, 4):
        params = tiny_pipelines.other(model.params) if step == best else model.params
        found = measure_and_keep(evaluation, model.network, model.metadata, tmp_path, params, step)
    assert found == {"eval_fid": 4.0, "eval_recall": 0.5}
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


def test_what_evaluate_every_needs():
    with pytest.raises(ValueError, match="evaluate_every=3 must be a multiple of eval_every=2"):
        Training(batch_size=1, num_steps=1, learning_rate=1.0, eval_every=2, evaluate_every=3).check()
