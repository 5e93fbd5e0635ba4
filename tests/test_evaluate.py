"""`python -m ddpm_jax.evaluate` on sets of images, and on models: numbers, files, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines
from PIL import Image

from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.likelihood import variational_bound
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.evaluation import bits
from ddpm_jax.evaluation.accuracy import Labelled, match_classes
from ddpm_jax.evaluation.archives import RowReader, read_array, write_rows
from ddpm_jax.evaluation.captions import clip_scores, r_precision
from ddpm_jax.evaluation.compare import Measure, compare, describe
from ddpm_jax.evaluation.features import POOL, Identity, random_extractor
from ddpm_jax.evaluation.images import SampledImages, SourceImages, class_labels, open_images
from ddpm_jax.evaluation.summary import read_statistics, summarize, write_statistics
from ddpm_jax.pipelines import save
from ddpm_jax.storage.metadata import freeze

SIZE, COUNT = 8, 40
RNG = np.random.RandomState(0)
ONES = RNG.randint(0, 128, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
OTHERS = RNG.randint(64, 256, (COUNT + 10, SIZE, SIZE, 3), dtype=np.uint8)


class Means:
    """Features of three numbers: the mean colour; its classes are the colours."""

    identity = Identity("means", "0123456789abcdef", "none")
    dimensions = {POOL: 3, "logits": 3}

    def __call__(self, images):
        means = images.mean((1, 2), dtype=np.float64).astype(np.float32)
        return {POOL: means, "logits": means}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of images, and .npz files of them and of others."""
    directory = tmp_path_factory.mktemp("sets")
    folder = directory / "folder"
    folder.mkdir()
    for number, image in enumerate(ONES):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    np.savez(directory / "ones.npz", ONES)
    np.savez_compressed(directory / "others.npz", OTHERS)
    return directory


def test_the_same_numbers_from_a_folder_an_archive_and_statistics(call, sets, tmp_path):
    flags = ["--kid_subset_size", "20", "--kid_subsets", "5", "--bootstrap", "3", "--keep_features", "100"]
    statistics, found = tmp_path / "reference.npz", []
    for number, (samples, reference) in enumerate((("folder", sets / "others.npz"), ("ones.npz", statistics))):
        out = tmp_path / f"out{number}"
        given = ["--samples", sets / samples, "--reference", reference, "--out", out, *flags]
        status, printed, err = call("evaluate", *given, *(() if number else ("--write_statistics", statistics)))
        assert status == 0, err
        assert "note: " in printed and "no more than the 128 dimensions of the features" in printed
        assert "is is not measured: the features random have no classes" in printed
        assert "bilinear to 64 x 64, antialiased" in printed
        found.append(json.loads((out / "measures.json").read_text())["measures"])
    assert set(found[0]) == {"FID", "KID", "precision", "recall"}
    for name, measure in found[0].items():
        assert found[1][name]["value"] == pytest.approx(measure["value"], rel=1e-9)
    low, high = found[0]["FID"]["interval"]
    assert low < found[0]["FID"]["value"] < high


