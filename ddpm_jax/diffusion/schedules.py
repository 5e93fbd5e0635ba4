"""Noise schedules and respacing, in float64 numpy.

Schedules are small tables computed once, so they are plain numpy in float64: published models were trained with betas
that were multiplied up in float64, and a float32 product over a thousand steps differs from theirs.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ddpm_jax.checks import check_static, shown

SPACINGS = ("leading", "trailing", "linspace")
MADE_IN_NUMPY = "since schedules are made in float64 by numpy"


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
    scale = _scale("linear_betas", num_steps, beta_start, beta_end)
    return np.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=np.float64)


def quadratic_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Return the quadratic schedule of DDPM's code ("quad"), which DDIM used for its CIFAR-10 timesteps.

    beta_i = (1000 / T) * linspace(sqrt(beta_start), sqrt(beta_end), T)_i^2. Arguments, errors and the scale are those
    of ``linear_betas``.
    """
    scale = _scale("quadratic_betas", num_steps, beta_start, beta_end)
    return scale * np.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=np.float64) ** 2


def sigmoid_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, reach: float = 6.0) -> np.ndarray:
    """Return the schedule that goes from beta_start to beta_end along a sigmoid (Xu et al. 2022, GeoDiff's code).

    beta_i = (1000 / T) * (beta_start + (beta_end - beta_start) / (1 + exp(-linspace(-reach, reach, T)_i))). Arguments,
    errors and the scale are those of ``linear_betas``; reach > 0. (Jabri et al. 2022 shape alpha_bar by a sigmoid:
    ``betas_from_alpha_bar`` with ``sigmoid_alpha_bar``.)
    """
    scale = _scale("sigmoid_betas", num_steps, beta_start, beta_end)
    check_static("reach", reach, MADE_IN_NUMPY)
    if reach <= 0.0:
        raise ValueError(f"{reach=} must be positive")
    share = 1.0 / (1.0 + np.exp(-np.linspace(-reach, reach, num_steps, dtype=np.float64)))
    return scale * (beta_start + (beta_end - beta_start) * share)


def constant_betas(num_steps: int, beta: float = 0.02) -> np.ndarray:
    """Return the same beta at every step (DDPM's code, "const"), scaled by 1000 / T like ``linear_betas``."""
    scale = _scale("constant_betas", num_steps, beta, beta)
    return np.full(num_steps, scale * beta, np.float64)


def reciprocal_betas(num_steps: int) -> np.ndarray:
    """Return beta_i = 1 / (T - i): 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015, section 2.4.1; DDPM's "jsd").

    It takes away the same share of the data at every step: alpha_bar_i = 1 - (i + 1) / T. The last is 0, see
    ``zero_terminal_snr`` for what that requires of a network.

    Returns:
        betas, float64[T] in (0, 1].

    Raises:
        ValueError: if num_steps < 2.
    """
    check_static("num_steps", num_steps, MADE_IN_NUMPY)
    if num_steps < 2:
        raise ValueError(f"{num_steps=} must be at least 2")
    return 1.0 / np.arange(num_steps, 0, -1, dtype=np.float64)


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
    check_static("s", s, MADE_IN_NUMPY)
    if s < 0.0:
        raise ValueError(f"{s=} must not be negative")
    return betas_from_alpha_bar(num_steps, lambda u: np.cos((u + s) / (1.0 + s) * np.pi / 2.0) ** 2, max_beta)


def betas_from_alpha_bar(
    num_steps: int, alpha_bar: Callable[[np.ndarray], np.ndarray], max_beta: float = 0.999
) -> np.ndarray:
    """Return the betas of any alpha_bar on [0, 1] (Improved DDPM, eq. 17).

    beta_i = min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta). Only ratios of alpha_bar matter, so it need
    not be 1 at 0.

    Args:
        num_steps: T >= 1.
        alpha_bar: float64[T + 1] in [0, 1] -> float64[T + 1], positive (it may reach 0 at 1) and decreasing.
        max_beta: upper clip, in (0, 1).

    Returns:
        betas, float64[T] in (0, max_beta].

    Raises:
        ValueError: if num_steps < 1, max_beta is outside (0, 1) or alpha_bar does not decrease.
    """
    _check_num_steps(num_steps)
    check_static("max_beta", max_beta, MADE_IN_NUMPY)
    if not 0.0 < max_beta < 1.0:
        raise ValueError(f"{max_beta=} must be in (0, 1)")
    values = np.asarray(alpha_bar(np.arange(num_steps + 1, dtype=np.float64) / num_steps), np.float64)
    if values.shape != (num_steps + 1,) or not (np.all(values[:-1] > 0.0) and np.all(np.diff(values) < 0.0)):
        raise ValueError("alpha_bar must be positive and decreasing on [0, 1], one value for each of its arguments")
    return np.minimum(1.0 - values[1:] / values[:-1], max_beta)


