"""What the hosts of a run say to one another while it runs: where they are, that one must stop, and what failed.

They write it into the key-value store of JAX's coordination service, which needs no device, from a thread, so that it
works while the main thread compiles, or waits for a device that waits for a host that has gone.

**Stopping together.** All hosts pass the same points of a run in the same order, the end of each training step, of each
batch of an evaluation, and so on, and count them (`point`). Once a host is asked to stop, every host writes the number
of the point that it passed last, or that it has nothing to save, and passes no point until all have written. Then all
stop at the point after the greatest number, or at once if one of them has nothing to save: it has made no step since
the last checkpoint, so none was made.

**Missing and slow hosts.** Each writes a count that changes, its last point and its progress. A host whose count does
not change is missing, one whose progress does not change while another is ahead of it is slow.
"""

import contextlib
import ctypes
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ddpm_jax import stopping
from ddpm_jax.parallel.cluster import ClusterError
from ddpm_jax.parallel.rendezvous import EX_TEMPFAIL, difference

PREEMPTED = 0  # in place of a signal's number
BEAT_SECONDS = 0.5
MISSING_SECONDS, SUSPECT_SECONDS, SLOW_SECONDS = 60.0, 8.0, 60.0
LEAVE_SECONDS = 15.0
_ROOT = "ddpm_jax/"


class Alone:
    """The only process of a run; the same methods as those of `Hosts`."""

    index, count = 0, 1

    def __init__(self) -> None:
        self._noticed, self._saving = False, False
        self._signals = stopping.StopRequest()

    @contextlib.contextmanager
    def saving(self) -> Iterator["Alone"]:
        """Let a stop wait for a point, where there is something to save, as long as the context lasts."""
        with stopping.StopRequest() as self._signals:
            self._saving = True
            try:
                yield self
            finally:
                self._saving = False
        if self._noticed:
            self.request(PREEMPTED)

    def point(self, where: str) -> bool:
        """Return whether to stop here."""
        del where
        return self._noticed or self._signals.signum is not None

    def busy(self, where: str) -> None:
        """Note what is done now; nobody reads it."""

    def request(self, signum: int) -> None:
        """Stop for a preemption notice."""
        self._noticed = True
        if not self._saving:
            stopping.end_process(f"stopped by {_describe(signum)}; what was finished is kept", _status(signum))

    def describe_reason(self) -> str:
        """Return "SIGTERM"."""
        return _describe(self._signum())

    def status(self) -> int:
        """Return the exit status of a stop."""
        return _status(self._signum())

    def _signum(self) -> int:
        return PREEMPTED if self._signals.signum is None else self._signals.signum

    def gather(self, what: str, value: Any) -> list[Any]:
        """Return the value of the only process."""
        del what
        return [value]

    def barrier(self, what: str) -> None:
        """Wait for nobody."""

    def agree(self, fields: Mapping[str, Any]) -> None:
        """Agree with nobody."""

    def fail(self, message: str, status: int) -> None:
        """Tell nobody."""

    def leave(self) -> None:
        """Leave nobody."""

    def wait_for_reason(self) -> None:
        """Return: no other host can be the reason."""


