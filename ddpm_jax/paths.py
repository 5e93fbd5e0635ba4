"""Paths of files and directories, on disks or in buckets (gs://, s3://)."""

import os
import re
from pathlib import Path
from typing import Any

from ddpm_jax.errors import LoadError
from ddpm_jax.extras import needs_extra
from ddpm_jax.temporary import temporary_path

_REMOTE = ("gs://", "s3://")


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is in a bucket."""
    return os.fspath(path).startswith(_REMOTE)


def as_path(path: str | os.PathLike) -> Any:
    """Return a path with the methods of `pathlib.Path`, also of one in a bucket; "~" is the home directory.

    Raises:
        LoadError: for an address of another kind, such as hdfs://, of which a local directory "hdfs:" would be made.
    """
    if not is_remote(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
            raise LoadError(f"path={os.fspath(path)} must be on a disk or begin with gs:// or s3://")
        return Path(os.path.expanduser(path))
    with needs_extra("train"):
        from etils import epath
    return epath.Path(path)


def local_path(path: str | os.PathLike) -> Path:
    """Return a path on a disk; "~" is the home directory.

    Raises:
        ValueError: for an address, of which a local directory "gs:" would be made.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        raise ValueError(f"directory={os.fspath(path)} must be on a disk")
    return Path(os.path.expanduser(path))


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write a file, whole or not at all; an object of a bucket always is.

    Raises:
        OSError: if it cannot be written.
    """
    path = as_path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    # One name, so that what a kill leaves is written over by the next run.
    with temporary_path(path.with_name(path.name + ".tmp")) as new:
        new.write_bytes(data)
        os.replace(new, path)


def check_bucket(path: str | os.PathLike) -> str | None:
    """Return why nothing can be written below a path in a bucket, or None; leaves nothing behind."""
    probe = as_path(path) / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b" ")
        probe.unlink()
    except ModuleNotFoundError as error:
        return f"the package {error.name} is not installed; pip install ddpm_jax[gcs] reads and writes buckets"
    except Exception as error:  # each bucket's client has errors of its own
        text = " ".join(str(error).split())[:300]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return None
