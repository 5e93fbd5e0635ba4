"""Data sets of TensorFlow Datasets, built here without TensorFlow."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from image_files import encoded, pixels

from ddpm_jax.data.decode import DecodeError, decode_image
from ddpm_jax.data.source import RecordError
from ddpm_jax.data.tfds_source import TFDSSource

IMAGES = pixels(6)
FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    "caption": tfds.features.Text(),
    "key": tfds.features.Text(),
    "z_image": tfds.features.Tensor(shape=(3,), dtype=np.float32),
    "sizes": tfds.features.Tensor(shape=(None,), dtype=np.int32),
}


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The records of `example`."""

    VERSION = tfds.core.Version("1.0.0")
    features, changes, image_format = FEATURES, {}, "PNG"

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(5)), "test": self._generate_examples(range(5, 6))}

    def _generate_examples(self, numbers):
        for number in numbers:
            path = self.folder / f"{number}.{self.image_format.lower()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(IMAGES[number], self.image_format))
            values = {
                "image": str(path),
                "label": number % 2,
                "caption": f"größer {number}",
                "key": f"{number}.png",
                "z_image": np.full(3, number, np.float32),
                "sizes": [1] * number,
            } | self.changes
            yield number, {name: values[name] for name in self.features}


def build(path, **attributes):
    """Build a data set and return its directory."""
    file_format = attributes.pop("file_format", "array_record")
    with tfds.core.registered.skip_registration():
        tiny = type("Tiny", (Tiny,), attributes | {"folder": path / "files"})
    builder = tiny(data_dir=path, file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return path / "tiny/1.0.0"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tfds"))


def by_key(source):
    return {record["key"]: record for record in source}


def test_records_are_those_of_the_builder(directory):
    source = pickle.loads(pickle.dumps(TFDSSource(directory)))
    assert len(source) == 5 and source.class_names == ("cat", "dog")
    records = by_key(source)
    for number in range(5):
        record = records[f"{number}.png"]
        assert set(record) == {"image", "label", "caption", "key", "z_image"}
        np.testing.assert_array_equal(record["image"], IMAGES[number], strict=True)
        assert record["label"] == number % 2 and record["label"].dtype == np.int32
        assert record["caption"] == f"größer {number}"
        np.testing.assert_array_equal(record["z_image"], np.full(3, number, np.float32), strict=True)
    assert "tensorflow" not in sys.modules
    with pytest.raises(IndexError, match=r"index must be in \[0, 5\), got 5"):
        source[5]


def test_images_are_decoded_as_everywhere(tmp_path):
    source = TFDSSource(build(tmp_path, image_format="JPEG"))
    for key, record in by_key(source).items():
        np.testing.assert_array_equal(record["image"], decode_image(encoded(IMAGES[int(key[0])], "JPEG")))


def test_splits_are_those_of_tfds(directory):
    assert len(TFDSSource(directory, "test")) == 1 and len(TFDSSource(directory, "train+test")) == 6
    first, rest = TFDSSource(directory, "train[:2]"), TFDSSource(directory, "train[2:]")
    assert (len(first), len(rest)) == (2, 3) and len(by_key(first) | by_key(rest)) == 5
    for split in ("validation", "train[", "", "train[5:]"):
        message = r"split '.*' is not one of .*tiny/1\.0\.0 or has no records; there are train, test, and parts"
        with pytest.raises(ValueError, match=message):
            TFDSSource(directory, split)


def test_features_are_chosen(tmp_path, directory):
    features = {"picture": FEATURES["image"], "kind": FEATURES["label"], "words": FEATURES["caption"]}

    def generate(self, numbers):
        for number, values in Tiny._generate_examples(self, numbers):
            yield number, {"picture": values["image"], "kind": 1, "words": "a"}

    names = {"features": FEATURES, "_info": lambda self: tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)), "_generate_examples": generate}  # fmt: skip
    other = build(tmp_path, **names)
    assert set(TFDSSource(other)[0]) == {"image", "label"}
    assert TFDSSource(other, caption="words")[0]["caption"] == "a"
    for option in ("image", "caption", "label"):
        with pytest.raises(ValueError, match=rf"{option}='z_image' is no \w+ feature of .*: \['"):
            TFDSSource(directory, **{option: "z_image"})


