"""Prepare a data set: parts are written by worker processes, embedded, and completed."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.data.preparing.directory import SKIPPED, Directory, counted, in_words, remove_duplicates
from ddpm_jax.data.preparing.embed import Embedder, embed_part
from ddpm_jax.data.preparing.part import Options, Part, PrepareError, load_part, save_part, write_part
from ddpm_jax.data.preparing.workers import write_parts
from ddpm_jax.data.record_format import read_manifest
from ddpm_jax.progress import progress_bar
from ddpm_jax.types import Source

MAX_SKIPPED = 0.1


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of `prepare`.

    Attributes:
        complete: False where parts of other processes are missing.
        records: in the data set, or in this process's parts.
        shards: likewise.
        bytes: likewise.
        skipped: {reason: number of records}.
        unused: the number of files and rows of metadata that belong to no record.
    """

    complete: bool
    records: int
    shards: int
    bytes: int
    skipped: dict[str, int]
    unused: int


def prepare(
    source: Source,
    out: str | os.PathLike,
    options: Options,
    *,
    workers: int = 1,
    max_skipped: int | float = MAX_SKIPPED,
    embedders: Sequence[Embedder] = (),
    process_index: int = 0,
    process_count: int = 1,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Summary:
    """Write a source as a directory of ArrayRecord shards that `ArrayRecordSource` reads.

    What is written depends on the source, `options` and `embedders` alone. A call that was interrupted at any moment
    continues where it was.

    Args:
        source: records with "image"; it is pickled where there is more than one worker.
        out: the directory; it must not exist, be empty, or hold the same data set, complete or not.
        options: how to prepare.
        workers: processes that decode and encode; 1 works in this process. With more, a script that calls this needs
            the usual guard `if __name__ == "__main__"`.
        max_skipped: how many records may be skipped, as an int, or as a fraction of the source, as a float.
        embedders: what computes further fields of the records; they run in this process.
        process_index: of this process, among those that prepare the same data set on a shared file system.
        process_count: the number of these processes. The last one to be ready completes the data set.
        provenance: plain data for the manifest.
        progress: whether to show a progress bar.

    Raises:
        OutputError: if the directory holds something else, or another run is writing it.
        PrepareError: if too many records are skipped, nothing is left, or the source has no images.
        ValueError: if an argument is wrong.
    """
    if workers < 1 or process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"workers and process_count must be at least 1, and process_index less than process_count; "
            f"got {workers}, {process_count} and {process_index}"
        )
    if max_skipped < 0 or (isinstance(max_skipped, float) and not max_skipped <= 1.0):
        raise ValueError(f"max_skipped must be a number of records, or a fraction in [0.0, 1.0], got {max_skipped}")
    length = len(source)
    if length < 1:
        raise ValueError("source must have at least one record")
    count = -(-length // options.shard_records)
    # Of a source without a fingerprint only the number of records is compared when the work is resumed.
    fingerprint = source.fingerprint() if hasattr(source, "fingerprint") else None
    description = {"version": 1, "source": fingerprint, "records": length, **options.plain()}
    description["embed"] = [embedder.fingerprint for embedder in embedders]
    directory = Directory(out, description, count)
    if not directory.is_complete:
        limit = _Limit(max_skipped, length, options)
        job = _Job(source, directory, options, workers, tuple(embedders), limit, progress)
        mine = range(process_index, count, process_count)
        with directory.lock(f"process-{process_index}"):
            parts = job.write(mine)
        complete = _complete(directory, source, options, max_skipped, provenance or {})
        if not complete:
            shards = [part.shard for part in parts if part.shard]
            return _summary(False, shards, counted(parts), 0)
    directory.remove_parts()
    manifest = read_manifest(directory.path)
    provenance = manifest["provenance"]
    return _summary(True, manifest["shards"], provenance["skipped"], provenance["unused"])


def _summary(complete: bool, shards: Sequence[Mapping[str, Any]], skipped: dict[str, int], unused: int) -> Summary:
    records, size = (sum(shard[name] for shard in shards) for name in ("records", "bytes"))
    return Summary(complete, records, len(shards), size, skipped, unused)


def _complete(
    directory: Directory, source: Source, options: Options, max_skipped: int | float, provenance: Mapping[str, Any]
) -> bool:
    """Complete the data set if all parts are there; return whether it is complete."""
    try:
        with directory.lock("completion", wait=True):
            if directory.is_complete:
                return True
            if not all(directory.part_path(number).exists() for number in range(directory.count)):
                return False
            licences = source.licences() if hasattr(source, "licences") else {}
            directory.complete(
                class_names=getattr(source, "class_names", None),
                unused=_unused(source),
                provenance=provenance,
                licences=licences,
                keep_duplicates=options.keep_duplicates,
                check=_Limit(max_skipped, len(source), options).check,
            )
    except FileNotFoundError:
        if not directory.is_complete:  # another process has not completed it
            raise
    return True


def _unused(source: Source) -> list[str]:
    """Return what a source has found and not made a record of."""
    names = ("ignored", "rows_without_image", "samples_without_image")
    return [entry for name in names for entry in getattr(source, name, ())]


class _Limit:
    """Counts what is skipped, duplicates included, and stops above the limit."""

    def __init__(self, most: int | float, length: int, options: Options):
        self.given, self._length, self._options = most, length, options
        self._most = int(most * length) if isinstance(most, float) else most
        self._skipped, self._seen = 0, set()

    def add(self, part: Part) -> bool:
        """Count a part, and return whether the limit is passed."""
        self._skipped += len(part.skipped)
        if not self._options.keep_duplicates:
            digests = [digest for _, digest, _ in part.kept]
            self._skipped += sum(digest in self._seen for digest in digests)
            self._seen.update(digests)
        return self._skipped > self._most

    def check(self, parts: Sequence[Part], path: Path) -> None:
        """Raise PrepareError if more was skipped in these parts than may be."""
        skipped = sum(len(part.skipped) for part in parts)
        if skipped > self._most:
            read = skipped + sum(len(part.kept) for part in parts)
            of = f"max_skipped={self.given}" + (f" of {self._length}" if isinstance(self.given, float) else "")
            raise PrepareError(
                f"{skipped} of the {read} records read were skipped ({in_words(parts)}), which is more than {of}; "
                f"{path / SKIPPED} names them; with a higher limit the work continues"
            )


@dataclasses.dataclass
class _Job:
    """The writing of some parts."""

    source: Source
    directory: Directory
    options: Options
    workers: int
    embedders: tuple[Embedder, ...]
    limit: _Limit
    progress: bool

    def write(self, numbers: Sequence[int]) -> list[Part]:
        """Write the parts with these numbers that are not there, and return all of them."""
        directory, parts = self.directory, {}
        directory.remove_unfinished(numbers)
        missing = [number for number in numbers if not directory.part_path(number).exists()]
        for number in sorted(set(numbers) - set(missing)):
            parts[number] = load_part(directory.part_path(number))
        passed = [self.limit.add(part) for part in parts.values()]
        total = sum(self._range(number)[1] - self._range(number)[0] for number in numbers)
        left = sum(self._range(number)[1] - self._range(number)[0] for number in missing)
        bar = progress_bar(total, description="prepare", unit="image", initial=total - left, shown=self.progress)
        with bar:
            if not any(passed):
                for number, part in self._parts(missing, bar.update):
                    parts[number] = self._embed(number, part)
                    save_part(directory.part_path(number), parts[number])
                    if self.limit.add(part):
                        break
        ordered = [parts[number] for number in sorted(parts)]
        if len(ordered) < len(numbers) or any(passed):
            self._stop(ordered)
        return ordered

    def _range(self, number: int) -> tuple[int, int]:
        size = self.options.shard_records
        return number * size, min((number + 1) * size, len(self.source))

    def _stop(self, parts: list[Part]) -> None:
        """Write what was skipped, and raise an error if the limit is exceeded."""
        if not self.options.keep_duplicates:
            remove_duplicates(parts)
        self.directory.write_skipped(parts, _unused(self.source))
        self.limit.check(parts, self.directory.path)

    def _embed(self, number: int, part: Part) -> Part:
        if not self.embedders or part.shard is None:
            return part
        return embed_part(part, self._decoded(number), self.directory.shard_path(number), self.embedders, self.source)

    def _decoded(self, number: int) -> Path:
        """Return where workers write the shard of a part."""
        return self.directory.decoded_path(number) if self.embedders else self.directory.shard_path(number)

    def _parts(self, numbers: Sequence[int], done: Callable[[int], None]) -> Iterator[tuple[int, Part]]:
        """Yield the parts with these numbers, as they are ready."""
        tasks = {number: (*self._range(number), self._decoded(number)) for number in numbers}
        if min(self.workers, len(numbers)) <= 1:
            for number, (begin, end, path) in tasks.items():
                yield number, write_part(self.source, begin, end, path, self.options, done)
            return
        yield from write_parts(self.source, self.options, tasks, min(self.workers, len(numbers)), done)
