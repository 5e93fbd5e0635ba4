"""Measures that train or solve an ODE, and an evaluation that two hosts share; too slow for the default run."""

import json
import math
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines
from commands import as_command
from several_hosts import HostRun
from toy_training import run

import ddpm_jax
from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.likelihood import ode_log_likelihood, variational_bound
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation import bits
from ddpm_jax.evaluation.accuracy import accuracy_score
from ddpm_jax.evaluation.bits import between_steps, measure_exact
from ddpm_jax.evaluation.during_training import SampleQuality
from ddpm_jax.evaluation.enlarged import EnlargedImages
from ddpm_jax.evaluation.images import SourceImages
from ddpm_jax.evaluation.upsampling import read_labels, read_pairs, restore
from ddpm_jax.models.unet import UNet
from ddpm_jax.pipelines import save
from ddpm_jax.pipelines.upsampling import default_sampling
from ddpm_jax.storage.metadata import freeze, thaw
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.training import DiffusionTask, Images, Stage, Training, train
from ddpm_jax.training.best import read_best

RNG = np.random.RandomState(0)


def squares(count, size=16, bright=200):
    """Images with a square in one of two corners, and which."""
    labels = RNG.randint(0, 2, count).astype(np.int32)
    images = RNG.randint(0, 60, (count, size, size, 3), dtype=np.uint8)
    for image, label in zip(images, labels):
        place = slice(0, size // 2) if label else slice(size // 2, size)
        image[place, place] = bright
    return images, labels


def test_a_classifier_learns_from_good_samples_alone(tmp_path):
    test = squares(60)
    how = {"num_steps": 40, "batch_size": 32, "replicates": 20}
    good = accuracy_score(squares(200), test, tmp_path / "good", **how)
    images, labels = squares(200)
    bad = accuracy_score((images, 1 - labels), test, tmp_path / "bad", **how)
    assert good.value > 0.95 and bad.value < 0.05
    assert good.interval.low <= good.value <= good.interval.high
    with pytest.raises(ValueError, match=r"label 5 of image 0 of the test images must be in \[0, 2\)"):
        accuracy_score(squares(20), (test[0][:1], np.array([5])), tmp_path / "none", **how)


def test_the_exact_likelihood_of_a_model():
    """Image i depends on the seed and i alone."""
    images = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    records = SourceImages([{"image": image, "label": i} for i, image in enumerate(images)])
    model = tiny_pipelines.base("guided")
    bits, calls = measure_exact(model, records, seed=3, batch_size=2, tolerance=1e-4)
    again, _ = measure_exact(model, records, seed=3, batch_size=1, tolerance=1e-4)
    assert np.isfinite(bits).all() and calls > 6
    # The solver takes other steps, which changes these by less than a hundredth; the images differ by a tenth.
    np.testing.assert_allclose(bits, again, rtol=0.03)
    assert abs(bits[1] / bits[[0, 2]] - 1).min() > 0.06


def evaluate(*flags):
    with as_command("evaluate", *map(str, flags)) as command:
        command()


def test_captions_and_accuracy_of_a_workdir(tmp_path):
    save(tiny_pipelines.unclip(0), tmp_path / "run")
    source = ShapesSource(0, 16, length=20)
    folder = tmp_path / "data"
    folder.mkdir()
    from PIL import Image

    for number in range(len(source)):
        Image.fromarray(source[number]["image"]).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(source[number]["caption"])
    flags = ["--workdir", tmp_path / "run", "--reference", folder, "--num_images", "8", "--metrics", "fid,clip"]
    evaluate(*flags, "--clip", tmp_path / "run" / "clip", "--bootstrap", "2", "--prior_steps", "1", "--steps", "1")
    found = json.loads((tmp_path / "run" / "measures.json").read_text())["measures"]
    assert set(found) == {"FID", "CLIP score", "R-precision"}
    assert 0 <= found["CLIP score"]["value"] <= 100


def test_what_an_upsampler_alone_enlarges():
    """The images of `upsampling.restore`, in any batches."""
    records = [{"image": image} for image in RNG.randint(0, 256, (3, 16, 16, 3), dtype=np.uint8)]
    model, originals = tiny_pipelines.upsampler(), SourceImages(records, "records")
    low, _ = read_pairs(records, 16, 8, count=3)
    wanted = restore(model, default_sampling(model).with_options(steps=2), low, seed=3)
    for batch_size in (3, 1):
        found = EnlargedImages(model, originals, seed=3, batch_size=batch_size, steps=2).read(0, 3)["image"]
        assert np.abs(found.astype(int) - wanted).max() <= 1  # rounding
    with pytest.raises(ValueError, match="of images of 16 x 16 pixels, and records has 8 x 8; --size=16"):
        EnlargedImages(model, SourceImages([{"image": records[0]["image"][:8, :8]}], "records"), steps=2).read(0, 1)
    with pytest.raises(ValueError, match="upsampler_tile is no option of an upsampler alone"):
        EnlargedImages(model, originals, upsampler_tile=8)


class OfClass(nn.Module):
    """Repeats the pixels of low_res, brighter by a tenth for each class."""

    def __call__(self, xt, t, low_res, y):
        return low_res.repeat(2, 1).repeat(2, 2) + 0.1 * y[:, None, None, None].astype(np.float32)


def of_class(labels, schedule, num_steps):
    """An upsampler from 8 to 16 pixels that returns x0."""
    metadata = {"image_size": 16, "conditions": ("low_resolution", "labels"), "labels": labels}
    diffusion = {"schedule": schedule, "num_steps": num_steps, "prediction": "x0"}
    return Model({}, OfClass(), freeze(metadata | {"low_resolution": {"size": 8}, "diffusion": diffusion}))


def of_pairs():
    """A random image of 2 x 2 equal pixels each, which its averages determine."""
    return RNG.randint(40, 120, (8, 8, 3)).repeat(2, 0).repeat(2, 1).astype(np.uint8)


def test_an_upsampler_with_classes_is_given_those_of_the_images():
    """By their names: the source counts from "b", the network from "a"; without labels it is given the null class."""
    labels = {"num_classes": 3, "names": ("a", "b", "c"), "null": 4}
    model, image = of_class(labels, "cosine", 10), of_pairs()
    source = ArraySource(np.stack([image] * 2), labels=np.array([1, 0]), class_names=("b", "c"))
    low, _ = read_pairs(source, 16, 8, count=2)
    own = read_labels(labels, source, 2, "the source")
    np.testing.assert_array_equal(own, [2, 1])
    for given, brighter in ((own, own), (None, np.array([4, 4]))):
        found = restore(model, Sampling("ddim", 1), low, labels=given)
        wanted = np.stack([image] * 2) + 12.75 * brighter[:, None, None, None]
        np.testing.assert_allclose(found, wanted, atol=0.51)
    plain = of_class({"num_classes": 3}, "cosine", 10)
    with pytest.raises(ValueError, match="class-conditional without a null class, and the images have no labels"):
        restore(plain, Sampling("ddim", 1), low)
    assert read_labels(labels, ArraySource(np.stack([image])), 1, "the source") is None


def test_bits_of_an_upsampler_are_given_the_averages():
    """What the averages say costs the last layer alone; to be off by d = 0.1 costs the KL of the posterior's means.

    With x0_hat = x0 + d the term of step t > 0 is d^2 (SNR_{t-1} - SNR_t) / 2 nats a pixel, so that those above t = 0
    add up to d^2 (SNR_0 - SNR_{T-1}) / 2.
    """
    model, image = of_class({"num_classes": 3, "null": 0}, "linear", 50), of_pairs()
    same, off = (SourceImages(ArraySource(image[None], labels=np.array([label])), "images") for label in (0, 1))
    process = model.diffusion.process
    snr = np.square(np.asarray(process.alpha, np.float64) / np.asarray(process.sigma, np.float64))
    found = bits.measure_bound(model, same)
    np.testing.assert_allclose(found.terms[1:], 0.0, atol=1e-9)
    # The last layer is a normal distribution around the image, of which half a level on each side counts.
    sigma = np.asarray(process.sigma, np.float64)
    std = np.sqrt(float(process.betas[1])) * sigma[0] / sigma[1]
    np.testing.assert_allclose(found.terms[0], -np.log2(math.erf(1 / 255 / std / math.sqrt(2))), rtol=1e-4)
    terms = bits.measure_bound(model, off).terms
    np.testing.assert_allclose(terms[1:].sum(), 0.01 * (snr[0] - snr[-1]) / 2 / np.log(2), rtol=1e-3)
    tokens = model.replace(metadata=freeze(thaw(model.metadata) | {"conditions": ("low_resolution", "tokens")}))
    with pytest.raises(ValueError, match="conditioned on tokens; bits per dimension are of images, given their labels"):
        bits.measure_bound(tokens, same)


def test_each_image_of_an_upsampler_has_its_own_averages_and_level_0():
    """In a batch that is filled up, against the bound of all at once with level 0; the likelihood in other batches."""
    images = RNG.randint(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    model, records = (
        tiny_pipelines.upsampler(noise_level_input=True, noise=0.5),
        SourceImages([{"image": i} for i in images]),
    )
    process, low = model.diffusion.respaced(3), images.reshape(3, 8, 2, 8, 2, 3).mean((2, 4))
    inputs = {"low_res": jnp.asarray(np.rint(low), jnp.float32) / 127.5 - 1.0}
    x0, keys = jnp.asarray(images, jnp.float32) / 127.5 - 1.0, example_keys(jax.random.key(5), 3)

    def bound(level):
        denoise = lambda xt, t: model.apply(xt, t, noise_level=jnp.full(3, level), **inputs)  # noqa: E731
        return variational_bound(process, denoise, keys, x0, x0_transform=lambda x0: jnp.clip(x0, -1.0, 1.0))["total"]

    found = bits.measure_bound(model, records, layers=3, seed=5, batch_size=2).totals
    np.testing.assert_allclose(found, bound(0.0), rtol=1e-4)
    assert np.abs(found / bound(0.5) - 1).max() > 5e-3
    exact = [measure_exact(model, records, seed=3, batch_size=size, tolerance=1e-4)[0] for size in (2, 1)]
    np.testing.assert_allclose(*exact, rtol=0.03)


def test_two_hosts_measure_what_one_does(tmp_path):
    names = ["samples.npz", "reference.npz"]
    for name, count in zip(names, (25, 30)):
        np.savez(tmp_path / name, RNG.randint(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    files = dict(zip(("--samples", "--reference"), (tmp_path / name for name in names)))
    flags = [each for pair in files.items() for each in pair] + ["--bootstrap", "3", "--kid_subset_size", "20"]
    found = []
    for hosts in (1, 2):
        out = tmp_path / f"out{hosts}"
        with HostRun([*flags, "--out", out], hosts=hosts, command="evaluate") as processes:
            for status, printed, err in processes.finish():
                assert status == 0, err
                print(printed, file=sys.stderr)
        found.append(json.loads((out / "measures.json").read_text())["measures"])
    for name, measure in found[0].items():
        assert found[1][name]["value"] == pytest.approx(measure["value"], rel=1e-6), name


def test_the_likelihood_of_gaussian_data():
    """Data N(0, s^2) have x_t ~ N(0, alpha^2 s^2 + sigma^2), so that the ODE's likelihood is that at the first step."""
    process, s = Diffusion("cosine", 50).process, 0.5
    schedule = between_steps(process)

    def eps(xt, t):
        alpha, sigma = (each(t[0]) for each in (schedule.alpha, schedule.sigma))
        return sigma * xt / (alpha**2 * s**2 + sigma**2)

    x0 = jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32)
    log_p, _ = ode_log_likelihood(schedule, eps, example_keys(jax.random.key(0), 3), x0, probe="exact")
    variance = float(process.alpha[0] ** 2 * s**2 + process.sigma[0] ** 2)
    wanted = -0.5 * np.square(x0).sum(1) / variance - 2 * np.log(2 * np.pi * variance)
    end = float(process.alpha[-1] ** 2 * s**2 + process.sigma[-1] ** 2)
    assert abs(end - 1) < 1e-3  # what the prior N(0, 1) takes for 1
    np.testing.assert_allclose(log_p, wanted, rtol=2e-3)


def test_measures_stand_in_the_log_and_come_again_after_a_stop(tmp_path):
    measured = []

    def measure(params, step):
        measured.append(step)
        return {"eval_fid": float(step)}

    run(tmp_path, num_steps=10, evaluate_every=4, measure=measure)
    run(tmp_path, num_steps=12, evaluate_every=4, measure=measure)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["eval_fid"] for row in rows if "eval_fid" in row} == {4: 4.0, 8: 8.0, 10: 10.0, 12: 12.0}
    assert measured == [4, 8, 10, 12]


def test_a_stage_keeps_its_best_model(tmp_path):
    images = RNG.randint(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    unet = UNet(16, 3, (1,), 1, (), head_channels=8, groups=4)
    sampling = Sampling("ddim", 2, threshold=1.0)
    quality = SampleQuality(reference=ArraySource(images), num_images=8, batch_size=8, sampling=sampling)
    stage = Stage(
        name="base",
        task=DiffusionTask(model=unet, diffusion=Diffusion("cosine", 10), x0=Images(8)),
        source=ArraySource(images),
        training=Training(batch_size=8, num_steps=4, learning_rate=1e-3, preview_every=0, evaluate_every=2),
        evaluate=quality,
    )
    train(stage, tmp_path / "run")
    best = read_best(tmp_path / "run" / "base")
    rows = [json.loads(line) for line in (tmp_path / "run" / "base" / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"]: row["eval_fid"] for row in rows if "eval_fid" in row}
    assert set(values) == {2, 4} and best["value"] == min(values.values()) == values[best["step"]]
    model = ddpm_jax.load(tmp_path / "run" / "base" / "best" / str(best["step"]))
    assert quality(model)["fid"] == pytest.approx(best["value"], rel=1e-6)
