"""The emoji source on small packages of the same form as the real ones, and what it does with broken ones."""

import gzip
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.data.decode import DecodeError
from ddpm_jax.data.emoji import records
from ddpm_jax.data.emoji.emoji_dataset_builder import Builder
from ddpm_jax.data.emoji.packages import NAMES, STYLES, EmojiError
from ddpm_jax.data.emoji.records import Concept, Emoji, read_emoji, render, render_svg, split_of
from ddpm_jax.data.emoji.source import EmojiSource

HAND = {"label": "waving hand", "hexcode": "1F44B", "tags": ["bye", "hi"], "group": 1}
TONED = {"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB", "group": 1}
ENTRIES = [
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    HAND | {"skins": [TONED]},
    {"label": "woman pilot", "hexcode": "1F469-200D-2708-FE0F", "group": 1},
    {"label": "eagle", "hexcode": "1F985", "tags": ["bird"], "group": 3},  # the one in the validation split
    {"label": "keycap: 3", "hexcode": "0033-FE0F-20E3", "group": 8},
    {"label": "flag: Norway", "hexcode": "1F1F3-1F1F4", "group": 9},
    {"label": "flag: Bouvet Island", "hexcode": "1F1E7-1F1FB", "group": 9},
    {"label": "flag: Wales", "hexcode": "1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", "group": 9},
]
RED, HALF = (255, 0, 0, 255), (0, 0, 255, 128)
SVG = b'<svg viewBox="0 0 2 2" xmlns="http://www.w3.org/2000/svg"><path fill="#00ff00" d="M0,0H2V1H0z"/></svg>'


def write_package(directory, package, members):
    with tarfile.open(directory / package.file, "w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def image(colour, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGBA", (4, 4), colour).save(stream, kind, lossless=True)
    return stream.getvalue()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    path = tmp_path_factory.mktemp("emoji")
    write_package(
        path, NAMES, [("package/en/data.json", json.dumps(ENTRIES).encode()), ("package/LICENSE", b"MIT of names")]
    )
    for style in ("twitter", "google"):
        folder = f"package/img/{style}/64"
        members = [
            (f"{folder}/1f44b.png", image(RED)),
            (f"{folder}/1f44b-1f3fb.png", image(HALF)),
            (f"{folder}/1f1e6.png", image(RED)),  # has no group: a part of flags, not an emoji
            (f"{folder}/1f985.png", image(HALF)),
            (f"{folder}/0033-fe0f-20e3.png", image(RED)),
            (f"package/img/{style}/sheets/64.png", b"not read"),
            ("package/LICENSE", b"MIT of images"),
        ]
        write_package(path, STYLES[style], members)
    fluent = [("1f3f4-e0067_e0062_e0077_e006c_e0073", RED), ("33-fe0f-20e3", HALF), ("0033-fe0f-20e3", RED)]
    fluent = [(f"package/assets/{name}.webp", image(colour, "WEBP")) for name, colour in fluent]
    write_package(path, STYLES["fluent3d"], [*fluent, ("package/README.md", b"about the licence")])
    openmoji = [(f"package/color/svg/{code}.svg", SVG) for code in ("1F1F3-1F1F4", "1F985")]
    openmoji += [("package/black/svg/1F44B.svg", b"not read")]
    write_package(path, STYLES["openmoji"], [*openmoji, ("package/LICENSE.txt", b"CC BY-SA 4.0")])
    return path


def test_packages_become_records_whose_names_agree(packages):
    found = [(emoji.key, emoji.caption) for emoji in read_emoji(packages)]
    assert found == [
        ("twitter/0033-20E3", "keycap: 3, Twitter emoji style"),
        ("twitter/1F44B", "waving hand, Twitter emoji style"),
        ("twitter/1F44B-1F3FB", "waving hand: light skin tone, Twitter emoji style"),
        ("twitter/1F985", "eagle, Twitter emoji style"),
        ("google/0033-20E3", "keycap: 3, Google Noto emoji style"),
        ("google/1F44B", "waving hand, Google Noto emoji style"),
        ("google/1F44B-1F3FB", "waving hand: light skin tone, Google Noto emoji style"),
        ("google/1F985", "eagle, Google Noto emoji style"),
        ("fluent3d/0033-20E3", "keycap: 3, Fluent 3D emoji style"),
        ("fluent3d/1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", "flag: Wales, Fluent 3D emoji style"),
        ("openmoji/1F1F3-1F1F4", "flag: Norway, OpenMoji emoji style"),
        ("openmoji/1F985", "eagle, OpenMoji emoji style"),
    ]


