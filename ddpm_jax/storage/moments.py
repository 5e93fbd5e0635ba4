"""Second moments of a network, estimated once after its training and stored beside it, for the sampler "analytic"."""

import math
import os
from typing import Any

import jax
import numpy as np

from ddpm_jax.errors import LoadError
from ddpm_jax.paths import as_path
from ddpm_jax.storage.json_file import read_json, write_json

MOMENTS_FILE, FORMAT = "moments.json", "ddpm_jax moments 1"


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
    if len(values) != num_steps or not all(_is_moment(value) for value in values):
        raise LoadError(f"{path}: values must be {num_steps} numbers, one for each step of the process, all >= 0")
    return jax.numpy.asarray(values, np.float32) if found.get("step") == step else None


def examples_of(directory: str | os.PathLike, step: int) -> int:
    """Return the number of examples that the moments of a checkpoint were estimated on, 0 if there are none."""
    try:
        found = read_json(as_path(directory) / MOMENTS_FILE)
    except (OSError, ValueError):
        return 0
    return found["examples"] if isinstance(found, dict) and found.get("step") == step else 0


def _is_moment(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
