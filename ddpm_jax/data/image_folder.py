"""Images in a folder, with class subfolders, and captions from text files beside them or from a metadata file."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.checks import shown
from ddpm_jax.data.decode import MAX_PIXELS, DecodeError, Decoder
from ddpm_jax.data.source import CaptionError, Fingerprint, check_index, read_text
from ddpm_jax.data.transforms import WHITE

EXTENSIONS = (".gif", ".jpeg", ".jpg", ".png", ".webp")
METADATA = ("metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("text", "caption")


class ImageFolder:
    """The images of a folder and its subfolders, in the order of their relative names.

    A record is {"image": uint8[H, W, 3], "key": str}, and where they exist "caption": str and "label": int32. The key
    is the name relative to the folder, as "cats/001.jpg". Files whose names end in .jpg, .jpeg, .png, .webp or .gif are
    images; their content decides how they are decoded. Names that begin with a dot are skipped.

    Args:
        path: the folder.
        captions: where captions are. "txt": in a text file beside each image ("cats/001.txt"). "metadata": in
            metadata.jsonl or metadata.csv, as Hugging Face's imagefolder has them: a column `file_name`, relative to
            the metadata file, and a column of captions. Either is UTF-8. None: there are none. "auto": the one that is
            there.
        caption_column: of the metadata; by default "text" or "caption".
        label_column: of the metadata, with class names or with integers >= 0; replaces the subfolders.
        labels: whether the folder's direct subfolders are classes, numbered in the order of their names. "auto": they
            are if there are at least two, and all images are in them.
        check: whether to refuse a folder where an image has no caption or a metadata row has no image. If False, such
            an image raises CaptionError when it is read, and such rows are named in `rows_without_image`.
        background: a colour for transparent parts, red, green and blue in [0, 255].
        max_pixels: a larger image is not decoded.

    Attributes:
        class_names: a tuple of str, or None where records have no label or labels are integers.
        ignored: relative names of files that are neither images nor captions, as of other image formats.
        rows_without_image: a tuple of str, each a metadata file, a line and a name.

    Raises:
        ValueError: if an argument is wrong, or the folder has no images, or does not have what was asked for.
        CaptionError: if captions are missing (see `check`), or a metadata file is not UTF-8.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        captions: str | None = "auto",
        caption_column: str | None = None,
        label_column: str | None = None,
        labels: bool | str = "auto",
        check: bool = True,
        background: Sequence[int] = WHITE,
        max_pixels: int = MAX_PIXELS,
    ):
        if captions not in ("auto", "txt", "metadata", None):
            raise ValueError(f"captions must be 'auto', 'txt', 'metadata' or None, got {captions!r}")
        if labels not in ("auto", True, False):
            raise ValueError(f"labels must be 'auto', True or False, got {labels!r}")
        self._root = Path(path).absolute()
        self._decoder = Decoder(background, max_pixels)
        if not self._root.is_dir():
            raise ValueError(f"{path} is not a folder")
        names = sorted(_files(self._root))
        self._keys = [name for name in names if name.lower().endswith(EXTENSIONS)]
        if not self._keys:
            raise ValueError(f"{path} has no image, no file that ends in {', '.join(EXTENSIONS)}{_found(names)}")
        texts = {name for name in names if name.lower().endswith(".txt")}
        tables = [name for name in names if name.rpartition("/")[2] in METADATA]
        rows = self._rows(tables, check)
        self._find_captions(captions, caption_column, texts, rows, check)
        self._find_labels(labels, label_column, rows)
        used = {*self._keys, *tables, *(self._texts or ())}
        self.ignored = tuple(name for name in names if name not in used)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Read and decode one record.

        Raises:
            DecodeError: if the image cannot be read; the message names the file.
            CaptionError: if the caption is missing or is not UTF-8; the message names the file.
            IndexError: if index is outside of [0, len).
        """
        index = check_index(index, len(self))
        key = self._keys[index]
        path = self._root / key
        try:
            image = self._decoder(path.read_bytes())
        except DecodeError as error:
            raise DecodeError(f"{path}: {error}") from None
        except OSError as error:
            raise DecodeError(f"{path}: cannot be read: {error.strerror or error}") from None
        record: dict[str, Any] = {"image": image}
        if self._texts is not None or self._captions is not None:
            record["caption"] = self._caption(key)
        if self._labels is not None:
            record["label"] = np.int32(self._labels[index])
        return record | {"key": key}

    def fingerprint(self) -> str:
        """Return a hash of the names, labels, captions and contents of all images, and of the background.

        Of each image and caption file its size and its first and last 64 KiB are read, so files up to 128 KiB are
        covered as a whole. Where the folder is, and when files were changed, has no influence.
        """
        mark = Fingerprint("image_folder 1")
        mark.add(self._decoder.background, self.class_names, self._labels, self._captions, self._keys)
        for key in self._keys:
            mark.add_file(self._root / key)
            if self._texts is not None:
                text = self._texts_of(key)
                mark.add(text)
                if text is not None:
                    mark.add_file(self._root / text)
        return mark.hexdigest()

    def __repr__(self) -> str:
        return f"ImageFolder({str(self._root)!r}, {len(self)} images)"

    def _texts_of(self, key: str) -> str | None:
        text = _sidecar(key)
        return text if text in self._texts else None

    def _caption(self, key: str) -> str:
        if self._texts is None:
            caption, where = self._captions.get(key), "the metadata"
        else:
            text = self._texts_of(key)
            caption, where = text and read_text(self._root / text).strip(), str(self._root / _sidecar(key))
        if not caption:
            raise CaptionError(f"{self._root / key}: has no caption in {where}")
        return caption

    def _rows(self, tables: list[str], check: bool) -> dict[str, dict[str, Any]]:
        """Return the metadata of all images, {key: row}."""
        known, rows, missing = set(self._keys), {}, []
        for table in tables:
            folder = table.rpartition("/")[0]
            for line, row in _read_table(self._root / table):
                where = f"{self._root / table}: line {line}"
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{where} has no file_name: it is {shown(name)}")
                key = os.path.normpath(os.path.join(folder, name)).replace(os.sep, "/")
                if key in rows:
                    raise ValueError(f"{where} names {name}, as an earlier line does")
                if key in known:
                    rows[key] = row
                else:
                    missing.append(f"{where}: {name}")
        if missing and check:
            raise ValueError(
                f"{len(missing)} metadata rows name no image of the folder, the first: {missing[0]}; "
                "remove them, or set check=False"
            )
        self.rows_without_image = tuple(missing)
        return rows

    def _find_captions(
        self, captions: str | None, column: str | None, texts: set[str], rows: dict[str, dict], check: bool
    ) -> None:
        """Set `_texts`, the names of caption files, or `_captions`, {key: caption}, or neither."""
        self._texts = self._captions = None
        columns = sorted({name for row in rows.values() for name in row})
        if column is not None and captions in ("txt", None):
            raise ValueError(f"caption_column={column!r} is a column of metadata, and captions={captions!r} reads none")
        captions = "metadata" if captions == "auto" and column is not None and column not in columns else captions
        column = column or next((name for name in CAPTION_COLUMNS if name in columns), None)
        beside = texts & {_sidecar(key) for key in self._keys}
        if captions == "auto":
            if beside and column in columns:
                raise ValueError(
                    f"{self._root} has captions in .txt files and in its metadata; set captions='txt' or 'metadata'"
                )
            captions = "metadata" if column in columns else "txt" if beside else None
        if captions is None:
            return
        if captions == "txt":
            self._texts = beside
            without = [key for key in self._keys if _sidecar(key) not in beside]
        else:
            if column not in columns:
                wanted = column or " or ".join(CAPTION_COLUMNS)
                has = f"has the columns {', '.join(columns)}" if columns else "is not there or has no rows"
                raise ValueError(f"the metadata of {self._root} {has}; there is no column {wanted} for captions")
            self._captions = {key: _text(row.get(column)) for key, row in rows.items()}
            without = [key for key in self._keys if not self._captions.get(key)]
        if without and check:
            raise CaptionError(
                f"{len(without)} of {len(self)} images have no caption, the first: {self._root / without[0]}; "
                f"add captions, or set captions=None"
            )

    def _find_labels(self, labels: bool | str, column: str | None, rows: dict[str, dict]) -> None:
        """Set `_labels`, a list of integers or None, and `class_names`."""
        self._labels: list[int] | None = None
        self.class_names: tuple[str, ...] | None = None
        values: list[Any]
        if column is not None:
            values = [rows.get(key, {}).get(column) for key in self._keys]
            without = [key for key, value in zip(self._keys, values, strict=True) if value is None or value == ""]
            if without:
                raise ValueError(f"{self._root / without[0]} has no value in the metadata's column {column}")
            values = [value if isinstance(value, int) and value >= 0 else str(value) for value in values]
            if all(isinstance(value, int) or value.isdecimal() for value in values):
                large = [value for value in values if len(str(value).lstrip("0")) > 10 or int(value) >= 2**31]
                if large:
                    raise ValueError(f"the column {column} has the label {shown(large[0])}, and labels are below 2**31")
                self._labels = [int(value) for value in values]
                return
            values = [str(value) for value in values]
        else:
            values = [key.partition("/")[0] if "/" in key else None for key in self._keys]
            if labels == "auto":
                labels = None not in values and len(set(values)) > 1
            if not labels:
                return
            if None in values:
                first = self._keys[values.index(None)]
                raise ValueError(f"{self._root / first} is not in a class subfolder, as labels=True requires")
        self.class_names = tuple(sorted(set(values)))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = [numbers[value] for value in values]


def _files(root: Path) -> Iterator[str]:
    """Yield the relative names of all files, with forward slashes; links are followed, each folder once.

    Pipes, sockets and devices are no files. A link to nothing is one, which cannot be read.
    """
    seen, folders = set(), [(str(root), "")]
    while folders:
        folder, prefix = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError:  # as lost+found of a disk, which other users must not read
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not entry.name.startswith("__MACOSX"):
                    folders.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_file() or not os.path.exists(entry.path):
                yield prefix + entry.name


def _found(names: Sequence[str]) -> str:
    """Return what to say about a folder without images."""
    sets = [name.rpartition("/")[0] for name in names if name.endswith("/dataset_info.json")]
    if sets:
        return f"; a data set of TensorFlow Datasets is in its subfolder {sets[0]}, give that one"
    endings = sorted({os.path.splitext(name)[1].lower() or name for name in names})
    if ".array_record" in endings:
        return "; it has ArrayRecord shards without manifest.json, which python -m ddpm_jax.prepare writes last"
    return f"; it has files that end in {', '.join(endings[:8])}" if endings else ""


def _sidecar(key: str) -> str:
    return os.path.splitext(key)[0] + ".txt"


def _columns(names: Sequence[str]) -> str:
    """Return what to say about columns that have no file_name."""
    if not names:
        return "has no file_name"
    hint = "; columns are separated by commas" if len(names) == 1 and any(mark in names[0] for mark in ";\t|") else ""
    return f"has no file_name, only the columns {', '.join(map(shown, names[:8]))}{hint}"


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the columns of each row of a metadata file."""
    text = read_text(path)
    if path.name.endswith(".csv"):
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise ValueError(f"{path}: line 1 names a column twice: {', '.join(reader.fieldnames[:8])}")
            if reader.fieldnames and "file_name" not in reader.fieldnames:
                raise ValueError(f"{path}: line 1 {_columns(reader.fieldnames)}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}: line {reader.line_num} does not have {len(reader.fieldnames)} columns")
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.reader.line_num} is not CSV: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} must be a JSON object, got {line[:40]}")
        if "file_name" not in row:
            raise ValueError(f"{path}: line {number} {_columns(list(row))}")
        yield number, row
