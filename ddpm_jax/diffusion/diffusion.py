"""Noise process and prediction type of a network as plain data, shared by the loss, the sampler and model.json."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from ddpm_jax.checks import check_static, is_finite
from ddpm_jax.diffusion.continuous import (
    Schedule,
    cosine_log_snr,
    discretize,
    interpolated,
    sub_vp,
    uniform_times,
    ve,
    vp_linear,
)
from ddpm_jax.diffusion.process import GaussianProcess, make_process, respace
from ddpm_jax.diffusion.schedules import (
    constant_betas,
    cosine_betas,
    left_steps_out,
    linear_betas,
    quadratic_betas,
    reciprocal_betas,
    respaced_timesteps,
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
# In continuous time: the process of a span, and the published span.
CONTINUOUS: dict[str, tuple[Callable[[float, float], Schedule], tuple[float, float]]] = {
    "vp": (vp_linear, (0.1, 20.0)),
    "sub_vp": (sub_vp, (0.1, 20.0)),
    "ve": (ve, (0.01, 50.0)),
    "cosine_log_snr": (cosine_log_snr, (-20.0, 20.0)),
}
Time = Literal["t", "sigma", "alpha_bar", "log_snr"]
_NOT_COMPARED = {"describe": "unless default"}  # checkpoints of versions without the field can be resumed


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A noise process and what a network predicts of it.

    The process is discrete, with T steps, or one of continuous time (score SDE; SR3), from which training samples any
    time and sampling takes its steps out of T.

    Attributes:
        schedule: name of the betas ("linear", "cosine", "quadratic", "sigmoid", "constant", "reciprocal"; see
            `diffusion.schedules`), or the betas themselves, each in (0, 1); or the name of a process of continuous time
            ("vp", "sub_vp", "ve", "cosine_log_snr"; see `diffusion.continuous`).
        num_steps: T >= 1; the number of betas if they are given; of continuous time, the number of evenly spaced times
            that samplers choose theirs from.
        prediction: what the network predicts: "eps", "x0", "v", "score" or "mean"; in continuous time no "mean", and
            "v" where alpha^2 + sigma^2 = 1.
        variance: of the reverse step: "fixed_small", "fixed_large", or "learned_range", for which the network's output
            has twice the channels; not in continuous time.
        span: of continuous time: (beta_min, beta_max) of "vp" and "sub_vp", (sigma_min, sigma_max) of "ve", and the
            least and largest log-SNR of "cosine_log_snr". None takes the published one, (0.1, 20), (0.01, 50) and
            (-20, 20), which is kept as None too.
        time: what the network receives as t: "t", the timestep or the time in [0, 1]; or the noise level: "sigma",
            "alpha_bar" (alpha^2, the gamma of SR3) or "log_snr". With a noise level a process of betas is trained in
            continuous time too, 1 - alpha_bar being linear between its steps (SR3, section 2.4; WaveGrad).

    Raises:
        ValueError: if a field is none of these, or fields contradict each other.
    """

    schedule: str | tuple[float, ...] = "cosine"
    num_steps: int = 1000
    prediction: PredictionType = "eps"
    variance: Variance = "fixed_small"
    span: tuple[float, float] | None = dataclasses.field(default=None, metadata=_NOT_COMPARED)
    time: Time = dataclasses.field(default="t", metadata=_NOT_COMPARED)

    def __post_init__(self):
        why = "since tables are made in float64"
        check_static("num_steps", self.num_steps, why)
        check_static("schedule", self.schedule, why)
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int):
            raise ValueError(f"num_steps={self.num_steps!r} must be an integer")
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps={self.num_steps} must be between 1 and {MAX_STEPS}")
        if not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", _given_betas(self.schedule, self.num_steps))
        elif self.schedule not in (*SCHEDULES, *CONTINUOUS):
            names = ", ".join(map(repr, (*SCHEDULES, *CONTINUOUS)))
            raise ValueError(f"schedule={self.schedule!r} must be one of {names}")
        options = {"prediction": get_args(PredictionType), "variance": get_args(Variance), "time": get_args(Time)}
        for name, values in options.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, values))}")
        self._check_span()
        if self.schedule not in CONTINUOUS:
            _betas(self.schedule, self.num_steps)
        if (schedule := self.continuous) is not None:
            schedule.check_prediction(self.prediction)
            if self.variance == "learned_range":
                raise ValueError("variance='learned_range' is of discrete time; training here is in continuous time")

    def _check_span(self) -> None:
        if self.span is None:
            return
        if self.schedule not in CONTINUOUS:
            raise ValueError(f"span={self.span!r} is of {', '.join(map(repr, CONTINUOUS))}, not of {self.schedule!r}")
        ends = tuple(self.span) if isinstance(self.span, Sequence) and not isinstance(self.span, str) else ()
        if len(ends) != 2 or not all(map(is_finite, ends)):
            raise ValueError(f"span={self.span!r} must be two numbers")
        ends = tuple(map(float, ends))
        object.__setattr__(self, "span", None if ends == CONTINUOUS[self.schedule][1] else ends)

    @property
    def continuous(self) -> Schedule | None:
        """The process in continuous time that training samples from; None where it samples one of T timesteps."""
        if self.schedule in CONTINUOUS:
            make, published = CONTINUOUS[self.schedule]
            return make(*(self.span or published))
        return None if self.time == "t" else _interpolated(self.schedule, self.num_steps)

    def network_time(self, t: jax.Array) -> Any:
        """Return what the network receives at times of `continuous`, float32[...]."""
        if self.time == "t":
            return t
        schedule = self.continuous
        if self.time == "sigma":
            return schedule.sigma(t)
        return schedule.log_snr(t) if self.time == "log_snr" else jax.numpy.square(schedule.alpha(t))

    @property
    def process(self) -> GaussianProcess:
        """The tables of the process."""
        return _process(self.schedule, self.num_steps, self.span, self.time)

    def respaced(self, steps: int | str | Sequence[int]) -> GaussianProcess:
        """Return the tables of some of the steps.

        steps: see `schedules.respaced_timesteps`.

        Raises:
            ValueError: if the process has no such steps.
        """
        if self.schedule not in CONTINUOUS:
            with jax.ensure_compile_time_eval():
                return respace(self.process, steps)
        chosen = respaced_timesteps(self.num_steps, steps)
        published = isinstance(steps, (str, int, np.integer))
        short = _discretized(self.schedule, self.num_steps, self.span, self.time, tuple(chosen))
        return short.replace(**left_steps_out(1.0, (), self.num_steps, chosen, published=published))

    def replace(self, **fields) -> "Diffusion":
        """Return a copy with other fields."""
        return dataclasses.replace(self, **fields)

    def channels(self, data_channels: int) -> int:
        """Return the number of channels of the network's output, given that of the data."""
        return data_channels * (2 if self.variance == "learned_range" else 1)


