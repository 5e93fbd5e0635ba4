"""CIFAR-10 from its binary version: a label, then 1024 red, 1024 green and 1024 blue values, row by row."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_files import assert_same_record, write

from ddpm_jax.cli import load_recipe
from ddpm_jax.data.cifar10 import Cifar10Source
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.open_source import open_source

TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
LABELS = np.array([3, 8, 0, 9, 6, 1, 2, 7, 5, 4])
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)


def content(images, labels):
    """Return the bytes of a file, pixel by pixel from the format's description."""
    data = bytearray()
    for image, label in zip(images, labels, strict=True):
        data.append(label)
        for channel in range(3):
            data += bytes(image[row, column, channel] for row in range(32) for column in range(32))
    return bytes(data)


@pytest.fixture(scope="module")
def files():
    """Two records in each training file, one in the test file."""
    found = {name: content(IMAGES[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]) for i, name in enumerate(TRAIN)}
    return found | {"test_batch.bin": content(IMAGES[3:4], LABELS[3:4]), "batches.meta.txt": b"airplane\n"}


def directory(path, files):
    for name, data in files.items():
        write(path / name, data)
    return path


def archive(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in reversed(files.items()):  # members may stand in any order
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_the_archive_and_its_extracted_files_are_the_same_records(tmp_path, files):
    packed = archive(tmp_path / "cifar-10-binary.tar.gz", files)
    for path in (packed, directory(tmp_path / "extracted", files)):
        source = pickle.loads(pickle.dumps(open_source(f"cifar10:{path}")))
        assert len(source) == 10 and source.fingerprint() == Cifar10Source(packed).fingerprint()
        for number, record in enumerate(source):
            key = f"{TRAIN[number // 2]}/{number % 2}"
            assert_same_record(record, {"image": IMAGES[number], "label": np.int32(LABELS[number]), "key": key})
    assert [source.class_names[label] for label in LABELS[:3]] == ["cat", "ship", "airplane"]


def test_the_test_images_are_a_split_of_their_own(tmp_path, files):
    path = archive(tmp_path / "cifar-10-binary.tar.gz", files)
    test = open_source(f"cifar10:{path}", split="test")
    (record,) = test
    assert_same_record(record, {"image": IMAGES[3], "label": np.int32(9), "key": "test_batch.bin/0"})
    assert test.fingerprint() != Cifar10Source(path).fingerprint()
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'validation'"):
        Cifar10Source(path, "validation")


def test_the_recipe_of_ddpm_trains_on_it(tmp_path, files):
    recipe = load_recipe(str(Path(__file__).parents[1] / "configs/ddpm.py"))
    config = recipe.get_config()
    config.data.path = f"cifar10:{archive(tmp_path / 'cifar-10-binary.tar.gz', files)}"
    config.class_conditional = True
    (stage,) = recipe.stages(config)
    assert len(stage.source) == 9 and stage.task.conditions[0].names == Cifar10Source.class_names
    with make_loader(stage.source, batch_size=4, seed=0, transforms=stage.transforms) as loader:
        batch = next(loader)
    assert batch["image"].shape == (4, 32, 32, 3) and batch["label"].dtype == np.int32


BROKEN = {
    "data_batch_3.bin": (None, "has no data_batch_3.bin; give the binary version, cifar-10-binary.tar.gz"),
    "data_batch_1.bin": (
        b"\0" * 3072,
        "data_batch_1.bin has 3072 bytes, which are not 1 to 10000 records of 3073 bytes",
    ),
    "data_batch_2.bin": (b"", "data_batch_2.bin has 0 bytes, which are not 1 to 10000 records of 3073 bytes"),
    "data_batch_4.bin": (
        b"\5" * 3073 + b"\12" * 3073,
        "data_batch_4.bin has the label 10 in record 1; labels are 0 to 9",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, files, name):
    data, message = BROKEN[name]
    files = {key: data if key == name else value for key, value in files.items() if key != name or data is not None}
    for path in (archive(tmp_path / "cifar.tar.gz", files), directory(tmp_path / "extracted", files)):
        with pytest.raises(ValueError) as error:
            Cifar10Source(path)
        assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_other_archives_are_refused(tmp_path, files):
    whole = archive(tmp_path / "whole.tar.gz", files).read_bytes()
    for name, data in {
        "cut.tar.gz": whole[: len(whole) // 2],
        "text.tar.gz": b"no archive",
        "empty.tar.gz": b"",
    }.items():
        with pytest.raises(ValueError, match=f"{name} cannot be read as cifar-10-binary.tar.gz: "):
            Cifar10Source(write(tmp_path / name, data))
    with pytest.raises(ValueError, match="has no data_batch_1.bin; give the binary version"):
        Cifar10Source(archive(tmp_path / "python.tar.gz", {"data_batch_1": b"\x80\2}."}))
    large = archive(tmp_path / "large.tar.gz", {"data_batch_1.bin": bytes(30_730_001)})
    with pytest.raises(ValueError, match="large.tar.gz is not cifar-10-binary.tar.gz: it has more or larger files"):
        Cifar10Source(large)
    with pytest.raises(ValueError, match="missing does not exist; give cifar-10-binary.tar.gz or the directory of its"):
        open_source(f"cifar10:{tmp_path / 'missing'}")