class Hosts:
    """The hosts of a run, as one of them sees them through a client of JAX's coordination service.

    Args:
        client: `jax.distributed`'s.
        index: of this process.
        names: the host names of all.
        host_timeout: seconds without progress, of a host that others wait for, after which the run ends.
        coordinator: (host, port) of the service.
    """

    def __init__(
        self, client: Any, index: int, names: list[str], *, host_timeout: float, coordinator: tuple[str, int] | None
    ):
        self.index, self.count, self._names = index, len(names), names
        self._client, self._host_timeout, self._coordinator = client, host_timeout, coordinator
        # A run of many hosts beats less often: each reads what all of them write.
        self._beat_seconds = max(BEAT_SECONDS, self.count / 64)
        self._lock = threading.Lock()
        self._number, self._progress, self._where, self._saving = 0, 0, "start", False
        self._stop_at: int | None = None
        self._request: dict[str, Any] | None = None
        self._reason: dict[str, Any] | None = None
        self._local: Callable[[], int | None] = lambda: None
        self._suspicious, self._leaving, self._ending, self._rounds = False, False, False, 0
        self._gone: set[int] = set()
        self._watch = _Watch(self)
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)

    # ---- For the main thread -----------------------------------------------------------------------------------------

    def name(self, index: int) -> str:
        """Return "host 1 (its name)"."""
        return f"host {index} ({self._names[index]})"

    def start(self) -> None:
        """Start to write and read; signals are for all hosts from now on."""
        stopping.signals_go_to(self.request, self.fail)
        _end_sensibly_without_coordinator(self)
        self._thread.start()

    def point(self, where: str) -> bool:
        """Pass a point that all hosts pass in the same order. Returns whether they agreed to stop here."""
        with self._lock:
            self._number += 1
            self._progress += 1
            self._where = where
            return self._stop_at is not None and self._number >= self._stop_at

    def busy(self, where: str) -> None:
        """Note what is done now, or that a part of it is done."""
        self._progress += 1
        self._where = where

    @contextlib.contextmanager
    def saving(self) -> Iterator["Hosts"]:
        """Let a stop wait for a point, where there is something to save, as long as the context lasts."""
        with self._lock:
            self._saving = True
        # Without the commands' handlers a signal is recorded here.
        with contextlib.nullcontext() if stopping.is_ending_on_signals() else stopping.StopRequest() as own:
            self._local = lambda: None if own is None else own.signum
            try:
                yield self
            finally:
                self._local = lambda: None
                with self._lock:
                    self._saving = False
        if self._stop_at is not None:  # they agreed after the last point, so all is saved
            self.end(f"stopped by {self.describe_reason()}; what was finished is kept", self.status())

    def describe_reason(self) -> str:
        """Return "SIGTERM on host 1 (its name)"."""
        assert self._reason is not None
        return _describe(self._reason["signum"], f" on {self.name(self._reason['host'])}")

    def status(self) -> int:
        """Return the exit status of a stop."""
        assert self._reason is not None
        return _status(self._reason["signum"])

    def request(self, signum: int) -> None:
        """Ask all hosts to stop, for a signal or `PREEMPTED`; the first reason counts."""
        if self._request is None:
            self._request = {"signum": signum, "host": self.index}

    def gather(self, what: str, value: Any) -> list[Any]:
        """Return what each host gives, plain data, by host; all hosts call it in the same order."""
        self._rounds += 1
        key = f"gather/{self._rounds}"
        self.point(what)
        self._set(f"{key}/{self.index}", json.dumps(value))
        found = []
        for index in range(self.count):
            while True:
                try:
                    found.append(json.loads(self._client.blocking_key_value_get(f"{_ROOT}{key}/{index}", 2_000)))
                    break
                except Exception as error:
                    # It is the thread that ends a run whose hosts are missing.
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise
        return found

    def barrier(self, what: str) -> None:
        """Wait for all hosts, for as long as they make progress."""
        self.gather(what, None)

    def agree(self, fields: Mapping[str, Any]) -> None:
        """Raise ClusterError on all hosts if one differs from host 0 in a field, and name both."""
        plain = {name: json.loads(json.dumps(value, default=str)) for name, value in fields.items()}
        error = difference(self.gather("comparing the hosts", plain), self._names)
        if error is not None:
            raise ClusterError(error)

    def fail(self, message: str, status: int) -> None:
        """Tell the other hosts that this one ends, and why; returns when they have ended, or soon after."""
        self._leaving = True
        with contextlib.suppress(Exception):
            news = {"host": self.index, "message": f"{self.name(self.index)} ended: {message}", "status": status}
            self._set("news/failed", json.dumps(news))
        self.leave()

    def leave(self) -> None:
        """Say that this host ends; the one with the coordination service waits for the others, which need it."""
        self._leaving = True
        with contextlib.suppress(Exception):
            self._set(f"left/{self.index}", "1")
            deadline = time.monotonic() + LEAVE_SECONDS
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._dir("left/")) + len(self._gone) >= self.count:
                    return
                time.sleep(0.05)

    def wait_for_reason(self) -> None:
        """Wait, after an error of a collective, until the thread has ended the process if another host caused it."""
        self._suspicious = True
        deadline = time.monotonic() + SUSPECT_SECONDS + 6.0
        while self._ending or time.monotonic() < deadline:
            time.sleep(0.1)

    # ---- The thread --------------------------------------------------------------------------------------------------

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(Exception) if key.startswith("news/") else contextlib.nullcontext():
            self._client.key_value_set(_ROOT + key, value, allow_overwrite=not key.startswith("news/"))

    def _run(self) -> None:
        next_beat, failing_since = 0.0, None
        while not self._leaving:
            now = time.monotonic()
            try:
                self._hear()
                if now >= next_beat:
                    self._watch.beat(now)
                    next_beat = now + self._beat_seconds
                failing_since = None
            except Exception:
                failing_since = now if failing_since is None else failing_since
                if now - failing_since > self.missing_seconds():
                    self.end(f"{self.name(0)} does not answer; the same command continues", EX_TEMPFAIL)
            time.sleep(0.1)

    def missing_seconds(self) -> float:
        """Return after how many seconds without a sign a host is missing."""
        return SUSPECT_SECONDS if self._suspicious else MISSING_SECONDS

    def _hear(self) -> None:
        """Publish a request to stop, and act on what any host published."""
        signum = self._local()
        if signum is not None:
            self.request(signum)
        if self._request is not None and self._reason is None:
            self._set("news/stop", json.dumps(self._request))
        news = {key.rpartition("/")[2]: json.loads(value) for key, value in self._dir("news/")}
        if "failed" in news and news["failed"]["host"] != self.index:
            failed = news["failed"]
            time.sleep(1.0)  # this host may be about to say the same
            self.end(failed["message"], failed["status"])
        if "stop" in news and self._reason is None:
            self._reason = news["stop"]
            self._decide()

    def _dir(self, key: str) -> list[tuple[str, str]]:
        return self._client.key_value_dir_get(_ROOT + key)

    def _decide(self) -> None:
        """Agree on the point to stop at; no host passes another one meanwhile."""
        with self._lock:
            self._set(f"at/{self.index}", str(self._number if self._saving else -1))
            passed = []
            for index in range(self.count):
                try:
                    timeout = int(1000 * (MISSING_SECONDS + self._beat_seconds))
                    passed.append(int(self._client.blocking_key_value_get(f"{_ROOT}at/{index}", timeout)))
                except Exception:
                    self.end_without(index, f"{self.name(index)} does not answer")
            if min(passed) >= 0:
                self._stop_at = max(passed) + 1
                return
        self.end(f"stopped by {self.describe_reason()}; what was finished is kept", self.status())

    def end_without(self, index: int, message: str) -> None:
        """End the process since a host is missing or slow; the others do the same."""
        self._gone.add(index)
        message = f"{message}; the same command continues"
        with contextlib.suppress(Exception):
            self._set("news/failed", json.dumps({"host": self.index, "message": message, "status": EX_TEMPFAIL}))
        self.end(message, EX_TEMPFAIL)

    def end(self, message: str, status: int) -> None:
        """Say why and end the process, from any thread; the main thread may be where it cannot be interrupted."""
        if not (self._leaving and threading.current_thread() is self._thread):  # else the main thread is about to
            self._ending = True
            stopping.end_process(message, status, farewell=self.leave)

    def warn(self, message: str) -> None:
        """Print a line, on the first host alone."""
        if self.index == 0 and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                print(f"warning: {message}", file=sys.stderr, flush=True)

    def here(self) -> list[Any]:
        """Return the last point, the progress, what is done now and whether this host has been asked to stop."""
        return [self._number, self._progress, self._where]


