"""Second moments of a network, estimated once after its training and stored beside it, for the sampler "analytic"."""

import os
from typing import Any

import jax
import numpy as np

from ddpm_jax.checks import is_finite
from ddpm_jax.errors import LoadError
from ddpm_jax.paths import as_path
from ddpm_jax.storage.json_file import read_json, write_json

MOMENTS_FILE, FORMAT = "moments.json", "ddpm_jax moments 1"
_LARGEST = 1e12  # of a mean square of noise that a network predicts, 1 if it is right


def write_moments(
    directory: str | os.PathLike, values: Any, *, examples: int | None = None, step: int | None = None
) -> None:
    """Write moments.json, whole or not at all, by the first process alone.

    Args:
        directory: of the model.
        values: float32[T], from `diffusion.samplers.analytic_moments`.
        examples: the number of examples that they are means over, if it is known.
        step: the checkpoint whose averaged parameters they are of; None for parameters that do not change.

    Raises:
        OSError: if it cannot be written.
    """
    value = {"format": FORMAT, "step": step, "examples": examples, "values": np.asarray(values, np.float64).tolist()}
    write_json(as_path(directory) / MOMENTS_FILE, value)


def read_moments(directory: str | os.PathLike, num_steps: int, *, step: int | None = None) -> jax.Array | None:
    """Read moments.json.

    Args:
        directory: of the model.
        num_steps: T of its process.
        step: of the checkpoint that is read; None for parameters that do not change.

    Returns:
        float32[T]; None if there is no such file, or one of another checkpoint.

    Raises:
        LoadError: if the file is not such a file, or has not T numbers.
    """
    found = _read(directory, num_steps)
    if found is None or found.get("step") != step:
        return None
    return jax.numpy.asarray(found["values"], np.float32)


def examples_of(directory: str | os.PathLike, num_steps: int, step: int | None) -> int:
    """Return the number of examples that the moments of a checkpoint were estimated on, or 0."""
    try:
        found = _read(directory, num_steps)
    except LoadError:
        return 0
    count = None if found is None or found.get("step") != step else found.get("examples")
    return count if isinstance(count, int) and not isinstance(count, bool) else 0


def _read(directory: str | os.PathLike, num_steps: int) -> dict[str, Any] | None:
    path = as_path(directory) / MOMENTS_FILE
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise LoadError(f"{path} does not hold the second moments of a model: {reason}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("values"), list):
        raise LoadError(f"{path} does not hold the second moments of a model in the format {FORMAT!r}")
    values = found["values"]
    if len(values) != num_steps or not all(is_finite(value) and 0 <= value <= _LARGEST for value in values):
        raise LoadError(
            f"{path}: values must be {num_steps} numbers in [0, {_LARGEST:g}], one for each step of the process"
        )
    return found
