"""Where the processes of a run are, and how they meet before JAX connects them: each fault is one sentence."""

import socket
import threading
import time

import pytest
from several_hosts import free_port

from ddpm_jax import stopping
from ddpm_jax.parallel import cluster, distributed, rendezvous
from ddpm_jax.parallel.cluster import ClusterError, Place, find_place

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "node[007-009,12]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "a-0.svc:8080", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}


def place_of(environ, **given):
    found = find_place(environ=environ, **given)
    return None if found is None else (found.address, found.count, found.index, found.local_devices)


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "4"}, None),  # a batch script, not started by srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM, ("node007:62344", 4, 3, None)),  # 61440 + 5000 % 4096
        (SLURM | {"SLURM_STEP_NODELIST": "n1,n2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ("n1:62344", 4, 3, (0,))),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (GKE, ("w-0.svc:8476", 2, 1, None)),
        (GKE | SLICES, ("a-0.svc:8476", 6, 5, None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"} | SLURM,
            ("h:1", 2, 1, None),
        ),
    ],
)
def test_the_environment_says_where_a_process_is(environ, expected):
    assert place_of(environ) == expected
    assert place_of(environ, mode="off") is None


def test_tpu_vms_are_found_through_the_metadata_server(monkeypatch):
    attributes = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6",
        "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v4-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }
    monkeypatch.setattr(cluster, "on_tpu_vm", lambda environ: True)
    monkeypatch.setattr(cluster, "read_metadata", attributes.get)
    assert place_of({}) == ("10.0.0.5:8476", 4, 3, None)
    monkeypatch.setattr(cluster, "read_metadata", {"worker-network-endpoints": "10.0.0.5"}.get)
    assert place_of({}) is None


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"num_processes": 2},
            r"--num_processes=2 needs --coordinator_address \(or JAX_COORDINATOR_ADDRESS\) and --pro",
        ),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, r"--process_id=2 must be in \[0, 2\)"),
        (
            {"coordinator_address": "h", "num_processes": 2, "process_id": 0},
            "--coordinator_address=h must be HOST",
        ),
        ({"coordinator_address": "h:1", "num_processes": 0, "process_id": 0}, "--num_processes=0 must be at least 1"),
        ({"mode": "on"}, "--distributed=on needs --coordinator_address, --num_processes and --process_id"),
        ({"mode": "yes"}, "--distributed=yes must be one of auto, on, off"),
    ],
)
def test_what_is_missing_or_wrong_is_named(given, message):
    with pytest.raises(ClusterError, match=message) as error:
        find_place(environ={}, **given)
    assert error.value.status == 2


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"])
def test_what_slurm_does_not_say_is_refused(name):
    with pytest.raises(ClusterError, match=f"{name}='12x' is not a whole number"):
        find_place(environ=SLURM | {name: "12x"})


def meet_all(each, count=None, timeout=5.0):
    """Let processes, {index: fields}, meet; return what each got, an error or the host names."""
    address, found = f"127.0.0.1:{free_port()}", {}

    def meet(number, index, fields):
        try:
            found[number] = rendezvous.meet(Place(address, count or len(each), index, ""), fields, timeout=timeout)
        except ClusterError as error:
            found[number] = error

    threads = [threading.Thread(target=meet, args=(n, *one)) for n, one in enumerate(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(each))]


def test_processes_that_agree_learn_their_names():
    assert meet_all([(2, {"a": (1, 2)}), (0, {"a": [1, 2]}), (1, {"a": [1, 2]})]) == [[socket.gethostname()] * 3] * 3


def test_processes_that_disagree_are_all_refused_by_field_and_host():
    errors = meet_all([(0, {"x": 1, "y": 1}), (1, {"x": 1, "y": 1}), (2, {"x": 1, "y": 2})])
    name = socket.gethostname()
    for error in errors:
        assert error.status == 2
        assert str(error).startswith(f"the hosts disagree: y is 1 on host 0 ({name}) and 2 on host 2 ({name}); start")


def test_a_field_that_only_one_has_is_named():
    assert "x is absent on host 0" in str(meet_all([(0, {}), (1, {"x": 1})])[0])


def test_a_missing_process_is_named_on_all_and_can_be_restarted():
    for error in meet_all([(0, {}), (2, {})], count=3, timeout=0.8):
        assert error.status == 75
        assert "host 1 of 3 (numbered from 0) did not come to 127.0.0.1:" in str(error)


def test_a_first_process_that_does_not_answer_is_named():
    place = Place(f"127.0.0.1:{free_port()}", 2, 1, "")
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=rf"host 0 did not answer at {place.address} within 0.5 s \(Connection ref"):
        rendezvous.meet(place, {}, timeout=0.5)
    assert time.monotonic() - begin < 5


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        place = Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, "")
        with pytest.raises(ClusterError, match="cannot be listened on: Address already in use"):
            rendezvous.meet(place, {}, timeout=1.0)


def test_a_port_that_becomes_free_is_taken():
    """The last run may have it for a moment."""
    server, said, found = socket.create_server(("", 0)), [], []
    place = Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, "")
    thread = threading.Thread(target=lambda: found.append(rendezvous.meet(place, {}, timeout=20.0, report=said.append)))
    thread.start()
    while not said:
        time.sleep(0.01)
    server.close()
    rendezvous.meet(Place(place.address, 2, 1, ""), {}, timeout=20.0)
    thread.join()
    assert found and said == [f"waiting for the port of {place.address}: Address already in use"]


@pytest.mark.parametrize("words", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_another_program_at_the_port_is_named_at_the_other_hosts(monkeypatch, words):
    """It says nothing, or speaks another language."""
    monkeypatch.setattr(rendezvous, "PORT_SECONDS", 0.3)

    def serve(server):
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.sendall(words)
            connections.append(connection)

    connections = []
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        place = Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, "")
        with pytest.raises(ClusterError, match=f"the program at {place.address} is not host 0 of this run") as error:
            rendezvous.meet(place, {}, timeout=20.0)
        assert error.value.status == 2
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_two_processes_of_one_number_are_refused():
    errors = [error for error in meet_all([(0, {}), (1, {}), (1, {})], count=3, timeout=3.0) if error is not None]
    assert any("two processes have --process_id=1" in str(error) for error in errors)


def test_a_stranger_at_the_port_is_ignored():
    port, found = free_port(), []
    place = Place(f"127.0.0.1:{port}", 2, 0, "")
    thread = threading.Thread(target=lambda: found.append(rendezvous.meet(place, {}, timeout=10.0)))
    thread.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n\n", b"[" * 100_000 + b"\n", b'{"id": 1}\n'):
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
                break
            except OSError:
                time.sleep(0.05)
    rendezvous.meet(Place(place.address, 2, 1, ""), {}, timeout=10.0)
    thread.join()
    assert found


@pytest.mark.parametrize("index, count, missing", [(1, 3, "host 0 (a)"), (0, 2, "host 1 (b)"), (0, 3, "a host")])
def test_a_host_that_goes_before_jax_has_connected_all_ends_the_others(monkeypatch, index, count, missing):
    ended = threading.Event()
    said = []
    monkeypatch.setattr(stopping, "end_process", lambda *words: (said.append(words), ended.set()))
    place = Place(f"127.0.0.1:{free_port()}", count, index, "")
    with distributed._ending_after(0.01, place, "abc"):
        assert ended.wait(10)
    assert said == [(f"{missing} did not answer for 0 s after all had come; the same command continues", 75)]
    with distributed._ending_after(0.2, place, "abc"):
        pass
    time.sleep(0.3)
    assert len(said) == 1
