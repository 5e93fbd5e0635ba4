"""The directory of a prepared data set while it is written: what is there, whose it is, and how it is completed.

OUT/parts/options.json         what is prepared, and how: another run continues only the same
OUT/parts/00012.array_record   the shard of a part, with duplicates
OUT/parts/00012.json           what became of the part's records; the part is complete when this is there
OUT/00012.array_record         the final shard
OUT/skipped.jsonl              every record that was skipped, and why
OUT/manifest.json              the last to be written: the data set is complete
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from ddpm_jax.data.array_record import write_shard
from ddpm_jax.data.preparing.part import NO_CAPTION, TOO_SMALL, UNREADABLE, Part, PrepareError, load_part
from ddpm_jax.data.record_format import MANIFEST, decode_record, read_manifest, write_manifest
from ddpm_jax.data.source import file_sha256
from ddpm_jax.temporary import temporary_path

SKIPPED = "skipped.jsonl"
DUPLICATE, UNUSED = "duplicate", "not used"
REASONS = (UNREADABLE, TOO_SMALL, NO_CAPTION, DUPLICATE)
DECODED = ".decoded"
_NAMES = {"source": "source", "embed": "choice of models to embed with"}
_PARTS, _OPTIONS = "parts", "options.json"


class OutputError(ValueError):
    """A directory that cannot be written to because of what it holds; the message is one sentence."""


class Directory:
    """A directory that is being prepared.

    Args:
        path: it is created if it does not exist.
        description: plain data that says what is prepared, and how.
        count: the number of parts.

    Raises:
        OutputError: if the directory holds something else.
    """

    def __init__(self, path: str | os.PathLike, description: Mapping[str, Any], count: int):
        self.path, self.count, self.description = Path(path), count, json.loads(json.dumps(description))
        self._parts = self.path / _PARTS
        self._open()

    @property
    def is_complete(self) -> bool:
        """True if the data set is complete."""
        return (self.path / MANIFEST).exists()

    def shard_path(self, number: int) -> Path:
        """Return where the shard of a part is written."""
        return self._parts / _shard_name(number)

    def decoded_path(self, number: int) -> Path:
        """Return where the shard of a part is written before it is embedded."""
        return self._parts / f"{number:05d}{DECODED}"

    def part_path(self, number: int) -> Path:
        """Return where the outcome of a part is written."""
        return self._parts / f"{number:05d}.json"

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the directory for one process; the kernel lets go of it when the process ends, however it ends.

        Raises:
            OutputError: if another process holds it, and wait is False.
            FileNotFoundError: if the data set was completed, and its parts removed.
        """
        import fcntl

        with open(self._parts / f"{name}.lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise OutputError(f"{self.path} is being written by another run (as {name})") from None
            yield

    def remove_unfinished(self, numbers: Sequence[int]) -> None:
        """Remove what a killed run of the parts with these numbers has left."""
        mine = {f"{number:05d}" for number in numbers}
        for file in self._parts.iterdir():
            unfinished = file.name.startswith(".") or file.suffix == DECODED
            if unfinished and file.name.lstrip(".").partition(".")[0] in mine:
                file.unlink(missing_ok=True)

    def write_skipped(self, parts: Sequence[Part], unused: Sequence[str]) -> None:
        """Write the list of skipped records and of what is no record, whole or not at all."""
        entries = [entry for part in parts for entry in part.skipped]
        entries += [{"index": None, "reason": UNUSED, "message": name} for name in unused]
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        target = self.path / SKIPPED
        with temporary_path(target.with_name(f".{SKIPPED}.{os.getpid()}")) as unfinished:
            unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")
            os.replace(unfinished, target)

    def complete(
        self,
        *,
        class_names: Sequence[str] | None,
        unused: Sequence[str],
        provenance: Mapping[str, Any],
        licences: Mapping[str, str],
        keep_duplicates: bool,
        check: Callable[[Sequence[Part], Path], None],
    ) -> dict[str, Any]:
        """Combine the parts to the data set, and return its manifest.

        A run that is killed here is continued by the next one.

        Raises:
            PrepareError: if no record is left, the parts differ in their fields, or `check` raises it.
        """
        parts = [load_part(self.part_path(number)) for number in range(self.count)]
        if not keep_duplicates:
            remove_duplicates(parts)
        self.write_skipped(parts, unused)
        check(parts, self.path)
        fields = _common_fields(parts)
        shards = []
        for number, part in enumerate(parts):
            if part.kept:
                shards.append(self._final_shard(number, part, class_names))
        if not shards:
            raise PrepareError(f"no record was kept: {in_words(parts)}; see {self.path / SKIPPED}")
        for name, text in licences.items():
            (self.path / name).write_text(text, encoding="utf-8")
        provenance = {**provenance, "prepare": self.description, "skipped": counted(parts), "unused": len(unused)}
        write_manifest(self.path, shards, fields, class_names=class_names, provenance=provenance)
        self.remove_parts()
        return read_manifest(self.path)

    def remove_parts(self) -> None:
        """Remove what is not needed after the data set is complete."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def _open(self) -> None:
        options = self._parts / _OPTIONS
        try:
            if self.is_complete:
                found = _prepared_as(self.path)
            elif options.exists():
                found = json.loads(options.read_text(encoding="utf-8"))
            elif others := self._others():
                raise OutputError(f"{self.path} holds other files, such as {others[0]}; give a new or empty directory")
            else:
                self._parts.mkdir(parents=True, exist_ok=True)
                with temporary_path(options.with_name(f".{_OPTIONS}.{os.getpid()}")) as unfinished:
                    unfinished.write_text(json.dumps(self.description), encoding="utf-8")
                    os.replace(unfinished, options)
                return
        except (NotADirectoryError, FileExistsError):
            raise OutputError(f"{self.path} is a file; give a directory") from None
        except ValueError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.path} holds something else: {error}") from None
        self._compare(found)

    def _others(self) -> list[str]:
        return [name for name in sorted(os.listdir(self.path)) if name != _PARTS] if self.path.exists() else []

    def _compare(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise OutputError(f"{self.path} holds a data set that was not prepared by this program; give another one")
        for name, value in self.description.items():
            if found.get(name) != value:
                was, now = (json.dumps(each) for each in (found.get(name), value))
                what = f"another {_NAMES[name]}" if name in _NAMES else f"{name} {was}, not {now}"
                raise OutputError(f"{self.path} holds a data set with {what}; give another directory, or remove it")

    def _final_shard(self, number: int, part: Part, class_names: Sequence[str] | None) -> dict[str, Any]:
        """Move or copy the shard of a part to where it stays, and return its entry of the manifest."""
        source, target = self.shard_path(number), self.path / _shard_name(number)
        assert part.shard is not None
        if part.shard["records"] == len(part.kept):
            if source.exists():
                os.replace(source, target)
            return part.shard
        if source.exists():
            kept = {index for index, _, _ in part.kept}
            order = load_part(self.part_path(number)).kept
            chosen = [place for place, (index, _, _) in enumerate(order) if index in kept]
            records = ArrayRecordDataSource(str(source))
            copies = (decode_record(records[place], part.fields) for place in chosen)
            entry = write_shard(target, copies, part.fields, class_names)
            source.unlink()
            return entry
        return {
            "name": target.name,
            "records": len(part.kept),
            "bytes": target.stat().st_size,
            "sha256": file_sha256(target),
        }


def remove_duplicates(parts: Sequence[Part]) -> None:
    """Skip every record whose pixels are those of an earlier record."""
    first: dict[str, int] = {}
    for part in parts:
        for index, digest, _ in part.kept:
            first.setdefault(digest, index)
    names = {digest: key for part in parts for index, digest, key in part.kept if index == first[digest]}
    for part in parts:
        for index, digest, key in part.kept:
            if first[digest] != index:
                message = f"{key}: has the pixels of {names[digest]}"
                part.skipped.append({"index": index, "reason": DUPLICATE, "message": message})
        part.kept = [entry for entry in part.kept if first[entry[1]] == entry[0]]
        part.skipped.sort(key=lambda entry: entry["index"])


def counted(parts: Sequence[Part]) -> dict[str, int]:
    """Return how many records were skipped for each reason."""
    counts = Counter(entry["reason"] for part in parts for entry in part.skipped)
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


def in_words(parts: Sequence[Part]) -> str:
    """Return the counts in words, as "3 unreadable, 2 too small"."""
    return ", ".join(f"{count} {reason}" for reason, count in counted(parts).items()) or "none"


def _shard_name(number: int) -> str:
    return f"{number:05d}.array_record"


def _prepared_as(path: Path) -> Any:
    return read_manifest(path)["provenance"].get("prepare")


def _common_fields(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the fields of all records; raise PrepareError if parts differ."""
    found: Part | None = None
    for part in parts:
        if not part.fields:
            continue
        found = found or part
        if part.fields != found.fields:
            names = [f"{key} has {', '.join(each.fields)}" for each in (found, part) for _, _, key in each.kept[:1]]
            raise PrepareError(f"records differ in their fields: {'; '.join(names)}")
    return found.fields if found else {}
