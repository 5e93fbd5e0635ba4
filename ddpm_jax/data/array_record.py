"""Prepared data sets: a directory of ArrayRecord shards and a manifest, see `ddpm_jax.data.record_format`."""

import contextlib
import dataclasses
import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from ddpm_jax.data.decode import MAX_PIXELS, DecodeError, Decoder
from ddpm_jax.data.record_format import (
    MANIFEST,
    decode_record,
    encode_record,
    read_manifest,
    record_fields,
    write_manifest,
)
from ddpm_jax.data.source import Fingerprint, RecordError, check_index, file_sha256
from ddpm_jax.data.transforms import WHITE
from ddpm_jax.extras import needs_extra
from ddpm_jax.temporary import temporary_path

with needs_extra("train"):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordWriter

# Encoded images do not shrink further; one record a group is what random access reads.
WRITER_OPTIONS = "group_size:1,uncompressed"


class ArrayRecordSource:
    """The records of a directory that `write_array_record` or `python -m ddpm_jax.prepare` wrote.

    A record has the fields of the manifest: "image" decoded to uint8[H, W, 3], strings as str, "label" as int32, other
    integers as int64, and arrays of their dtype and shape.

    Args:
        path: the directory.
        fields: names of those to read; the others are not decoded. None reads all.
        background: a colour for transparent parts, red, green and blue in [0, 255].
        max_pixels: a larger image is not decoded.

    Attributes:
        class_names: a tuple of str, or None.
        fields: {name: type}, of the fields that are read, as in the manifest.
        provenance: plain data that the writer left about where the records come from.

    Raises:
        ValueError: if the manifest is missing or wrong, a shard is missing or does not have the size it should have,
            or an argument is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        fields: Sequence[str] | None = None,
        background: Sequence[int] = WHITE,
        max_pixels: int = MAX_PIXELS,
    ):
        self._root = Path(path).absolute()
        self._decoder = Decoder(background, max_pixels)
        manifest = read_manifest(path)
        for name in fields or ():
            if name not in manifest["fields"]:
                raise ValueError(f"fields names {name!r}; {path} has {', '.join(manifest['fields'])}")
        self.fields = {name: manifest["fields"][name] for name in fields or manifest["fields"]}
        self.class_names = None if manifest["class_names"] is None else tuple(manifest["class_names"])
        self.provenance = manifest["provenance"]
        self._shards = manifest["shards"]
        for shard in self._shards:
            file = self._root / shard["name"]
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {shard['bytes']}"
                raise ValueError(f"{file} {found}")
        _allow_open_files(len(self._shards))
        self._ends = list(itertools.accumulate(shard["records"] for shard in self._shards))
        self._records = ArrayRecordDataSource(
            [_Part(str(self._root / shard["name"]), shard["records"]) for shard in self._shards if shard["records"]]
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _allow_open_files(len(self._shards))  # of a worker process

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Read and decode one record.

        Raises:
            DecodeError: if the image cannot be decoded; the message names the shard, the position in it and the key.
            RecordError: if the record is damaged.
            IndexError: if index is outside of [0, len).
        """
        record = self.encoded(index)
        try:
            if "image" in self.fields:
                image = self._decoder(record["image"])
                record["image"] = image
        except DecodeError as error:
            named = f" ({record['key']})" if "key" in record else ""
            raise DecodeError(f"{self._where(index)}{named}: {error}") from None
        return record

    def encoded(self, index: SupportsIndex) -> dict[str, Any]:
        """Read one record, with its image as the bytes of an image file; raises as `__getitem__`."""
        index = check_index(index, len(self))
        try:
            data = self._records[index]
        except Exception as error:  # the reader's errors are not documented
            raise RecordError(f"{self._where(index)}: cannot be read: {error}") from None
        try:
            return decode_record(data, self.fields, self.class_names)
        except ValueError as error:
            raise RecordError(f"{self._where(index)}: {error}") from None

    def fingerprint(self) -> str:
        """Return a hash of the fields, class names, background, and of the shards' SHA-256 from the manifest.

        The shards are not read; `verify` compares them with the manifest.
        """
        mark = Fingerprint("array_record 1")
        mark.add(self._decoder.background, self.class_names, self.fields)
        mark.add([[shard["records"], shard["sha256"]] for shard in self._shards])
        return mark.hexdigest()

    def verify(self) -> None:
        """Read all shards and raise ValueError if one is not what was written."""
        for shard in self._shards:
            if file_sha256(self._root / shard["name"]) != shard["sha256"]:
                raise ValueError(f"{self._root / shard['name']} has another SHA-256 than the manifest says")

    def __repr__(self) -> str:
        return f"ArrayRecordSource({str(self._root)!r}, {len(self)} records)"

    def _where(self, index: SupportsIndex) -> str:
        index = check_index(index, len(self))
        number = next(number for number, end in enumerate(self._ends) if index < end)
        first = self._ends[number] - self._shards[number]["records"]
        return f"{self._root / self._shards[number]['name']}: record {index - first}"


