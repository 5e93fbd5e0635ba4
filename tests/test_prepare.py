"""Preparing data sets: bad files are counted and named, and the result depends on the source and options alone."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import assert_one_sentence, small_disk
from image_files import encoded, pixels, write
from PIL import Image
from random_networks import random_params
from tiny_run import ROOT

from ddpm_jax import temporary
from ddpm_jax.data.array_record import ArrayRecordSource
from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.image_folder import ImageFolder
from ddpm_jax.data.preparing import Options, OutputError, PrepareError, prepare
from ddpm_jax.data.transforms import CLIP_MEAN, CLIP_STD, CenterCrop
from ddpm_jax.errors import LoadError
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.storage.embedder import open_embedder
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model, open_model, save_model

OPTIONS = Options(8, shard_records=4)
GOOD = 12


def bad_files(good):
    """Return {name: (content, caption, reason, what the message says)} for every kind of file that cannot be used."""
    png = encoded(good, "PNG")
    return {
        "20.png": (png[:-40], "x", "unreadable", "truncated or damaged"),
        "21.png": (b"", "x", "unreadable", "the file is empty"),
        "22.jpg": (b"no image", "x", "unreadable", "not that of a JPEG, PNG, WebP or GIF file"),
        "23.png": (encoded(np.zeros((20, 20, 3), np.uint8), "PNG"), "x", "unreadable", "more than max_pixels=399"),
        "24.png": (encoded(good[:7, :], "PNG"), "x", "too small", "has 16 x 7 pixels"),
        "25.png": (encoded(good + 1, "PNG"), None, "no caption", "has no caption in"),
        "26.png": (encoded(good + 2, "PNG"), "café".encode("latin-1"), "no caption", "line 1 is not UTF-8"),
        "27.png": (encoded(good + 3, "PNG"), "  ", "no caption", "has no caption in"),
        "28.png": (png, "x", "duplicate", "28.png: has the pixels of 00.png"),
        "29.webp": (encoded(good, "PNG"), "x", "duplicate", "29.webp: has the pixels of 00.png"),  # a wrong extension
    }


@pytest.fixture(scope="module")
def images():
    return pixels(GOOD, low=16, high=17)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("prepare") / "folder"
    for number, image in enumerate(images):
        write(path / f"{number:02d}.png", image)
        write(path / f"{number:02d}.txt", f"image {number}")
    for name, (content, caption, _, _) in bad_files(images[0]).items():
        write(path / name, content)
        if caption is not None:
            write((path / name).with_suffix(".txt"), caption)
    write(path / "other.bmp", b"of another format")
    return path


@pytest.fixture
def source(folder):
    return ImageFolder(folder, check=False, max_pixels=399)


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """The directory that all others are compared with."""
    out = tmp_path_factory.mktemp("prepare") / "out"
    prepare(ImageFolder(folder, check=False, max_pixels=399), out, OPTIONS, max_skipped=10, progress=False)
    return out


def contents(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_good_records_are_resized_and_cropped(prepared, images):
    source = ArrayRecordSource(prepared)
    assert len(source) == GOOD
    for number, image in enumerate(images):
        expected = CenterCrop(8)({"image": image})["image"]
        record = source[number]
        np.testing.assert_array_equal(record["image"], expected)
        assert (record["key"], record["caption"]) == (f"{number:02d}.png", f"image {number}")


def test_every_bad_file_is_named_with_its_reason(prepared, images):
    lines = [json.loads(line) for line in (prepared / "skipped.jsonl").read_text().splitlines()]
    expected = bad_files(images[0])
    assert len(lines) == len(expected) + 1
    for number, (line, (name, (_, _, reason, message))) in enumerate(zip(lines, expected.items())):
        assert line["index"] == GOOD + number and line["reason"] == reason
        assert Path(name).stem in line["message"] and message in line["message"]
    assert lines[-1] == {"index": None, "reason": "not used", "message": "other.bmp"}
    counts = {"unreadable": 4, "too small": 1, "no caption": 3, "duplicate": 2}
    assert json.loads((prepared / "manifest.json").read_text())["provenance"]["skipped"] == counts


def test_manifest_says_what_was_prepared(prepared, source):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["fields"] == {"image": "image", "caption": "str", "key": "str"}
    assert [shard["records"] for shard in manifest["shards"]] == [4, 4, 4]
    for shard in manifest["shards"]:
        assert hashlib.sha256((prepared / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert manifest["provenance"]["prepare"] == {
        "version": 1,
        "source": source.fingerprint(),
        "records": GOOD + 10,
        "size": 8,
        "min_side": 8,
        "format": "png",
        "keep_duplicates": False,
        "shard_records": 4,
        "embed": [],
    }
    names = {"00000.array_record", "00001.array_record", "00002.array_record", "manifest.json", "skipped.jsonl"}
    assert set(os.listdir(prepared)) == names


def test_workers_give_the_same_bytes(prepared, source, tmp_path):
    prepare(source, tmp_path / "out", OPTIONS, workers=2, max_skipped=10, progress=False)
    assert contents(tmp_path / "out") == contents(prepared)


def test_processes_give_the_same_bytes(prepared, source, tmp_path):
    options = {"max_skipped": 10, "process_count": 3, "progress": False}
    done = [prepare(source, tmp_path / "out", OPTIONS, process_index=index, **options) for index in (2, 0, 1)]
    assert [summary.complete for summary in done] == [False, False, True]
    assert contents(tmp_path / "out") == contents(prepared)


def test_duplicates_in_different_shards_keep_the_first(images, tmp_path):
    repeated = [images[i] for i in (0, 1, 0, 2, 1, 1, 3, 0)]
    arrays = ArraySource(repeated, labels=np.arange(8))
    summary = prepare(arrays, tmp_path / "some", Options(8, shard_records=3), max_skipped=1.0, progress=False)
    assert summary.skipped == {"duplicate": 4} and summary.records == 4
    assert [record["label"] for record in ArrayRecordSource(tmp_path / "some")] == [0, 1, 3, 6]
    messages = (tmp_path / "some" / "skipped.jsonl").read_text()
    assert all(
        f"record {again}: has the pixels of record {first}" in messages
        for again, first in ((2, 0), (4, 1), (5, 1), (7, 0))
    )
    options = Options(8, shard_records=3, keep_duplicates=True)
    assert prepare(arrays, tmp_path / "all", options, progress=False).records == 8


class Crash(BaseException):
    pass


def crash_at(monkeypatch, number):
    """Let the process die before the n-th change of the file system that is not the growth of a file."""
    count = 0

    def dying(function):
        def called(*args, **options):
            nonlocal count
            count += 1
            if count >= number:
                raise Crash
            return function(*args, **options)

        return called

    for module, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    monkeypatch.setattr(temporary, "_remove", lambda path: None)  # nobody removes what a killed process has left


class Means:
    """An embedder that computes the mean colour."""

    fingerprint, batch_size = "means", 2

    def __call__(self, images, captions):
        return {"mean": images.mean((1, 2), dtype=np.float32)}


@pytest.mark.parametrize("embedders", [(), (Means(),)], ids=["plain", "embedded"])
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(images, tmp_path, embedders):
    repeated = ArraySource([*images[:5], images[0], images[5]])
    options = Options(8, shard_records=3)
    arguments = {"max_skipped": 1, "embedders": embedders, "progress": False}
    prepare(repeated, tmp_path / "whole", options, **arguments)
    expected, crashes = contents(tmp_path / "whole"), 0
    for number in range(1, 100):
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, number)
            try:
                prepare(repeated, out, options, **arguments)
                break
            except Crash:
                crashes += 1
        prepare(repeated, out, options, **arguments)
        assert contents(out) == expected, number
    assert crashes > 12
    for record in ArrayRecordSource(out) if embedders else ():
        np.testing.assert_allclose(record["mean"], record["image"].mean((0, 1)), rtol=1e-5)


def test_sigkill_leaves_no_worker_and_resumes(tmp_path):
    folder, flags = tmp_path / "folder", ["--size", "96", "--shard_records", "8", "--workers", "2"]
    rng = np.random.default_rng(0)
    for number in range(96):
        write(folder / f"{number:03d}.png", rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    command = [sys.executable, "-m", "ddpm_jax.prepare", "--source", str(folder), *flags]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--out", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list((out / "parts").glob("*.json"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    while time.monotonic() < deadline:  # the session lasts as long as one of its processes
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("worker processes went on after the main process was killed")
    assert not (out / "manifest.json").exists()
    source = ImageFolder(folder, check=False)
    for place in (out, tmp_path / "whole"):
        provenance = {"source": str(folder), "options": []}
        prepare(source, place, Options(96, shard_records=8), provenance=provenance, progress=False)
    assert contents(out) == contents(tmp_path / "whole")


def test_limit_stops_and_keeps_what_was_finished(source, prepared, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PrepareError) as error:
        prepare(source, out, OPTIONS, max_skipped=3, progress=False)
    assert str(error.value) == (
        "4 of the 16 records read were skipped (4 unreadable), which is more than max_skipped=3; "
        f"{out / 'skipped.jsonl'} names them; with a higher limit the work continues"
    )
    assert sorted(path.name for path in (out / "parts").glob("*.json")) == [f"{n:05d}.json" for n in range(4)] + [
        "options.json"
    ]
    assert not (out / "manifest.json").exists()
    with pytest.raises(PrepareError, match=r"which is more than max_skipped=0.1 of 22"):
        prepare(source, out, OPTIONS, max_skipped=0.1, progress=False)
    prepare(source, out, OPTIONS, max_skipped=10, progress=False)
    assert contents(out) == contents(prepared)


def test_nothing_left_is_one_sentence(tmp_path):
    with pytest.raises(PrepareError, match=r"no record was kept: 3 too small; see .*skipped.jsonl"):
        prepare(ArraySource(pixels(3)), tmp_path / "out", Options(64), max_skipped=1.0, progress=False)
    summary = prepare(ArraySource(pixels(3)), tmp_path / "large", Options(64, min_side=1), progress=False)
    assert summary.records == 3
    assert ArrayRecordSource(tmp_path / "large")[0]["image"].shape == (64, 64, 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_sentence(call, tmp_path, workers):
    rng = np.random.default_rng(0)
    for number in range(4):
        write(tmp_path / "folder" / f"{number}.png", rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    with small_disk(tmp_path / "disk", 150_000):
        out = tmp_path / "disk" / "out"
        flags = ("--source", tmp_path / "folder", "--out", out, "--size", 128, "--shard_records", 2)
        status, _, err = call("prepare", *flags, "--workers", workers)
        assert status == 1 and err.splitlines()[-1].startswith(f"error: {out}/parts/0000")
        assert "No space left on device" in err and "Traceback" not in err
        left = {path.name for path in (out / "parts").iterdir()} - {"options.json", "process-0.lock"}
        assert left <= {"00000.array_record", "00000.json", "00001.array_record", "00001.json"}


class Varying:
    """Records that differ in their fields, or have images that are none."""

    def __init__(self, *records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def test_records_with_bad_values(images, tmp_path):
    first = {"image": images[0], "caption": "one"}
    nan = {"image": np.full((16, 16, 3), np.nan), "caption": "two", "key": "nan"}
    blank = {"image": images[1], "caption": " "}
    surrogate = {"image": images[2], "caption": "\udce9"}
    source = Varying(first, nan, blank, surrogate)
    summary = prepare(source, tmp_path / "values", OPTIONS, max_skipped=1.0, progress=False)
    assert summary.skipped == {"unreadable": 2, "no caption": 1}
    lines = (tmp_path / "values" / "skipped.jsonl").read_text()
    assert "nan: the image has values that are not finite" in lines and "record 3: caption is not UTF-8" in lines
    for shard_records in (1, 4):
        other = Varying(first, {"image": images[1]})
        options = Options(8, shard_records=shard_records)
        with pytest.raises(PrepareError, match="has the fields image; the first record has|differ in their fields"):
            prepare(other, tmp_path / f"fields {shard_records}", options, progress=False)
    with pytest.raises(PrepareError, match="record 0 has no image; it has caption"):
        prepare(Varying({"caption": "x"}), tmp_path / "none", OPTIONS, progress=False)


def test_a_directory_with_something_else_is_refused(source, prepared, folder, tmp_path):
    before = contents(prepared)
    for options, message in (
        (Options(9, shard_records=4), "holds a data set with size 8, not 9"),
        (Options(8), "holds a data set with shard_records 4, not 1024"),
        (Options(8, format="webp", shard_records=4), 'with format "png", not "webp"'),
    ):
        with pytest.raises(OutputError, match=message):
            prepare(source, prepared, options, progress=False)
    with pytest.raises(OutputError, match="holds a data set with another source"):
        prepare(ArraySource(pixels(GOOD + 10)), prepared, OPTIONS, progress=False)
    with pytest.raises(OutputError, match="another choice of models to embed with"):
        prepare(source, prepared, OPTIONS, embedders=[Means()], progress=False)
    with pytest.raises(OutputError, match="holds other files, such as 00.png; give a new or empty directory"):
        prepare(source, folder, OPTIONS, progress=False)
    with pytest.raises(OutputError, match="is a file; give a directory"):
        prepare(source, write(tmp_path / "file", "text"), OPTIONS, progress=False)
    assert prepare(source, prepared, OPTIONS, progress=False).records == GOOD
    assert contents(prepared) == before


@pytest.mark.parametrize("options", [{"format": "webp"}, {"format": "jpeg", "quality": 100}])
def test_formats(images, tmp_path, options):
    prepare(ArraySource(images), tmp_path / "out", Options(16, **options), progress=False)
    source = ArrayRecordSource(tmp_path / "out")
    with Image.open(io.BytesIO(source.encoded(0)["image"])) as image:
        assert image.format == options["format"].upper()
    difference = max(np.abs(source[i]["image"].astype(int) - images[i]).max() for i in range(GOOD))
    assert difference == 0 if options["format"] == "webp" else 0 < difference < 8


# ---- Embeddings ------------------------------------------------------------------------------------------------------

NETWORKS = {
    "clip": CLIP(VisionTransformer(8, 4, 8, 1, 2), TextEncoder(20, 6, 8, 1, 2), 5),
    "autoencoder": Autoencoder(4, (1, 2), 1, 2, groups=2),
}
TOKENIZER = {"kind": "compact", "vocab": ["a", "image", *map(str, range(GOOD))]}


def inputs(name):
    images = np.zeros((1, 8, 8, 3), np.float32)
    return (images,) if name == "autoencoder" else (images, np.zeros((1, 6), np.int32), np.ones((1, 6), bool))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for name, network in NETWORKS.items():
        metadata = {"tokenizer": TOKENIZER} if name == "clip" else {}
        params = random_params(network.init, *inputs(name))
        save_model(Model(params, network, freeze(metadata)), path / name)
    return path


def test_embeddings_are_those_of_the_stored_images(images, models, tmp_path):
    embedders = [open_embedder(models / name, batch_size=5) for name in NETWORKS]
    source = ArraySource(images, captions=[f"image {i}" for i in range(GOOD)])
    for process in (1, 0):
        options = {"embedders": embedders, "process_index": process, "process_count": 2}
        prepare(source, tmp_path / "out", Options(8, shard_records=7), **options, progress=False)
    records = list(ArrayRecordSource(tmp_path / "out"))
    stored = np.stack([record["image"] for record in records]) / np.float32(127.5) - 1
    clip = open_embedder(models / "clip")
    tokens, mask = clip._tokenizer([record["caption"] for record in records])
    params = {name: random_params(network.init, *inputs(name)) for name, network in NETWORKS.items()}
    z_image, z_text, _ = NETWORKS["clip"].apply(params["clip"], stored, tokens, mask)
    mean, std = NETWORKS["autoencoder"].apply(params["autoencoder"], stored, method=Autoencoder.encode)
    for name, values in {"z_image": z_image, "z_text": z_text, "latent_mean": mean, "latent_std": std}.items():
        found = np.stack([record[name] for record in records])
        np.testing.assert_allclose(found, values, atol=2e-5, err_msg=name)
    assert len({z.tobytes() for z in np.asarray(z_text)}) == GOOD


def test_a_converted_clip_gets_normalised_pixels(images, models, tmp_path):
    model = open_model(models / "clip")
    save_model(model.replace(family="clip", metadata=freeze({})), tmp_path / "clip")
    stored = np.stack([CenterCrop(8)({"image": image})["image"] for image in images])
    embeddings = open_embedder(tmp_path / "clip")(stored, ["a"] * GOOD)
    assert set(embeddings) == {"z_image"}  # its vocabulary is not that of OpenAI's CLIP
    z = model.apply((stored / 255 - CLIP_MEAN) / CLIP_STD, method=CLIP.encode_image)
    expected = z / np.linalg.norm(z, axis=-1, keepdims=True)
    np.testing.assert_allclose(embeddings["z_image"], expected, atol=2e-5)


def test_only_a_clip_or_an_autoencoder_embeds(tmp_path):
    text = TextEncoder(20, 6, 8, 1, 2)
    save_model(Model(random_params(text.init, np.zeros((1, 6), np.int32)), text), tmp_path / "text")
    with pytest.raises(LoadError, match="must hold one CLIP or one autoencoder, it holds TextEncoder"):
        open_embedder(tmp_path / "text")


# ---- The command -----------------------------------------------------------------------------------------------------


def test_the_command_reports(call, folder, tmp_path):
    flags = ("--source", folder, "--out", tmp_path / "out", "--size", 8, "--shard_records", 64)
    status, out, _ = call("prepare", *flags, "--max_skipped", 9)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"wrote {tmp_path / 'out'}: 13 images in 1 shard, ")
    assert lines[1].startswith("skipped 9: 3 unreadable, 1 too small, 3 no caption, 2 duplicate; ")
    assert lines[2].startswith("not used: 1 files")
    status, out, _ = call("prepare", *flags)
    assert status == 0 and out.splitlines() == lines  # complete already: the limit has no say


def test_wrong_flags_are_one_sentence(call, folder, tmp_path):
    good = ("--source", folder, "--out", tmp_path / "out", "--size", 8)
    for flags, parts in (
        ((), ("--source, --out and --size are needed",)),
        (("--source", tmp_path / "none", *good[2:]), ("--source=", "does not exist")),
        ((*good, "--max_skipped", "1.5"), ("--max_skipped=1.5", "a fraction in [0.0, 1.0]")),
        ((*good, "--max_skipped", "few"), ("--max_skipped=few",)),
        ((*good, "--option", "captons=none"), ("ImageFolder has no option captons",)),
        ((*good, "--option", "captions"), ("--option=captions must be NAME=VALUE",)),
        ((*good, "--option", "captions=7"), ("captions must be", "got 7")),
        ((*good, "--embed", tmp_path / "none"), ("--embed=", "does not exist")),
        ((*good, "--process_index", "1"), ("--process_index=1 must be less than --process_count=1",)),
        (("--source", folder, "--out", folder, "--size", 8), ("--out: ", "holds other files")),
    ):
        assert_one_sentence(call("prepare", *flags), 2, *parts)
    assert not (tmp_path / "out").exists()
    status, _, err = call("prepare", *good)
    assert status == 1 and "error: 9 of the 22 records read were skipped" in err
