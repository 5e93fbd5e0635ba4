"""Shared code of the command-line programs: flags, errors and warnings in one sentence, and exit statuses.

Each program has its own `flags.FlagValues`, so that all of them can be imported, and run, in one process.
"""

import contextlib
import difflib
import errno
import importlib.util
import math
import os
import platform
import re
import secrets
import signal as signals
import stat
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpm_jax import cli_hosts, cli_messages
from ddpm_jax.paths import as_path, check_bucket, is_remote
from ddpm_jax.stopping import ending_on_signals
from ddpm_jax.temporary import temporary_path

EXTRA = "install ddpm_jax[train], which has all that the commands need"
for _package in ("absl", "ml_collections"):
    if importlib.util.find_spec(_package) is None:
        sys.exit(f"error: the package {_package} is not installed; {EXTRA}")

from absl import flags  # noqa: E402 (after the check above)

USAGE_ERROR = 2
FAILURE = 1
PACKAGE = str(Path(__file__).parent) + os.sep
# Errors that are written for users, by module: one whose module was never imported cannot have been raised.
ERRORS = {
    "ddpm_jax.data.preparing.part": ("PrepareError",),
    "ddpm_jax.interop.table": ("ConvertError",),
    "ddpm_jax.errors": ("LoadError",),
    "ddpm_jax.parallel.cluster": ("ClusterError",),
    "ddpm_jax.storage.checkpoint": ("CheckpointError",),
    "ddpm_jax.storage.lock": ("WorkdirInUse",),
    "ddpm_jax.training.loop": ("Interrupted", "TrainingDiverged"),
}
REASONS = {
    "Exceeds the limit": "is too large",
    "invalid literal for int": "is not a whole number",
    "could not convert string to float": "is not a number",
    "Non-boolean argument": "is neither true nor false",
}


class UsageError(Exception):
    """A wrong flag, or a config field that does not exist; the message is one sentence."""


def run(
    main: Callable[[], Any], flag_values: flags.FlagValues, *, config: str | None = None, distributed: bool = False
) -> None:
    """Run a program: parse flags, call `main`, and turn what users can mend into one sentence and a status.

    Ends the process unless all went well. Status 2 is a wrong flag or config field, 1 a failure, 128 + n a stop by
    signal n, 75 a stop by a preemption notice or since another host is missing. Defines the flag --compilation_cache.

    Args:
        main: the program.
        flag_values: its flags.
        config: the name of its config flag, if it has one.
        distributed: True for a program that several processes can run together; defines their flags.
    """
    cli_messages.say_in_one_line()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name that cannot be printed is no failure
    if "compilation_cache" not in flag_values:
        cache_help = "Keep compiled programs in the user's cache directory."
        flags.DEFINE_bool("compilation_cache", True, cache_help, flag_values=flag_values)
    if distributed and "distributed" not in flag_values:
        cli_hosts.define_flags(flag_values, define_finite)
    with ending_on_signals():
        try:
            if not _wants_help(flag_values):
                _parse(flag_values, config)
                if flag_values["compilation_cache"].value:
                    from ddpm_jax.compilation_cache import use_compilation_cache

                    use_compilation_cache()
                several = distributed and cli_hosts.join(flag_values, _given(flag_values, config), cli_messages.say)
                main()
                if several:
                    from ddpm_jax.parallel.distributed import finish

                    finish()
        except Exception as error:
            message = cli_hosts.tell_others(error, _sentence, _status)
            if message is None:
                raise
            if config is not None and isinstance(error, (UsageError, ValueError)):
                message = _with_overrides(message, config, sys.argv[1:])
            _stop(message, _status(error))


def use_cpu_devices(count: int = 0) -> None:
    """Split the CPU into this number of JAX devices, over which batches are sharded; 0: one per core.

    A small network leaves cores idle that work on one batch together; of more than 8 cores 0 takes 8, since each device
    has a copy of the parameters. What the user has set counts instead: JAX_NUM_CPU_DEVICES, the XLA flag of the same
    meaning, or a JAX that has computed something already. On a GPU or TPU nothing changes.
    """
    import jax

    flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices < 1 and not flag:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", count or min(cores, 8))


