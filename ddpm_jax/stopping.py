"""Signal handling of commands: SIGTERM, SIGINT or SIGHUP end them at once, with one sentence and status 128 + n.

A handler never raises. Python runs handlers between any two instructions of the main thread, also inside a callback of
the garbage collector, `__del__` or an import, where an exception is printed as ignored and the program runs on. And it
runs none of them while the main thread is in C code, as for the minutes of a long compilation. So the process is ended
by `os._exit`, from the handler or from a thread that reads the signal from Python's wake-up file descriptor, whichever
comes first; temporary files are removed before.

A training loop has steps to save: it installs other handlers, which only record the signal. While they are
installed the thread leaves the first signal to them, and a later one ends the process.

In a run of several hosts the first signal is given to a listener (`parallel.hosts`), so that all hosts stop together.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from os import _exit
from types import FrameType
from typing import Any

from ddpm_jax.temporary import remove_temporary_paths

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
# `timeout`, job launchers and closing terminals deliver one request to a process twice, a moment apart.
REPEAT_SECONDS = 1.0
FAREWELL_SECONDS = 20.0

_listener: Callable[[int], None] | None = None
_farewell: Callable[[str, int], None] | None = None
_active = 0
_ending_thread: dict[str, int] = {}


def signals_go_to(listener: Callable[[int], None] | None, farewell: Callable[[str, int], None] | None = None) -> None:
    """Give the first signal of `ending_on_signals` to a function, called in a thread, instead of ending the process.

    Args:
        listener: takes the signal's number; None ends the process, as without this.
        farewell: called with what is said and the status before a later signal ends the process.
    """
    global _listener, _farewell
    _listener, _farewell = listener, farewell


def is_ending_on_signals() -> bool:
    """Return whether the code runs in `ending_on_signals`."""
    return _active > 0


def signal_name(number: int) -> str:
    """Return "SIGTERM" for 15."""
    return signal.Signals(number).name


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """End the process on a signal while the context lasts; does nothing outside of the main thread.

    Signals that are ignored stay ignored, as under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _active
    _ending_thread.clear()
    ending = _Ending()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=ending.watch, args=(receiver,), name="signals", daemon=True).start()
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    caught = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in caught:
            signal.signal(number, ending.handle)
        _active += 1
        yield
    finally:
        _active -= 1
        for number, handler in caught.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        sender.close()


class _Ending:
    def handle(self, number: int, frame: FrameType | None) -> None:
        """End the process; the handler of the main thread."""
        del frame
        if _listener is None:
            self.end(number)

    def watch(self, receiver: socket.socket) -> None:
        """End the process on a signal that the main thread is too busy for, or on a second one; runs in a thread."""
        first: float | None = None
        with receiver:
            while data := receiver.recv(1):
                number, now = data[0], time.monotonic()
                if number not in SIGNALS:
                    continue
                first = now if first is None else first
                repeated = now - first > REPEAT_SECONDS
                if _listener is not None and not repeated:
                    _listener(number)
                elif signal.getsignal(number) == self.handle or repeated:
                    self.end(number)

    def end(self, number: int) -> None:
        """End the process for a signal."""
        message, status = f"stopped by {signal_name(number)}; what was finished is kept", 128 + number
        end_process(message, status, farewell=None if _farewell is None else lambda: _farewell(message, status))


def end_process(message: str, status: int, *, farewell: Callable[[], None] | None = None) -> None:
    """Print the reason, remove temporary files and end the process; only the first thread does it.

    Args:
        message: one sentence.
        status: exit status.
        farewell: called after the message is printed, for at most `FAREWELL_SECONDS`.
    """
    mine = threading.get_ident()
    while _ending_thread.setdefault("ends", mine) != mine:
        time.sleep(1.0)
    if not _ending_thread.setdefault("said", 0):
        _ending_thread["said"] = 1
        _print(f"error: {message}")
        if farewell is not None:
            thread = threading.Thread(target=farewell, name="farewell", daemon=True)
            thread.start()
            thread.join(FAREWELL_SECONDS)
    # C code of another thread may be creating the file: once more after it has.
    for pause in (0.0, 0.02):
        time.sleep(pause)
        remove_temporary_paths()
    _exit(status)


def _print(line: str) -> None:
    """Write a line to stderr without its buffer, which the main thread may hold locked."""
    if sys.stderr is None:  # closed from the start: file descriptor 2 may be any file
        return
    start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
    with contextlib.suppress(OSError, ValueError):
        # A reader that has stopped reading must not keep the process alive.
        if select.select([], [2], [], 0.5)[1]:
            os.write(2, f"{start}{line}\n".encode())


class StopRequest:
    """Records the first of `SIGNALS` for a loop that reads it between steps, as long as the context lasts.

    A second signal, more than `REPEAT_SECONDS` later, is left to the handler that was there before, as is one that the
    loop did not act on before its end. Signals that are ignored stay ignored. Outside of the main thread, where Python
    handles no signals, it does nothing.

    Attributes:
        signum: the signal, or None.
    """

    def __init__(self):
        self.signum: int | None = None
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    self._previous[number] = handler
                    signal.signal(number, self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.signum is not None and exception[0] is None:
            signal.raise_signal(self.signum)

    def _record(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signum is None:
            self.signum, self._time = number, time.monotonic()
        elif time.monotonic() - self._time > REPEAT_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
