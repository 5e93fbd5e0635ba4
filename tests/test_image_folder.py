"""Image folders: labels, captions of every layout, and errors that name the file."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from image_files import encoded, pixels, write

from ddpm_jax.data.decode import DecodeError, decode_image
from ddpm_jax.data.image_folder import ImageFolder
from ddpm_jax.data.source import CaptionError, RecordError

IMAGES = pixels(6)


@pytest.fixture
def folder(tmp_path):
    """Six images in the classes cat and dog."""
    root = tmp_path / "folder"
    for number, image in enumerate(IMAGES):
        write(root / ("cat" if number < 4 else "dog") / f"{number}.png", image)
    return root


def with_texts(root):
    for path in root.rglob("*.png"):
        path.with_suffix(".txt").write_text(f" {path.stem}: Größe \n", encoding="utf-8")
    return root


def test_class_subfolders_are_labels(folder):
    source = pickle.loads(pickle.dumps(ImageFolder(folder)))
    assert len(source) == 6 and source.class_names == ("cat", "dog")
    for number, record in enumerate(source):
        assert set(record) == {"image", "label", "key"}
        np.testing.assert_array_equal(record["image"], IMAGES[number], strict=True)
        assert record["label"] == (number >= 4) and record["label"].dtype == np.int32
        assert record["key"] == f"{'cat' if number < 4 else 'dog'}/{number}.png"
    with pytest.raises(IndexError, match=r"index must be in \[0, 6\), got -1"):
        source[-1]


def test_labels_can_be_chosen(folder):
    assert "label" not in ImageFolder(folder, labels=False)[0]
    assert ImageFolder(folder, labels=False).class_names is None
    single = ImageFolder(folder / "cat")
    assert single.class_names is None and "label" not in single[0]
    shutil.rmtree(folder / "dog")
    assert ImageFolder(folder).class_names is None
    assert ImageFolder(folder, labels=True).class_names == ("cat",)
    write(folder / "a.png", IMAGES[0])
    with pytest.raises(ValueError, match=r"a\.png is not in a class subfolder, as labels=True requires"):
        ImageFolder(folder, labels=True)


def test_every_format_and_case_of_the_ending_is_found(tmp_path):
    for number, (kind, ending) in enumerate(
        [("JPEG", "JPG"), ("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "WebP"), ("GIF", "gif"), ("PNG", "jpg")]
    ):
        data = encoded(IMAGES[number], kind)
        write(tmp_path / f"{number}.{ending}", data)
    write(tmp_path / ".hidden.png", IMAGES[0])
    write(tmp_path / ".cache/0.png", IMAGES[0])
    write(tmp_path / "__MACOSX/0.png", IMAGES[0])
    write(tmp_path / "notes.pdf", "no image")
    source = ImageFolder(tmp_path)
    assert len(source) == 6 and source.ignored == ("notes.pdf",)
    for record in source:
        np.testing.assert_array_equal(record["image"], decode_image((tmp_path / record["key"]).read_bytes()))


def test_links_are_followed_once(folder, tmp_path):
    root = tmp_path / "links"
    root.mkdir()
    (root / "a").symlink_to(folder / "cat")
    (root / "again").symlink_to(root)
    assert [record["key"] for record in ImageFolder(root)] == [f"a/{number}.png" for number in range(4)]


def test_captions_from_text_files(folder):
    source = ImageFolder(with_texts(folder))
    assert [record["caption"] for record in source] == [f"{number}: Größe" for number in range(6)]
    assert source.ignored == () and source.class_names == ("cat", "dog")
    (folder / "cat/0.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark\r\n")
    assert ImageFolder(folder)[0]["caption"] == "with a byte order mark"
    assert set(ImageFolder(folder, captions=None)[0]) == {"image", "label", "key"}
    assert len(ImageFolder(folder, captions=None).ignored) == 6


ROWS = [{"file_name": f"{'cat' if n < 4 else 'dog'}/{n}.png", "text": f'Größe "{n}", é', "kind": n} for n in range(6)]


def jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"


def table(rows):
    columns = list(rows[0])
    lines = [columns] + [[str(row[column]) for column in columns] for row in rows]
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in lines)


@pytest.mark.parametrize(("name", "text"), [("metadata.jsonl", jsonl), ("metadata.csv", table)])
def test_captions_and_labels_from_metadata(folder, name, text):
    write(folder / name, text(ROWS))
    source = ImageFolder(folder)
    assert [record["caption"] for record in source] == [row["text"] for row in ROWS]
    assert source.class_names == ("cat", "dog") and source.ignored == ()
    source = ImageFolder(folder, caption_column="text", label_column="kind")
    assert [record["label"] for record in source] == list(range(6)) and source.class_names is None
    source = ImageFolder(folder, caption_column="text", label_column="text")
    assert source.class_names == tuple(row["text"] for row in ROWS) and source[5]["label"] == 5


def test_a_caption_column_that_is_not_there_is_refused(folder):
    write(folder / "metadata.csv", table([{"file_name": row["file_name"], "prompt": row["text"]} for row in ROWS]))
    assert ImageFolder(folder, caption_column="prompt")[2]["caption"] == ROWS[2]["text"]
    message = "has the columns file_name, prompt; there is no column promt for captions"
    for options in ({}, {"captions": "metadata"}, {"check": False}):
        with pytest.raises(ValueError, match=message):
            ImageFolder(folder, caption_column="promt", **options)
    for captions in ("txt", None):
        with pytest.raises(
            ValueError, match=f"caption_column='prompt' is a column of metadata, and captions={captions!r}"
        ):
            ImageFolder(folder, caption_column="prompt", captions=captions)
    (folder / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="is not there or has no rows; there is no column prompt for captions"):
        ImageFolder(with_texts(folder), caption_column="prompt")


def test_spaces_after_commas_are_no_part_of_metadata(folder):
    lines = [
        f'{row["file_name"]}, "{row["text"].replace(chr(34), chr(34) * 2)}", {number}'
        for number, row in enumerate(ROWS)
    ]
    write(folder / "metadata.csv", "\n".join(["file_name, text , size", *lines]))
    source = ImageFolder(folder, label_column="size")
    assert [record["caption"] for record in source] == [row["text"] for row in ROWS]
    assert [record["label"] for record in source] == [0, 1, 2, 3, 4, 5]


def test_zeros_before_a_label_do_not_count(folder):
    write(folder / "metadata.jsonl", jsonl([row | {"number": "00000000001"} for row in ROWS]))
    assert ImageFolder(folder, label_column="number")[3]["label"] == 1
    write(folder / "metadata.jsonl", jsonl([row | {"number": "02147483648"} for row in ROWS]))
    with pytest.raises(ValueError, match="has the label '02147483648', and labels are below 2"):
        ImageFolder(folder, label_column="number")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_and_32_are_named(folder, encoding):
    write(folder / "metadata.csv", ("\ufeff" + table(ROWS)).encode(encoding))
    name = encoding[:6]
    message = rf"metadata\.csv: is {name.upper()}, not UTF-8; convert the file, e\.g\. with iconv -f {name} -t utf-8$"
    with pytest.raises(CaptionError, match=message):
        ImageFolder(folder)


def test_pipes_are_not_read(folder):
    for name in ("z.png", "cat/0.txt", "metadata.csv"):
        os.mkfifo(folder / name)
    (folder / "cat/a.png").symlink_to(folder / "z.png")
    source = ImageFolder(folder)
    assert len(source) == 6 and source.ignored == () and "caption" not in source[0]


def test_metadata_in_subfolders_names_files_beside_it(folder):
    for name in ("cat", "dog"):
        rows = [{"file_name": row["file_name"][4:], "caption": row["text"]} for row in ROWS if name in row["file_name"]]
        write(folder / name / "metadata.jsonl", jsonl(rows))
    assert [record["caption"] for record in ImageFolder(folder)] == [row["text"] for row in ROWS]


def test_two_kinds_of_captions_need_a_choice(folder):
    write(with_texts(folder) / "metadata.jsonl", jsonl(ROWS))
    with pytest.raises(ValueError, match="has captions in .txt files and in its metadata; set captions='txt' or"):
        ImageFolder(folder)
    assert ImageFolder(folder, captions="metadata")[2]["caption"] == ROWS[2]["text"]
    assert ImageFolder(folder, captions="txt")[2]["caption"] == "2: Größe"


def test_missing_captions_are_named(folder):
    with_texts(folder)
    (folder / "cat/2.txt").unlink()
    with pytest.raises(CaptionError, match=r"1 of 6 images have no caption, the first: .*folder/cat/2\.png; add"):
        ImageFolder(folder)
    source = ImageFolder(folder, check=False)
    assert source[1]["caption"] == "1: Größe"
    with pytest.raises(CaptionError, match=r"folder/cat/2\.png: has no caption in .*folder/cat/2\.txt"):
        source[2]
    write(folder / "cat/2.txt", " \n")
    with pytest.raises(CaptionError, match=r"cat/2\.png: has no caption in .*cat/2\.txt"):
        ImageFolder(folder)[2]


def test_missing_rows_and_images_are_named(folder):
    write(folder / "metadata.jsonl", jsonl(ROWS[:3] + ROWS[4:]))
    with pytest.raises(CaptionError, match=r"1 of 6 images have no caption, the first: .*cat/3\.png"):
        ImageFolder(folder)
    with pytest.raises(CaptionError, match=r"cat/3\.png: has no caption in the metadata"):
        ImageFolder(folder, check=False)[3]
    write(folder / "metadata.jsonl", jsonl([*ROWS, {"file_name": "cat/9.png", "text": "nothing"}]))
    with pytest.raises(ValueError, match=r"1 metadata rows name no image .*: .*metadata\.jsonl: line 7: cat/9\.png;"):
        ImageFolder(folder)
    assert "line 7: cat/9.png" in ImageFolder(folder, check=False).rows_without_image[0]
    write(folder / "metadata.jsonl", jsonl([*ROWS, ROWS[0] | {"file_name": "../folder/cat/0.png"}]))
    with pytest.raises(ValueError, match="1 metadata rows name no image"):
        ImageFolder(folder)  # nothing outside of the folder is read


def test_captions_in_latin_1_are_named(folder):
    with_texts(folder)
    (folder / "dog/4.txt").write_bytes("eins\nGröße".encode("latin-1"))
    with pytest.raises(CaptionError, match=r"dog/4\.txt: line 2 is not UTF-8 \(byte 0xf6\); convert the file"):
        ImageFolder(folder)[4]
    for path in folder.rglob("*.txt"):
        path.unlink()
    (folder / "metadata.csv").write_bytes(table(ROWS).encode("latin-1"))
    with pytest.raises(CaptionError, match=r"metadata\.csv: line 2 is not UTF-8 \(byte 0xf6\)"):
        ImageFolder(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", "{", "line 1 is not JSON"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("metadata.jsonl", '{"file_name": "a"}\n[]', r"line 2 must be a JSON object, got \[\]"),
        ("metadata.jsonl", '{"text": "a"}', "line 1 has no file_name, only the columns 'text'$"),
        ("metadata.jsonl", '{"file_name": 3}', "line 1 has no file_name: it is 3$"),
        ("metadata.jsonl", "{}", "line 1 has no file_name$"),
        ("metadata.jsonl", jsonl([ROWS[0], ROWS[0]]), "line 2 names cat/0.png, as an earlier line does"),
        ("metadata.csv", "file_name,text\ncat/0.png\n", "line 2 does not have 2 columns"),
        ("metadata.csv", "file_name,text\ncat/0.png,a,b\n", "line 2 does not have 2 columns"),
        ("metadata.csv", "name,text\ncat/0.png,a\n", "line 1 has no file_name, only the columns 'name', 'text'$"),
        (
            "metadata.csv",
            "file_name;text\ncat/0.png;a, b\n",
            "line 1 has no file_name, only the columns 'file_name;text'; columns are separated by commas$",
        ),
        ("metadata.csv", "file_name,text, text\ncat/0.png,a,b\n", "line 1 names a column twice: file_name, text, text"),
        ("metadata.csv", 'file_name,text\n"cat/0.png,a\n', "line 2 is not CSV"),
    ],
)
def test_wrong_metadata_is_named(folder, name, text, message):
    write(folder / name, text)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        ImageFolder(folder)


def test_broken_images_are_named(folder):
    files = sorted(folder.rglob("*.png"))
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-30])
    files[2].write_text("<html>not found</html>")
    files[3].unlink()
    source = ImageFolder(folder)
    for number, message in enumerate(["the file is empty", "the image is truncated", "the content is not that of"]):
        with pytest.raises(DecodeError, match=f"{files[number]}: {message}"):
            source[number]
    source[3]
    files[4].unlink()
    with pytest.raises(DecodeError, match=f"{files[4]}: cannot be read: No such file"):
        source[3]
    with pytest.raises(RecordError, match=f"{files[4]}: cannot be read: No such file"):
        source.fingerprint()
    with pytest.raises(DecodeError, match=r"dog/5\.png: the image has .* pixels, more than max_pixels=9"):
        ImageFolder(folder, max_pixels=9)[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": "text"}, "captions must be 'auto', 'txt', 'metadata' or None, got 'text'"),
        ({"labels": "yes"}, "labels must be 'auto', True or False, got 'yes'"),
        ({"captions": "metadata"}, "there is no column text or caption for captions"),
        ({"captions": "txt"}, "6 of 6 images have no caption"),
        ({"label_column": "kind"}, "has no value in the metadata's column kind"),
        ({"background": "white"}, "background must be three integers"),
        ({"max_pixels": 0}, "max_pixels must be a positive integer, got 0"),
        ({"max_pixels": "1e6"}, "max_pixels must be a positive integer, got '1e6'"),
    ],
)
def test_wrong_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, **options)


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"has no image, no file that ends in \.gif, \.jpeg, \.jpg, \.png, \.webp$"):
        ImageFolder(tmp_path)
    write(tmp_path / "prepared/00000.array_record", "")
    with pytest.raises(
        ValueError, match="has no image.*; it has ArrayRecord shards without manifest.json, which python -m"
    ):
        ImageFolder(tmp_path / "prepared")
    write(tmp_path / "sets/odd/1.0.0/dataset_info.json", "")
    with pytest.raises(
        ValueError, match="has no image.*; a data set of TensorFlow Datasets is in its subfolder odd/1.0.0,"
    ):
        ImageFolder(tmp_path / "sets")
    for name in ("prepared", "sets"):
        shutil.rmtree(tmp_path / name)
    write(tmp_path / "a.HEIC", "")
    with pytest.raises(ValueError, match=r"has no image.*; it has files that end in \.heic"):
        ImageFolder(tmp_path)


def test_the_fingerprint_is_that_of_the_data(folder, tmp_path):
    mark = ImageFolder(with_texts(folder)).fingerprint()
    other = shutil.copytree(folder, tmp_path / "other")
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
    code = (
        "import sys; from ddpm_jax.data.image_folder import ImageFolder; print(ImageFolder(sys.argv[1]).fingerprint())"
    )
    program = [sys.executable, "-c", code, str(other)]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip() == mark
    marks = {mark, ImageFolder(other, labels=False).fingerprint(), ImageFolder(other, captions=None).fingerprint()}
    marks.add(ImageFolder(other, background=(0, 0, 0)).fingerprint())
    (other / "cat/0.txt").write_text("another")
    marks.add(ImageFolder(other).fingerprint())
    data = bytearray((other / "cat/1.png").read_bytes())
    data[len(data) // 2] ^= 1
    (other / "cat/1.png").write_bytes(data)
    marks.add(ImageFolder(other).fingerprint())
    (other / "cat/1.png").rename(other / "dog/1.png")
    (other / "cat/1.txt").rename(other / "dog/1.txt")
    marks.add(ImageFolder(other).fingerprint())
    assert len(marks) == 7
