"""The launchers that start processes: rehearse.sh, supervise.sh and slurm.sbatch."""

import json
import shlex
import signal
import sys

import pytest
from launchers import LAUNCH, WORDS, Bench, start, wait_for


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# A command that goes on in the background


@pytest.mark.skipif(sys.platform != "linux", reason="TPU VMs run Linux")
def test_supervise_starts_again_when_the_status_asks_for_it(bench):
    def supervise(action, *words, **options):
        return bench.run("supervise.sh", action, "--directory", "run", *words, **options).stdout

    state = bench.base / "run" / "state"
    count = "echo x >>count; test $(wc -l <count) -lt 3 && exit 75; exit "
    supervise("start", "--restart-delay=0", "--", "bash", "-c", count + "1")
    wait_for(state, "ended with status 1")
    assert (bench.base / "count").read_text() == "x\n" * 3
    assert "not started again" in supervise("start", "--resume", "--", "false")
    (bench.base / "count").unlink()
    supervise("start", "--restart-delay=0", "--max-restarts=1", "--", "bash", "-c", count + "0")
    wait_for(state, "ended with status 75")
    assert "ended with status 75" in supervise("status")
    assert "started" in supervise("start", "--resume", "--", "true")
    wait_for(state, "ended with status 0")
    assert supervise("stop") == supervise("status")


# Slurm

JOB = {"SLURM_JOB_ID": "12", "TASKS": "2"}
ENDS = ["bash", "-c", 'exit "${@:SLURM_PROCID + 1:1}"', "x"]  # each task with its own status


@pytest.mark.parametrize(
    "statuses, expected, again",
    [
        (["0", "0"], 0, False),
        (["75", "143"], 143, True),
        (["137", "75"], 137, True),
        (["75", "1"], 1, False),  # an error on one host, which the others report as a missing host
        (["2", "2"], 2, False),
        (["130", "75"], 130, False),
        (["77", "75"], 1, False),
    ],
)
def test_slurm_queues_the_job_again(bench, statuses, expected, again):
    bench.run("slurm.sbatch", *ENDS, *statuses, status=expected, **JOB)
    step, *rest = bench.recorded()
    assert step[:3] == ["srun", "--kill-on-bad-exit=0", "--wait=600"] and step[-2 - len(ENDS) :] == [*ENDS, *statuses]
    assert rest == ([["scontrol", "requeue", "Incomplete", "12"]] if again else [])


def test_slurm_gives_up_after_enough_restarts(bench):
    limits = {**JOB, "SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3", "SLURM_CPUS_PER_TASK": "4"}
    said = bench.run("slurm.sbatch", *ENDS, "75", "75", status=75, **limits).stderr
    assert "had 3 already" in said
    assert [words[:4] for words in bench.recorded()] == [
        ["srun", "--kill-on-bad-exit=0", "--wait=600", "--cpus-per-task=4"]
    ]


def test_slurm_waits_for_the_step_and_does_not_queue_a_job_that_is_ended(bench):
    job = start(bench, "slurm.sbatch", "bash", "-c", "echo up; sleep 0.5; exit 75", **JOB)
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 75
    assert [words[0] for words in bench.recorded()] == ["srun"]


def test_slurm_signals_the_steps_before_the_time_limit():
    """Without "B:" the job steps are signalled, and not the batch shell (man sbatch)."""
    options = [line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line[:7]]
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)


# Several processes on this machine

PROGRAM = """
import json, os, signal, sys, time
names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"]
for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    signal.signal(number, lambda *_, status=status: sys.exit(status))
print(json.dumps([{name: os.environ.get(name) for name in names}, sys.argv[2:]]), flush=True)
ends = json.loads(sys.argv[1])[int(os.environ["JAX_PROCESS_ID"])]
time.sleep(60 if ends is None else 0)
print("no new line", end="")
sys.exit(ends)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("rehearse") / "a program.py"
    path.write_text(PROGRAM)
    return [sys.executable, "-IS", str(path)]


def output_of(text, process):
    return [line.partition("] ")[2] for line in text.splitlines() if line.startswith(f"[{process}] ")]


def test_rehearse_gives_each_process_its_place(bench, program):
    done = bench.run("rehearse.sh", "--processes=3", "--devices", "2", "--", *program, "[0, 0, 0]", *WORDS)
    addresses = set()
    for process in range(3):
        first, second = output_of(done.stdout, process)
        environment, arguments = json.loads(first)
        addresses.add(environment.pop("JAX_COORDINATOR_ADDRESS"))
        assert environment == {
            "JAX_NUM_PROCESSES": "3",
            "JAX_PROCESS_ID": str(process),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
        }
        assert arguments == WORDS and second == "no new line"
    (address,) = addresses
    host, port = address.split(":")
    assert host == "127.0.0.1" and 1024 < int(port) < 65536
    assert len(done.stdout.splitlines()) == 6


@pytest.mark.parametrize(
    "ends, status",
    [
        ([0, 75], 75),
        ([75, 143], 143),
        ([1, 75], 1),  # an error on one host, which the other reports as a missing host
        ([2, 143], 2),
        ([130, 75], 130),
    ],
)
def test_rehearse_returns_the_worst_status(bench, program, ends, status):
    done = bench.run("rehearse.sh", "--max-restarts=0", "--", *program, json.dumps(ends), status=status)
    assert "restart" not in done.stderr


def test_rehearse_restarts_all_processes(bench, program):
    flags = ["--max_restarts", "2", "--restart-delay=0", "--"]
    done = bench.run("rehearse.sh", *flags, *program, "[75, 0]", status=75, JAX_NUM_CPU_DEVICES="4")
    assert len(output_of(done.stdout, 0)) == len(output_of(done.stdout, 1)) == 6
    assert '"JAX_NUM_CPU_DEVICES": "4"' in done.stdout
    done = bench.run("rehearse.sh", *flags, *program, "[75, 1]", status=1)
    assert len(output_of(done.stdout, 0)) == 2


def test_rehearse_signals_one_process_and_kills_what_is_left(bench, program):
    run = start(bench, "rehearse.sh", "--signal-to=1", "--grace-seconds=1", "--", *program, "[null, null]")
    for _ in range(2):
        run.stdout.readline()
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 143
    assert "process 1 ended with status 143" in said and "process 0 ended with status 137" in said


def test_rehearse_signals_all_processes(bench, program):
    run = start(bench, "rehearse.sh", "--max-restarts=3", "--", *program, "[null, null]")
    for _ in range(2):
        run.stdout.readline()
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 130 and said.count("ended with status 130") == 2


def test_rehearse_dry_run(bench):
    lines = bench.run("rehearse.sh", "--port=4321", "--dry-run", "--", *WORDS).stdout.splitlines()
    common = ["env", "JAX_COORDINATOR_ADDRESS=127.0.0.1:4321", "JAX_NUM_PROCESSES=2"]
    for process, line in enumerate(lines):
        rest = [f"JAX_PROCESS_ID={process}", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=1", *WORDS]
        assert shlex.split(line) == [*common, *rest]
    assert len(lines) == 2
