"""WebDataset shards: random access by an index, which is made once and made again when the shard changes."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from image_files import encoded, pixels

import ddpm_jax.data.tar_index as tar_index
from ddpm_jax.data.decode import DecodeError, encode_png
from ddpm_jax.data.source import CaptionError, RecordError
from ddpm_jax.data.webdataset import WebDatasetSource

IMAGES = pixels(6)
Z = np.random.default_rng(0).standard_normal((6, 4), np.float32)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def members(number, **changes):
    values = {"png": encode_png(IMAGES[number]), "txt": f"größer {number}\n", "cls": f"{number % 3}\n"}
    values |= {"z_image.npy": npy(Z[number]), "json": json.dumps({"caption": f"json {number}", "width": 3})} | changes
    return [(f"./part/{number:03d}.{name}", value) for name, value in values.items() if value is not None]


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, value in files:
            value = value.encode() if isinstance(value, str) else value
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    return path


@pytest.fixture
def shards(tmp_path):
    """Two shards of three samples each."""
    for shard in (0, 1):
        numbers = range(3 * shard, 3 * shard + 3)
        write_tar(tmp_path / f"s-{shard:04d}.tar", [m for number in numbers for m in members(number)])
    return tmp_path


def test_samples_are_records(shards):
    source = pickle.loads(pickle.dumps(WebDatasetSource(shards)))
    assert len(source) == 6 and source.class_names is None
    for number, record in enumerate(source):
        assert set(record) == {"image", "caption", "label", "z_image", "key"}
        np.testing.assert_array_equal(record["image"], IMAGES[number], strict=True)
        np.testing.assert_array_equal(record["z_image"], Z[number], strict=True)
        assert record["caption"] == f"größer {number}" and record["key"] == f"./part/{number:03d}"
        assert record["label"] == number % 3 and record["label"].dtype == np.int32
    assert [r["caption"] for r in WebDatasetSource(shards, captions="json")] == [f"json {n}" for n in range(6)]
    assert "caption" not in WebDatasetSource(shards, captions=None)[0]


@pytest.mark.parametrize(
    ("path", "count"), [("", 6), ("s-*.tar", 6), ("s-{0000..0001}.tar", 6), ("s-0001.tar", 3), ("s-000[0].tar", 3)]
)
def test_shards_are_found(shards, path, count):
    assert len(WebDatasetSource(shards / path)) == count


def test_shards_that_are_not_there(shards, tmp_path):
    with pytest.raises(ValueError, match=r"s-0002\.tar is missing, a shard of .*s-\{0000\.\.0002\}\.tar"):
        WebDatasetSource(shards / "s-{0000..0002}.tar")
    with pytest.raises(ValueError, match=r"t-\*\.tar names no tar file"):
        WebDatasetSource(shards / "t-*.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(tmp_path, form):
    """Names of more than 100 bytes and other than ASCII take headers of their own."""
    name = "a" * 60 + "/" + "b" * 90
    name = name if form == tarfile.USTAR_FORMAT else "é" * 100 + "/" + name * 2
    files = [(f"{name}.png", encode_png(IMAGES[0])), ("._x.png", b"of macOS"), ("x", b"no ending")]
    write_tar(tmp_path / "a.tar", [*files, ("z.png", encode_png(IMAGES[1]))], format=form)
    source = WebDatasetSource(tmp_path / "a.tar")
    assert [record["key"] for record in source] == [name, "z"]
    np.testing.assert_array_equal(source[1]["image"], IMAGES[1])


def count_made(monkeypatch):
    made, make_index = [], tar_index.make_index
    monkeypatch.setattr(tar_index, "make_index", lambda path: made.append(path.name) or make_index(path))
    return made


def test_the_index_is_made_once_and_again_after_a_change(shards, monkeypatch):
    made = count_made(monkeypatch)
    mark = WebDatasetSource(shards).fingerprint()
    assert made == ["s-0000.tar", "s-0001.tar"] and WebDatasetSource(shards).fingerprint() == mark and len(made) == 2
    path = shards / "s-0001.tar"
    status = path.stat()
    write_tar(path, [m for number in (3, 4, 5) for m in members(number, cls="2")])  # the same sizes and headers
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    source = WebDatasetSource(shards)
    assert made[2:] == ["s-0001.tar"] and [r["label"] for r in source] == [0, 1, 2, 2, 2, 2]
    changed = source.fingerprint()
    write_tar(path, [m for number in (3, 5, 4) for m in members(number, cls="2")])  # other headers
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    source = WebDatasetSource(shards)
    assert made[3:] == ["s-0001.tar"] and source[4]["key"] == "./part/005"
    assert len({mark, changed, source.fingerprint()}) == 3
    assert WebDatasetSource(shards, captions=None).fingerprint() != source.fingerprint()


def test_the_fingerprint_does_not_depend_on_the_place(shards, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in shards.glob("*.tar"):
        (other / path.name).write_bytes(path.read_bytes())
    assert WebDatasetSource(other).fingerprint() == WebDatasetSource(shards).fingerprint()


def test_a_wrong_index_is_made_again(shards, monkeypatch):
    WebDatasetSource(shards)
    kept = shards / "s-0000.tar.index.json"
    right = kept.read_text()
    made = count_made(monkeypatch)
    values = json.loads(right)["index"]
    name, offset, size = values["members"][0]
    wrong = ["", "[]", "[" * 100_000, right.replace('"version": 1', '"version": 2'), right.replace(name, name + "x")]
    wrong += [right.replace(f"{size}]", f"{size - 1}]"), right.replace(f"{offset}", f"{offset + 1}")]
    for number, text in enumerate(wrong, 1):
        assert text != right
        kept.write_text(text)
        assert len(WebDatasetSource(shards)) == 6 and len(made) == number
        assert kept.read_text() == right


def test_the_index_may_be_kept_elsewhere(shards, monkeypatch):
    made = count_made(monkeypatch)
    for _ in range(2):
        WebDatasetSource(shards, index_directory=shards / "new/indices")
    assert len(made) == 2 and not list(shards.glob("*.json")) and len(list(shards.glob("new/indices/*.json"))) == 2
    (shards / "file").write_text("")
    with pytest.warns(UserWarning, match="the index of s-0000.tar is made again next time, since"):
        WebDatasetSource(shards / "s-0000.tar", index_directory=shards / "file")


def test_shards_that_cannot_be_read(tmp_path):
    data = write_tar(tmp_path / "a.tar", members(0)).read_bytes()
    size = 512 + -(-len(encode_png(IMAGES[0])) // 512) * 512  # of the first member, with its header
    cases = {
        "truncated": (data[:600], "unexpected end of data"),
        "a truncated header": (data[: size + 100], "there is something else after the last member"),
        "no end": (data[:size], "its end is missing"),
        "empty": (b"", "empty file"),
        "text": (b"no tar file" * 100, "invalid header"),
        "a size that lies": (data[:124] + b"77777777777\0" + data[136:], "bad checksum|invalid header"),
        "two in one": (data + data, "there is something else after the last member"),
    }
    (tmp_path / "a.tar").unlink()
    for name, (content, message) in cases.items():
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(ValueError, match=rf"b\.tar is not an uncompressed, complete tar file: .*({message})"):
            pytest.fail(f"{name} is read: {WebDatasetSource(tmp_path)}")
    with tarfile.open(tmp_path / "b.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"b\.tar is not an uncompressed, complete tar file"):
        WebDatasetSource(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"png": b""}, DecodeError, "the file is empty"),
        ({"png": encode_png(IMAGES[4])[:-40]}, DecodeError, "the image is truncated"),
        ({"png": "text"}, DecodeError, "the content is not that of"),
        ({"txt": " \n"}, CaptionError, "has no caption in .txt"),
        ({"txt": "größer".encode("latin-1")}, CaptionError, r"\.txt: line 1 is not UTF-8 \(byte 0xf6\)"),
        ({"cls": "cat"}, RecordError, r"\.cls must hold an integer in \[0, 2\^31\), got b'cat'"),
        ({"cls": "-1"}, RecordError, r"\.cls must hold an integer"),
        ({"cls": "02147483648"}, RecordError, r"\.cls must hold an integer in \[0, 2\^31\), got b'02147483648'"),
        ({"cls": "9" * 5000}, RecordError, r"\.cls must hold an integer"),
        ({"cls": None}, RecordError, r"\.cls must hold an integer"),
        ({"z_image.npy": None}, RecordError, "has no member .z_image.npy"),
        ({"z_image.npy": npy(np.float32([1, np.nan]))}, RecordError, r"\.z_image\.npy has values that are not finite"),
        ({"z_image.npy": b"text"}, RecordError, r"\.z_image\.npy is not an array of numbers"),
        ({"z_image.npy": npy(Z[0])[:-1]}, RecordError, r"\.z_image\.npy is not an array of numbers"),
        ({"z_image.npy": npy(np.array([{}], object))}, RecordError, r"\.z_image\.npy is not an array.*dtype is object"),
    ],
)
def test_broken_samples_are_named(tmp_path, changes, error, message):
    write_tar(tmp_path / "s.tar", members(3) + members(4, **changes) + members(5))
    source = WebDatasetSource(tmp_path)
    source[0], source[2]
    with pytest.raises(error, match=rf"s\.tar: \./part/004: .*{message}") as caught:
        source[1]
    assert type(caught.value) is error


def test_missing_captions_and_images_are_named(tmp_path):
    write_tar(tmp_path / "s.tar", members(3) + members(4, txt=None))
    with pytest.raises(
        CaptionError, match=r"1 of 2 samples have no \.txt with a caption, the first: .*s\.tar: ./part/004"
    ):
        WebDatasetSource(tmp_path)
    with pytest.raises(CaptionError, match=r"part/004: has no caption, no member \.txt"):
        WebDatasetSource(tmp_path, check=False)[1]
    write_tar(tmp_path / "s.tar", members(3) + members(4, png=None))
    with pytest.raises(ValueError, match=r"1 samples have no image, the first: .*s\.tar: \./part/004; set check=False"):
        WebDatasetSource(tmp_path)
    source = WebDatasetSource(tmp_path, check=False)
    assert len(source) == 1 and source.samples_without_image[0].endswith("s.tar: ./part/004")
    write_tar(tmp_path / "s.tar", members(3) + [("./part/003.jpg", encoded(IMAGES[0], "JPEG"))])
    with pytest.raises(ValueError, match=r"part/003 has more than one image, the second is \./part/003\.jpg"):
        WebDatasetSource(tmp_path)
    write_tar(tmp_path / "s.tar", members(3, png=None))
    with pytest.raises(ValueError, match="have no sample with an image"):
        WebDatasetSource(tmp_path, check=False)


def test_zeros_before_a_label_do_not_count(tmp_path):
    write_tar(tmp_path / "s.tar", members(3, cls="00000000001"))
    assert WebDatasetSource(tmp_path)[0]["label"] == 1


def test_files_that_macos_adds_split_no_sample(tmp_path):
    """Its tar puts "._NAME" before each file that has extended attributes."""
    files = [
        pair for name, value in members(3) + members(4) for pair in ((name.replace("/0", "/._0"), b"x"), (name, value))
    ]
    write_tar(tmp_path / "s.tar", files)
    source = WebDatasetSource(tmp_path)
    assert [record["caption"] for record in source] == ["größer 3", "größer 4"]
    assert [record["label"] for record in source] == [0, 1]


@pytest.mark.parametrize("name", ["image", "caption", "label", "key"])
def test_arrays_do_not_replace_fields(tmp_path, name):
    write_tar(tmp_path / "s.tar", members(3, **{f"{name}.npy": npy(Z[3])}))
    with pytest.raises(
        ValueError, match=rf"s\.tar: \./part/003\.{name}\.npy cannot be the field '{name}' of a record; re"
    ):
        WebDatasetSource(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"caption": 3}', "{}", '{"text": " "}', "[" * 100_000])
def test_captions_of_json_are_strings(tmp_path, text):
    write_tar(tmp_path / "s.tar", members(3, json=text))
    with pytest.raises(CaptionError, match=r"part/003: (\.json is not JSON|has no caption in \.json)"):
        WebDatasetSource(tmp_path, captions="json")[0]


def test_wrong_arguments(shards):
    with pytest.raises(ValueError, match="captions must be 'auto', 'txt', 'json' or None, got 'text'"):
        WebDatasetSource(shards, captions="text")
    write_tar(shards / "s-0000.tar", members(0, txt=None, json=None))
    with pytest.raises(ValueError, match=r"no sample has a member \.json with a caption"):
        WebDatasetSource(shards / "s-0000.tar", captions="json")
