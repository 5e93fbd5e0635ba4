"""WebDataset shards: tar files whose members belong together by name, read at random through an index."""

import glob
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.decode import MAX_PIXELS, Decoder
from ddpm_jax.data.source import RESERVED, CaptionError, Fingerprint, RecordError, check_index, decode_text
from ddpm_jax.data.tar_index import TarIndex, open_index
from ddpm_jax.data.transforms import WHITE

IMAGES = ("gif", "jpeg", "jpg", "png", "webp")
JSON_CAPTIONS = ("caption", "text")
_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST_SHARDS = 10**6


class WebDatasetSource:
    """The samples of tar shards, in the order of the shards' names and of their members.

    Successive members with the same name up to the first dot of the file name are a sample, as "000.jpg", "000.txt",
    "000.cls". A record is {"image": uint8[H, W, 3], "key": str}, the key being that name; where they exist "caption":
    str (from .txt, or "caption" or "text" in .json), "label": int32 (from .cls, an integer), and for each NAME.npy the
    array NAME, which is none of these four names. Other members are not read.

    An index of each shard, NAME.tar.index.json, is made by reading the shard once, and stored. It is made again when
    the shard has changed: its size, time of modification, or the headers of its members.

    Args:
        path: a tar file, a directory of tar files, or a pattern: "train-*.tar", "train-{0000..0099}.tar".
        captions: "txt", "json", or None for none; "auto" takes .txt where the first sample has it, then .json.
        check: whether to refuse shards where a sample has no caption (of .txt), or no image. If False, such a caption
            raises CaptionError when it is read, and such samples are named in `samples_without_image`.
        index_directory: where to store indices; None for beside the shards.
        background: a colour for transparent parts, red, green and blue in [0, 255].
        max_pixels: a larger image is not decoded.

    Attributes:
        class_names: None; labels of shards have no names.
        samples_without_image: a tuple of str, each a shard and a key.

    Raises:
        ValueError: if an argument is wrong, there is no shard, or a shard is compressed, truncated, or not a tar file.
        CaptionError: if captions are missing (see `check`).
    """

    class_names = None

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        captions: str | None = "auto",
        check: bool = True,
        index_directory: str | os.PathLike | None = None,
        background: Sequence[int] = WHITE,
        max_pixels: int = MAX_PIXELS,
    ):
        if captions not in ("auto", "txt", "json", None):
            raise ValueError(f"captions must be 'auto', 'txt', 'json' or None, got {captions!r}")
        self._decoder = Decoder(background, max_pixels)
        self._shards = [Path(name).absolute() for name in find_shards(path)]
        directory = None if index_directory is None else Path(index_directory)
        self._samples, self._contents, without = _Samples(), [], []
        for number, shard in enumerate(self._shards):
            index = open_index(shard, directory)
            self._contents.append(index.content)
            for key, members in _grouped(index, shard):
                if "image" in members:
                    self._samples.append(number, key, members)
                else:
                    without.append(f"{shard}: {key}")
        if without and check:
            raise ValueError(f"{len(without)} samples have no image, the first: {without[0]}; set check=False")
        self.samples_without_image = tuple(without)
        if not len(self._samples):
            raise ValueError(f"the shards of {path} have no sample with an image ({', '.join(IMAGES)})")
        self._samples.finish()
        self._choose_fields(captions, check)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Read and decode one record.

        Raises:
            DecodeError: if the image cannot be read; the message names the shard and the member.
            CaptionError: if the caption is missing or is not UTF-8.
            RecordError: if the label or an array is missing or wrong.
            IndexError: if index is outside of [0, len).
        """
        shard, key, places = self._samples[check_index(index, len(self))]
        path = self._shards[shard]
        try:
            with open(path, "rb", buffering=0) as file:
                data = {name: os.pread(file.fileno(), *places[name]) for name in self._fields if name in places}
        except OSError as error:
            raise RecordError(f"{path}: {key}: cannot be read: {error.strerror or error}") from None
        try:
            return self._record(key, data)
        except RecordError as error:
            raise type(error)(f"{path}: {key}: {error}") from None

    def fingerprint(self) -> str:
        """Return a hash of the contents of all shards, of what is read from them, and of the background.

        The contents are those of the time when the index was made; see the class for when it is made again.
        """
        mark = Fingerprint("webdataset 1")
        mark.add(self._decoder.background, self._contents, self._fields)
        return mark.hexdigest()

    def __repr__(self) -> str:
        return f"WebDatasetSource({len(self._shards)} shards, {len(self)} samples)"

    def _choose_fields(self, captions: str | None, check: bool) -> None:
        """Set `_captions` and `_fields`, the names of the members to read."""
        has, samples = self._samples.members, self._samples
        if captions == "auto":
            first = samples[0][2]
            captions = next((name for name in ("txt", "json") if name in first), None)
        if captions is not None and captions not in has:
            raise ValueError(f"no sample has a member .{captions} with a caption")
        if captions is not None and check and (without := samples.without(captions)):
            shard, key, _ = samples[without[0]]
            raise CaptionError(
                f"{len(without)} of {len(self)} samples have no .{captions} with a caption, the first: "
                f"{self._shards[shard]}: {key}; add captions, or set captions=None"
            )
        self._captions = captions
        self._arrays = sorted(name for name in has if name.endswith(".npy"))
        self._fields = ["image", *([captions] if captions else []), *(["cls"] if "cls" in has else []), *self._arrays]

    def _record(self, key: str, data: dict[str, bytes]) -> dict[str, Any]:
        image = self._decoder(data["image"])
        record: dict[str, Any] = {"image": image}
        if self._captions is not None:
            record["caption"] = _caption(data.get(self._captions), self._captions)
        if "cls" in self._fields:
            record["label"] = _label(data.get("cls"))
        for name in self._arrays:
            record[name.removesuffix(".npy")] = _array(data.get(name), name)
        return record | {"key": key}


def find_shards(path: str | os.PathLike) -> list[str]:
    """Return the names of the tar files of a path, as `WebDatasetSource` takes it, sorted.

    Raises:
        ValueError: if there is none.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        names = glob.glob(os.path.join(glob.escape(text), "*.tar"))
    elif os.path.exists(text):
        names = [text]
    else:
        names = [name for pattern in _expanded(text) for name in glob.glob(pattern)]
        missing = [name for name in _expanded(text) if not glob.has_magic(name) and name not in names]
        if missing and names:
            raise ValueError(f"{missing[0]} is missing, a shard of {text}")
    if not names:
        raise ValueError(f"{text} names no tar file")
    return sorted(set(names))


