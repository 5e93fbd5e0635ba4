"""The launchers for TPU VMs and GKE, with stand-ins for gcloud and kubectl that record what they are given.

The expected commands were written from the documentation that docs/pods.md links, not from what the scripts print.
"""

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from launchers import LAUNCH, WORDS, Bench, wait_for

SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
SHOW = """
import json, os, sys, time
print(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in ("A", "JAX_PROCESS_ID")}]), flush=True)
time.sleep(float(os.environ.get("SECONDS_TO_RUN", 0)))
"""


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_shellcheck_finds_nothing():
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    assert shellcheck.exists(), "shellcheck is missing: pip install -e '.[test]'"
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


# Cloud TPU VMs

NAME = ["--name", "decoder", "--zone", "us-east5-a", "--project=my-project"]
TPU = [*NAME, "--accelerator_type", "v5p-64", "--spot", "--poll-seconds", "0"]
WHERE = ["--zone=us-east5-a", "--project=my-project"]
CREATE = shlex.split(
    "gcloud compute tpus queued-resources create decoder --zone=us-east5-a --project=my-project --node-id=decoder "
    "--accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 --spot"
)
STATE = shlex.split(
    "gcloud compute tpus queued-resources describe decoder --zone=us-east5-a --project=my-project "
    "'--format=value(state.state)'"
)
DELETE = shlex.split(
    "gcloud compute tpus queued-resources delete decoder --zone=us-east5-a --project=my-project --force"
)
SSH = shlex.split("gcloud compute tpus tpu-vm ssh decoder --zone=us-east5-a --project=my-project")
SCP = shlex.split("gcloud compute tpus tpu-vm scp ARCHIVE decoder:ddpm_jax.tar.gz")


def without_command(words):
    return [word for word in words if not word.startswith("--command=")]


@pytest.fixture
def checkout(bench):
    """A small checkout with the launchers, an ignored file, and a worker on which the installation is a stand-in."""
    root = bench.base / "checkout"
    shutil.copytree(LAUNCH, root / "launch")
    subprocess.run(["git", "init", "--quiet", root], check=True)
    (root / ".gitignore").write_text("runs/\n")
    (root / "runs").mkdir()
    (root / "runs" / "large").touch()
    (root / "show.py").write_text(SHOW)
    worker = bench.base / "worker"
    (worker / "python3").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >>~/installed\n')
    (worker / "uv").write_text(
        '#!/bin/sh\nprintf "%s\\n" "uv $*" >>~/installed\nmkdir -p .venv/bin\n'
        f"ln -sf {sys.executable} .venv/bin/python\n"
    )
    for program in worker.iterdir():
        program.chmod(0o755)
    return root / "launch"


