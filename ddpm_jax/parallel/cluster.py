"""Where the processes of a run are: from flags, from JAX's environment variables, or from what started the job.

Nothing is guessed: a job is distributed if its address, size and index are given, if Slurm started more than one task,
or if Cloud TPU or GKE name more than one worker.
"""

import dataclasses
import glob
import importlib.util
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

MODES = ("auto", "on", "off")
TPU_PORT = 8476  # of the coordinator; libtpu uses 8471 to 8475 and 8478 to 8482
_GIVEN = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


class ClusterError(Exception):
    """The processes of a run cannot be found, reached, or agree; the message is one sentence.

    Attributes:
        status: exit status of a command, 2 for what the user must change and 75 for what a restart may mend.
        of_all_hosts: all hosts raise it.
    """

    of_all_hosts = True

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process in a run of several.

    Attributes:
        address: host:port of the first process.
        count: the number of processes.
        index: of this one.
        origin: what says so.
        local_devices: the accelerators of this host that are for this process; None for all.
    """

    address: str
    count: int
    index: int
    origin: str
    local_devices: tuple[int, ...] | None = None

    @property
    def endpoint(self) -> tuple[str, int]:
        """The host and the port of the first process."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def find_place(
    mode: str = "auto",
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """Return the place of this process, or None for a run of one process.

    Args:
        mode: "off" is None; "on" raises where "auto" is None.
        coordinator_address: host:port of process 0, any free port.
        num_processes: in all.
        process_id: of this process, from 0.
        environ: has JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for what is not given, and what
            Slurm, Cloud TPU and GKE set.

    Raises:
        ClusterError: if some of the three are given and others missing, or one is wrong; or "on" finds nothing.
    """
    if mode not in MODES:
        raise ClusterError(f"--distributed={mode} must be one of {', '.join(MODES)}")
    if mode == "off":
        return None
    flags = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    given = {name: environ.get(variable) if flags[name] is None else flags[name] for name, variable in _GIVEN.items()}
    if any(value is not None for value in given.values()):
        return _by_hand(given)
    place = _slurm(environ) or _cloud_tpu(environ)
    if place is None and mode == "on":
        raise ClusterError(
            "--distributed=on needs --coordinator_address, --num_processes and --process_id: neither Slurm nor Cloud "
            "TPU nor GKE says that there are several processes"
        )
    return place


def _by_hand(given: Mapping[str, Any]) -> Place:
    missing = [f"--{name} (or {_GIVEN[name]})" for name, value in given.items() if value is None]
    if missing:
        there = ", ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
        raise ClusterError(f"{there} needs {' and '.join(missing)} too")
    address = str(given["coordinator_address"])
    if not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d{1,5}", address) or not 0 < int(address.rpartition(":")[2]) < 65536:
        raise ClusterError(f"--coordinator_address={address} must be HOST:PORT, such as 10.0.0.2:8476")
    count, index = (_whole(name, given[name]) for name in ("num_processes", "process_id"))
    if count < 1:
        raise ClusterError(f"--num_processes={count} must be at least 1")
    if not 0 <= index < count:
        raise ClusterError(f"--process_id={index} must be in [0, {count}), since --num_processes={count}")
    return Place(address, count, index, "the command line or JAX's environment variables")


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise ClusterError(f"{_GIVEN[name]}={value!r} is not a whole number") from None


_TEXTS = ("SLURM_STEP_NODELIST",)


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """Return the place in a Slurm step of several tasks; without srun a job has one."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environ for name in needed):
        return None
    odd = next((name for name in needed if name not in _TEXTS and not re.fullmatch(r"\d{1,18}", environ[name])), None)
    if odd is not None:
        raise ClusterError(f"{odd}={environ[odd]!r} is not a whole number")
    if int(environ["SLURM_STEP_NUM_TASKS"]) < 2:
        return None
    # "node001", "node001,host2", "node[001-015],host2" or "node[001,007-015]"
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", environ["SLURM_STEP_NODELIST"])
    if match is None:
        raise ClusterError(f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']} names no host")
    port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    # Tasks that share a host share its accelerators, one each.
    tasks = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    own = (int(environ["SLURM_LOCALID"]),) if tasks and int(tasks[0]) > 1 else None
    return Place(
        f"{match[1]}{match[2] or ''}:{port}",
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_PROCID"]),
        f"Slurm job {environ['SLURM_JOB_ID']}",
        own,
    )


def _cloud_tpu(environ: Mapping[str, str]) -> Place | None:
    """Return the place among the workers of a TPU slice, or of several, in GKE or on TPU VMs."""
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    number, origin = environ.get("TPU_WORKER_ID"), "GKE"
    slices = {name: environ.get(f"MEGASCALE_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID")}
    if workers is None and on_tpu_vm(environ):
        workers, number, origin = read_metadata("worker-network-endpoints"), read_metadata("agent-worker-number"), "GCE"
        settings = dict(re.findall(r"^(\w+): '?([^'\n]*)'?$", read_metadata("tpu-env") or "", re.MULTILINE))
        slices = {name: settings.get(f"MEGASCALE_{name}") for name in slices}
    if not workers or not number:
        return None
    hosts = [_worker(each) for each in workers.split(",")]
    num_slices = int(slices["NUM_SLICES"] or 1)
    if len(hosts) * num_slices < 2:
        return None
    first = (slices["COORDINATOR_ADDRESS"] or "").partition(":")[0] or hosts[0]
    index = int(slices["SLICE_ID"] or 0) * len(hosts) + int(number)
    return Place(f"{first}:{TPU_PORT}", len(hosts) * num_slices, index, f"Cloud TPU ({origin})")


def _worker(entry: str) -> str:
    """Return the host of "host", "host:port" or, in older metadata, "name:id:address"."""
    parts = entry.strip().split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def on_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Return whether this machine has TPU chips and a metadata server that knows of them."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and "TPU_SKIP_MDS_QUERY" not in environ and importlib.util.find_spec("libtpu") is not None


def read_metadata(name: str, *, timeout: float = 10.0, wait: bool = False) -> str | None:
    """Return an attribute of this virtual machine from Google Cloud's metadata server, or None.

    Args:
        name: of the attribute, or a path with a slash.
        timeout: seconds.
        wait: True waits for it to change, `timeout` seconds at most.
    """
    host = os.environ.get("GCE_METADATA_HOST", os.environ.get("GCE_METADATA_IP", "metadata.google.internal"))
    path = name if "/" in name else f"instance/attributes/{name}"
    query = f"?wait_for_change=true&timeout_sec={int(timeout)}" if wait else ""
    url = f"http://{host}/computeMetadata/v1/{path}{query}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=timeout + 5.0) as answer:
            return answer.read(1 << 20).decode()
    except (OSError, ValueError):
        return None
