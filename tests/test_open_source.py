"""One function opens every source, and every source yields the same records from the same files."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from image_files import assert_same_record, encoded, pixels, write
from PIL import Image

from ddpm_jax.data.array_record import ArrayRecordSource, write_array_record
from ddpm_jax.data.image_folder import ImageFolder
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.tfds_source import TFDSSource
from ddpm_jax.data.webdataset import WebDatasetSource

CLASSES = ("cat", "dog")


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def files():
    """Return {name: content}: images of every format and mode."""
    images = [Image.fromarray(image) for image in pixels(4)]
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    return {
        "cat/0.jpg": saved(images[0], "JPEG", exif=exif),
        "cat/1.png": encoded(rgba, "PNG"),
        "cat/2.gif": saved(images[1], "GIF"),
        "cat/3.webp": encoded(rgba, "WEBP"),
        "dog/4.jpg": saved(images[2].convert("CMYK"), "JPEG"),
        "dog/5.png": saved(Image.fromarray(rgba[..., 0].astype(np.uint16) * 255), "PNG"),
        "dog/6.png": saved(images[3].quantize(9), "PNG"),
    }


class Files(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The files of a folder."""

    VERSION, folder = tfds.core.Version("1.0.0"), None

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text()}
        features |= {"label": tfds.features.ClassLabel(names=CLASSES), "key": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for name in files():
            caption = (self.folder / name).with_suffix(".txt").read_text(encoding="utf-8")
            path = str(self.folder / name)
            yield name, {"image": path, "caption": caption, "label": name.partition("/")[0], "key": name}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The same files as each source reads them: {class: path}."""
    root = tmp_path_factory.mktemp("sources")
    contents = files()
    for name, data in contents.items():
        write(root / "folder" / name, data)
        (root / "folder" / name).with_suffix(".txt").write_text(f"größer: {name}", encoding="utf-8")
    records = [
        {"image": data, "caption": f"größer: {name}", "label": CLASSES.index(name[:3]), "key": name}
        for name, data in contents.items()
    ]
    write_array_record(root / "prepared", records, class_names=CLASSES, shard_records=3)
    with tarfile.open(root / "shard-000.tar", "w") as tar:
        for name, data in contents.items():
            stem, _, ending = name.partition(".")
            values = {ending: data, "txt": f"größer: {name}".encode(), "cls": b"%d" % CLASSES.index(name[:3])}
            for extension, value in values.items():
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
    builder = type("Files", (Files,), {"folder": root / "folder"}, skip_registration=True)(
        data_dir=root / "tfds", file_format="array_record"
    )
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return {
        ImageFolder: root / "folder",
        ArrayRecordSource: root / "prepared",
        WebDatasetSource: root / "shard-*.tar",
        TFDSSource: root / "tfds/files/1.0.0",
    }


@pytest.mark.parametrize("options", [{}, {"background": (0, 128, 255)}])
def test_every_source_yields_the_same_records(paths, options):
    expected = {record["key"].partition(".")[0]: record for record in ImageFolder(paths[ImageFolder], **options)}
    assert len(expected) == 7
    for kind, path in paths.items():
        source = open_source(path, **options)
        assert type(source) is kind and len(source) == 7
        assert source.class_names == (None if kind is WebDatasetSource else CLASSES)
        records = {record["key"].partition(".")[0]: record for record in source}
        for key, record in expected.items():
            assert_same_record(records[key] | {"key": record["key"]}, record)
    assert len({open_source(path).fingerprint() for path in paths.values()}) == 4


def test_specs_are_strings_too(paths):
    with pytest.raises(
        ValueError, match="a data set of TensorFlow Datasets is in its subfolder files/1.0.0, give that"
    ):
        open_source(paths[TFDSSource].parent.parent)
    for kind, path in paths.items():
        assert type(open_source(str(path))) is kind
    assert type(open_source(str(paths[WebDatasetSource].parent / "shard-{000..000}.tar"))) is WebDatasetSource
    assert type(open_source(paths[WebDatasetSource].parent)) is WebDatasetSource
    with pytest.raises(ValueError, match="no_such_set is neither a directory nor a data set of TFDS"):
        open_source("tfds:no_such_set")


def test_options_that_a_source_does_not_have_are_named(paths):
    for kind, path in paths.items():
        with pytest.raises(TypeError, match=f"^{kind.__name__} has no option colour; it has .*background, max_pixels"):
            open_source(path, colour="x")
    for spec, name in (("zeros:image=8x8", "ZerosSource"), ("cifar10:x", "Cifar10Source"), ("emoji:x", "EmojiSource")):
        with pytest.raises(TypeError, match=f"^{name} has no option path; it has "):
            open_source(spec, path="x")


def test_what_is_no_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist; give a folder of images, prepared data"):
        open_source(tmp_path / "missing")
    write(tmp_path / "a.zip", "")
    with pytest.raises(ValueError, match="a.zip is neither a directory nor a .tar file"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="has no image"):
        open_source(tmp_path)