@pytest.mark.skipif(sys.platform != "linux", reason="TPU VMs run Linux")
def test_life_cycle_on_tpu_vms(bench, checkout):
    def tpu_vm(*words, **options):
        return bench.run("tpu_vm.sh", *words, launch=checkout, **options)

    bench.states.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    said = tpu_vm("create", *TPU, "--wait").stderr
    assert bench.recorded() == [CREATE, STATE, STATE, STATE]
    assert "is WAITING_FOR_RESOURCES" in said and "is ACTIVE" in said

    tpu_vm("setup", *TPU, "--setup-command", "touch ~/mounted disk")
    state, scp, ssh = bench.recorded()
    assert state == STATE and without_command(ssh) == [*SSH, "--worker=all"]
    scp[5] = "ARCHIVE"
    assert scp == [*SCP, *WHERE, "--worker=all"]
    assert (bench.home / "installed").read_text().splitlines() == [
        "-m pip install --user --quiet --upgrade uv",
        "uv venv --quiet --allow-existing --python 3.12 .venv",
        "uv pip install --quiet --python .venv/bin/python -e .[train,tpu,gcs]",
    ]
    copied = {path.name for path in (bench.home / "ddpm_jax").iterdir()}
    assert {"show.py", "launch", "disk"} <= copied and "runs" not in copied and (bench.home / "mounted").exists()

    run = ["--env", "A=b  c", "--env", "SECONDS_TO_RUN=60", "--", *WORDS]
    tpu_vm("run", *TPU, *run)
    state, ssh = bench.recorded()
    assert state == STATE and without_command(ssh) == [*SSH, "--worker=all"]
    log = bench.home / "ddpm_jax_run" / "log"
    lines = wait_for(log, '"A"').splitlines()
    assert json.loads(lines[1]) == [WORDS[2:], {"A": "b  c", "JAX_PROCESS_ID": None}]
    assert "running already" in tpu_vm("run", *TPU, *run, status=1).stderr
    assert "running" in tpu_vm("resume", *TPU, *run).stdout
    bench.recorded()

    assert "running" in tpu_vm("status", *TPU).stdout
    described, state, ssh = bench.recorded()
    assert described == STATE[:-1] and state == STATE and without_command(ssh) == [*SSH, "--worker=all"]
    assert "ended with status 143" in tpu_vm("stop", *TPU).stdout
    assert [without_command(words) for words in bench.recorded()] == [[*SSH, "--worker=all"]]

    # Preempted: the VMs are gone, and so is what was on them.
    shutil.rmtree(bench.home)
    bench.home.mkdir()
    bench.states.write_text("SUSPENDING SUSPENDED PROVISIONING ACTIVE")
    tpu_vm("resume", *TPU, "--env", "A=again", "--", *WORDS)
    commands = bench.recorded()
    assert commands[:6] == [STATE, STATE, [*DELETE, "--quiet"], CREATE, STATE, STATE]
    assert [words[4] for words in commands[6:]] == ["scp", "ssh", "ssh"]
    wait_for(bench.home / "ddpm_jax_run" / "state", "ended with status 0")
    assert '"A": "again"' in log.read_text()
    assert "not started again" in tpu_vm("resume", *TPU, "--", *WORDS).stdout
    bench.recorded()

    tpu_vm("delete", *TPU)
    assert bench.recorded() == [DELETE]


def test_log_of_a_worker_follows_its_file(bench):
    text = bench.run("tpu_vm.sh", "log", *NAME, "--worker=3", "--lines=5", "--internal-ip", "--dry-run").stdout
    words = shlex.split(text)
    assert words == [*SSH, "--internal-ip", "--worker=3", "--command=tail -n 5 -F ddpm_jax_run/log"]