def test_an_integer_is_a_label_and_no_array_replaces_a_field(tmp_path):
    features = FEATURES | {"kind": FEATURES["label"], "label": tfds.features.Scalar(np.int64)}
    path = build(tmp_path, features=features, changes={"kind": 1, "label": 7})
    source = TFDSSource(path)
    record = source[0]
    assert record["label"] == 7 and record["label"].dtype == np.int32 and source.class_names is None
    with pytest.raises(
        ValueError, match=r"the array 'label' of .*tiny/1\.0\.0 cannot be that field of a record; build"
    ):
        TFDSSource(path, label="kind")
    large = TFDSSource(build(tmp_path / "large", features=features, changes={"kind": 1, "label": 2**31}))
    with pytest.raises(RecordError, match=r"train\[0\]: has the label 2147483648, and labels are below 2\*\*31"):
        large[0]
    features = {"image": FEATURES["image"], "text": FEATURES["caption"], "caption": FEATURES["z_image"]}
    path = build(tmp_path / "caption", features=features, changes={"text": "a", "caption": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="the array 'caption' of .* cannot be that field of a record"):
        TFDSSource(path)


def test_the_fingerprint_is_that_of_the_records(directory, tmp_path):
    mark = TFDSSource(directory).fingerprint()
    copy = shutil.copytree(directory, tmp_path / "elsewhere")
    assert TFDSSource(copy).fingerprint() == mark
    changed = build(tmp_path / "changed", changes={"caption": "größer 0"})
    others = [TFDSSource(changed), TFDSSource(directory, "test"), TFDSSource(directory, "train[:4]")]
    others.append(TFDSSource(directory, background=(0, 0, 0)))
    assert len({mark, *(source.fingerprint() for source in others)}) == 5


def test_broken_records_are_named(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    source = TFDSSource(build(tmp_path / "text", changes={"image": str(text)}))
    with pytest.raises(DecodeError, match=r"tiny/1\.0\.0: train\[3\]: the content is not that of"):
        source[3]
    nan = np.array([1, np.nan, 2], np.float32)
    source = TFDSSource(build(tmp_path / "nan", changes={"z_image": nan}))
    with pytest.raises(RecordError, match=r"train\[0\]: z_image has values that are not finite"):
        source[0]
    source = TFDSSource(build(tmp_path / "label", changes={"label": -1}))
    with pytest.raises(RecordError, match=r"train\[0\]: has no label"):
        source[0]


def test_what_is_no_built_data_set_is_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="no_such_set is neither a directory nor a data set of TFDS"):
        TFDSSource("no_such_set")
    with pytest.raises(ValueError, match=r"mnist is not built in .*mnist/3\.0\.1; build it with"):
        TFDSSource("mnist", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has no dataset_info\.json .*; there is one in .*tiny/1\.0\.0"):
        TFDSSource(directory.parent)
    with pytest.raises(ValueError, match="has no dataset_info.json of a data set of TFDS$"):
        TFDSSource(tmp_path)


def test_other_file_formats_are_refused(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    text = (copy / "dataset_info.json").read_text()
    (copy / "dataset_info.json").write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="is built as tfrecord, which is not read at random"):
        TFDSSource(copy)


def test_features_name_no_code(directory, tmp_path):
    """TFDS imports the module of a feature that it does not know, so a directory could choose what is imported."""
    copy = shutil.copytree(directory, tmp_path / "copy")
    text = (copy / "features.json").read_text()
    for name in ("evil.Text", "tensorflow_datasets.core.features.x.Y; import os"):
        (copy / "features.json").write_text(text.replace("tensorflow_datasets.core.features.text_feature.Text", name))
        with pytest.raises(ValueError, match="features.json names the class '.*', which is not a feature of TFDS"):
            TFDSSource(copy)
    values = json.loads(text)
    (copy / "features.json").write_text(json.dumps(values | {"python_class_name": "evil.Thing"}))
    with pytest.raises(ValueError, match="features.json names the class 'evil.Thing'"):
        TFDSSource(copy)
    (copy / "features.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="features.json cannot be read"):
        TFDSSource(copy)
