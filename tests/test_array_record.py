"""Prepared data sets: what is written is read, and what is damaged is named."""

import json
import os
import pickle
import resource
import shutil

import msgpack
import numpy as np
import pytest
from image_files import assert_same_record, encoded, pixels

from ddpm_jax.data.array_record import ArrayRecordSource, write_array_record, write_shard
from ddpm_jax.data.decode import DecodeError, decode_image
from ddpm_jax.data.record_format import record_fields, write_manifest
from ddpm_jax.data.source import RecordError

IMAGES = pixels(7)


def record(number):
    rng = np.random.default_rng(number)
    return {
        "image": IMAGES[number],
        "caption": f"Bild {number}, größer als \N{GRINNING FACE}",
        "label": np.int32(number % 3),
        "key": f"{number}.png",
        "index": np.int64(2**40 + number),
        "z_image": rng.standard_normal(5, dtype=np.float32),
        "levels": rng.integers(0, 9, (2, 3), dtype=np.uint16),
    }


RECORDS = [record(number) for number in range(7)]
CLASSES = ("cat", "dog", "Vögel")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "data"
    write_array_record(path, RECORDS, class_names=CLASSES, provenance={"from": "tests"}, shard_records=3)
    return path


@pytest.fixture
def copy(path, tmp_path):
    return shutil.copytree(path, tmp_path / "copy")


def test_what_is_written_is_read(path):
    source = pickle.loads(pickle.dumps(ArrayRecordSource(path)))
    assert len(source) == 7 and source.class_names == CLASSES and source.provenance == {"from": "tests"}
    for got, expected in zip(source, RECORDS, strict=True):
        assert_same_record(got, expected)
    source.verify()
    with pytest.raises(IndexError, match=r"index must be in \[0, 7\), got 7"):
        source[7]


def test_encoded_images_are_stored_as_they_are(tmp_path):
    data = encoded(IMAGES[0], "JPEG")
    write_array_record(tmp_path, [{"image": data}])
    source = ArrayRecordSource(tmp_path)
    assert source.encoded(0) == {"image": data}
    np.testing.assert_array_equal(source[0]["image"], decode_image(data))


def test_a_shard_is_a_documented_file(path):
    """As another program reads it: ArrayRecord, MessagePack and the manifest, nothing of ours."""
    from array_record.python.array_record_module import ArrayRecordReader

    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    shard = manifest["shards"][1]
    assert shard["records"] == 3
    reader = ArrayRecordReader(str(path / shard["name"]))
    values = msgpack.unpackb(reader.read([0])[0])
    reader.close()
    field = manifest["fields"]["z_image"]
    z = np.frombuffer(values["z_image"], field["dtype"]).reshape(field["shape"])
    np.testing.assert_array_equal(z, RECORDS[3]["z_image"])
    assert values["caption"] == RECORDS[3]["caption"] and values["image"].startswith(b"\x89PNG")


def test_only_the_chosen_fields_are_read(path, copy):
    source = ArrayRecordSource(path, fields=("z_image", "label"))
    assert_same_record(source[2], {name: RECORDS[2][name] for name in ("z_image", "label")})
    assert source.fingerprint() != ArrayRecordSource(path).fingerprint()
    with pytest.raises(ValueError, match="fields names 'z_text'; .* has image, caption, label, key, index, z_image"):
        ArrayRecordSource(path, fields=("z_text",))


def test_the_fingerprint_is_that_of_the_records(path, copy, tmp_path):
    mark = ArrayRecordSource(path).fingerprint()
    assert ArrayRecordSource(copy).fingerprint() == mark
    changed = [r | {"z_image": r["z_image"] + np.float32(n == 6)} for n, r in enumerate(RECORDS)]
    for number, (records, names) in enumerate([(changed, CLASSES), (RECORDS[:6], CLASSES), (RECORDS, "abc")]):
        write_array_record(tmp_path / f"{number}", records, class_names=names, shard_records=3)
        assert ArrayRecordSource(tmp_path / f"{number}").fingerprint() != mark
    assert ArrayRecordSource(path, background=(0, 0, 0)).fingerprint() != mark


