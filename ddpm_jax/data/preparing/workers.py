"""Worker processes that write parts.

Each has one pipe to the main process, and nothing else in common with it. A worker ends when the pipe is closed, which
is also what happens when the main process ends, however it ends.
"""

import dataclasses
import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ddpm_jax.data.preparing.part import Options, Part, PrepareError, write_part
from ddpm_jax.types import Source

_REPORT_SECONDS = 0.2


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: Connection
    number: int | None = None
    """Of the part that it writes."""


def write_parts(
    source: Source,
    options: Options,
    tasks: Mapping[int, tuple[int, int, Path]],
    count: int,
    done: Callable[[int], None],
) -> Iterator[tuple[int, Part]]:
    """Write parts in worker processes, and yield each with its number, in the order in which they are ready.

    Args:
        source: the records; a copy of it goes to every worker.
        options: how to prepare.
        tasks: number of the part -> begin, end and path, as `write_part` takes them.
        count: the number of workers.
        done: called with numbers of records, as they are done.

    Raises:
        PrepareError: as `write_part`; also if a worker was ended by something else.
    """
    data, waiting = pickle.dumps((source, options)), list(reversed(tasks))
    workers: dict[Connection, _Worker] = {}
    try:
        for _ in range(count):
            worker = _start()
            workers[worker.pipe] = worker
        for worker in workers.values():  # all of them are importing by now
            _send(worker, data)
            _assign(worker, waiting, tasks)
        while any(worker.number is not None for worker in workers.values()):
            for pipe in wait(workers):
                worker = workers[pipe]
                message = _receive(worker)
                if isinstance(message, int):
                    done(message)
                    continue
                if isinstance(message, Exception):
                    raise message
                number = worker.number
                _assign(worker, waiting, tasks)  # before the part is taken, which may need much time
                yield number, message
    finally:
        for worker in workers.values():
            worker.pipe.close()
        for worker in workers.values():
            worker.process.join()


def _start() -> _Worker:
    # From nothing: a copy of this process would share the locks of JAX's threads.
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_work, args=(other,), daemon=True)
    # Ctrl-C is for the main process, also while a worker imports its modules.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    other.close()
    return _Worker(process, mine)


def _assign(worker: _Worker, waiting: list[int], tasks: Mapping[int, tuple[int, int, Path]]) -> None:
    worker.number = waiting.pop() if waiting else None
    if worker.number is not None:
        _send(worker, pickle.dumps(tasks[worker.number]))


def _send(worker: _Worker, data: bytes) -> None:
    try:
        worker.pipe.send_bytes(data)
    except OSError:
        raise _ended(worker) from None


def _receive(worker: _Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        raise _ended(worker) from None


def _ended(worker: _Worker) -> PrepareError:
    worker.process.join()
    return PrepareError(
        f"a worker process ended with status {worker.process.exitcode}; -9 is often for lack of memory, of which fewer "
        "workers need less"
    )


# ---- In a worker -----------------------------------------------------------------------------------------------------


class _Closed(Exception):
    """The main process needs no more parts, or has ended."""


class _Report:
    """Counts records, and sends their number now and then."""

    def __init__(self, pipe: Connection):
        self._pipe, self._count, self._time = pipe, 0, time.monotonic()

    def __call__(self, count: int) -> None:
        """Count records."""
        self._count += count
        now = time.monotonic()
        if now - self._time >= _REPORT_SECONDS:
            self._time = now
            self.send()

    def send(self) -> None:
        """Send the number that was not sent; raise _Closed if the other end is closed."""
        try:
            self._pipe.send(self._count)
        except OSError:
            raise _Closed from None
        self._count = 0


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        source, options = pickle.loads(pipe.recv_bytes())
        report = _Report(pipe)
        while True:
            begin, end, path = pipe.recv()
            part = write_part(source, begin, end, path, options, report)
            report.send()
            pipe.send(part)
    except (_Closed, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
            _send_error(pipe, error)
    except Exception as error:  # for the main process to raise
        _send_error(pipe, error)


def _send_error(pipe: Connection, error: Exception) -> None:
    if not isinstance(error, PrepareError):
        error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error of a source that cannot be sent as it is
        error = PrepareError(f"{type(error).__name__}: {error}")
    try:
        pipe.send(error)
    except OSError:
        return
