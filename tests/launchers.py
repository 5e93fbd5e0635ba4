"""Stand-ins for the programs that the launchers call, and a machine that has them on PATH."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "launch"
WORDS = ["python", "show.py", "it's", 'a "red"  star', "--config.x=(1, 2)", "$HOME & \\n *", "{{name}}", "é"]

GCLOUD = """
import json, os, shutil, subprocess, sys
words = sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(["gcloud", *words]) + "\\n")
home = os.environ["WORKER_HOME"]
if words[3] == "describe" and "--format=value(state.state)" in words:
    states = open(os.environ["STATES"]).read().split()
    open(os.environ["STATES"], "w").write(" ".join(states[1:] or states))
    if states[0] == "ABSENT":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    if states[0] == "DENIED":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) PERMISSION_DENIED: no")
    print(states[0])
elif words[3] == "scp":
    shutil.copy(words[4], os.path.join(home, words[5].partition(":")[2]))
elif words[3] == "ssh":
    command = next(word for word in words if word.startswith("--command=")).partition("=")[2]
    environment = {**os.environ, "HOME": home, "PATH": os.environ["WORKER_PATH"] + ":" + os.environ["PATH"]}
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode)
"""
KUBECTL = """
import json, os, sys
given = sys.stdin.read() if "--filename=-" in sys.argv else ""
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(["kubectl", *sys.argv[1:]]) + "\\n")
open(os.environ["RECORD"] + ".yaml", "w").write(given)
"""
# Runs the tasks of a step, and returns the highest status, as srun does.
SRUN = """
import os, subprocess, sys, json
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(["srun", *sys.argv[1:]]) + "\\n")
words = sys.argv[1:]
while words[0].startswith("--"):
    del words[0]
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": "0"})
    for task in range(int(os.environ["TASKS"]))
]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\\n")
"""


def write_program(path, text):
    path.write_text(f"#!{sys.executable} -IS{text}")
    path.chmod(0o755)


class Bench:
    """A machine with stand-ins on PATH."""

    def __init__(self, base):
        self.base, self.bin, self.home = base, base / "bin", base / "home"
        for directory in (self.bin, self.home, base / "worker"):
            directory.mkdir()
        for name, text in (("gcloud", GCLOUD), ("kubectl", KUBECTL), ("srun", SRUN), ("scontrol", SCONTROL)):
            write_program(self.bin / name, text)
        self.record, self.states = base / "record", base / "states"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "STATES": str(self.states),
            "WORKER_HOME": str(self.home),
            "WORKER_PATH": str(base / "worker"),
        }

    def run(self, script, *words, status=0, launch=LAUNCH, **environment):
        """Run a script to its end, and return what it printed."""
        done = subprocess.run(
            [launch / script, *words],
            env={**self.environment, **environment},
            cwd=self.base,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def recorded(self):
        """Return the commands since the last call."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


def start(bench, script, *words, **environment):
    return subprocess.Popen(
        [LAUNCH / script, *words],
        env={**bench.environment, **environment},
        cwd=bench.base,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a shell
    )


def wait_for(path, text):
    for _ in range(200):
        if path.exists() and text in path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} has no {text!r}: {path.read_text() if path.exists() else 'it is absent'}")