def keep_memory() -> None:
    """Start this program again, once, with a C library that keeps memory and backs it with large pages.

    A training step on a CPU takes and gives back hundreds of megabytes; glibc returns them to the system, which hands
    out newly zeroed pages each time. Nothing happens where JAX may find an accelerator, where the C library is another
    one, or where the user has set GLIBC_TUNABLES, which this sets.
    """
    import jax

    accelerated = any(importlib.util.find_spec(name) is not None for name in ("libtpu", "jax_plugins"))
    on_cpu = jax.config.jax_platforms == "cpu" or not accelerated
    if on_cpu and platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        tunables = {"hugetlb": 1, "mmap_threshold": 2**32, "trim_threshold": 2**34, "top_pad": 2**28}
        # Blocked until the package is imported again: Python's own start answers Ctrl-C with a traceback.
        mask = signals.pthread_sigmask(signals.SIG_BLOCK, {signals.SIGINT})
        os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items())
        try:
            os.execv(sys.executable, sys.orig_argv)
        finally:
            signals.pthread_sigmask(signals.SIG_SETMASK, mask)


def show(text: str) -> None:
    """Print a result at once, on the first host alone: what follows may fail."""
    if not cli_hosts.is_first_host():
        return
    # A path may hold bytes that the locale does not know, and the terminal may not know a character.
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def as_utf8(text: str, *, what: str) -> str:
    """Return an argument of the command line as the user typed it, also where the locale is not of UTF-8.

    Raises:
        UsageError: naming the flag `what`, for bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps bytes that the locale does not know as lone surrogates
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise UsageError(f"{what}={text!r} is not UTF-8") from None
    return text


def check_address(path: str | os.PathLike, flag: str) -> None:
    """Raise UsageError for an address of another kind than those that `as_path` knows."""
    from ddpm_jax.errors import LoadError

    try:
        as_path(path)
    except LoadError as error:
        raise UsageError(f"{flag} {str(error).partition(' ')[2]}") from None


def check_can_write(path: str | os.PathLike, *, what: str, given: str | None = None) -> None:
    """Raise UsageError, naming the flag `what`, unless a file can be written at a path; leaves nothing behind.

    A file is written beside it: permissions say little about root, read-only disks, full ones and quotas. given: the
    flag's value where it is not the path.
    """
    flag = f"{what}={path if given is None else given}"
    check_address(path, flag)
    if is_remote(path):
        if (reason := check_bucket(as_path(path).parent)) is not None:
            raise UsageError(f"{flag} cannot be written: {reason}")
        return
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:  # such as a name that is too long
        raise UsageError(f"{flag} cannot be written: {error.strerror}") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise UsageError(f"{what}={path} is a directory; give the name of a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise UsageError(f"{flag} cannot be written: {path} is not a regular file")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{flag} cannot be written: {parent} is not a directory")
    try:
        with temporary_path(parent / f".{secrets.token_hex(8)}.tmp") as probe:
            probe.write_bytes(b" " * 4096)
        if mode is not None:
            with open(path, "ab"):
                pass
    except OSError as error:
        # A file without permissions can be replaced; one that is immutable or on a read-only disk cannot.
        if error.errno == errno.EACCES and error.filename == str(path):
            return
        raise UsageError(f"{flag} cannot be written: {parent}: {error.strerror}") from error


def check_exists(path: str | os.PathLike | None, *, what: str) -> None:
    """Raise UsageError, naming the flag `what`, unless there is a file or directory at a path; None is no path."""
    if path is not None:
        check_address(path, f"{what}={path}")
    if path is not None and not as_path(path).exists():
        raise UsageError(f"{what}={path} does not exist")


MAX_SEED = 2**32 - 1  # JAX drops the higher bits of a seed


_LARGEST = (2.0 - 2.0**-23) * 2.0**127  # of float32


class _FiniteParser(flags.FloatParser):
    """Refuses nan, which passes every bound, and what is infinite in float32."""

    def parse(self, argument: Any) -> float:
        """Return the number."""
        value = super().parse(argument)
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{argument} is not a finite number of single precision")
        return value


def define_finite(
    name: str, default: float | None, help: str, *, flag_values: flags.FlagValues, lower_bound: float | None = None
) -> flags.FlagHolder:
    """Define a flag that holds a finite number."""
    parser, serializer = _FiniteParser(lower_bound, None), flags.ArgumentSerializer()
    return flags.DEFINE(parser, name, default, help, flag_values, serializer)


# ---- Flags -----------------------------------------------------------------------------------------------------------


def _wants_help(flag_values: flags.FlagValues) -> bool:
    if not {"--help", "-help", "-h", "--helpfull"} & set(sys.argv[1:]):
        return False
    print((sys.modules["__main__"].__doc__ or "").strip())
    for name in sorted(flag_values):
        flag = flag_values[name]
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        print(f"  --{name}: {flag.help}{default}")
    return True


def _parse(flag_values: flags.FlagValues, config: str | None) -> None:
    if config is not None:
        _check_config_flags(config, sys.argv[1:])
    try:
        rest = flag_values(sys.argv)[1:]
    except flags.Error as error:
        raise UsageError(_explain(str(error))) from error
    if rest:
        raise UsageError(f"unknown argument {rest[0]!r}; flags begin with --")
    # Libraries that read their own flags find the defaults.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _explain(text: str) -> str:
    """Return a flag's error in words that do not need Python."""
    match = re.match(r"flag (--[^=]+=.*?): (.*)", text, re.DOTALL)
    for start, meaning in REASONS.items():
        if match and start in match[2]:
            return f"{match[1]:.120} {meaning}"
    return text.removeprefix("flag ").splitlines()[0]