def test_source_gives_records_with_labels_on_white(packages):
    source = EmojiSource(packages, styles=("twitter", "fluent3d"))
    assert len(source) == 6
    record = source[2]
    assert record["image"].shape == (4, 4, 3) and record["image"].dtype == np.uint8
    # 255 blue and white at alpha 128/255: red and green are 255 (1 - 128/255) = 127.
    assert (record["image"] == (127, 127, 255)).all()
    del record["image"]
    assert record == {
        "key": "twitter/1F44B-1F3FB",
        "caption": "waving hand: light skin tone, Twitter emoji style",
        "label": 1,
        "style": "twitter",
        "concept": "1F44B-1F3FB",
        "base": "1F44B",
        "tags": "bye, hi",
    }
    assert source.class_names[1] == "people-body"
    assert (source[4]["image"] == RED[:3]).all()  # of two files for one concept the first by name
    with pytest.raises(IndexError, match="got 6"):
        source[6]


def test_splits_divide_by_base_concept(packages):
    both = [EmojiSource(packages, split=split, styles="twitter") for split in ("train", "validation")]
    assert [[record["base"] for record in source] for source in both] == [["0033-20E3", "1F44B", "1F44B"], ["1F985"]]
    shares = [split_of(f"{number:X}") == "validation" for number in range(20_000)]
    assert abs(np.mean(shares) - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5
    with pytest.raises(ValueError, match="split must be train, validation or None, got 'test'"):
        EmojiSource(packages, split="test")


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1F44B-1F3FB", "1F44B"),  # in skin tone
        ("1F469-200D-2708", "1F9D1-200D-2708"),  # woman pilot: a person
        ("1F1E7-1F1FB", "1F1F3-1F1F4"),  # Bouvet Island has Norway's flag
        ("0033-20E3", "0033-20E3"),
    ],
)
def test_variants_have_the_base_of_what_they_look_like(packages, variant, base):
    assert records.read_concepts(packages)[variant].base == base


def test_fingerprint_depends_on_what_is_read(packages, tmp_path):
    prints = {
        EmojiSource(packages, styles="twitter").fingerprint(),
        EmojiSource(packages, styles="google").fingerprint(),
        EmojiSource(packages, styles="twitter", background=(0, 0, 0)).fingerprint(),
    }
    assert len(prints) == 3
    for file in packages.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert EmojiSource(tmp_path, styles="twitter").fingerprint() in prints


def test_licences_are_those_of_the_packages(packages):
    texts = EmojiSource(packages, styles=("twitter", "fluent3d")).licences()
    assert set(texts) == {
        "NOTICE.txt",
        "emoji-datasource-twitter-16.0.0-LICENSE",
        "lobehub-fluent-emoji-3d-1.1.0-README.md",
        "emojibase-data-17.0.0-LICENSE",
    }
    assert texts["emoji-datasource-twitter-16.0.0-LICENSE"] == "MIT of images"
    assert "CC BY 4.0" in texts["NOTICE.txt"] and "OpenMoji" not in texts["NOTICE.txt"]


def test_a_missing_package_is_answered_with_the_command(packages, tmp_path):
    with pytest.raises(EmojiError) as error:
        EmojiSource(tmp_path, styles="google")
    assert str(error.value) == (
        f"{tmp_path} has no emoji-datasource-google-16.0.0.tgz; "
        "in it run: npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0"
    )
    with pytest.raises(EmojiError, match="is not a directory; make it, and in it run: npm pack"):
        EmojiSource(tmp_path / "nothing")
    with pytest.raises(ValueError, match="styles must be among twitter, google, fluent3d, openmoji, got apple"):
        EmojiSource(packages, styles="apple")


def test_openmoji_without_resvg_names_the_extra(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ModuleNotFoundError, match=r"package resvg_py is not installed; install ddpm_jax\[emoji\]"):
        EmojiSource(packages)


