"""Noise schedules and respacing, in float64 numpy.

Schedules are small tables computed once, so they are plain numpy in float64: published models were trained with betas
that were multiplied up in float64, and a float32 product over a thousand steps differs from theirs.
"""

import re
from collections.abc import Sequence
from itertools import accumulate

import numpy as np


def linear_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Return the linear schedule of DDPM (section 4), scaled so that any length reaches the same noise.

    beta_i = (1000 / T) * linspace(beta_start, beta_end, T)_i; the scale is that of Improved DDPM's code. At T = 1000 it
    is DDPM's own schedule.

    Args:
        num_steps: T, large enough that beta_end * 1000 / T < 1 (T > 20 with the defaults).
        beta_start: first beta at T = 1000, in (0, 1).
        beta_end: last beta at T = 1000, in (0, 1).

    Returns:
        betas, float64[T] in (0, 1).

    Raises:
        ValueError: if num_steps < 1 or a beta leaves (0, 1).
    """
    _check_num_steps(num_steps)
    scale = 1000.0 / num_steps
    if not (0.0 < scale * beta_start < 1.0 and 0.0 < scale * beta_end < 1.0):
        raise ValueError(
            f"linear_betas with {num_steps=}, {beta_start=}, {beta_end=} leaves (0, 1): betas are scaled by 1000 / "
            f"num_steps, so num_steps must be more than {1000 * max(beta_start, beta_end):g} and betas positive"
        )
    return np.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=np.float64)


def cosine_betas(num_steps: int, s: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """Return the cosine schedule of Improved DDPM (eq. 17).

    alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2)
    beta_i = min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta)

    The clipped betas, not alpha_bar itself, are the schedule: alpha_bar is multiplied up from them again by
    ``make_process``, as in the published models, and therefore does not reach zero.

    Args:
        num_steps: T >= 1.
        s: offset that keeps the first betas from vanishing, >= 0.
        max_beta: upper clip, in (0, 1).

    Returns:
        betas, float64[T] in (0, max_beta].

    Raises:
        ValueError: if num_steps < 1, s < 0 or max_beta is outside (0, 1).
    """
    _check_num_steps(num_steps)
    if s < 0.0:
        raise ValueError(f"{s=} must not be negative")
    if not 0.0 < max_beta < 1.0:
        raise ValueError(f"{max_beta=} must be in (0, 1)")
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    alpha_bar = np.cos((u + s) / (1.0 + s) * np.pi / 2.0) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def respaced_timesteps(num_steps: int, spec: str | int | Sequence[int]) -> list[int]:
    """Choose which of T timesteps a shorter process keeps.

    Args:
        num_steps: T, the length of the original process.
        spec: one of

            - ``"250"`` or ``250``: that many steps, evenly spaced with both end points (Improved DDPM);
            - ``"10,10,3,2,2"``: [0, T) cut into equal sections, so many steps in each, the least noisy section first;
            - ``"ddim50"``: that many steps with one integer stride from 0 (DDIM);
            - ``"fast27"``: GLIDE's ``"10,10,3,2,2"`` with the last step T - 1 replaced by T - 3;
            - a list of timesteps, strictly increasing. (A list means the timesteps themselves, not section counts.)

    Returns:
        The kept timesteps in increasing order, each in [0, T).

    Raises:
        ValueError: if the spec cannot be read, asks for more steps than there are, or is a list that is not strictly
            increasing inside [0, T).
    """
    _check_num_steps(num_steps)
    if isinstance(spec, (int, np.integer)) and not isinstance(spec, bool):
        return _sections(num_steps, [int(spec)], spec)
    if not isinstance(spec, str):
        return _explicit(num_steps, spec)
    text = spec.replace(" ", "")
    if text == "fast27":
        return _fast27(num_steps)
    if re.fullmatch(r"ddim\d+", text):
        return _integer_stride(num_steps, int(text.removeprefix("ddim")))
    if re.fullmatch(r"\d+(,\d+)*", text):
        return _sections(num_steps, [int(count) for count in text.split(",")], spec)
    raise ValueError(f'{spec=} must be like "250", "10,10,3,2,2", "ddim50", "fast27", or a list of timesteps')


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be at least 1")


def _explicit(num_steps: int, spec: Sequence[int]) -> list[int]:
    steps = np.asarray(spec)
    if steps.ndim != 1 or steps.size == 0 or not np.issubdtype(steps.dtype, np.integer):
        raise ValueError(f"{spec=} must be a non-empty list of integer timesteps")
    if np.any(np.diff(steps) <= 0):
        raise ValueError(f"{spec=} must be strictly increasing")
    if steps[0] < 0 or steps[-1] >= num_steps:
        raise ValueError(f"{spec=} must lie in [0, {num_steps})")
    return [int(step) for step in steps]


def _integer_stride(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps + 1):
        steps = range(0, num_steps, stride)
        if len(steps) == count:
            return list(steps)
    raise ValueError(f'spec="ddim{count}" is impossible: no integer stride takes {count} steps from {num_steps}')


def _sections(num_steps: int, counts: Sequence[int], spec: str | int) -> list[int]:
    if min(counts) < 1:
        raise ValueError(f"{spec=} must ask for at least 1 step in every section")
    base, longer = divmod(num_steps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = base + (section < longer)
        if count > size:
            raise ValueError(f"{spec=} asks for {count} steps where there are only {size} (of {num_steps} in all)")
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        # The stride is added up, not multiplied, and rounded half to even: ties fall as in the published models.
        kept += [start + round(offset) for offset in accumulate([stride] * (count - 1), initial=0.0)]
        start += size
    return kept


def _fast27(num_steps: int) -> list[int]:
    steps = _sections(num_steps, [10, 10, 3, 2, 2], "fast27")
    moved = [*steps[:-1], num_steps - 3]
    if moved[-2] >= moved[-1]:
        raise ValueError(f'spec="fast27" needs a longer process than {num_steps=}')
    return moved
