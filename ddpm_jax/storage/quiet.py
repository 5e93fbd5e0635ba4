"""Suppression of what the storage library prints beside the errors it raises.

Orbax logs every save, and a failed read or write leaves tracebacks of its threads and tasks on stderr. Each of those
failures is also raised, and then reported in one sentence by `ddpm_jax.storage.checkpoint`.
"""

import functools
import logging as python_logging
import os
import sys
from collections.abc import Callable
from typing import Any

from ddpm_jax.extras import needs_extra

with needs_extra("train"):
    from absl import logging


_ORBAX = f"{os.sep}orbax{os.sep}"


@functools.cache
def silence_storage() -> None:
    """Keep Orbax's log lines, and what its threads and tasks print after a failure, off stderr; for good."""
    logging.get_absl_logger().addFilter(lambda record: _ORBAX not in record.pathname)
    python_logging.getLogger("asyncio").addFilter(lambda record: _ORBAX not in record.getMessage())
    sys.unraisablehook = _without_closed_loop(sys.unraisablehook, lambda arguments: arguments.exc_value)
    sys.excepthook = _without_closed_loop(sys.excepthook, lambda kind, error, traceback: error)


def _without_closed_loop(hook: Callable[..., None], error_of: Callable[..., Any]) -> Callable[..., None]:
    """Wrap a hook to drop what a read reports to an event loop that another, failed read has closed."""

    def filtered(*arguments: Any) -> None:
        error = error_of(*arguments)
        if not (type(error) is RuntimeError and str(error) == "Event loop is closed"):
            hook(*arguments)

    return filtered
