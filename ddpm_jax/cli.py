"""What the command-line programs share: errors in one sentence, and exit statuses."""

import os
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

USAGE_ERROR = 2
FAILURE = 1


def run(main: Callable[[list[str]], Any]) -> None:
    """Run a program: parse flags, call `main`, and turn what users can mend into one sentence and a status.

    Status 2 is a wrong flag or config field, 1 a failure, 128 + n a stop by signal n after saving.
    """
    logging.set_verbosity(logging.WARNING)
    logging.use_absl_handler()

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            _stop(str(error).splitlines()[0], USAGE_ERROR)
        except (AttributeError, KeyError, ValueError, TypeError, OSError) as error:
            # A config file or an override that does not fit: ml_collections raises what Python raised inside.
            _stop(_sentence(error), USAGE_ERROR)

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except Exception as error:
            if not _is_for_users(error):
                raise
            _stop(_sentence(error), 128 + error.signum if hasattr(error, "signum") else FAILURE)
        except KeyboardInterrupt:
            _stop("interrupted", 130)

    app.run(guarded, flags_parser=parse)


def _is_for_users(error: Exception) -> bool:
    from ddpm_jax.pipelines.weights import LoadError
    from ddpm_jax.training.checkpoint import CheckpointError, WorkdirInUse
    from ddpm_jax.training.loop import Interrupted, TrainingDiverged

    ours = (LoadError, CheckpointError, WorkdirInUse, Interrupted, TrainingDiverged)
    return isinstance(error, (ValueError, OSError, *ours))


def _sentence(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'a file'}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def _stop(message: str, status: int) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    # Writer threads of a failed checkpoint could keep the interpreter alive.
    os._exit(status) if status != USAGE_ERROR else sys.exit(status)
