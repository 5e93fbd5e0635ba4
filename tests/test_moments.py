"""Second moments for the sampler "analytic": estimated after training, stored, loaded and used."""

import json
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipelines import cascade

import ddpm_jax
from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.errors import LoadError
from ddpm_jax.models.adm import Classifier
from ddpm_jax.pipelines import load, save
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.storage.moments import MOMENTS_FILE
from ddpm_jax.training import ClassifierTask, DiffusionTask, Images, Stage, Training, train
from ddpm_jax.training.records import random_records

SIZE, T, N = 4, 20, 96
IMAGES = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3), np.uint8)
DIFFUSION = Diffusion("cosine", T)


class Scaled(nn.Module):
    """eps_hat = w x_t; with so low a learning rate w stays at 0.7."""

    @nn.compact
    def __call__(self, x, t, train=False):
        return self.param("w", nn.initializers.constant(0.7), ()) * x


def stage(**fields):
    return Stage(
        name="base",
        task=DiffusionTask(model=Scaled(), diffusion=DIFFUSION, x0=Images(SIZE), sampling=Sampling("analytic", 5)),
        source=ArraySource(IMAGES),
        training=Training(batch_size=8, num_steps=1, learning_rate=1e-12, progress=False, **fields),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A stage that is trained without moments, and goes on to estimate them."""
    workdir = tmp_path_factory.mktemp("moments") / "run"
    train(stage(), workdir)
    assert load(workdir / "base", network=Scaled()).moments is None
    train(stage(moment_examples=N), workdir)
    return workdir


def test_moments_of_a_linear_network(workdir):
    """E |w x_t|^2 / D = w^2 (alpha^2 E |x0|^2 / D + sigma^2), the first over the same images."""
    process, x0 = DIFFUSION.process, IMAGES / 127.5 - 1.0
    alpha, sigma = (np.asarray(table, np.float64) for table in (process.alpha, process.sigma))
    expected = 0.49 * (alpha**2 * np.mean(x0**2) + sigma**2)
    found = load(workdir / "base", network=Scaled()).moments
    error = 0.49 * np.sqrt(2 * sigma**4 + 4 * (alpha * sigma) ** 2 * np.mean(x0**2)) / math.sqrt(x0.size)
    assert found.shape == (T,) and (np.abs(found - expected) < 4.5 * error + 1e-6).all()


def test_they_are_estimated_once(workdir):
    before = (workdir / "base" / MOMENTS_FILE).read_bytes()
    (workdir / "base" / MOMENTS_FILE).write_bytes(before.replace(b'"values": [', b'"values": [ '))
    train(stage(moment_examples=N), workdir)
    assert (workdir / "base" / MOMENTS_FILE).read_bytes() != before


def test_a_damaged_file_is_estimated_again_and_fewer_records_are_not(workdir):
    path = workdir / "base" / MOMENTS_FILE
    before = path.read_bytes()
    train(stage(moment_examples=8), workdir)
    assert path.read_bytes() == before
    path.write_text(json.dumps(json.loads(before) | {"values": [1.0]}))
    train(stage(moment_examples=N), workdir)
    np.testing.assert_allclose(json.loads(path.read_bytes())["values"], json.loads(before)["values"], rtol=1e-6)


def test_records_from_all_over_a_sorted_source():
    chosen = random_records(stage(), ArraySource(np.zeros((1000, 1, 1, 1), np.uint8)), 100)
    index = np.asarray(chosen._indices)
    assert len(set(index)) == 100 and index.min() < 50 and index.max() > 950 and abs(index.mean() - 500) < 100


def test_a_pipeline_samples_by_them(workdir):
    model = load(workdir / "base", network=Scaled())
    pipeline = ddpm_jax.pipelines.Cascade(base=model)
    images = pipeline.generate(4, sampler="analytic", steps=5)
    assert images.shape == (4, SIZE, SIZE, 3) and (images != pipeline.generate(4, sampler="ancestral", steps=5)).any()
    # With all noise explained, eps_hat of unit variance, nothing is left of x0 to be uncertain of.
    one = ddpm_jax.pipelines.Cascade(base=model.replace(moments=jnp.ones(T)))
    np.testing.assert_array_equal(
        one.generate(4, sampler="analytic", steps=5, threshold=math.inf),
        one.generate(4, sampler="ancestral", steps=5, threshold=math.inf),
    )


def test_raw_weights_have_none(workdir):
    assert load(workdir / "base", ema=False, network=Scaled()).moments is None


def test_a_saved_pipeline_keeps_them(tmp_path):
    pipeline = cascade()
    with pytest.raises(ValueError, match="sampler='analytic' needs the second moments of the network"):
        pipeline.generate(1, sampler="analytic")
    moments = np.linspace(0.1, 0.9, pipeline.base.diffusion.num_steps).astype(np.float32)
    save(pipeline.replace(base=pipeline.base.replace(moments=moments)), tmp_path / "p")
    np.testing.assert_array_equal(load(tmp_path / "p").base.moments, moments)


def test_a_pipeline_that_needs_them_is_refused_before_training(tmp_path):
    description = PipelineDescription("Cascade", {"base": "base"}, {"base": Sampling("analytic", 5)})
    with pytest.raises(ValueError, match="cannot sample base: sampler='analytic' needs the second moments"):
        train(stage(), tmp_path / "run", pipeline=description)
    assert not list((tmp_path / "run").glob("*/checkpoints"))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"values": [0.5] * (T - 1)}, f"values must be {T} numbers"),
        ({"values": [-0.5] * T}, "values must be"),
        ({"values": [True] * T}, "values must be"),
        ({"values": [10**400] * T}, "values must be"),
        ({"values": [1e39] * T}, "values must be"),
        ({"values": "x"}, "does not hold the second moments"),
        ({"format": "moments 7"}, "does not hold the second moments"),
    ],
)
def test_a_wrong_file_is_refused(workdir, tmp_path, change, message):
    path = workdir / "base" / MOMENTS_FILE
    before = path.read_bytes()
    try:
        path.write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(LoadError, match=message):
            load(workdir / "base", network=Scaled())
    finally:
        path.write_bytes(before)


def test_a_classifier_has_none():
    task = ClassifierTask(model=Classifier(3, 8, (1,), 1, ()), diffusion=DIFFUSION, x0=Images(SIZE))
    training = Training(batch_size=8, num_steps=1, learning_rate=1e-3, moment_examples=8)
    with pytest.raises(ValueError, match="stage judge: moment_examples=8 is for a DiffusionTask"):
        Stage(name="judge", task=task, source=ArraySource(IMAGES), training=training)