@pytest.mark.parametrize(
    "accelerator, runtime",  # https://docs.cloud.google.com/tpu/docs/runtimes
    [("v6e-64", "v2-alpha-tpuv6e"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v4-32", "tpu-ubuntu2204-base")],
)
def test_create_with_every_flag(bench, accelerator, runtime):
    flags = shlex.split(
        "--reserved --service-account a@b --network n --subnetwork s --internal-ips --labels run=decoder "
        "--valid-until-duration=6h --data-disk=projects/p/zones/z/disks/d,read-only"
    )
    bench.run("tpu_vm.sh", "create", *NAME, "--accelerator-type", accelerator, *flags)
    assert bench.recorded() == [
        [
            *CREATE[:9],
            f"--accelerator-type={accelerator}",
            f"--runtime-version={runtime}",
            "--reserved",
            "--service-account=a@b",
            "--network=n",
            "--subnetwork=s",
            "--internal-ips",
            "--labels=run=decoder",
            "--valid-until-duration=6h",
            "--data-disk=source=projects/p/zones/z/disks/d,mode=read-only",
        ]
    ]


def test_a_dry_run_prints_what_would_run(bench):
    def printed(*words):
        done = bench.run("tpu_vm.sh", *words, "--dry-run", "--", *WORDS)
        assert not bench.record.exists()
        return [shlex.split(line) for line in done.stdout.splitlines()]

    assert printed("create", *TPU) == [CREATE]
    assert printed("create", *TPU, "--wait") == [CREATE, STATE]
    assert printed("delete", *TPU, "--quiet") == [[*DELETE, "--quiet"]]
    assert [words[4] for words in printed("setup", *TPU)] == ["describe", "scp", "ssh"]
    assert [words[4] for words in printed("status", *TPU)] == ["describe", "describe", "ssh"]
    assert [words[4] for words in printed("stop", *TPU)] == ["ssh"]
    assert [words[4] for words in printed("run", *TPU)] == ["describe", "ssh"]
    resumed = printed("resume", *TPU)
    assert resumed[:4] == [STATE, [*DELETE, "--quiet"], CREATE, STATE]
    assert [words[4] for words in resumed[4:]] == ["scp", "ssh", "ssh"]
    # The command survives the shell here and the one on the worker.
    remote = shlex.split(resumed[-1][-1].partition("=")[2])
    assert remote[-len(WORDS) :] == WORDS


@pytest.mark.parametrize("states", ["ABSENT", "WAITING_FOR_RESOURCES", "SUSPENDED", "DENIED"])
def test_nothing_is_sent_to_a_tpu_that_is_not_there(bench, states):
    bench.states.write_text(states)
    assert "error: " in bench.run("tpu_vm.sh", "run", *TPU, "--", "true", status=1).stderr
    assert bench.recorded() == [STATE]


def test_waiting_ends_when_the_request_has_failed(bench):
    bench.states.write_text("PROVISIONING FAILED")
    said = bench.run("tpu_vm.sh", "create", *TPU, "--wait", status=1).stderr
    assert "is FAILED and will not be ACTIVE" in said
    bench.states.write_text("WAITING_FOR_RESOURCES")
    arguments = [*TPU, "--wait", "--wait-seconds=1", "--poll-seconds=1"]
    assert "after 1 s" in bench.run("tpu_vm.sh", "create", *arguments, status=1).stderr


# GKE

GKE = ["--name=decoder", "--accelerator", "tpu-v5p-slice", "--topology=4x4x4", "--image", "registry/image:1"]


def test_manifest(bench):
    flags = ["--spot", "--service-account=trainer", "--volume-claim=data:/mnt/data", "--env", 'A=b "c" $(D)']
    text = bench.run("gke.sh", "render", *GKE, *flags, "--slices=2", "--", *WORDS, "two\nlines\t").stdout
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "decoder" and "labels" not in jobset["metadata"]
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 100,
        "rules": [{"name": "doNotRestart", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 2 and job["parallelism"] == job["completions"] == 16
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == [75, 134, 137, 139, 143]
    pod = job["template"]["spec"]
    assert (
        pod["restartPolicy"] == "Never" and pod["shareProcessNamespace"] and pod["terminationGracePeriodSeconds"] == 600
    )
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    # Kubernetes replaces $$ by $.
    assert [word.replace("$$", "$") for word in container["command"]] == [*WORDS, "two\nlines\t"]
    assert "$$HOME & \\n *" in container["command"]
    assert container["env"] == [{"name": "A", "value": 'b "c" $$(D)'}]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "data": "/mnt/data"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert "{{" not in text.replace("{{name}}", "")


@pytest.mark.parametrize(
    "accelerator, topology, flags, chips, vms",  # https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
    [
        ("tpu-v4-podslice", "2x2x1", [], 4, 1),
        ("tpu-v4-podslice", "8x8x12", [], 4, 192),
        ("tpu-v5-lite-podslice", "1x1", [], 1, 1),
        ("tpu-v5-lite-podslice", "4x4", [], 4, 4),
        ("tpu-v5-lite-podslice", "16x16", [], 4, 64),
        ("tpu-v5p-slice", "2x2x4", [], 4, 4),
        ("tpu-v6e-slice", "2x4", [], 4, 2),
        ("tpu-v6e-slice", "2x4", ["--chips-per-vm=8"], 8, 1),
    ],
)
def test_chips_of_a_vm(bench, accelerator, topology, flags, chips, vms):
    flags = ["--name=a", f"--accelerator={accelerator}", f"--topology={topology}", "--image=i", *flags]
    job = yaml.safe_load(bench.run("gke.sh", "render", *flags, "--", "true").stdout)["spec"]["replicatedJobs"][0]
    job = job["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == vms and container["resources"]["limits"] == {"google.com/tpu": chips}
    assert "env" not in container and "serviceAccountName" not in job["template"]["spec"]


def test_life_cycle_on_gke(bench):
    words = [*GKE, "--namespace=research", "--context=c"]
    for action in ("apply", "log", "status", "delete"):
        bench.run("gke.sh", action, *words, "--", *WORDS)
        if action == "apply":
            applied = Path(f"{bench.record}.yaml").read_text()
            assert applied == bench.run("gke.sh", "render", *words, "--", *WORDS).stdout
            assert yaml.safe_load(applied)["metadata"]["namespace"] == "research"
    pods = "jobset.sigs.k8s.io/jobset-name=decoder"
    one = f"{pods},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    expected = [
        ["apply", "--filename=-"],
        ["logs", "--follow", "--tail=100", f"--selector={one}", "--container=train"],
        ["get", "jobset", "decoder"],
        ["get", "pods", f"--selector={pods}", "--output=wide"],
        ["delete", "jobset", "decoder"],
    ]
    expected = [["kubectl", "--context=c", "--namespace=research", *command] for command in expected]
    assert bench.recorded() == expected
    printed = [bench.run("gke.sh", a, *words, "--dry-run", "--", *WORDS).stdout for a in ("log", "status", "delete")]
    assert [shlex.split(line) for line in "".join(printed).splitlines()] == expected[1:]
    printed = bench.run("gke.sh", "apply", *words, "--dry-run", "--", *WORDS).stdout
    assert printed.splitlines()[0] == shlex.join(expected[0]) and printed.partition("\n")[2] == applied
    assert not bench.record.exists()


# Wrong usage

CREATED = ["create", *NAME]


@pytest.mark.parametrize(
    "script, words, says",
    [
        ("tpu_vm.sh", [], "first argument must be an action"),
        ("tpu_vm.sh", ["creat"], "no action creat"),
        ("tpu_vm.sh", ["create"], "--name is needed"),
        ("tpu_vm.sh", ["create", "--name"], "--name needs a value"),
        ("tpu_vm.sh", ["create", "--name="], "--name needs a value that is not empty"),
        ("tpu_vm.sh", ["create", "--name=My TPU"], "not My TPU"),
        ("tpu_vm.sh", ["create", "--name=a"], "--zone is needed"),
        ("tpu_vm.sh", ["create", "--name=a", "--zone=us-east5"], "not us-east5"),
        ("tpu_vm.sh", CREATED, "--accelerator-type is needed"),
        ("tpu_vm.sh", [*CREATED, "--accelerator-type=v9-8"], "not v9-8"),
        ("tpu_vm.sh", [*CREATED, "--accelerator-type=v5p-7"], "sizes of v5p are multiples of 8 up to 12288"),
        ("tpu_vm.sh", [*CREATED, "--accelerator-type=v6e-3"], "sizes of v6e are 1, 4, 8, 16, 32, 64, 128, 256"),
        ("tpu_vm.sh", [*CREATED, "--spot", "--on-demand"], "--spot and --on-demand exclude each other"),
        ("tpu_vm.sh", [*CREATED, "--spot=yes"], "--spot takes no value"),
        ("tpu_vm.sh", [*CREATED, "--zoen=a"], "unknown flag or argument --zoen"),
        ("tpu_vm.sh", [*CREATED, "--data-disk=d"], "not d"),
        ("tpu_vm.sh", ["setup", *NAME, "--python=2"], "--python must be a version such as 3.12, not 2"),
        ("tpu_vm.sh", ["setup", *NAME, "--extras=a;b"], "not a;b"),
        ("tpu_vm.sh", ["run", *NAME], "there is no command"),
        ("tpu_vm.sh", ["run", *NAME, "--env", "A"], "--env must be NAME=VALUE, not A"),
        ("tpu_vm.sh", ["log", *NAME, "--worker=all"], "--worker must be a whole number of at least 0, not all"),
        ("gke.sh", ["appply"], "no action appply"),
        ("gke.sh", ["render", "--name=a"], "--accelerator is needed"),
        ("gke.sh", ["render", *GKE], "there is no command"),
        ("gke.sh", ["render", *GKE, "--accelerator=tpu-v9", "--", "true"], "not tpu-v9"),
        ("gke.sh", ["render", *GKE, "--topology=4x4", "--", "true"], "not 4x4"),
        ("gke.sh", ["render", *GKE, "--topology=4x4x6", "--", "true"], "not 4x4x6"),
        ("gke.sh", ["render", *GKE, "--chips-per-vm=8", "--", "true"], "must be 4 for a 4x4x4 slice"),
        ("gke.sh", ["render", *GKE, "--volume-claim=data", "--", "true"], "not data"),
        ("gke.sh", ["render", *GKE, "--", "a\x01"], "control character"),
        ("gke.sh", ["render", *GKE, "--namespace=a\x01b", "--", "true"], "--namespace must be at most 63 lower-case"),
        ("gke.sh", ["render", *GKE, "--queue=Not Valid_", "--", "true"], "--queue must be at most 63 lower-case"),
        ("gke.sh", ["render", *GKE, "--volume-claim=a:/b\x01", "--", "true"], "--volume-claim has a control character"),
        ("gke.sh", ["render", *GKE, "--topology=16x20x28", "--", "true"], "6144 (v5p) chips, not 16x20x28"),
        ("slurm.sbatch", [], "there is no command"),
        ("slurm.sbatch", ["true"], "not a Slurm job"),
        ("rehearse.sh", ["true"], "unknown flag or argument true"),
        ("rehearse.sh", [], "there is no command"),
        ("rehearse.sh", ["--processes=0", "--", "true"], "--processes must be a whole number of at least 1, not 0"),
        ("rehearse.sh", ["--signal-to=2", "--", "true"], "not 2"),
        ("supervise.sh", ["start", "--", "true"], "--directory is needed"),
    ],
)
def test_wrong_usage_is_one_sentence(bench, script, words, says):
    done = bench.run(script, *words, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ") and says in line and not done.stdout
    assert not bench.record.exists()


@pytest.mark.parametrize("script, tool", [("tpu_vm.sh", "gcloud"), ("gke.sh", "kubectl")])
def test_a_missing_tool_is_named(bench, script, tool):
    only = bench.base / "only"
    only.mkdir()
    for name in ("bash", "tr", "env", "awk", "grep", "mktemp"):
        (only / name).symlink_to(shutil.which(name))
    words = ["status", *(NAME if tool == "gcloud" else ["--name=a"])]
    said = bench.run(script, *words, status=1, PATH=str(only)).stderr
    assert said.startswith(f"{script}: error: {tool} is not installed or not on PATH")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "rehearse.sh", "supervise.sh"])
def test_help_names_every_flag(bench, script):
    text = bench.run(script, "--help").stdout
    lines = [line.strip() for line in (LAUNCH / script).read_text().splitlines()]
    arms = [line.split(")")[0] for line in lines if line.startswith("--") and ";;" in line]
    flags = {flag.strip() for arm in arms for flag in arm.split("|")} - {"--", "--help"}
    assert flags and not [flag for flag in flags if flag not in text]