def _expanded(text: str) -> Iterator[str]:
    """Yield the names that a pattern with ranges in braces stands for."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    first, last = match.groups()
    if int(last) - int(first) >= _MOST_SHARDS:
        raise ValueError(f"{match[0]} in the name of shards stands for more than {_MOST_SHARDS} names")
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{text[: match.start()]}{number:0{len(first)}d}{text[match.end() :]}")


def _grouped(index: TarIndex, shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield the key and the members of each sample, {name: (size, offset)}; that of its image is "image"."""

    def split(member: tuple[str, int, int]) -> tuple[str, str]:
        folder, slash, name = member[0].rpartition("/")
        stem, _, extension = name.partition(".")
        return folder + slash + stem if stem and extension else "", extension.lower()

    # Others have no ending, or begin with a dot, as the files that macOS adds between those of a sample.
    named = (member for member in index.members if split(member)[0])
    for key, group in itertools.groupby(named, lambda member: split(member)[0]):
        members: dict[str, tuple[int, int]] = {}
        for member in group:
            extension = split(member)[1]
            name = "image" if extension in IMAGES else extension
            field, _, ending = name.rpartition(".")
            if ending == "npy" and field in RESERVED:
                raise ValueError(f"{shard}: {member[0]} cannot be the field {field!r} of a record; rename the member")
            if name in members:
                raise ValueError(f"{shard}: {key} has more than one {name}, the second is {member[0]}")
            members[name] = member[2], member[1]
        yield key, members


class _Samples:
    """Positions of the members of each sample, in arrays, since worker processes get a copy."""

    def __init__(self):
        self._keys: list[str] = []
        self._shards: Any = []
        self.members: dict[str, Any] = {}

    def append(self, shard: int, key: str, members: dict[str, tuple[int, int]]) -> None:
        for name, place in members.items():
            if name in ("image", "txt", "json", "cls") or name.endswith(".npy"):
                self.members.setdefault(name, []).append((len(self._keys), *place))
        self._keys.append(key)
        self._shards.append(shard)

    def finish(self) -> None:
        """Convert lists to arrays, after the last `append`."""
        self._shards = np.array(self._shards, np.int32)
        for name, rows in self.members.items():
            numbers, *places = np.array(rows, np.int64).T
            self.members[name] = np.full((len(self), 2), -1, np.int64)
            self.members[name][numbers] = np.stack(places, -1)

    def without(self, name: str) -> list[int]:
        """Return the numbers of the samples that do not have a member."""
        return np.flatnonzero(self.members[name][:, 0] < 0).tolist()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[int, str, dict[str, tuple[int, int]]]:
        places = {name: array[index].tolist() for name, array in self.members.items() if array[index, 0] >= 0}
        return int(self._shards[index]), self._keys[index], places


def _caption(data: bytes | None, kind: str) -> str:
    if data is None:
        raise CaptionError(f"has no caption, no member .{kind}")
    text: Any = decode_text(data, f".{kind}")
    if kind == "json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CaptionError(f".json is not JSON: {error}") from None
        text = next((values[name] for name in JSON_CAPTIONS if name in values), "") if isinstance(values, dict) else ""
    if not isinstance(text, str) or not text.strip():
        raise CaptionError(f"has no caption in .{kind}")
    return text.strip()


def _label(data: bytes | None) -> np.int32:
    text = b"" if data is None else data.strip()
    if not text.isdigit() or len(text.lstrip(b"0")) > 10 or int(text) >= 2**31:
        raise RecordError(f".cls must hold an integer in [0, 2^31), got {text[:40]!r}")
    return np.int32(int(text))


def _array(data: bytes | None, name: str) -> np.ndarray:
    """Read a .npy file without its pickles, and without memory for a shape that its bytes do not have."""
    if data is None:
        raise RecordError(f"has no member .{name}")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](stream)
        if dtype.kind not in "biuf":
            raise ValueError(f"its dtype is {dtype}")
        array = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if is_fortran else "C")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise RecordError(f".{name} is not an array of numbers: {error}") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise RecordError(f".{name} has values that are not finite (NaN or infinity)")
    return array
