"""What the commands do when several processes, the hosts of a run, run one together.

Their flags; connecting the processes; and telling the others when one ends. Nothing here imports JAX for a run of one.
"""

import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FLAGS = ("distributed", "coordinator_address", "num_processes", "process_id", "initialization_timeout", "host_timeout")


def define_flags(flag_values: Any, define_finite: Callable[..., Any]) -> None:
    """Define the flags of a program that several processes run together.

    Args:
        flag_values: absl's.
        define_finite: `cli.define_finite`.
    """
    from absl import flags

    modes = "Connect with the other hosts of the job: auto on Slurm, Cloud TPU and GKE."
    flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], modes, flag_values=flag_values)
    address = "HOST:PORT of process 0; JAX_COORDINATOR_ADDRESS if none."
    flags.DEFINE_string("coordinator_address", None, address, flag_values=flag_values)
    flags.DEFINE_integer("num_processes", None, "In all; JAX_NUM_PROCESSES if none.", flag_values=flag_values)
    flags.DEFINE_integer("process_id", None, "Of this process; JAX_PROCESS_ID if none.", flag_values=flag_values)
    start, limit = "Seconds to wait for the other hosts at the start.", "Seconds to wait for a host without progress."
    define_finite("initialization_timeout", 1800.0, start, flag_values=flag_values, lower_bound=0.0)
    define_finite("host_timeout", 1800.0, limit, flag_values=flag_values, lower_bound=1.0)


def join(flag_values: Any, given: Mapping[str, Any], report: Callable[[str], None]) -> bool:
    """Connect with the other processes of this run, which must have the same flags; return whether there are any.

    Args:
        flag_values: absl's.
        given: the value of every flag and config field, by its name on the command line.
        report: called with a line after each minute of waiting.

    Raises:
        ClusterError: if the processes cannot be found or reached, or disagree.
    """
    from ddpm_jax.parallel.distributed import initialize

    values = {name: flag_values[name].value for name in FLAGS}
    own = {f"--{name}" for name in (*FLAGS, "compilation_cache")}
    return initialize(
        values["distributed"],
        coordinator_address=values["coordinator_address"],
        num_processes=values["num_processes"],
        process_id=values["process_id"],
        timeout=values["initialization_timeout"],
        host_timeout=values["host_timeout"],
        fields={"the command": Path(sys.argv[0]).stem} | {name: given[name] for name in given if name not in own},
        report=report,
    )


def is_first_host() -> bool:
    """Return whether this process is the one that writes results and prints."""
    hosts = sys.modules.get("ddpm_jax.parallel.hosts")
    return hosts is None or hosts.current().index == 0


def tell_others(
    error: Exception, sentence: Callable[[Exception], str | None], status: Callable[[Exception], int]
) -> str | None:
    """Return what to tell a user, after telling the other hosts, if there are any, why this one ends.

    Args:
        error: what ends it.
        sentence: error -> what to tell a user, or None for what only a programmer can mend.
        status: error -> exit status.
    """
    hosts = sys.modules.get("ddpm_jax.parallel.hosts")
    others = None if hosts is None or hosts.current().count == 1 else hosts.current()
    if others is None:
        return sentence(error)
    if _may_be_of_another_host(error):
        others.wait_for_reason()
    message = sentence(error)
    if hasattr(error, "of_all_hosts"):
        others.leave()
        return message
    if message is None:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
    others.fail(message, status(error))
    return message


def _may_be_of_another_host(error: BaseException | None) -> bool:
    """Return whether an error came from the runtime, as it does when another host has left a collective operation."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
            return "RESOURCE_EXHAUSTED" not in str(error)
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False
