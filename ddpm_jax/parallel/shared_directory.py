"""Whether all hosts of a run have the same directory, on a shared disk or in a bucket."""

import os
import secrets
import shutil
import time
from typing import Any

from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.cluster import ClusterError
from ddpm_jax.paths import as_path, is_remote

VISIBLE_SECONDS = 60.0  # NFS may show a new file that late
_PREFIX = ".shared-"


def check_shared(directory: str | os.PathLike, what: str, *, run: hosts.Alone | hosts.Hosts | None = None) -> None:
    """Raise ClusterError on all hosts if one of them does not see what the first one writes; all of them call it.

    Args:
        directory: created if missing, by the first host.
        what: names it in the message.
        run: the hosts; `hosts.current()` by default.

    Raises:
        ClusterError: if it is not shared, or cannot be written.
    """
    run = hosts.current() if run is None else run
    if run.count == 1:
        return
    path = as_path(directory) if is_remote(directory) else as_path(directory).absolute()
    # In a directory of its own: clients of buckets do not see new objects in those that they have listed before.
    token = path / f"{_PREFIX}{secrets.token_hex(8)}" / "token"
    problem = _write(token) if run.index == 0 else None
    first, name, problem = run.gather(f"writing into {what}", [str(path), token.parent.name, problem])[0]
    if problem is None:
        seen = run.index == 0 or _appears(path / name / token.name)
        found = run.gather(f"looking for {what}", [seen, str(path)])
        if run.index == 0:
            _remove(token.parent)
        others = [index for index, (seen, _) in enumerate(found) if not seen]
        if not others:
            return
        here, there = run.name(0), run.name(others[0])
        problem = (
            f"is not shared: {there} does not find in {found[others[0]][1]} what {here} wrote into {first}; all hosts "
            "need one directory, on a shared disk or in a bucket"
        )
    raise ClusterError(f"{what} {problem}")


def _write(token: Any) -> str | None:
    """Write a token, and return why it cannot be written or None; remove one that a kill left."""
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        for old in token.parent.parent.glob(f"{_PREFIX}*"):
            if old.name != token.parent.name:
                _remove(old)
        token.write_bytes(b"\n")
    except OSError as error:
        return f"{token.parent.parent} cannot be written: {error.strerror or error}"
    return None


def _remove(directory: Any) -> None:
    if is_remote(directory):
        directory.rmtree()
    else:
        shutil.rmtree(directory)


def _appears(token: Any) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not token.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
