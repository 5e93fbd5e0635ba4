"""Hosts agree on the point where they stop, and name the one that is missing or slow; threads stand for the hosts."""

import random
import threading
import time

import pytest

from ddpm_jax import stopping
from ddpm_jax.parallel import hosts, shared_directory
from ddpm_jax.parallel.cluster import ClusterError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Store:
    """The key-value store of JAX's coordination service, as one client sees it."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, key):
        with self.changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


class Ended(BaseException):
    """Stands for the end of a process."""


class Group:
    """Hosts that share a store. What would end their processes is noted in `ended`, {index: (message, status)}."""

    def __init__(self, monkeypatch, count, host_timeout=60.0):
        self.ended, self.here = {}, {}
        monkeypatch.setattr(stopping, "signals_go_to", lambda *_: None)
        monkeypatch.setattr(stopping, "is_ending_on_signals", lambda: True)
        monkeypatch.setattr(stopping, "end_process", self.end)
        names, store = [f"name{i}" for i in range(count)], Store()
        options = {"host_timeout": host_timeout, "coordinator": None}
        self.hosts = [hosts.Hosts(store, i, names, **options) for i in range(count)]
        for host in self.hosts:
            self.here[host._thread] = host
            host.start()

    def end(self, message, status, *, farewell):
        host = self.here[threading.current_thread()]
        self.ended.setdefault(host.index, (message, status))
        host._leaving = True
        raise SystemExit  # of the thread

    def start(self, work):
        """Start work(host) on each host, in a thread; return the threads."""

        def one(host):
            self.here[threading.current_thread()] = host
            work(host)

        threads = [threading.Thread(target=one, args=(host,), daemon=True) for host in self.hosts]
        for thread in threads:
            thread.start()
        return threads

    def run(self, work):
        """Run work(host) on each host, in a thread, until all have returned or ended."""
        for thread in self.start(work):
            thread.join(30)
            assert not thread.is_alive()
        for host in self.hosts:
            host._leaving = True


@pytest.mark.parametrize("seed", range(4))
def test_all_stop_at_the_same_point_wherever_the_signal_comes(monkeypatch, seed):
    group, stopped, draw = Group(monkeypatch, 3), {}, random.Random(seed)
    signalled, at = draw.randrange(3), draw.randrange(1, 30)
    meetings = [threading.Barrier(3) for _ in range(201)]

    def work(host):
        own = random.Random(seed * 10 + host.index)
        with host.saving():
            for step in range(1, 201):
                time.sleep(own.uniform(0, 0.02))
                if step > 2:
                    meetings[step - 2].wait(10)  # two steps are in flight
                if host.index == signalled and step == at:
                    host.request(15)
                if host.point(f"step {step}"):
                    stopped[host.index] = step
                    return

    group.run(work)
    assert len(set(stopped.values())) == 1 and len(stopped) == 3
    assert at <= stopped[signalled] < 150
    assert group.hosts[0].describe_reason() == f"SIGTERM on host {signalled} (name{signalled})"
    assert group.hosts[0].status() == 143


def test_all_end_at_once_while_one_has_nothing_to_save(monkeypatch):
    group = Group(monkeypatch, 3)

    def work(host):
        if host.index == 2:
            while host.index not in group.ended:
                time.sleep(0.01)
            return
        with host.saving():
            host.point("step 1")
            host.request(hosts.PREEMPTED)
            while host.index not in group.ended:
                time.sleep(0.01)

    group.run(work)
    assert {status for _, status in group.ended.values()} == {75}
    assert all(message.startswith("stopped by a preemption notice on host ") for message, _ in group.ended.values())


def test_a_signal_after_the_last_point_ends_all_of_them(monkeypatch):
    group = Group(monkeypatch, 2)

    def work(host):
        with host.saving():
            host.point("step 1")
            if host.index == 0:
                host.request(2)
            while host._stop_at is None:
                time.sleep(0.01)

    group.run(work)
    assert group.ended == dict.fromkeys(
        range(2), ("stopped by SIGINT on host 0 (name0); what was finished is kept", 130)
    )


def test_a_missing_host_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "MISSING_SECONDS", 1.5)
    group = Group(monkeypatch, 3)

    def work(host):
        host.point("step 7")
        if host.index == 1:
            time.sleep(1.0)
            host._leaving = True  # as if it was killed
        while host.index != 1 and host.index not in group.ended:
            time.sleep(0.01)

    group.run(work)
    message = "host 1 (name1) is missing: no sign of it for 2 s, last at step 7; the same command continues"
    assert group.ended == {0: (message, 75), 2: (message, 75)}


def test_a_slow_host_is_named_first_in_a_warning(monkeypatch, capfd):
    monkeypatch.setattr(hosts, "SLOW_SECONDS", 0.5)
    group = Group(monkeypatch, 2, host_timeout=2.0)

    def work(host):
        host.point("step 1")
        if host.index == 0:
            host.point("step 2")
        while host.index not in group.ended:
            time.sleep(0.01)

    group.run(work)
    for message, status in group.ended.values():
        assert status == 75
        assert message.startswith("host 1 (name1) has been at step 1 for 2 s, host 0 (name0) is at step 2; the same")
    assert "warning: host 1 (name1) has been at step 1 for 1 s, host 0 (name0) is at step 2" in capfd.readouterr().err


def test_what_fails_on_one_ends_the_others_with_its_sentence_and_status(monkeypatch):
    group = Group(monkeypatch, 2)
    monkeypatch.setattr(hosts, "LEAVE_SECONDS", 0.2)

    def work(host):
        if host.index == 0:
            host.fail("there is no file x", 2)
            return
        host.barrier("the end")

    group.start(work)  # the second host stays in the barrier, which its process would leave by ending
    deadline = time.monotonic() + 30
    while 1 not in group.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert group.ended == {1: ("host 0 (name0) ended: there is no file x", 2)}


def test_hosts_compare_what_they_train(monkeypatch):
    group, errors = Group(monkeypatch, 3), {}

    def work(host):
        host.agree({"x": 1})
        try:
            host.agree({"x": 1, "source of stage a": "other" if host.index == 2 else "one"})
        except ClusterError as error:
            errors[host.index] = str(error)

    group.run(work)
    assert len(errors) == 3 and set(errors.values()) == {
        'the hosts disagree: source of stage a is "one" on host 0 (name0) and "other" on host 2 (name2); start all '
        "with the same package, command, config and data"
    }


@pytest.mark.parametrize("case", ["shared", "apart", "a file"])
def test_hosts_need_one_directory(monkeypatch, tmp_path, case):
    monkeypatch.setattr(shared_directory, "VISIBLE_SECONDS", 0.3)
    group, said = Group(monkeypatch, 3), {}
    if case == "a file":
        (tmp_path / "run").write_bytes(b"")
    elif case == "shared":
        (tmp_path / "run" / ".shared-0").mkdir(parents=True)  # a kill left it

    def work(host):
        own = tmp_path / "other" if case == "apart" and host.index == 2 else tmp_path
        try:
            shared_directory.check_shared(own / "run", "workdir", run=host)
        except ClusterError as error:
            said[host.index] = str(error)

    group.run(work)
    sentences = {
        "apart": f"workdir is not shared: host 2 (name2) does not find in {tmp_path / 'other' / 'run'} what host 0 "
        f"(name0) wrote into {tmp_path / 'run'}; all hosts need one directory, on a shared disk or in a bucket",
        "a file": f"workdir {tmp_path / 'run'} cannot be written: Not a directory",
    }
    assert said == ({} if case == "shared" else dict.fromkeys(range(3), sentences[case]))
    assert not list(tmp_path.rglob(".shared-*"))