def sigmoid_alpha_bar(
    u: np.ndarray, *, start: float = -3.0, end: float = 3.0, tau: float = 1.0, smallest: float = 1e-9
) -> np.ndarray:
    """Return alpha_bar(u) of the sigmoid schedule (Jabri et al. 2022, RIN, and Chen 2023, algorithm 1).

    alpha_bar(u) = (S(end) - S(start + u (end - start))) / (S(end) - S(start)), S(x) = 1 / (1 + exp(-x / tau)), not
    below `smallest`. For ``betas_from_alpha_bar``.

    Args:
        u: float64[...] in [0, 1].
        start, end: the part of the sigmoid, start < end.
        tau: > 0; larger is closer to a straight line.
        smallest: > 0.

    Raises:
        ValueError: if start >= end, or tau or smallest is not positive.
    """
    check_static("u, start, end, tau and smallest", (u, start, end, tau, smallest), MADE_IN_NUMPY)
    if not start < end:
        raise ValueError(f"{start=} must be less than {end=}")
    if not (tau > 0.0 and smallest > 0.0):
        raise ValueError(f"{tau=} and {smallest=} must be positive")
    sigmoid = lambda x: 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64) / tau))
    left = sigmoid(end) - sigmoid(start + np.asarray(u, np.float64) * (end - start))
    return np.maximum(left / (sigmoid(end) - sigmoid(start)), smallest)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Rescale a schedule so that the last step is pure noise (Lin et al. 2024, algorithm 1).

    sqrt(alpha_bar) is shifted and scaled linearly so that its last value is 0 and its first stays; the last beta
    becomes 1. A network that predicts eps says nothing about x0 there: use "v" or "x0".

    Args:
        betas: [T], T >= 2, each in (0, 1).

    Returns:
        betas, float64[T] in (0, 1].

    Raises:
        ValueError: if betas is not a vector of at least two entries in (0, 1).
    """
    check_static("betas", betas, MADE_IN_NUMPY)
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2 or not np.all((betas > 0.0) & (betas < 1.0)):
        raise ValueError(f"betas must be a vector of at least 2 entries inside (0, 1), got shape {betas.shape}")
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = np.append(1.0, root**2)
    return 1.0 - alpha_bar[1:] / alpha_bar[:-1]


def respaced_timesteps(num_steps: int, spec: str | int | Sequence[int]) -> list[int]:
    """Choose the timesteps of a shorter process out of T.

    Args:
        num_steps: T, the length of the original process.
        spec: one of

            - ``"250"`` or ``250``: that many steps, evenly spaced with both end points (Improved DDPM);
            - ``"10,10,3,2,2"``: [0, T) cut into equal sections with these numbers of steps, from the least noisy on;
            - ``"ddim50"``: that many steps with one integer stride from 0 (DDIM);
            - ``"fast27"``: GLIDE's ``"10,10,3,2,2"`` with the last step T - 1 replaced by T - 3;
            - a list of timesteps, strictly increasing. (A list means the timesteps themselves, not section counts.)

    Returns:
        The chosen timesteps in increasing order, each in [0, T).

    Raises:
        ValueError: if the spec cannot be read, has more steps than there are, or is a list that is not strictly
            increasing inside [0, T).
    """
    _check_num_steps(num_steps)
    check_static("spec", spec, MADE_IN_NUMPY)
    if isinstance(spec, (int, np.integer)) and not isinstance(spec, bool):
        return _sections(num_steps, [int(spec)], spec)
    if not isinstance(spec, str):
        return _explicit(num_steps, spec)
    text = re.sub(r"\s*,\s*", ",", spec.strip())
    if re.search(r"\d{10}", text):
        raise ValueError(f"spec={shown(spec)} has a number of ten or more digits, and there are {num_steps} steps")
    if text == "fast27":
        return _fast27(num_steps)
    if re.fullmatch(r"ddim\d+", text):
        return _integer_stride(num_steps, int(text.removeprefix("ddim")))
    if re.fullmatch(r"\d+(,\d+)*", text):
        return _sections(num_steps, [int(count) for count in text.split(",")], spec)
    raise ValueError(
        f'spec={shown(spec)} must be like "250", "10,10,3,2,2", "ddim50", "fast27", or a list of timesteps'
    )


def spaced_timesteps(num_steps: int, count: int, spacing: str = "leading", offset: int = 0) -> list[int]:
    """Choose timesteps by one of the rules of Lin et al. 2024, table 2, which schedulers of Stable Diffusion name.

    "leading": offset + i (T // count); "trailing": round(T - i T / count) - 1; "linspace": evenly from 0 to T - 1,
    rounded.

    Args:
        num_steps: T.
        count: how many.
        spacing: the rule.
        offset: of "leading"; its first timestep.

    Returns:
        The timesteps in increasing order, each in [0, T).

    Raises:
        ValueError: if there are fewer timesteps, or the rule is unknown.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"{spacing=} must be one of {', '.join(map(repr, SPACINGS))}")
    _check_num_steps(num_steps)
    check_static("count and offset", (count, offset), "since they are shapes and timesteps")
    most = num_steps - (offset if spacing == "leading" else 0)
    if not 1 <= count <= most:
        raise ValueError(f"{count=} must be between 1 and {most}")
    if spacing == "trailing":
        return [round(num_steps - i * (num_steps / count)) - 1 for i in reversed(range(count))]
    if spacing == "linspace":
        return [round(float(t)) for t in np.linspace(0, num_steps - 1, count)]
    found = [offset + i * (num_steps // count) for i in range(count)]
    if found[-1] >= num_steps:
        raise ValueError(f"{count=} with {offset=} leads to timestep {found[-1]} of {num_steps}")
    return found


def left_steps_out(
    reach: float, ends: tuple[float, ...], num_steps: int, chosen: Sequence[int], *, published: bool = False
) -> dict[str, Any]:
    """Return ``reach`` and ``ends`` of the process of a subset of the steps of a ``GaussianProcess``.

    Args:
        reach, ends: of the process.
        num_steps: its number of steps.
        chosen: the steps of the subset, increasing.
        published: True for the published rules, which leave ``reach`` as it is.
    """
    shares = ends or tuple((i + 1) / num_steps for i in range(num_steps))
    last = reach if published or chosen[-1] == num_steps - 1 else shares[chosen[-1]]
    return {"reach": last, "ends": ends if len(chosen) == num_steps else tuple(shares[i] for i in chosen)}


def _scale(name: str, num_steps: int, beta_start: float, beta_end: float) -> float:
    _check_num_steps(num_steps)
    check_static("beta_start and beta_end", (beta_start, beta_end), MADE_IN_NUMPY)
    scale = 1000.0 / num_steps
    if not (0.0 < scale * beta_start < 1.0 and 0.0 < scale * beta_end < 1.0):
        raise ValueError(
            f"{name} with {num_steps=} and betas from {beta_start} to {beta_end} leaves (0, 1): betas are scaled by "
            f"1000 / num_steps, so num_steps must be more than {1000 * max(beta_start, beta_end):g} and betas positive"
        )
    return scale


def _check_num_steps(num_steps: int) -> None:
    check_static("num_steps", num_steps, MADE_IN_NUMPY)
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be at least 1")


def _explicit(num_steps: int, spec: Sequence[int]) -> list[int]:
    steps = np.asarray(spec)
    if steps.ndim != 1 or steps.size == 0 or not np.issubdtype(steps.dtype, np.integer):
        raise ValueError(f"spec={shown(spec)} must be a non-empty list of integer timesteps")
    if np.any(np.diff(steps) <= 0):
        raise ValueError(f"spec={shown(spec)} must be strictly increasing")
    if steps[0] < 0 or steps[-1] >= num_steps:
        raise ValueError(f"spec={shown(spec)} must lie in [0, {num_steps})")
    return [int(step) for step in steps]


def _integer_stride(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps + 1):
        steps = range(0, num_steps, stride)
        if len(steps) == count:
            return list(steps)
    raise ValueError(f'spec="ddim{count}" is impossible: no integer stride takes {count} steps from {num_steps}')


def _sections(num_steps: int, counts: Sequence[int], spec: str | int) -> list[int]:
    if min(counts) < 1:
        raise ValueError(f"spec={shown(spec)} must have at least 1 step in every section")
    base, longer = divmod(num_steps, len(counts))
    chosen, start = [], 0
    for section, count in enumerate(counts):
        size = base + (section < longer)
        if count > size:
            raise ValueError(
                f"spec={shown(spec)} selects {shown(count)} steps where there are only {size} (of {num_steps} in all)"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        # The stride is added up, not multiplied, and rounded half to even: ties fall as in the published models.
        chosen += [start + round(offset) for offset in accumulate([stride] * (count - 1), initial=0.0)]
        start += size
    return chosen


def _fast27(num_steps: int) -> list[int]:
    steps = _sections(num_steps, [10, 10, 3, 2, 2], "fast27")
    moved = [*steps[:-1], num_steps - 3]
    if moved[-2] >= moved[-1]:
        raise ValueError(f'spec="fast27" needs a longer process than {num_steps=}')
    return moved
