"""How the processes of a run meet before JAX connects them: over one socket of the first of them.

JAX's own start-up ends the process, without a reason that helps, if a process is missing; here those that are missing
are named, and processes that were not started alike are refused, before any of them has a device.

Each process sends one line, {"id", "host", "pid", "fields"}, which is acknowledged at once, so that another program at
the port is noticed, and gets one back when all are there, {"error"} of all.
"""

import contextlib
import errno
import json
import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddpm_jax.parallel.cluster import ClusterError, Place

EX_TEMPFAIL = 75
_BYTES = 1 << 22
_RETRY_SECONDS = 0.2
_ACKNOWLEDGEMENT = b"ddpm_jax\n"
PORT_SECONDS = 30.0
"""How long another program at the port, which may be an earlier run that ends, is waited for."""


def meet(
    place: Place, fields: Mapping[str, Any], *, timeout: float, report: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Wait until all processes are there and compare what they were started with.

    Args:
        place: of this process.
        fields: name -> value, in which all must agree; the names are shown to the user.
        timeout: seconds.
        report: called with a line after each minute of waiting.

    Returns:
        The host names, by process.

    Raises:
        ClusterError: if a process is missing after `timeout`, or disagrees; on all processes that are there.
    """
    hello = {"id": place.index, "count": place.count, "host": socket.gethostname(), "pid": os.getpid()}
    hello["fields"] = {name: json.loads(json.dumps(value, default=str)) for name, value in fields.items()}
    waiting = _Waiting(time.monotonic() + timeout, timeout, report)
    answer = _receive_all(place, hello, waiting) if place.index == 0 else _send(place, hello, waiting)
    if answer["error"] is not None:
        raise ClusterError(answer["error"], answer["status"])
    return answer["hosts"]


class _Waiting:
    """A deadline, and a line for each minute before it."""

    def __init__(self, deadline: float, timeout: float, report: Callable[[str], None]):
        self.deadline, self.timeout, self.report = deadline, timeout, report
        self._next = time.monotonic() + 60.0

    def is_over(self, line: Callable[[], str]) -> bool:
        """Return whether the deadline has passed; report the line after each minute."""
        now = time.monotonic()
        if now > self._next:
            self._next += 60.0
            self.report(line())
        return now > self.deadline


def difference(all_fields: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str | None:
    """Return a sentence on the first field in which a process differs from the first one, or None."""
    for index, fields in enumerate(all_fields[1:], 1):
        for name in sorted({*all_fields[0], *fields}):
            absent = "absent"
            here, there = (json.dumps(each[name]) if name in each else absent for each in (all_fields[0], fields))
            if here != there:
                ours, theirs = (
                    f"{_short(here)} on host 0 ({hosts[0]})",
                    f"{_short(there)} on host {index} ({hosts[index]})",
                )
                return (
                    f"the hosts disagree: {name} is {ours} and {theirs}; start all with the same package, command, "
                    "config and data"
                )
    return None


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


# ---- The first process -----------------------------------------------------------------------------------------------


def _receive_all(place: Place, hello: dict, waiting: _Waiting) -> dict[str, Any]:
    """Take the lines of the other processes, answer them, and return the answer."""
    with contextlib.closing(_listen(place, waiting)) as server:
        found: dict[int, tuple[dict, socket.socket | None]] = {0: (hello, None)}
        try:
            error = _collect(server, place, found, waiting)
            hellos = [found[i][0] for i in sorted(found)]
            hosts, status = [each["host"] for each in hellos], 2
            if error is None and len(found) < place.count:
                missing = [i for i in range(place.count) if i not in found]
                shown = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
                error = (
                    f"host {shown} of {place.count} (numbered from 0) did not come to {place.address} within "
                    f"{waiting.timeout:g} s; {', '.join(hosts[:16])} did"
                )
                status = EX_TEMPFAIL
            error = error or difference([each["fields"] for each in hellos], hosts)
            answer = {"hosts": hosts, "error": error, "status": status}
            for _, connection in found.values():
                _answer(connection, answer)
            return answer
        finally:
            for _, connection in found.values():
                if connection is not None:
                    connection.close()


def _listen(place: Place, waiting: _Waiting) -> socket.socket:
    """Return the socket of the first process, once no other program has the port."""
    deadline, said = min(time.monotonic() + PORT_SECONDS, waiting.deadline), False
    while True:
        try:
            return _create_server(place.endpoint[1])
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ClusterError(f"--coordinator_address={place.address} cannot be listened on: {reason}") from error
            if not said:
                waiting.report(f"waiting for the port of {place.address}: {reason}")
                said = True
        time.sleep(_RETRY_SECONDS)


def _create_server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _collect(server: socket.socket, place: Place, found: dict, waiting: _Waiting) -> str | None:
    """Fill `found` until all processes are there or the time is over; return a sentence if they cannot be one run."""
    server.settimeout(_RETRY_SECONDS)
    missing = lambda: (  # noqa: E731
        f"waiting for {place.count - len(found)} of {place.count} hosts at {place.address}"
    )
    while len(found) < place.count and not waiting.is_over(missing):
        try:
            connection, peer = server.accept()
        except TimeoutError:
            continue
        hello = _read_line(connection)
        if hello is None or not isinstance(hello.get("id"), int) or not isinstance(hello.get("fields"), dict):
            connection.close()
            continue
        with contextlib.suppress(OSError):
            connection.sendall(_ACKNOWLEDGEMENT)
        index, name = hello["id"], f"{hello.get('host')} ({peer[0]})"
        if hello.get("count") != place.count:
            error = f"host {name} was started with --num_processes={hello.get('count')}, host 0 with {place.count}"
        elif index in found and (index == 0 or _is_open(found[index][1])):
            error = f"two processes have --process_id={index}: {found[index][0]['host']} and {name}"
        else:
            found[index] = (hello, connection)
            continue
        _answer(connection, {"hosts": [], "error": error, "status": 2})
        return error
    return None


def _is_open(connection: socket.socket) -> bool:
    """Return whether the other end, which has nothing more to say, is still there."""
    readable, _, _ = select.select([connection], [], [], 0)
    return not readable


def _answer(connection: socket.socket | None, answer: dict[str, Any]) -> None:
    if connection is None:
        return
    with contextlib.suppress(OSError):
        connection.settimeout(10.0)
        connection.sendall(json.dumps(answer).encode() + b"\n")
        # The end that closes first keeps the port for a while; this one is needed again at once.
        connection.recv(1)


def _read_line(connection: socket.socket, deadline: float | None = None) -> dict[str, Any] | None:
    """Return the JSON of a line, or None if none comes."""
    deadline = time.monotonic() + 10.0 if deadline is None else deadline
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _BYTES:
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            part = connection.recv(1 << 16)
            if not part:
                return None
            data += part
        value = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---- The others ------------------------------------------------------------------------------------------------------


def _send(place: Place, hello: dict, waiting: _Waiting) -> dict[str, Any]:
    """Send this process' line until it is answered, and return the answer."""
    line, reason = json.dumps(hello).encode() + b"\n", "no answer"
    about = lambda: f"waiting for host 0 at {place.address}: {reason}"  # noqa: E731
    foreign_since = None
    while not waiting.is_over(about):
        begin, is_foreign = time.monotonic(), False
        try:
            with socket.create_connection(place.endpoint, timeout=10.0) as connection:
                connection.sendall(line)
                said = _read_exactly(connection, len(_ACKNOWLEDGEMENT), min(begin + PORT_SECONDS, waiting.deadline))
                if said == _ACKNOWLEDGEMENT:
                    # The first process answers at its own deadline, which may be a little later.
                    answer = _read_line(connection, waiting.deadline + 30.0)
                    if answer is not None and isinstance(answer.get("hosts"), list) and "error" in answer:
                        return answer
                # A proxy in front of a host that has not started yet closes connections too.
                is_foreign = said is None or said not in (b"", _ACKNOWLEDGEMENT)
            reason = "it closed the connection; is there another program at the port?"
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        foreign_since = (begin if foreign_since is None else foreign_since) if is_foreign else None
        if foreign_since is not None and time.monotonic() >= foreign_since + PORT_SECONDS:
            raise ClusterError(
                f"the program at {place.address} is not host 0 of this run, which cannot use that port; give another "
                "one in --coordinator_address, or end that program"
            )
        time.sleep(_RETRY_SECONDS)
    raise ClusterError(f"host 0 did not answer at {place.address} within {waiting.timeout:g} s ({reason})", EX_TEMPFAIL)


def _read_exactly(connection: socket.socket, count: int, deadline: float) -> bytes | None:
    """Return `count` bytes, fewer if the other end closes first, or None if nothing comes until the deadline."""
    data = b""
    try:
        while len(data) < count:
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            part = connection.recv(count - len(data))
            if not part:
                break
            data += part
    except TimeoutError:
        return data or None
    return data