class _Watch:
    """Reads the beats of all hosts."""

    def __init__(self, hosts: Hosts):
        self._hosts, self._beats = hosts, 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._moved: dict[int, tuple[list[Any], float]] = {}
        self._warned: dict[int, float] = {}

    def beat(self, now: float) -> None:
        """Write that this host is there, read the others, and end the run if one is missing or stays behind."""
        hosts = self._hosts
        self._beats += 1
        hosts._set(f"beat/{hosts.index}", json.dumps([self._beats, *hosts.here()]))
        found = {int(key.rpartition("/")[2]): json.loads(value) for key, value in hosts._dir("beat/")}
        left = {int(key.rpartition("/")[2]) for key, _ in hosts._dir("left/")}
        for index in range(hosts.count):
            beats, *place = found.get(index, [0, 0, 0, "start"])
            if self._seen.get(index, (None, 0.0))[0] != beats:
                self._seen[index] = (beats, now)
            if self._moved.get(index, (None, 0.0))[0] != place:
                self._moved[index] = (place, now)
                self._warned.pop(index, None)
        for index in range(hosts.count):
            if index not in left and now - self._seen[index][1] > hosts.missing_seconds():
                where, seconds = self._moved[index][0][2], hosts.missing_seconds()
                hosts.end_without(
                    index, f"{hosts.name(index)} is missing: no sign of it for {seconds:.0f} s, last at {where}"
                )
        self._find_slow(now, left)

    def _find_slow(self, now: float, left: set[int]) -> None:
        hosts = self._hosts
        still = {i: now - since for i, (_, since) in self._moved.items() if i not in left}
        numbers = {i: place[0] for i, (place, _) in self._moved.items() if i not in left}
        if not numbers:
            return
        behind = [i for i in still if numbers[i] < max(numbers.values()) and still[i] > SLOW_SECONDS]
        all_still = min(still.values()) > hosts._host_timeout
        for i in behind or (sorted(still) if all_still else []):
            ahead = max(numbers, key=lambda j: numbers[j])
            what = f"{hosts.name(i)} has been at {self._moved[i][0][2]} for {still[i]:.0f} s"
            if behind:
                what += f", {hosts.name(ahead)} is at {self._moved[ahead][0][2]}"
            else:
                what = f"no host has made progress for {still[i]:.0f} s: {what}"
            if still[i] > hosts._host_timeout:
                hosts.end_without(i, what)
            if now >= self._warned.get(i, 0.0):
                self._warned[i] = now + max(SLOW_SECONDS, still[i])
                hosts.warn(what)