def test_svg_is_rendered_at_the_size_asked_for(packages):
    source = EmojiSource(packages, styles="openmoji", svg_size=8)
    assert source[0]["image"].shape == (8, 8, 3)
    assert (source[0]["image"][:4] == (0, 255, 0)).all() and (source[0]["image"][4:] == 255).all()
    with pytest.raises(DecodeError, match="the SVG image is damaged"):
        render_svg(b"<svg", 8)


@pytest.mark.parametrize(
    "data",
    [
        b'<svg><image href="/etc/hostname"/></svg>',
        b'<!DOCTYPE svg [<!ENTITY x SYSTEM "/etc/hostname">]><svg>&x;</svg>',
        b'<svg style="fill: url(file:///etc/hostname)"/>',
    ],
)
def test_svg_that_refers_to_files_is_refused(data):
    with pytest.raises(DecodeError, match="refers to other files"):
        render_svg(data, 8)


def test_broken_image_is_named(packages):
    emoji = Emoji(Concept("1F44B", "1F44B", "waving hand", (), 1), "twitter", image(RED)[:40])
    with pytest.raises(DecodeError, match="twitter/1F44B: the PNG image is truncated or damaged"):
        render(emoji)


def _copy_with(packages, tmp_path, package, data):
    for file in packages.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / package.file).write_bytes(data)
    return tmp_path


BROKEN = {
    "empty": b"",
    "not gzip": b"<html>404</html>",
    "not tar": gzip.compress(b"hello" * 1000),
    "an image outside": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_package_is_one_sentence(packages, tmp_path, name):
    package = STYLES["twitter"]
    data = BROKEN[name]
    if data is None:
        write_package(tmp_path, package, [("../package/img/twitter/64/1f44b.png", image(RED))])
        data = (tmp_path / package.file).read_bytes()
    path = _copy_with(packages, tmp_path, package, data)
    with pytest.raises(EmojiError, match=r"twitter-16.0.0.tgz is broken \(.*; fetch it again by: npm pack emoji-data"):
        EmojiSource(path, styles="twitter")


def test_truncated_package_is_one_sentence(packages, tmp_path):
    data = (packages / NAMES.file).read_bytes()
    path = _copy_with(packages, tmp_path, NAMES, data[: len(data) // 2])
    with pytest.raises(EmojiError, match="emojibase-data-17.0.0.tgz is broken"):
        EmojiSource(path, styles="twitter")


@pytest.mark.parametrize(
    "text", [b"{", b"[" * 100_000, b"[1]", b'[{"group": 1}]', b'[{"group": 77, "hexcode": "1", "label": "x"}]']
)
def test_broken_names_are_one_sentence(packages, tmp_path, text):
    path = _copy_with(packages, tmp_path, NAMES, b"")
    write_package(path, NAMES, [("package/en/data.json", text)])
    with pytest.raises(EmojiError, match=r"emojibase-data-17.0.0.tgz is broken \(.* in package/en/data.json\)"):
        EmojiSource(path, styles="twitter")


def test_package_that_unpacks_to_gigabytes_is_refused(packages, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_jax.data.emoji.packages.MAX_BYTES", 10**6)
    path = _copy_with(packages, tmp_path, NAMES, b"")
    write_package(path, NAMES, [("package/big", bytes(2 * 10**6))])
    with pytest.raises(EmojiError, match="emojibase-data-17.0.0.tgz"):
        EmojiSource(path, styles="twitter")


def test_tfds_builder_has_the_same_records(packages, tmp_path):
    builder = Builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=packages))
    assert builder.name == "emoji" and "CC BY-SA 4.0" in (builder.data_path / "NOTICE.txt").read_text()
    for split in ("train", "validation"):
        expected = {record["key"]: record for record in EmojiSource(packages, split=split)}
        found = builder.as_data_source(split=split)
        assert len(found) == len(expected) > 0
        for record in found:
            record = {name: v.decode() if isinstance(v, bytes) else v for name, v in record.items()}
            same = expected[record["key"]]
            assert (record.pop("image") == same["image"]).all()
            assert record == {name: value for name, value in same.items() if name != "image"}
