"""configs/upsampler.py and `ddpm_jax.sweep`: sizes, a smoke run, and the measures."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import assert_one_sentence
from PIL import Image
from random_networks import fast_jit, normal

from ddpm_jax import pipelines
from ddpm_jax.cli import load_recipe
from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.evaluation.upsampling import best_levels, bicubic, psnr, read_pairs, sliced_wasserstein
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.training import train
from ddpm_jax.training.abstract import AbstractStages

RECIPE = load_recipe(str(Path(__file__).parents[1] / "configs" / "upsampler.py"))


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def config_of(variant, tmp_path):
    config = RECIPE.get_config(variant)
    if not config.data.path:
        for number in range(4):
            Image.fromarray(images(24, 20, 3, seed=number)).save(tmp_path / f"{number}.png")
        config.data.update(path=str(tmp_path), held_out=0.25)
    return config


@pytest.mark.parametrize("variant", ["", "shapes"])
def test_variants_have_their_documented_sizes(variant, tmp_path):
    rows = dict(re.findall(r"configs/upsampler.py:?(\w*) .*: ([\d.]+)M", RECIPE.__doc__))
    (stage,) = RECIPE.stages(config_of(variant, tmp_path))
    abstract = AbstractStages((stage,), make_mesh({"data": -1}, devices=jax.devices()[:1]))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.state(stage).params))
    assert abs(size / 1e6 - float(rows[variant])) <= 0.05


@pytest.mark.parametrize("degradation", ["none", "blur", "bsr"])
def test_low_resolution_images_are_made_on_the_host_or_the_device(degradation, tmp_path):
    config = config_of("smoke", tmp_path)
    config.degradation = degradation
    (stage,) = RECIPE.stages(config)
    (condition,) = stage.task.conditions
    names = [type(transform).__name__ for transform in stage.transforms]
    assert (names[-1] == "DegradeBSR") == (condition.entry == "low_res") == (degradation == "bsr")
    assert condition.blur_rate == (0.5 if degradation == "blur" else 0.0)
    assert condition.noise_level_input and condition.variance_preserving and condition.noise == 0.3


def test_what_cannot_be(tmp_path):
    config = config_of("smoke", tmp_path)
    config.degradation = "jpeg"
    with pytest.raises(ValueError, match="degradation='jpeg' must be one of 'none', 'blur', 'bsr'"):
        RECIPE.stages(config)
    config.update(degradation="bsr", crop=18)
    with pytest.raises(ValueError, match="factor=4 must be at least 2 and divide image_size=32 and crop=18"):
        RECIPE.stages(config)
    config.update(crop=16)
    config.diffusion.prediction = "eps"
    with pytest.raises(ValueError, match="residual=True needs diffusion.prediction='x0', got 'eps'"):
        RECIPE.stages(config)
    with pytest.raises(ValueError, match="data.path is needed"):
        RECIPE.stages(RECIPE.get_config())


def test_a_residual_network_begins_as_bicubic_enlarging():
    unet = UNet(8, 3, (1,), 1, groups=4, attention_resolutions=(), attention_levels=(), mid_attention=False)
    xt, low, t = normal(0, 1, 16, 16, 3), normal(1, 1, 4, 4, 3), jnp.zeros(1, jnp.int32)
    network = Upsampler(unet, residual=True)
    begun = lambda key: network.init_with_output(key, xt, t, low)[0]
    found = fast_jit(begun)(jax.random.key(0))
    np.testing.assert_allclose(found, jax.image.resize(low, (1, 16, 16, 3), "cubic"), atol=1e-6)
    with pytest.raises(ValueError, match="residual=True is for an output of x0, and out_channels=6"):
        jax.eval_shape(Upsampler(unet.copy(out_channels=6), residual=True).init, jax.random.key(0), xt, t, low)


# ---- Measures --------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_its_definition():
    one, other = images(3, 8, 8, 3), images(3, 8, 8, 3, seed=1)
    expected = [20 * np.log10(255) - 10 * np.log10(np.square(a.astype(float) - b).mean()) for a, b in zip(one, other)]
    np.testing.assert_allclose(psnr(one, other), expected)
    np.testing.assert_allclose(psnr(one, one), 20 * np.log10(255) + 10 * np.log10(12))
    with pytest.raises(ValueError, match="must be uint8 of one shape"):
        psnr(one, other[:2])


def test_the_distance_of_details_is_that_of_their_distributions():
    """0 of a set to itself, small between samples of one distribution, large to images of other details."""
    source = ShapesSource(0, 32)
    shapes = np.stack([source[i]["image"] for i in range(64)])
    blurred = bicubic(shapes[:, ::4, ::4], 32)
    assert sliced_wasserstein(shapes, shapes) == 0
    halves = sliced_wasserstein(shapes[:32], shapes[32:])
    assert halves < sliced_wasserstein(shapes[:32], blurred[32:])
    assert halves < sliced_wasserstein(shapes[:32], images(32, 32, 32, 3))


def test_the_best_level_of_each_measure():
    rows = [{"level": 0.0, "psnr": 20.0, "swd": 9.0}, {"level": 0.1, "psnr": 21.0, "swd": 8.0}]
    rows.append({"level": 0.2, "psnr": 19.0, "swd": 7.0})
    found = best_levels(rows)
    assert {measure: row["level"] for measure, row in found.items()} == {"psnr": 0.1, "swd": 0.2}


def test_pairs_are_held_out_images_and_their_copies():
    pixels = images(4, 16, 16, 3)
    averaged = np.rint(pixels.reshape(4, 4, 4, 4, 4, 3).mean((2, 4)))
    low, high = read_pairs(ArraySource(pixels), 16, 4, count=3)
    np.testing.assert_array_equal(high, pixels[:3])
    np.testing.assert_array_equal(low, averaged[:3])
    degraded = [read_pairs(ArraySource(pixels), 16, 4, count=n, degradation="bsr")[0] for n in (3, 2)]
    np.testing.assert_array_equal(degraded[0][:2], degraded[1])
    assert (degraded[0] != low).any((1, 2, 3)).all()
    with pytest.raises(ValueError, match="count=5 is more than the 4 images that there are"):
        read_pairs(ArraySource(pixels), 16, 4, count=5)


# ---- The run ---------------------------------------------------------------------------------------------------------


def test_smoke_trains_and_is_swept(tmp_path, call):
    pytest.importorskip("matplotlib")
    config = RECIPE.get_config("smoke")
    config.training.update(progress=False, preview_every=0, eval_every=0, num_steps=1)
    mesh = make_mesh({"data": -1}, devices=jax.devices()[:1])
    train(RECIPE.stages(config), tmp_path / "run", mesh=mesh)
    flags = ["--workdir", tmp_path / "run", "--data", "shapes", "--out", tmp_path / "sweep", "--num_images", "4"]
    flags += ["--degradation", "bsr", "--steps", "2", "--batch_size", "4"]
    status, out, _ = call("sweep", *flags, "--levels", "0,0.3")
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert status == 0 and "Best level, restored: " in out
    assert [row["level"] for row in found["levels"]] == [0.0, 0.3]
    assert all(np.isfinite([row["psnr"], row["swd"]]).all() for row in [found["bicubic"], *found["levels"]])
    for name in ("sweep.png", "images.png"):
        assert Image.open(tmp_path / "sweep" / name).size[0] > 100
    assert (tmp_path / "sweep" / "table.md").read_text().count("| restored |") == 2
    status, _, err = call("sweep", *flags, "--levels", "0,0.5")
    assert status == 2 and "--levels=0,0.5 must lie in [0, 0.3], the levels of training" in err
    status, _, err = call("sweep", *flags, "--generated", "--levels", "0")
    assert status == 2 and "--generated needs a pipeline" in err
    assert call("sweep", "--out", tmp_path / "other")[0] == 2
    status, _, err = call("sweep", *flags, "--tile", "30")
    assert status == 2 and "--tile=30 must be a multiple of" in err


def test_what_a_sweep_of_the_bundled_pipeline_lacks_is_said_before_anything_is_restored(tmp_path, call, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pipelines, "load", functools.cache(pipelines.load))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    flags = ["--out", tmp_path / "sweep", "--num_images", "1"]
    result = call("sweep", *flags, "--data", tmp_path, "--generated")
    assert_one_sentence(result, 2, "--generated needs a caption for each image", "image 0 of --data=", "has none")
    # Trained by configs/shapes.py with noise of at most 0.05.
    result = call("sweep", *flags, "--data", "shapes", "--levels", "0,0.1")
    assert_one_sentence(result, 2, "--levels=0,0.1 must lie in [0, 0.05], the levels of training")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_takes_images_of_all_classes(tmp_path):
    """Folders are in the order of their classes."""
    from ddpm_jax import sweep  # here, since the command must not have been imported before it is run above

    for number in range(6):
        place = tmp_path / ("cat", "dog")[number // 3] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(place)
    sweep.FLAGS(["sweep", "--data", str(tmp_path), "--num_images", "4"])
    source = sweep._source(8)
    sweep.FLAGS.unparse_flags()
    assert [source[i]["image"].max() for i in range(len(source))] == [0, 1, 3, 4]


def test_a_factor_of_zero_is_refused():
    config = RECIPE.get_config("smoke")
    config.factor = 0
    with pytest.raises(ValueError, match="factor=0 must be at least 2 and divide image_size="):
        RECIPE.stages(config)