def _describe(signum: int, where: str = "") -> str:
    return ("a preemption notice" if signum == PREEMPTED else stopping.signal_name(signum)) + where


def _status(signum: int) -> int:
    return EX_TEMPFAIL if signum == PREEMPTED else 128 + signum


_handlers: list[Any] = []


def _end_sensibly_without_coordinator(hosts: Hosts) -> None:
    """Say which host is missing when JAX aborts since the one with the coordination service has gone.

    JAX's client calls abort() from a thread of its own, at once; there is no other place to say so. Aborts while the
    service can be reached have other reasons and end the process as before.
    """
    if hosts.index == 0 or hosts._coordinator is None:
        return

    def handle(number: int) -> None:
        del number
        try:
            socket.create_connection(hosts._coordinator, timeout=2.0).close()
        except OSError:
            stopping.end_process(f"{hosts.name(0)} is missing; the same command continues", EX_TEMPFAIL)

    libc = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
    _handlers.append(kind(handle))
    libc.signal(6, _handlers[-1])  # SIGABRT; `signal.signal` would only note it for the main thread


_current: Alone | Hosts = Alone()


def current() -> Alone | Hosts:
    """Return what knows of the other hosts of this run; `Alone` if there are none."""
    return _current


def set_current(hosts: Alone | Hosts) -> None:
    """Let `current` return this."""
    global _current
    _current = hosts