def test_samples_of_a_workdir(call, sets, tmp_path):
    save(tiny_pipelines.cascade("guided"), tmp_path / "run")
    flags = ["--num_images", "4", "--kid_subset_size", "3", "--kid_subsets", "2", "--bootstrap", "2", "--steps", "1"]
    flags += ["--metrics", "fid,kid,bits", "--layers", "3", "--plot"]
    given = ["--workdir", tmp_path / "run", "--reference", sets / "others.npz", *flags]
    status, printed, err = call("evaluate", *given)
    assert status == 0, err
    assert "samples: 4 images of 8 x 8 pixels of samples of a Cascade (as sampled, seed 1)" in printed
    assert (tmp_path / "run" / "measured_samples.png").exists()
    assert "| t | rate (bits/dim) |" in printed and "bits per dimension (bound)" in printed
    stored = json.loads((tmp_path / "run" / "elbo.json").read_text())
    assert len(stored["timesteps"]) == len(stored["rate"]) == 3 and stored["images"] == 4
    assert {"elbo.png", "bits.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    images = SampledImages(tiny_pipelines.cascade("guided"), 8, seed=1, steps=1)
    whole = tiny_pipelines.cascade("guided").generate(labels=[1, 2, 0, 1], seed=1, start=4, steps=1)
    found = images.read(4, 8)
    np.testing.assert_array_equal(found["image"], whole)
    assert found["label"] == [1, 2, 0, 1]


def test_what_is_refused(call, sets, tmp_path):
    np.savez(tmp_path / "nan.npz", np.where(np.arange(COUNT)[:, None, None, None] == 3, np.nan, ONES / 255.0))
    np.savez(tmp_path / "mixed.npz", np.zeros((4, 8, 8)))
    Image.fromarray(ONES[0]).save(tmp_path / "a.png")
    Image.fromarray(ONES[0, :5]).save(tmp_path / "b.png")
    np.savez(tmp_path / "inception.npz", mu=np.zeros(128), sigma=np.eye(128))
    objects = np.array([{}, {}], object)
    np.savez(tmp_path / "objects.npz", arr_0=objects)
    reference = ["--reference", sets / "others.npz"]
    save(tiny_pipelines.cascade("guided"), tmp_path / "run")
    workdir, folder = ["--workdir", tmp_path / "run"], ["--samples", sets / "folder"]
    for flags, parts in (
        ([*workdir, "--metrics", "fid,bits", "--layers", "0", *reference], ["--layers='0' must have at least 1 step"]),
        (
            [*workdir, "--metrics", "cas", "--test", sets / "folder", *reference],
            ["--reference is not used by --metrics=cas"],
        ),
        (["--samples", tmp_path, *reference], ["image 1 of", "(b.png) has 5 x 8 pixels", "8 x 8; --size=N"]),
        (["--samples", tmp_path / "nan.npz", *reference], ["image 3 of", "values that are not finite (NaN"]),
        (["--samples", tmp_path / "mixed.npz", *reference], ["arr_0 must be images [N, H, W, C]"]),
        (["--samples", sets / "folder", "--reference", tmp_path / "inception.npz"], ["does not say of which features"]),
        (["--samples", tmp_path / "objects.npz", *reference], ["an array holds Python objects"]),
        (["--samples", tmp_path / "none", *reference], ["none does not exist"]),
        (["--samples", sets / "folder"], ["--reference is needed for fid"]),
        (["--reference", sets / "folder"], ["--samples or --workdir is needed"]),
        (["--samples", sets / "folder", *reference, "--metrics", "fid,fidd"], ["'fidd' must be one of fid, sfid"]),
        (["--samples", sets / "folder", *reference, "--features", "vgg"], ["features=vgg must be inception:FILE"]),
        (["--samples", sets / "folder", *reference, "--metrics", "clip"], ["--clip is needed for clip"]),
        (["--metrics", "bits", *reference], ["bits per dimension need --workdir"]),
        ([*folder, "--metrics", "is"], ["is cannot be measured: the features random have no classes"]),
        ([*folder, *reference, "--metrics", "sfid"], ["sfid cannot be measured: the features random"]),
        ([*folder, "--metrics", "is,fid"], ["--reference is needed for fid"]),
        (
            [*folder, *reference, "--inception_resize", "half_pixel"],
            ["--inception_resize is not used by --features=random"],
        ),
        ([*folder, "--metrics", "is", "--reference", "nope"], ["--reference is not used by --metrics=is"]),
        ([*folder, *reference, "--steps", "3"], ["--steps is not used where images are not sampled"]),
        ([*folder, *reference, "--layers", "3"], ["--layers is not used by --metrics=fid,", "only by bits"]),
        (["--metrics", "bits", *folder, *workdir, *reference], ["--samples is not used by bits per"]),
        ([*reference, "--write_statistics", tmp_path / "stats"], ["stats must end in .npz"]),
        ([*folder, *reference, "--metrics", "fid,cas", "--test", "nope", "--out", tmp_path], ["nope does not exist"]),
    ):
        status, _, err = call("evaluate", *flags, "--bootstrap", "0", "--batch_size", "64")
        last = err.splitlines()[-1]
        assert status in (1, 2) and last.startswith("error: ") and all(part in last for part in parts), err


def test_statistics_of_other_features_are_refused(sets, tmp_path):
    means = summarize(SourceImages([{"image": image} for image in ONES]), Means())
    write_statistics(tmp_path / "means.npz", means)
    back = read_statistics(tmp_path / "means.npz", Means())
    np.testing.assert_array_equal(back.features[POOL], means.features[POOL])
    assert (back.count, back.identity, back.size) == (COUNT, Means.identity, (SIZE, SIZE))
    with pytest.raises(RuntimeError, match=r"holds statistics of the features means 0123456789ab \(none\), and"):
        read_statistics(tmp_path / "means.npz", random_extractor())
    other = Means()
    other.identity = Identity("inception", "ab", "other resize")
    with pytest.raises(RuntimeError, match="other resize"):
        read_statistics(tmp_path / "means.npz", other)
    np.savez(tmp_path / "public.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(RuntimeError, match=r"shapes \(2048,\) and \(2048, 2048\).* another extractor"):
        read_statistics(tmp_path / "public.npz", other)


def test_a_part_of_a_set_is_evenly_spaced(sets):
    """Files are often in the order of classes."""
    for name in ("folder", "ones.npz"):
        part = open_images(sets / name, at_most=3)
        found = np.concatenate([part.read(0, 2)["image"], part.read(2, 3)["image"]])
        np.testing.assert_array_equal(found, ONES[[0, 13, 26]])
        assert len(open_images(sets / name, at_most=100)) == COUNT


def test_a_summary_is_the_same_in_any_batches_and_keeps_a_part():
    images = SourceImages([{"image": image} for image in OTHERS], "others")
    whole, parts = summarize(images, Means()), summarize(images, Means(), keep=20, batch_size=7)
    np.testing.assert_allclose(parts.moments[POOL].covariance, whole.moments[POOL].covariance, rtol=1e-12)
    np.testing.assert_allclose(parts.scores.scores(), whole.scores.scores(), rtol=1e-12)
    assert len(parts.features[POOL]) == 20
    rows = {tuple(row) for row in whole.features[POOL]}
    assert all(tuple(row) in rows for row in parts.features[POOL])
    means = OTHERS.mean((1, 2))
    np.testing.assert_allclose(whole.moments[POOL].covariance, np.cov(means, rowvar=False), rtol=1e-5)
    measures, notes = compare(whole, None, ("is",))
    assert [measure.name for measure in measures] == ["Inception Score"] and not notes


def test_archives_are_read_as_a_stream(tmp_path):
    shape, parts = (9, 2, 3, 3), RNG.randint(0, 256, (3, 3, 2, 3, 3), dtype=np.uint8)
    write_rows(tmp_path / "rows.npz", "arr_0", shape, iter(parts))
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npz")["arr_0"], parts.reshape(shape))
    for name in ("rows.npz", "packed.npz"):
        np.savez_compressed(tmp_path / "packed.npz", parts.reshape(shape))
        reader = RowReader(tmp_path / name, "arr_0")
        for begin, end in ((4, 6), (6, 9), (0, 1), (8, 9)):
            np.testing.assert_array_equal(reader.read(begin, end), parts.reshape(shape)[begin:end])
    data = (tmp_path / "rows.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(RuntimeError, match="cut.npz cannot be read as an .npz file"):
        read_array(tmp_path / "cut.npz", "arr_0")


def test_clip_scores_and_r_precision():
    z = np.eye(4, dtype=np.float32)
    turned = z[[0, 1, 3, 2]]
    np.testing.assert_allclose(clip_scores(z, turned), [100, 100, 0, 0])
    captions = ["a", "b", "c", "d"]
    np.testing.assert_array_equal(r_precision(z, turned, captions), [True, True, False, False])
    # An image whose caption stands twice in the set does not compete with its copy.
    twice = r_precision(z[[0, 1, 0]], z[[0, 1, 0]], ["a", "b", "a"])
    assert twice.all()
    with pytest.raises(ValueError, match="two different captions"):
        r_precision(z[:2], z[:2], ["a", "a"])


# ---- Bits per dimension ----------------------------------------------------------------------------------------------


def test_the_bound_of_a_set_is_that_of_its_images():
    model = tiny_pipelines.base("guided")
    images = SourceImages([{"image": image, "label": i % 3} for i, image in enumerate(ONES[:6])], "ones")
    bound = bits.measure_bound(model, images, layers=4, seed=5, batch_size=4)
    process = model.diffusion.respaced(4)
    labels = jnp.arange(6) % 3
    x0, clip = jnp.asarray(ONES[:6], jnp.float32) / 127.5 - 1.0, lambda x0: jnp.clip(x0, -1.0, 1.0)
    denoise = lambda xt, t: model.apply(xt, t, y=labels)  # noqa: E731
    keys = example_keys(jax.random.key(5), 6)
    found = jax.jit(lambda x0, keys: variational_bound(process, denoise, keys, x0, x0_transform=clip))(x0, keys)
    np.testing.assert_allclose(bound.totals, found["total"], rtol=1e-4)
    np.testing.assert_allclose(bound.rate[0] + bound.terms[0], bound.totals.mean(), rtol=1e-6)
    assert bound.rate[-1] == bound.prior
    np.testing.assert_array_equal(bound.timesteps, [0, 333, 666, 999])
    assert "| 999 |" in bits.table(bound)
    wrong = SourceImages([{"image": image, "label": 3} for image in ONES[:2]], "ones")
    with pytest.raises(ValueError, match=r"label 3 of measured image 0 of ones must be in \[0, 3\)"):
        bits.measure_bound(model, wrong, layers=2)
    large = SourceImages([{"image": np.zeros((16, 16, 3), np.uint8)}] * 2, "large")
    with pytest.raises(ValueError, match="8 x 8 pixels, and large has 16 x 16; --size=8"):
        bits.measure_bound(model, large, layers=2)
    with pytest.raises(ValueError, match=r"tolerance=0.001 must be in \(0, 1e-4\]"):
        bits.measure_exact(model, images, tolerance=1e-3)


def test_the_process_between_its_steps():
    process = Diffusion("cosine", 50).process
    schedule = bits.between_steps(process)
    t = jnp.arange(50, dtype=jnp.float32)
    np.testing.assert_allclose(jax.vmap(schedule.alpha)(t), process.alpha, rtol=2e-4)
    np.testing.assert_allclose(jax.vmap(schedule.sigma)(t), process.sigma, rtol=2e-4)
    middle = np.asarray(jax.vmap(schedule.log_snr)(t[:-1] + 0.5))
    values = 2 * (np.log(np.asarray(process.alpha, np.float64)) - np.log(np.asarray(process.sigma, np.float64)))
    assert ((middle < values[:-1]) & (middle > values[1:])).all()


def test_a_mean_difference_has_an_interval_on_both_sides_of_zero():
    differences = np.array([-2.0, -1.0, 1.0, 2.0] * 25)
    found = Measure.of_means("difference", differences, replicates=200, seed=0, least=-np.inf)
    # 1.96 standard errors of 100 numbers of variance 2.5: 0.31; of 200 replicates their spread is known to 5 %
    assert found.value == 0.0 and found.interval == pytest.approx((-0.31, 0.31), rel=0.2)
    assert Measure.of_means("bits", differences, replicates=200, seed=0).interval[0] == 0.0


# ---- Classes ---------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name():
    known = {"num_classes": 3, "names": ("a", "b", "c")}
    own = {"num_classes": 2, "names": ("b", "c")}
    np.testing.assert_array_equal(class_labels([0, 1, 0], own, known, "D"), [1, 2, 1])
    np.testing.assert_array_equal(class_labels([0, 2], None, known, "D"), [0, 2])
    np.testing.assert_array_equal(class_labels([0, 2], known, {"num_classes": 3, "names": None}, "D"), [0, 2])
    with pytest.raises(ValueError, match="class 'd' of measured image 5 of D is not one of the 3 classes of the"):
        class_labels([0, 1], {"num_classes": 2, "names": ("c", "d")}, known, "D", begin=4)
    with pytest.raises(ValueError, match="D has 2 classes with names, and the model 3 without names"):
        class_labels([0], own, {"num_classes": 3, "names": None}, "D")
    labels, count = match_classes(np.array([0, 1]), known, np.array([0, 1]), own, "T")
    assert labels.tolist() == [1, 2] and count == 3
    labels, count = match_classes(np.array([0, 1]), None, np.array([0, 2]), known, "T")
    assert labels.tolist() == [0, 2] and count == 3  # of samples without names of classes, the last one without any
    with pytest.raises(ValueError, match="T has 2 classes with names, and the samples 3"):
        match_classes(np.array([0, 2]), None, np.array([0, 1]), own, "T")
    with pytest.raises(
        ValueError, match="samples of 8 x 8 pixels and test images of 16 x 16 must be square and of one"
    ):
        Labelled("D", (16, 16, 3)).add({"image": ONES[:2], "label": [0, 1]})  # the first batch, not after the last


def test_the_bound_is_of_the_class_with_the_same_name(tmp_path):
    model = tiny_pipelines.base("guided")
    labels = {"num_classes": 3, "null": None, "names": ("a", "b", "c")}
    model = model.replace(metadata=freeze({**model.metadata, "labels": labels}))
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        Image.fromarray(ONES[0]).save(tmp_path / name / "0.png")
    images = open_images(tmp_path)
    _, inputs = bits._inputs(model, images.read(0, 2), images, 0)
    np.testing.assert_array_equal(inputs["y"], [1, 2])


def test_sizes_of_sets_are_reported():
    large = np.repeat(np.repeat(OTHERS, 2, 1), 2, 2)
    samples, reference = (
        summarize(SourceImages([{"image": image} for image in images]), Means()) for images in (ONES, large)
    )
    measures, notes = compare(samples, reference, ("fid", "fid"))
    assert [measure.name for measure in measures] == ["FID"]
    assert any("the samples have 8 x 8 pixels and the reference 16 x 16 pixels" in note for note in notes)
    assert describe("samples", samples).startswith("samples: 40 images of 8 x 8 pixels of the source (as stored)")
    assert not any("pixels and" in note for note in compare(samples, samples, ("fid",))[1])
    with pytest.raises(ValueError, match="the source has 1 image, and statistics need"):
        summarize(SourceImages([{"image": ONES[0]}]), Means())


def test_statistics_of_some_images(call, sets, tmp_path):
    flags = ["--reference", sets / "others.npz", "--write_statistics", tmp_path / "some.npz", "--num_images", "10"]
    status, printed, err = call("evaluate", *flags)
    assert status == 0, err
    assert "some.npz, statistics of the reference: 10 images of 8 x 8 pixels of" in printed
    assert read_statistics(tmp_path / "some.npz", random_extractor()).size == (8, 8)