def _check_config_flags(name: str, argv: list[str]) -> None:
    """Raise UsageError for a config file that gives no config, and for an override of a field that it does not have."""
    chosen = [i for i, word in enumerate(argv) if re.match(rf"--?{name}(=|$)", word)]
    overrides = [match for word in argv if (match := re.match(rf"--?(?:no)?{name}\.([^=]+)", word))]
    if not chosen:
        if overrides:
            raise UsageError(f"--{name} is needed, before {overrides[0][0]}")
        return
    _, _, value = argv[chosen[0]].partition("=")
    value = value or "".join(argv[chosen[0] + 1 : chosen[0] + 2])
    fields = dict(_fields(_load_config(name, value)))
    for match in overrides:
        if match[1] not in fields:
            near = _nearest(match[1], list(fields))
            raise UsageError(f"the config has no field {match[1]}; did you mean {near}?")


def _load_config(name: str, value: str) -> Any:
    path, colon, variant = value.partition(":")
    if not Path(path).is_file():
        raise UsageError(f"--{name}={value}: there is no file {path or 'without a name'}")
    with _recipe_errors(path, f"--{name}={value}: "):
        module = load_recipe(path)
        if not hasattr(module, "get_config"):
            raise UsageError(f"--{name}={value}: {path} has no function get_config")
        config = module.get_config(*([variant] if colon else []))
    if not hasattr(config, "to_dict") or not hasattr(config, "items"):
        raise UsageError(
            f"--{name}={value}: get_config must return an ml_collections ConfigDict, got {type(config).__name__}"
        )
    return config