def write_array_record(
    path: str | os.PathLike,
    records: Iterable[Mapping[str, Any]],
    *,
    class_names: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_records: int = 1024,
) -> None:
    """Write records as a directory that `ArrayRecordSource` reads, in their order.

    Args:
        path: of the directory; it is made if it does not exist, and must not have a manifest.
        records: each a dict as `encode_record` takes it, with the same fields; for example a source.
        class_names: names of the labels.
        provenance: plain data about where the records come from, for people.
        shard_records: records in a shard.

    Raises:
        ValueError: if a record is wrong or differs from the first one in its fields, there is no record, or the
            directory has a manifest.
    """
    directory = Path(path)
    if (directory / MANIFEST).exists():
        raise ValueError(f"{directory} has a {MANIFEST} already; give another directory, or remove it")
    if shard_records < 1:
        raise ValueError(f"shard_records must be at least 1, got {shard_records}")
    directory.mkdir(parents=True, exist_ok=True)
    shards, fields, iterator = [], None, iter(records)
    while (first := next(iterator, None)) is not None:
        fields = fields or record_fields(first)
        chunk = itertools.chain([first], itertools.islice(iterator, shard_records - 1))
        shards.append(write_shard(directory / f"{len(shards):05d}.array_record", chunk, fields, class_names))
    write_manifest(directory, shards, fields or {}, class_names=class_names, provenance=provenance)


def write_shard(
    path: str | os.PathLike,
    records: Iterable[Mapping[str, Any]],
    fields: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write one shard, whole or not at all, and return its entry of the manifest.

    Args:
        path: of the file, which is replaced if it exists.
        records: each a dict as `encode_record` takes it.
        fields: as `record_fields` returns them.
        class_names: names of the labels.

    Raises:
        OSError: if it cannot be written, as on a full disk.
        ValueError: if a record is wrong.
    """
    path, count = Path(path), 0
    with temporary_path(path.with_name(f".{path.name}.{os.getpid()}")) as unfinished:
        with _writer_errors(path):
            writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
        try:
            for count, record in enumerate(records, 1):  # noqa: B007
                data = encode_record(record, fields, class_names)
                with _writer_errors(path):
                    writer.write(data)
        finally:
            with _writer_errors(path):
                writer.close()
        entry = {"name": path.name, "records": count, "bytes": unfinished.stat().st_size}
        entry["sha256"] = file_sha256(unfinished)
        os.replace(unfinished, path)
    return entry


@contextlib.contextmanager
def _writer_errors(path: Path) -> Iterator[None]:
    """Convert errors of the ArrayRecord writer to OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).partition(";")[0], str(path)) from None


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files where it is too low for shards, which all stay open.

    Raises:
        ValueError: if the system does not allow it.
    """
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return
    needed = count + 256  # for everything else
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard < needed and hard != resource.RLIM_INFINITY:
        raise ValueError(
            f"{count} shards need as many open files, of which the system allows {hard}; use larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Name and number of records of a shard, so that the reader does not open all shards to count them."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard
