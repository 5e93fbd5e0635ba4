"""Temporary files and directories, removed when they are done with and also when a signal ends the process.

What must be whole or absent is written under a temporary name and renamed.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_paths: set[Path] = set()


@contextlib.contextmanager
def temporary_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path, and remove what is there at the end; rename what should stay before.

    Args:
        path: of a file or a directory, which the caller creates.
    """
    # Absolute: the working directory may change before a signal comes.
    path = Path(path).absolute()
    _paths.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _paths.discard(path)


def remove_temporary_paths() -> None:
    """Remove what is at the paths of all open `temporary_path` contexts, before the process ends without them."""
    for path in tuple(_paths):
        _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
