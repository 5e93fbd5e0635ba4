"""The lock on a working directory: one run at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ddpm_jax.paths import is_remote
from ddpm_jax.storage.checkpoint import CheckpointError


class WorkdirInUse(RuntimeError):
    """Another run holds the directory."""


@contextlib.contextmanager
def lock_workdir(path: str | os.PathLike) -> Iterator[None]:
    """Hold a directory for one run; the kernel lets go of it when the process ends, however it ends.

    Args:
      path: the directory; it is created. One in a bucket is not held.

    Raises:
      WorkdirInUse: when another run holds it.
      CheckpointError: when it cannot be created or written.
    """
    if is_remote(path):  # a bucket has no locks
        yield
        return
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "a+")  # noqa: SIM115 (closed below, after errors of opening it are distinguished)
    except OSError as error:
        raise CheckpointError(f"workdir {path} cannot be used: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise WorkdirInUse(f"workdir {path} is in use by another run (pid {pid})") from error
        except OSError as error:
            raise CheckpointError(f"workdir {path} cannot be locked: {error.strerror}") from error
        # The process id only makes the message above better, so a full disk is no reason to stop here.
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield
