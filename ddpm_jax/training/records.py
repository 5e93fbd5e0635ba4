"""Records of a stage after its transforms, as batches; and what keeps them from being in one."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.source import read_record
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.training.stage import Stage, apply_transforms
from ddpm_jax.types import Source


def _without_text(record: dict) -> dict:
    """Leave out what is not numbers, such as a file's name, which no device can hold."""
    return {name: value for name, value in record.items() if np.asarray(value).dtype.kind not in "OSU"}


class LikeFirst:
    """Leave out text, and raise ValueError for a record that cannot be in one batch with the first.

    Or whose label is not a class of the stage's network, which would train it on NaN.
    """

    def __init__(self, stage: Stage, first: dict):
        self._stage, self._shapes = stage.name, self._shapes_of(_without_text(first))
        metadata = getattr(stage.task, "metadata", None)
        labels = None if metadata is None else metadata().get("labels")
        self._num_classes = None if labels is None else labels["num_classes"]

    def __call__(self, record: dict) -> dict:
        record = _without_text(record)
        shapes = self._shapes_of(record)
        if shapes != self._shapes:
            raise ValueError(_unequal(self._stage, self._shapes, shapes))
        label = record.get("label", 0)
        if self._num_classes is not None and not 0 <= label < self._num_classes:
            raise ValueError(
                f"stage {self._stage}: label {label} of a record must be in [0, {self._num_classes}), the classes of "
                "the network"
            )
        return record

    @staticmethod
    def _shapes_of(record: dict) -> dict[str, tuple[int, ...]]:
        return {name: np.shape(value) for name, value in record.items()}


def _unequal(stage: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return a sentence on records, name -> shape, that cannot be in one batch."""
    if first.keys() != other.keys():
        entries = " and ".join(", ".join(record) for record in (first, other))
        return f"stage {stage}: the records have different entries, {entries}; Select can bring them to the same"
    name = next(name for name in first if first[name] != other[name])
    shapes = f"{first[name]} and {other[name]}"
    return f"stage {stage}: {name!r} of the records has different shapes, {shapes}; CenterCrop can bring them to one"


def example_record(stage: Stage, models: Mapping[str, Model], source: Source) -> dict:
    """Return the first record after the transforms, with zeros for embeddings that are not computed yet."""
    if len(source) < 1:
        raise ValueError("its source has no records")
    record = source.example(models) if hasattr(source, "example") else read_record(source, 0)
    return _without_text(apply_transforms(dict(record), stage.transforms, np.random.default_rng(0)))


def example_batch(stage: Stage, source: Source) -> dict[str, np.ndarray]:
    """Return a batch of the first records, for previews and for the shapes of the network."""
    count = max(stage.training.num_previews, 1)
    return stack_records(stage, list(SomeRecords(stage, source, range(min(count, len(source))))))


class SomeRecords(Sequence):
    """Records of a stage after the transforms, without text.

    Args:
        stage: whose seed and transforms they have.
        source: of the records.
        indices: which.
    """

    def __init__(self, stage: Stage, source: Source, indices: Sequence[int]):
        self._stage, self._source, self._indices = stage, source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: SupportsIndex) -> dict[str, np.ndarray]:
        index = int(self._indices[number])  # raises IndexError, by which an iteration ends
        rng = np.random.default_rng((self._stage.training.seed, index))
        return _without_text(apply_transforms(dict(read_record(self._source, index)), self._stage.transforms, rng))


def random_records(stage: Stage, source: Source, count: int) -> SomeRecords:
    """Return different records from all over a source, which may be sorted, the same in every process."""
    rng = np.random.default_rng(stage.training.seed)
    return SomeRecords(stage, source, np.sort(rng.choice(len(source), min(count, len(source)), replace=False)))


def stack_records(stage: Stage, records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Return a batch of records; raise ValueError for one that is not like the first."""
    check = LikeFirst(stage, records[0])
    records = [check(record) for record in records]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def missing_entry(stage: Stage, error: KeyError) -> str:
    """Return a sentence on a record, or a model, that lacks an entry."""
    name = error.args[0] if error.args else error
    with contextlib.suppress(Exception):
        for which in ("source", "eval_source"):
            record = getattr(stage, which)[0]
            if name in record and name not in _without_text(record):
                kind = type(record[name]).__name__
                return f"its task or transforms read {name!r}, which is of type {kind} in its {which}, and not an array"
            if name not in record:
                entries = ", ".join(map(str, record))
                return f"its task or transforms read {name!r}, and the records of its {which} have {entries}"
    return f"its task or transforms read {name!r}, which the records do not have"