def load_recipe(path: str) -> Any:
    """Return the module of a recipe: a Python file with `get_config` and `stages`."""
    spec = importlib.util.spec_from_file_location("recipe", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_config_numbers(config: Any) -> None:
    """Refuse numbers that are not finite, sizes below 1, and seeds of which JAX would drop the higher bits.

    Raises:
        UsageError: naming the field.
    """
    for name, value in _fields(config):
        leaf = name.rpartition(".")[2]
        off = leaf == "threshold" and value == math.inf  # of samplers: no threshold
        if isinstance(value, float) and not math.isfinite(value) and not off:
            raise UsageError(f"{name}={value} must be a finite number")
        if leaf == "seed" and isinstance(value, int) and not 0 <= value <= MAX_SEED:
            raise UsageError(f"{name}={value} must lie in [0, 2**32)")
        least = {"cpu_devices": 0, "image_size": 1, "low_size": 1, "patch": 1}.get(leaf)
        if least is not None and isinstance(value, int) and value < least:
            raise UsageError(f"{name}={value} must be at least {least}")


def call_recipe(recipe: Any, name: str, config: Any) -> Any:
    """Return what a function of a recipe makes of the config; None if it has no such function.

    Raises:
        UsageError: if it raises; a ValueError, such as for a number out of its range, keeps its sentence.
    """
    path = str(recipe.__file__)
    if not hasattr(recipe, name):
        if name == "stages":
            raise UsageError(f"{path} has no function stages(config), which returns what is trained")
        return None
    with _recipe_errors(path, ""):
        found = getattr(recipe, name)(config)
    if name == "pipeline" and not hasattr(found, "write"):
        raise UsageError(f"pipeline(config) of {path} must return a PipelineDescription, got {type(found).__name__}")
    if name == "stages" and found in ((), []):
        raise UsageError(f"stages(config) of {path} returned no stage")
    if name == "stages" and not (isinstance(found, (list, tuple)) and found and all(map(_is_stage, found))):
        raise UsageError(f"stages(config) of {path} must return a tuple of Stage objects, got {type(found).__name__}")
    return found


def _is_stage(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("name", "task", "source", "training"))


@contextlib.contextmanager
def _recipe_errors(path: str, prefix: str) -> Iterator[None]:
    """Turn an error of a recipe into one sentence that names the file and, for a mistake in it, the line."""
    try:
        yield
    except ModuleNotFoundError as error:
        line = _importing_line(error, path)
        if line is None:
            raise
        where = f"config file {path}, line {line}"
        raise UsageError(f"{where}: there is no module {error.name}; is it installed?") from error
    except (UsageError, OSError, *_own_errors()):
        raise
    except ValueError as error:
        raise UsageError(f"{prefix}{error}") from error
    except Exception as error:
        lines = [line.lineno for line in traceback.extract_tb(error.__traceback__) if line.filename.endswith(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"config file {path} does not work: {type(error).__name__}: {error}{where}") from error


def _importing_line(error: ModuleNotFoundError, path: str) -> int | None:
    """Return the line of a recipe whose own import failed; None if that of another module did."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return frames[-1].lineno if frames and frames[-1].filename.endswith(path) else None


def _with_overrides(message: str, name: str, argv: list[str]) -> str:
    """Add to a message the fields that the command line sets to the value that it shows by another name.

    More than two of them are too many to be of use.
    """
    found = []
    for word, following in zip(argv, [*argv[1:], ""]):
        match = re.fullmatch(rf"--?{name}\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            continue
        value = following if match[2] is None else match[2]
        # As in "drop=2.0", "kind='foo'" or "got 0", and not as the beginning of another number.
        shown = rf"(?:=|got )['\"]?{re.escape(value)}(?:\.0)?(?![\w.]*\w)"
        if value and re.search(shown, message) and not re.search(rf"\b{match[1].rpartition('.')[2]}\b", message):
            found.append(f"--{name}.{match[1]}={value}")
        elif value and re.search(rf"\b{match[1].rpartition('.')[2]}{shown}", message):
            return message  # which names the field itself
    return message + (f" (here {' or '.join(found)})" if 0 < len(found) < 3 else "")


def _own_errors() -> tuple[type[Exception], ...]:
    """Return the errors that are written for users, of the modules that were imported."""
    found = (getattr(sys.modules[m], name) for m, names in ERRORS.items() if m in sys.modules for name in names)
    return tuple(found)


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every field, parts before what they hold."""
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            yield from _fields(value, f"{prefix}{name}.")


def _given(flag_values: flags.FlagValues, config: str | None) -> dict[str, Any]:
    """Return the value of every flag and config field, by what a user would write on the command line."""
    names = [name for name in flag_values if config is None or not (name == config or name.startswith(f"{config}."))]
    given = {f"--{name}": flag_values[name].value for name in names}
    if config is not None and flag_values[config].value is not None:
        leaves = ((name, value) for name, value in _fields(flag_values[config].value) if not hasattr(value, "items"))
        given |= {f"--{config}.{name}": value for name, value in leaves}
    return given


def _nearest(name: str, fields: list[str]) -> str:
    """Return the field most like a name: one in the same part of the config before one elsewhere."""
    part = name.rpartition(".")[0]
    siblings = [field for field in fields if part and field.rpartition(".")[0] == part]
    found = difflib.get_close_matches(name, siblings, 1, cutoff=0.6)
    return (found or difflib.get_close_matches(name, fields, 1, cutoff=0.0))[0]


# ---- Errors and warnings ---------------------------------------------------------------------------------------------


def _sentence(error: Exception) -> str | None:
    """Return what to tell a user of an error, on one line; None for what only a programmer can mend."""
    ours = _own_errors()
    text: str | None = None
    if isinstance(error, ModuleNotFoundError) and "install ddpm_jax[" in str(error):
        text = str(error)
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("ddpm_jax"):
        text = f"the package {error.name} is not installed; {EXTRA}"
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        text = place + (error.strerror or str(error) or type(error).__name__)
    elif (
        isinstance(error, (UsageError, *ours))
        or isinstance(error, (ValueError, FloatingPointError))
        and _raised_here(error)
    ):
        text = str(error)
    elif "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        text = f"out of memory; a smaller batch_size or a larger accumulate needs less ({error})"
    return None if text is None else " ".join(text.split())


def _raised_here(error: Exception) -> bool:
    """Return whether this package raised an error itself: its checks speak to users, those of libraries do not."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.abspath(frames[-1].filename).startswith(PACKAGE)


def _status(error: Exception) -> int:
    if isinstance(error, UsageError):
        return USAGE_ERROR
    return getattr(error, "status", FAILURE)


def _stop(message: str, status: int) -> None:
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {message}\n")):
        with contextlib.suppress(AttributeError, OSError):  # closed, or its reader has gone
            stream.write(text)
            stream.flush()
    # Writer threads of a failed checkpoint could keep the interpreter alive.
    os._exit(status)
