"""Start a run of several processes: they meet, agree, connect through `jax.distributed`, and watch one another."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ddpm_jax import stopping
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.cluster import Place, find_place, on_tpu_vm, read_metadata
from ddpm_jax.parallel.rendezvous import EX_TEMPFAIL, meet

INITIALIZATION_SECONDS, HOST_SECONDS = 1800.0, 1800.0
CONNECT_SECONDS = 60.0
"""Between the moment when all processes are there and that when JAX has connected them."""


def initialize(
    mode: str = "auto",
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = INITIALIZATION_SECONDS,
    host_timeout: float = HOST_SECONDS,
    fields: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> bool:
    """Connect this process with the others of its run, before JAX has any device.

    `python -m ddpm_jax.train`, `sample`, `evaluate` and `prepare` call it. A program that has called
    `jax.distributed.initialize` itself need not: `training.train` watches the other hosts all the same.

    Args:
        mode, coordinator_address, num_processes, process_id: see `parallel.cluster.find_place`.
        timeout: seconds to wait for the other processes. After a cold restart of a large slice some need many minutes.
        host_timeout: seconds without progress of a host that others wait for, after which the run ends with status 75.
        fields: name -> value, in which all processes must agree; the versions of this package and of JAX are added.
        report: called with a line after each minute of waiting.

    Returns:
        Whether there are several processes.

    Raises:
        ClusterError: if the processes cannot be found or reached, or disagree.
        RuntimeError: if JAX has devices already.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    place = find_place(mode, **given)
    if place is None or place.count == 1:
        _watch_for_preemption()
        return False
    import jax

    from ddpm_jax.version import __version__

    versions = {"the version of ddpm_jax": __version__, "the version of jax": jax.__version__}
    names = meet(place, versions | dict(fields or {}), timeout=timeout, report=report)
    with _ending_after(CONNECT_SECONDS, place, names):
        _connect(place)
    connected = hosts.Hosts(_client(), place.index, names, host_timeout=host_timeout, coordinator=place.endpoint)
    hosts.set_current(connected)
    connected.start()
    _watch_for_preemption()
    return True


def watch_hosts() -> None:
    """Watch the other hosts in a program that has called `jax.distributed.initialize` itself; else do nothing."""
    import jax

    if hosts.current().count == 1 and jax.process_count() > 1:
        found = hosts.Hosts(
            _client(), jax.process_index(), [""] * jax.process_count(), host_timeout=HOST_SECONDS, coordinator=None
        )
        hosts.set_current(found)
        found.start()


def finish() -> None:
    """Wait for all hosts and disconnect, at the end of a run in which nothing failed."""
    current = hosts.current()
    if current.count > 1:
        import jax

        current.barrier("the end")
        current.leave()
        with contextlib.suppress(RuntimeError):  # a host that has left already
            jax.distributed.shutdown()


def _connect(place: Place) -> None:
    import jax

    # Its handler of SIGTERM, in C, would take the place of those that stop all hosts (`stopping`, `parallel.hosts`).
    jax.config.update("jax_enable_preemption_service", False)
    # Collectives on the CPU are matched by their order, which programs that run at the same time do not keep.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        # After this JAX aborts; `_ending_after` gives a reason before.
        initialization_timeout=int(CONNECT_SECONDS) + 60,
    )


@contextlib.contextmanager
def _ending_after(seconds: float, place: Place, names: Sequence[str]) -> Iterator[None]:
    """End the process if what runs inside takes longer: JAX waits there for a host that may have gone since."""

    def end() -> None:
        others = [index for index in range(place.count) if index != place.index]
        if place.index > 0 and not _is_reachable(place.endpoint):
            others = [0]
        who = f"host {others[0]} ({names[others[0]]})" if len(others) == 1 else "a host"
        message = f"{who} did not answer for {seconds:.0f} s after all had come; the same command continues"
        stopping.end_process(message, EX_TEMPFAIL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_reachable(endpoint: tuple[str, int]) -> bool:
    try:
        socket.create_connection(endpoint, timeout=2.0).close()
    except OSError:
        return False
    return True


def _client() -> Any:
    from jax._src import distributed  # JAX has no public name for its key-value store

    return distributed.global_state.client


def _watch_for_preemption() -> None:
    """Start a thread that waits for Google Cloud's notice that this virtual machine is about to be taken back."""
    if on_tpu_vm(os.environ):
        threading.Thread(target=_wait_for_notice, name="preemption", daemon=True).start()


def _wait_for_notice() -> None:
    pause = threading.Event()
    while True:
        answer = read_metadata("instance/preempted", timeout=60.0, wait=True)
        if answer is not None and answer.strip() == "TRUE":
            hosts.current().request(hosts.PREEMPTED)
            return
        pause.wait(1.0 if answer is not None else 30.0)