def _given_betas(schedule: Any, num_steps: int) -> tuple[float, ...]:
    try:
        betas = tuple(float(beta) for beta in schedule)
    except (TypeError, ValueError):
        raise ValueError(f"schedule={schedule!r} must be a name, or a sequence of betas") from None
    if len(betas) != num_steps:
        raise ValueError(f"schedule has {len(betas)} betas, and num_steps={num_steps}")
    return betas


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
def _interpolated(schedule: str | tuple[float, ...], num_steps: int) -> Schedule:
    return interpolated(_betas(schedule, num_steps))


@functools.lru_cache(maxsize=64)
def _process(
    schedule: str | tuple[float, ...], num_steps: int, span: tuple[float, float] | None, time: Time
) -> GaussianProcess:
    if schedule in CONTINUOUS:
        return _discretized(schedule, num_steps, span, time, tuple(range(num_steps)))
    betas = _betas(schedule, num_steps)
    with jax.ensure_compile_time_eval():  # the tables are numbers, also where this runs inside a jitted function
        return _with_time(make_process(betas), time)


@functools.lru_cache(maxsize=64)
def _discretized(
    schedule: str, num_steps: int, span: tuple[float, float] | None, time: Time, chosen: tuple[int, ...]
) -> GaussianProcess:
    """Return the process of continuous time at some of T evenly spaced times, 0 being the least noisy."""
    make, published = CONTINUOUS[schedule]
    continuous = make(*(span or published))
    times = uniform_times(continuous, num_steps)[::-1][list(chosen)]
    with jax.ensure_compile_time_eval():
        process = _with_time(discretize(continuous, times[::-1]), time)
    return process.replace(time_is_sigma=schedule == "ve" and time == "sigma", shortened=len(chosen) < num_steps)


def _with_time(process: GaussianProcess, time: Time) -> GaussianProcess:
    """Return the process with what the network receives."""
    return process if time == "t" else process.replace(timestep_map=getattr(process, time))
