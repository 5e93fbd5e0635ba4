"""Noise process and prediction type of a network as plain data, shared by the loss, the sampler and model.json."""

import dataclasses
import functools
from collections.abc import Callable
from typing import get_args

import jax
import numpy as np

from ddpm_jax.checks import check_static
from ddpm_jax.diffusion.process import GaussianProcess, make_process
from ddpm_jax.diffusion.schedules import (
    constant_betas,
    cosine_betas,
    linear_betas,
    quadratic_betas,
    reciprocal_betas,
    sigmoid_betas,
)
from ddpm_jax.types import PredictionType, Variance

MAX_STEPS = 100_000  # of a process: more would be a mistake in a file, and tables of that size are slow to make
SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "quadratic": quadratic_betas,
    "sigmoid": sigmoid_betas,
    "constant": constant_betas,
    "reciprocal": reciprocal_betas,
}


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A discrete noise process and what a network predicts of it.

    Attributes:
        schedule: name of the betas ("linear", "cosine", "quadratic", "sigmoid", "constant", "reciprocal"; see
            `diffusion.schedules`), or the betas themselves, each in (0, 1).
        num_steps: T >= 1; the number of betas if they are given.
        prediction: what the network predicts: "eps", "x0", "v", "score" or "mean".
        variance: of the reverse step: "fixed_small", "fixed_large", or "learned_range", for which the network's output
            has twice the channels.

    Raises:
        ValueError: if a field is none of these.
    """

    schedule: str | tuple[float, ...] = "cosine"
    num_steps: int = 1000
    prediction: PredictionType = "eps"
    variance: Variance = "fixed_small"

    def __post_init__(self):
        why = "since tables are made in float64"
        check_static("num_steps", self.num_steps, why)
        check_static("schedule", self.schedule, why)
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int):
            raise ValueError(f"num_steps={self.num_steps!r} must be an integer")
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps={self.num_steps} must be between 1 and {MAX_STEPS}")
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(map(repr, SCHEDULES))}")
        else:
            try:
                betas = tuple(float(beta) for beta in self.schedule)
            except (TypeError, ValueError):
                raise ValueError(f"schedule={self.schedule!r} must be a name, or a sequence of betas") from None
            object.__setattr__(self, "schedule", betas)
            if len(self.schedule) != self.num_steps:
                raise ValueError(f"schedule has {len(self.schedule)} betas, and num_steps={self.num_steps}")
        for name, options in {"prediction": get_args(PredictionType), "variance": get_args(Variance)}.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, options))}")
        _betas(self.schedule, self.num_steps)

    @property
    def process(self) -> GaussianProcess:
        """The tables of the process."""
        return _process(self.schedule, self.num_steps)

    def replace(self, **fields) -> "Diffusion":
        """Return a copy with other fields."""
        return dataclasses.replace(self, **fields)

    def channels(self, data_channels: int) -> int:
        """Return the number of channels of the network's output, given that of the data."""
        return data_channels * (2 if self.variance == "learned_range" else 1)


# By numpy alone: a module may make a Diffusion when it is imported, before JAX has chosen its devices.
@functools.lru_cache(maxsize=64)
def _betas(schedule: str | tuple[float, ...], num_steps: int) -> np.ndarray:
    betas = SCHEDULES[schedule](num_steps) if isinstance(schedule, str) else np.array(schedule, np.float64)
    if not (np.all((betas > 0.0) & (betas <= 1.0)) and np.all(betas[:-1] < 1.0)) or betas[0] == 1.0:
        raise ValueError(
            f"betas must be inside (0, 1), or 1 at the last of several steps, got values from {betas.min():g} to "
            f"{betas.max():g}"
        )
    return betas


@functools.lru_cache(maxsize=64)
def _process(schedule: str | tuple[float, ...], num_steps: int) -> GaussianProcess:
    betas = _betas(schedule, num_steps)
    with jax.ensure_compile_time_eval():  # the tables are numbers, also where this runs inside a jitted function
        return make_process(betas)
