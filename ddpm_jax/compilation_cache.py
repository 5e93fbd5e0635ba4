"""JAX's persistent compilation cache, in the user's cache directory, for the commands.

Importing the package does not configure JAX; a command calls `use_compilation_cache`. JAX bounds a cache only with a
lock and a second file for every entry, and a process that is killed between the two corrupts it permanently; so the
directory has no limit of JAX's and is cut down here, once a process.
"""

import contextlib
import hashlib
import os
import platform
import re
import secrets
import sys
import warnings
from pathlib import Path

import jax
import jaxlib

MAX_BYTES = 2**30
MIN_COMPILE_SECONDS = 0.3
_FAILURE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']+)'")


def use_compilation_cache() -> Path | None:
    """Store compiled programs on disk and reuse them; return the directory, or None without a cache.

    What the user has said counts instead: the environment variables JAX_COMPILATION_CACHE_DIR (empty for no cache) and
    JAX_ENABLE_COMPILATION_CACHE, or the options of `jax.config` of these names. A directory that cannot be used costs
    one warning.
    """
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None
    if chosen or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        directory = cache_directory()
        _prepare(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        warnings.warn(f"no compilation cache: {error}", stacklevel=2)
        return None
    prune(directory, MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    _repair_on_warnings(directory)
    return directory


def cache_directory() -> Path:
    """Return the directory for programs of this machine: those of another processor or jaxlib may not run here."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification ignores others
        base = Path(given)
    machine = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return base / "ddpm_jax" / "jax" / f"{jaxlib.__version__}-{platform.machine()}-{machine}"


def prune(directory: Path, max_bytes: int) -> None:
    """Remove the entries that were used longest ago until the rest fit, and those that a killed process left empty."""
    entries = []
    for path in directory.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process removes it
            stat = path.stat()
            entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    size = 0
    for _, entry_size, path in sorted(entries, reverse=True):
        size += entry_size
        if size > max_bytes or entry_size == 0:
            with contextlib.suppress(OSError):
                path.unlink()


def _processor() -> str:
    """Return what tells processors apart that cannot run each other's programs."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _prepare(directory: Path) -> None:
    """Create the directory; raise OSError unless files can be written there, and by this user alone.

    The programs in it are run as they are.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    stat = directory.stat()
    if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o022):
        raise OSError(f"other users can write into {directory}")
    probe = directory / f".{secrets.token_hex(8)}"
    try:
        probe.touch()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _repair_on_warnings(directory: Path) -> None:
    """Remove an entry that JAX cannot read, so that it is written again, and say once that none can be written.

    JAX writes entries in place and never over one that exists: one that a killed process left half-written would cost
    a warning and a compilation in every process after it.
    """
    show, said = warnings.showwarning, set()

    def filtered(message, category, *rest):
        failure = _FAILURE.search(str(message))
        if failure is None:
            show(message, category, *rest)
        elif failure[1] == "reading":
            for path in directory.glob(f"{failure[2]}-*-cache"):
                with contextlib.suppress(OSError):
                    path.unlink()
        elif not said:
            said.add("writing")
            show(UserWarning(f"the compilation cache in {directory} cannot be written"), UserWarning, *rest)

    warnings.showwarning = filtered
