"""The working directory of a run: whether it is one."""

from pathlib import Path

from ddpm_jax.errors import LoadError
from ddpm_jax.parallel import hosts
from ddpm_jax.paths import check_bucket, is_remote
from ddpm_jax.storage.json_file import read_json

RUN_FILE = "run.json"


def check_workdir(workdir: Path) -> None:
    """Raise LoadError for a foreign directory."""
    if is_remote(workdir):
        reason = check_bucket(workdir) if hosts.current().index == 0 else None
        if reason is not None:
            raise LoadError(f"workdir {workdir} cannot be written: {reason}")
    if workdir.exists() and not workdir.is_dir():
        raise LoadError(f"workdir {workdir} is a file, not a directory")
    if (workdir / RUN_FILE).exists():
        try:
            read_json(workdir / RUN_FILE)["stages"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(
                f"{workdir / RUN_FILE} cannot be read as a training run of this version ({type(error).__name__}); give "
                "another workdir"
            ) from None
    elif workdir.exists() and any(not _is_own(entry.name) for entry in workdir.iterdir()):
        raise LoadError(f"workdir {workdir} is not empty and holds no training run; give a new or empty directory")


def _is_own(name: str) -> bool:
    """Return whether a run that was killed before it wrote run.json may have left a file of this name."""
    return name == ".lock" or (name.startswith(RUN_FILE) and name.endswith(".tmp"))
