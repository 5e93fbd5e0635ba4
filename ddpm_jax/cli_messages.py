"""What the commands print on stderr: log lines and warnings, a line each."""

import contextlib
import logging as python_logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ddpm_jax import cli_hosts

PACKAGE = str(Path(__file__).parent) + os.sep


def say(text: str) -> None:
    """Print a line to stderr, above the progress bars if there are any."""
    line = " ".join(text.split())
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):  # its reader has gone
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


class _OneLine(python_logging.Handler):
    """Prints what this package has to say, and what others warn of, a line each."""

    def emit(self, record: python_logging.LogRecord) -> None:
        """Print one record; of several hosts only the first one informs."""
        if record.levelno <= python_logging.INFO and not cli_hosts.is_first_host():
            return
        if record.levelno < python_logging.WARNING and not record.pathname.startswith(PACKAGE):
            return
        level = "" if record.levelno <= python_logging.INFO else f"{record.levelname.lower()}: "
        say(level + record.getMessage())


def say_in_one_line() -> None:
    """Send log lines and warnings to stderr in the form of the errors."""
    from absl import logging

    logger = logging.get_absl_logger()
    logging.set_verbosity(logging.INFO)
    logger.handlers[:] = [_OneLine()]
    logger.propagate = False

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        del category
        say(f"warning: {message}")

    warnings.showwarning = show