def test_records_that_cannot_be_written(tmp_path):
    nan = RECORDS[1] | {"z_image": np.array([1, 2, np.nan, 4, 5], np.float32)}
    cases = [
        (nan, "the record with the key '1.png': z_image has values that are not finite"),
        (RECORDS[1] | {"label": np.int32(3)}, r"the key '1.png': label must be in \[0, 3\), got 3"),
        (
            RECORDS[1] | {"z_image": np.zeros(4, np.float32)},
            r"z_image is float32\[4\], that of the first record <f4\[5\]",
        ),
        (RECORDS[1] | {"caption": None}, "caption must be str, got NoneType None"),
        ({"image": IMAGES[0]}, "a record has the fields image; the first record has image, caption"),
        (RECORDS[1] | {"image": IMAGES[0][..., :2]}, r"image must be bytes or uint8\[H, W, 3\]"),
        (RECORDS[1] | {"index": 2**64}, "the key '1.png': "),
    ]
    for number, (bad, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            write_array_record(tmp_path / f"{number}", [RECORDS[0], bad], class_names=CLASSES)
        assert not list((tmp_path / f"{number}").iterdir())
    with pytest.raises(ValueError, match="thing must be a str, an int or an array of numbers, got object"):
        write_array_record(tmp_path / "object", [{"thing": object()}])
    with pytest.raises(ValueError, match="there must be at least one record"):
        write_array_record(tmp_path / "none", [])


def test_a_directory_is_not_overwritten(path):
    with pytest.raises(ValueError, match="has a manifest.json already"):
        write_array_record(path, RECORDS)


def test_damaged_shards_are_named(copy):
    shard = sorted(copy.glob("*.array_record"))[1]
    data = shard.read_bytes()
    changed = bytearray(data)
    changed[100] ^= 255
    shard.write_bytes(changed)
    source = ArrayRecordSource(copy)
    with pytest.raises(RecordError, match=r"00001.array_record: record \d: cannot be read"):
        for number in range(3, 6):
            source[number]
    with pytest.raises(ValueError, match="00001.array_record has another SHA-256 than the manifest says"):
        source.verify()
    shard.write_bytes(data[:1000])
    with pytest.raises(ValueError, match="00001.array_record has 1000 bytes, the manifest says"):
        ArrayRecordSource(copy)
    shard.unlink()
    with pytest.raises(ValueError, match="00001.array_record is missing"):
        ArrayRecordSource(copy)


def test_many_shards_may_be_open(tmp_path, monkeypatch):
    write_array_record(tmp_path, ({"index": number} for number in range(60)), shard_records=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
        source = ArrayRecordSource(tmp_path)
        assert [record["index"] for record in source] == list(range(60))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (60 + 256, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, hard))
        assert pickle.loads(pickle.dumps(source))[59] == {"index": 59}
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (60 + 256, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 300))
    with pytest.raises(ValueError, match="60 shards need as many open files, of which the system allows 300"):
        ArrayRecordSource(tmp_path)


def written_by_hand(path, data, fields):
    """Write a shard with one record of any bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path.mkdir()
    shard = write_shard(path / "0.array_record", [RECORDS[0]], record_fields(RECORDS[0]))
    writer = ArrayRecordWriter(str(path / "0.array_record"), "group_size:1")
    writer.write(data)
    writer.close()
    shard |= {"records": 1, "bytes": (path / "0.array_record").stat().st_size}
    write_manifest(path, [shard], fields, class_names=("cat", "dog"))
    return ArrayRecordSource(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (b"\xc1", "is not MessagePack"),
        (b"\x91" * 5000, "is not MessagePack"),
        ([1], "must be a MessagePack map, got list"),
        ({"image": b"", "label": 0}, "has no field z"),
        ({"image": b"", "label": 2, "z": bytes(8)}, r"label must be in \[0, 2\), got 2"),
        ({"image": b"", "label": "0", "z": bytes(8)}, "label must be int, got str '0'"),
        ({"image": b"", "label": 0, "z": bytes(9)}, r"z has 9 bytes, float32\[2\] needs 8"),
        ({"image": b"", "label": 0, "z": b"\0\0\xc0\x7f" * 2}, "z has values that are not finite"),
        ({"image": "text", "label": 0, "z": bytes(8)}, "image must be bytes, got str 'text'"),
        ({"image": b"GIF89a", "label": 0, "z": bytes(8)}, "the GIF image is truncated or damaged in its header"),
    ],
)
def test_damaged_records_are_named(tmp_path, values, message):
    data = values if isinstance(values, bytes) else msgpack.packb(values)
    fields = {"image": "image", "label": "int", "z": {"dtype": "<f4", "shape": [2]}}
    with pytest.raises(RecordError, match=f"0.array_record: record 0: .*{message}"):
        written_by_hand(tmp_path / "d", data, fields)[0]


def test_a_damaged_image_is_named_with_its_key(tmp_path):
    write_array_record(tmp_path, [{"image": b"no image", "key": "cats/1.jpg"}])
    with pytest.raises(DecodeError, match=r"00000.array_record: record 0 \(cats/1.jpg\): the content is not that of"):
        ArrayRecordSource(tmp_path)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format must be 'ddpm_jax.array_record'"),
        ({"version": 2}, "version must be 1, got int 2"),
        ({"shards": {}}, "shards must be a list"),
        ({"shards": []}, "there must be at least one record"),
        ({"fields": {}}, "fields must be a map"),
        ({"fields": {"z": {"dtype": "|O", "shape": [1]}}}, "fields.z is wrong"),
        ({"fields": {"z": {"dtype": "<f4", "shape": [-1]}}}, "fields.z is wrong"),
        ({"fields": {"z": {"dtype": "<f4", "shape": [2**20, 2**20]}}}, "fields.z is wrong"),
        ({"fields": {"image": "str"}}, "fields.image is wrong"),
        ({"class_names": [1]}, "class_names must be a list of str, or null"),
        ({"provenance": None}, "provenance must be a map"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, changes, message):
    file = copy / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))
    with pytest.raises(ValueError, match=f"manifest.json: {message}"):
        ArrayRecordSource(copy)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("name", "../0"), ("name", "/etc/passwd"), ("name", ""), ("records", -1), ("records", True), ("bytes", 1.5),
     ("sha256", "0"), ("name", "00000.array_record")],
)  # fmt: skip
def test_a_wrong_shard_entry_is_refused(copy, entry, value):
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["shards"][1][entry] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest.json: (shards\[1\].{entry}|names of shards must differ)"):
        ArrayRecordSource(copy)


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match="manifest.json cannot be read: No such file"):
        ArrayRecordSource(tmp_path)
    for text in ("", "[" * 100_000, "\xff"):
        (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="manifest.json is not JSON"):
            ArrayRecordSource(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="format must be"):
        ArrayRecordSource(tmp_path)
