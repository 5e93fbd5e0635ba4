"""Mistakes in Python with stages, tasks, sources and `train`: each is refused in one sentence, before training."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from toy_training import ToyTask

from ddpm_jax.data.decode import DecodeError
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.transforms import CenterCrop, RandomFlip, Select
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.storage.model_directory import place_of
from ddpm_jax.training import (
    ClassifierTask,
    ContrastiveTask,
    DiffusionTask,
    Images,
    Labels,
    LowResolution,
    Stage,
    Training,
    train,
)

IMAGE = np.zeros((8, 8, 3), np.uint8)
TRAINING = Training(batch_size=8, num_steps=1, learning_rate=1e-3, preview_every=0, progress=False)


class Net(nn.Module):
    @nn.compact
    def __call__(self, xt, t, train=False):
        return nn.Dense(3)(xt)


def task(**fields):
    return DiffusionTask(**({"model": Net(), "diffusion": Diffusion("cosine", 10), "x0": Images(8)} | fields))


def stage(**fields):
    return Stage(**({"name": "base", "task": task(), "source": [{"image": IMAGE}] * 8, "training": TRAINING} | fields))


def refused(message, make):
    """Assert that `make()` is refused in one sentence that begins with `message`."""
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": Net}, "model must be a network, got the class Net; write Net(...)"),
        (
            {"model": lambda xt, t: xt},
            "model must be a network such as a flax.linen.Module, with init and apply, got",
        ),
        ({"model": None}, "model must be a network such as a flax.linen.Module, with init and apply, got None"),
        ({"diffusion": "cosine"}, "diffusion='cosine' must be a Diffusion"),
        ({"x0": 8}, "x0=8 must be what is generated, such as Images(size)"),
        ({"x0": Images}, "x0=<class 'ddpm_jax.training.tasks.data.Images'> must be what is generated"),
        ({"conditions": Labels(3)}, "conditions=Labels(num_classes=3, drop=0.0, names=None) must be a tuple"),
        ({"conditions": ("labels",)}, "conditions[0]='labels' must be a condition"),
        ({"weighting": "min_snr"}, "weighting='min_snr' must be a function"),
        ({"sampling": {"steps": 2}}, "sampling={'steps': 2} must be a Sampling"),
    ],
)
def test_fields_of_a_diffusion_task(fields, message):
    refused(message, lambda: task(**fields))


def test_fields_of_a_classifier_task():
    good = {"model": Net(), "diffusion": Diffusion("cosine", 10), "x0": Images(8)}
    for name, value in {"model": Net, "diffusion": "cosine", "x0": 8}.items():
        refused(name, lambda name=name, value=value: ClassifierTask(**good | {name: value}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Images("8"), "Images.size='8' must be an integer"),
        (lambda: Images(0), "Images.size=0 must be at least 1"),
        (lambda: Images(8, channels=True), "Images.channels=True must be an integer"),
        (lambda: Labels("3"), "Labels.num_classes='3' must be an integer"),
        (lambda: Labels(3, drop=2), "Labels.drop=2 must lie between 0 and 1"),
        (lambda: Labels(3, drop="0.1"), "Labels.drop='0.1' must be one number"),
        (lambda: LowResolution("8", 2), "LowResolution.size='8' must be an integer"),
        (lambda: LowResolution(8, 2.0), "factor=2.0 of enlarging must be a power of two"),
        (lambda: Select("image"), "names='image' must be a tuple of names; one name is written as ('image',)"),
    ],
)
def test_fields_of_data_and_conditions(make, message):
    refused(message, make)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": object()}, "task of stage base must be a task such as DiffusionTask(...)"),
        (
            {"task": ContrastiveTask(CLIP, None)},
            "task of stage base cannot be trained: model must be a",
        ),
        ({"task": DiffusionTask}, "task of stage base must be a task such as DiffusionTask(...)"),
        ({"source": "photos"}, "source of stage base must hold records, dicts of arrays, by index, got 'photos'"),
        (
            {"source": np.zeros((8, 8, 8, 3))},
            "source of stage base must hold records, dicts of arrays, by index, got",
        ),
        ({"source": None}, "source of stage base must hold records"),
        ({"eval_source": iter(())}, "eval_source of stage base must hold records"),
        (
            {"transforms": CenterCrop(8)},
            "transforms of stage base must be a tuple of transforms, got CenterCrop; one",
        ),
        ({"transforms": (CenterCrop,)}, "transforms of stage base must be a tuple of transforms, and [0] is the class"),
        (
            {"transforms": ("crop",)},
            "transforms of stage base must be a tuple of transforms, functions of a rec",
        ),
        ({"needs": ["clip"]}, "needs of stage base must be a dict"),
        ({"needs": "clip"}, "needs of stage base must be a dict"),
        ({"needs": {"clip": 3}}, "needs of stage base must be names of stages or paths of model directories by role"),
    ],
)
def test_fields_of_a_stage(fields, message):
    refused(message, lambda: stage(**fields))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "run"), "stages=None must be a Stage"),
        (("base", "run"), "stages='base' must be a Stage"),
        (([None], "run"), "stages[0]=None must be a Stage"),
        ((task(), "run"), "stages=DiffusionTask("),
        ((stage(), None), "workdir=None must be the path of a directory"),
    ],
)
def test_arguments_of_train(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    refused(message, lambda: train(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "base"}, "names='base' must be a sequence of names of stages; write ['base']"),
        ({"mesh": 8}, "mesh=8 must be a Mesh with axes out of data, fsdp, tensor"),
        (
            {"mesh": Mesh(np.reshape(jax.devices()[:2], (1, 2)), ("data", "fspd"))},
            "mesh=Mesh(axis_sizes=(1, 2), axis_names=('data', 'fspd'), axis... must be a Mesh with axes out of data",
        ),
        ({"profile_steps": (5, 2)}, "profile_steps=(5, 2) must be the first and the last step, such as (100, 105)"),
        ({"profile_steps": (100, 105)}, "profile_steps=(100, 105) are steps that no stage makes: base has 1"),
        ({"pipeline": "Cascade"}, "pipeline='Cascade' must be a pipelines.PipelineDescription"),
    ],
)
def test_options_of_train(tmp_path, options, message):
    refused(message, lambda: train(stage(), tmp_path / "run", **options))


A_DICT = 'must be a dict, such as {"image": uint8[H, W, 3]}, got'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": [None] * 8}, f"record 0 of the source {A_DICT} NoneType"),
        ({"source": [IMAGE] * 8}, f"record 0 of the source {A_DICT} ndarray"),
        ({"transforms": (lambda record: None,)}, "what the transform "),
        ({"source": [{"image": IMAGE[..., 0]}] * 8}, "images of the records must be [H, W, 3], got the shape [8, 8]"),
        ({"source": [{"image": object()}] * 8}, "its task or transforms read 'image', which is of type object in"),
        ({"task": task(model=UNet(16, 3, (1,), 1, (), groups=4, patch=0))}, "UNet.patch=0 must be an integer in [1, "),
        ({"task": task(model=UNet(16, 3, 1, 1, (), groups=4))}, "UNet.channel_mult=1 must be a list"),
        (
            {"task": task(model=UNet(16, 3, (1,), 1, (), groups=4, dtype="float33"))},
            "UNet.dtype='float33' must be one",
        ),
    ],
)
def test_records_and_networks_that_train_refuses(tmp_path, fields, message):
    with pytest.raises(ValueError) as error:
        train(stage(**fields), tmp_path / "run")
    text = str(error.value)
    assert text.startswith("stage base") and message in text and "\n" not in text, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("found", [(lambda loss: loss), (lambda loss: (loss, loss)), (lambda loss: (1.0, {}))])
def test_a_loss_that_returns_something_else(tmp_path, found):
    class Task(ToyTask):
        def loss(self, params, batch, key):
            return found(jnp.zeros(batch["x"].shape[0]))

    own = stage(task=Task(), source=[{"x": np.zeros(3, np.float32)}] * 8)
    refused(
        "stage base cannot work: loss of its task must return (float32[B], a dict", lambda: train(own, tmp_path / "run")
    )


def test_later_records_and_transforms_are_named_by_the_loader():
    records = [{"image": IMAGE}, None]
    with make_loader(records, batch_size=2, seed=0) as loader:
        refused(f"record 1 of the source {A_DICT} NoneType", lambda: next(loader))

    class Lost(RandomFlip):
        def random_map(self, record, rng):
            super().random_map(record, rng)

    with make_loader(records[:1], batch_size=2, seed=0, transforms=(Lost(),)) as loader:
        refused("what the transform ", lambda: next(loader))


def test_a_record_that_cannot_be_read_names_the_cure():
    class Broken(list):
        def __getitem__(self, index):
            raise DecodeError("photos/7.jpg: the image is truncated or damaged")

    message = (
        "photos/7.jpg: the image is truncated or damaged; python -m ddpm_jax.prepare copies a data set without such"
    )
    with make_loader(Broken([0]), batch_size=1, seed=0) as loader, pytest.raises(DecodeError) as error:
        next(loader)
    assert str(error.value).startswith(message)


def test_no_records_are_refused(tmp_path):
    refused("stage base cannot work: its source has no records", lambda: train(stage(source=[]), tmp_path / "run"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 9, 9, 3), np.uint8), "images of the records must be 8 x 8 x 3, got 9 x 9 x 3"),
        (np.zeros((8, 8, 8, 3), np.float32), "images of the records must be uint8"),
    ],
)
def test_images_of_another_size_or_type(images, message):
    refused(message, lambda: task().clean({"image": images}))
    upsampler = task(x0=Images(16), conditions=(LowResolution(8, 2),))
    assert upsampler.clean({"image": np.zeros((2, 8, 8, 3), np.uint8)}).shape == (2, 8, 8, 3)
    refused(
        "images of the records must be 4 x 4 x 3, got 8 x 8 x 3",
        lambda: task(x0=Images(4)).clean({"image": np.zeros((2, 8, 8, 3), np.uint8)}),
    )


def test_a_pipeline_of_models_that_are_not_there(tmp_path):
    class Pipeline:
        models = {"base": "bose"}

        def write(self, directory):
            raise AssertionError

    message = "the pipeline's base is 'bose', which is neither a stage (base) nor a model directory"
    refused(message, lambda: train(stage(), tmp_path / "run", pipeline=Pipeline()))
    assert not (tmp_path / "run").exists()


def test_places_of_models(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/own")
    places = {
        "base": tmp_path / "base",
        "/own/base": "/own/base",
        "~/base": "/home/own/base",
        "gs://own/b": "gs://own/b",
    }
    for place, expected in places.items():
        assert str(place_of(tmp_path, place)) == str(expected)


def test_a_pipeline_of_more_steps_than_there_are(tmp_path):
    """Not after the training, when the pipeline is loaded."""
    pipeline = PipelineDescription("Cascade", models={"base": "base"}, sampling={"base": Sampling("ddim", 20)})
    message = "the pipeline cannot sample base: steps=20 selects 20 steps where there are only 10"
    refused(message, lambda: train(stage(), tmp_path / "run", pipeline=pipeline))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_share(tmp_path):
    own = stage(training=dataclasses.replace(TRAINING, accumulate=2))
    mesh = make_mesh({"data": -1}, devices=jax.devices()[:3])
    message = "stage base: batch_size=8 must be a multiple of 6 = 3 (devices) x 2 (accumulate)"
    refused(message, lambda: train(own, tmp_path / "run", mesh=mesh))
