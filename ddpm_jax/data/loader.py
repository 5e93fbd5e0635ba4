"""The training loader: an endless, shuffled, resumable stream of batches, on Grain.

The stream is one fixed sequence of records x[0], x[1], ...: epoch after epoch of the source, each with its own
permutation from the seed. Global batch b is x[b B], ..., x[(b + 1) B - 1]; it has `shard_count` equal blocks, of which
a host reads those that its devices hold and nothing else. So the blocks in their order are the same batch for every
number of hosts.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ddpm_jax.data.source import read_record, transformed
from ddpm_jax.extras import needs_extra
from ddpm_jax.types import Source

with needs_extra("train"):
    import grain
    from absl import flags


class Loader(Iterator[dict[str, Any]]):
    """Iterates over batches, dicts of numpy arrays; made by `make_loader`.

    A context manager that closes it; the end of the program closes it as well.
    """

    _open: "weakref.WeakSet[Loader]" = weakref.WeakSet()

    def __init__(self, batches: grain.DatasetIterator):
        self._batches: grain.DatasetIterator | None = batches
        Loader._open.add(self)

    def __next__(self) -> dict[str, Any]:
        batch = next(self._used())
        # Arrays of workers are in shared memory, of which there is little; a copy releases it at once.
        return {name: value if type(value) is np.ndarray else np.array(value) for name, value in batch.items()}

    def get_state(self) -> Any:
        """Return the position in the stream as plain data."""
        return self._used().get_state()

    def set_state(self, state: Any) -> None:
        """Continue with the batch after the position that an equally made loader returned."""
        self._used().set_state(state)

    def close(self) -> None:
        """Stop the threads and workers; does nothing the second time."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _used(self) -> grain.DatasetIterator:
        if self._batches is None:
            raise ValueError("the loader is closed")
        return self._batches


@atexit.register
def _close_loaders() -> None:
    """Close all loaders while Grain's modules are there, which its iterators need when they are deleted."""
    for loader in tuple(Loader._open):
        loader.close()


def _start_worker(index: int, count: int) -> None:
    """Let the first process decide when a worker ends."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    # A process that is killed, or leaves by os._exit, does not end its workers.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="parent", daemon=True).start()


class _Records:
    """A source whose records are checked when they are read."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return read_record(self._source, index)


class _HostBlocks(grain.MapDataset):
    """The records of one host: those of some of the `count` equal blocks of each batch of the parent."""

    def __init__(self, parent: grain.MapDataset, batch: int, blocks: Sequence[int], count: int):
        super().__init__(parent)
        self._batch, self._blocks, self._size = batch, tuple(blocks), batch // count
        self._own = self._size * len(self._blocks)

    def __len__(self) -> int:
        # Endless; Grain computes the number of batches in floats, which round sys.maxsize up to what is no length.
        return min(len(self._parent) // self._batch * self._own, 2**62)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        number, offset = divmod(index, self._own)
        block, offset = divmod(offset, self._size)
        return self._parent[number * self._batch + self._blocks[block] * self._size + offset]


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transforms: Sequence[Callable[[dict], dict] | Any] = (),
    shard_index: int | Sequence[int] = 0,
    shard_count: int = 1,
    num_threads: int = 1,
    num_workers: int = 0,
    prefetch: int = 4,
) -> Loader:
    """Make an endless iterator over batches of records.

    Batches run on over the end of an epoch, so no record is dropped. The sequence depends on the source, `seed`,
    `batch_size` and `transforms` alone, not on the hosts, threads and workers that read it.

    Args:
        source: records with numpy arrays (and strings) of fixed shape.
        batch_size: records in the global batch, over all hosts.
        seed: of the shuffles and the random transforms, in [0, 2**32).
        transforms: applied to each record in order; see `ddpm_jax.data.transforms`.
        shard_index: which of the equal blocks of each batch are read, one or several: those that the devices of this
            host hold, `parallel.mesh.process_shards(mesh)`. Hosts that hold the same ones read the same records.
        shard_count: the number of blocks, `parallel.mesh.batch_shards(mesh)`.
        num_threads: threads that read ahead; with 0, batches are made when they are asked for.
        num_workers: worker processes; 0 reads in this process. They import the program's main module again, so a
            program that sets this has its work under `if __name__ == "__main__":`.
        prefetch: batches to read ahead.

    Returns:
        An iterator over dicts of numpy arrays with a leading axis of batch_size / shard_count for each block.
        `get_state()` returns its position as plain data, and `set_state` of an equally made iterator, of any blocks,
        continues with the batch after it. `close()` stops its threads and workers. `next` raises what the source or a
        transform raised.

    Raises:
        ValueError: if the source is empty, or a number is out of its range.
    """
    if batch_size < 1 or shard_count < 1 or batch_size % shard_count:
        raise ValueError(f"batch_size must be a positive multiple of shard_count={shard_count}, got {batch_size}.")
    blocks = tuple(shard_index) if isinstance(shard_index, Sequence) else (shard_index,)
    if not blocks or not all(0 <= block < shard_count for block in blocks):
        raise ValueError(f"shard_index must lie in [0, {shard_count}), got {shard_index}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}.")
    if len(source) < 1:
        raise ValueError("source must have at least one record.")
    records = _transformed(grain.MapDataset.source(_Records(source)).seed(seed).shuffle().repeat(), transforms)
    batches = _HostBlocks(records, batch_size, blocks, shard_count)
    batches = batches.batch(batch_size // shard_count * len(blocks), batch_fn=_stacked)
    threads = 0 if num_workers else num_threads
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    stream = batches.to_iter_dataset(reading)
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads one of its flags here, which fails outside absl's app.run
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch)
        stream = stream.mp_prefetch(options, _start_worker)
    return Loader(iter(stream))


def _transformed(records: grain.MapDataset, transforms: Sequence[Any]) -> grain.MapDataset:
    """Apply the transforms before the split into hosts, so that a random one sees the record's global position."""
    for transform in transforms:
        if hasattr(transform, "random_map"):
            records = records.random_map(functools.partial(transformed, transform.random_map))
        else:
            records = records.map(functools.partial(transformed, transform))
    return records


def _stacked(records: Sequence[dict]) -> dict[str, np.ndarray]:
    """Return the records of a batch as one, or say which of them differs."""
    first = records[0]
    for record in records:
        if set(record) != set(first):
            raise ValueError(
                f"all records must have the same fields; {_name(first)} has {', '.join(sorted(first))}, "
                f"{_name(record)} has {', '.join(sorted(record))}"
            )
        for name, value in record.items():
            if np.shape(value) != np.shape(first[name]):
                hint = "; add CenterCrop(size) or RandomCrop(size) to the transforms" if name == "image" else ""
                raise ValueError(
                    f"{name} must have the same shape in all records; it is {np.shape(first[name])} in {_name(first)} "
                    f"and {np.shape(value)} in {_name(record)}{hint}"
                )
    return {name: np.stack([np.asarray(record[name]) for record in records]) for name in first}


def _name(record: dict) -> str:
    return f"the record {record['key']!r}" if "key" in record else "one record"
