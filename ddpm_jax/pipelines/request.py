"""Arguments of the pipelines' `generate`: each has one meaning, whatever its Python type, or is refused in a sentence.

An option may be a Python number, a NumPy scalar, or a NumPy or JAX array without axes.
"""

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.diffusion.process import GaussianProcess, respace

Steps = int | str | Sequence[int]
"""A number of steps, a spec of `schedules.respaced_timesteps`, or the timesteps themselves, increasing."""


def as_int(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Return an integer option as a Python int.

    Raises:
        ValueError: if value is not an integer in [least, most]; True and 4.0 are none.
    """
    value, given = _plain(name, value), value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={given!r} must be an integer")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value} must be at most {most}")
    return int(value)


def as_seed(value: Any) -> int:
    """Return a seed in [0, 2**32); JAX would take a larger one modulo 2**32.

    Raises:
        ValueError: if value is not an integer in this range.
    """
    return as_int("seed", value, least=0, most=2**32 - 1)


def as_float(name: str, value: Any, *, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a real option as a Python float.

    Raises:
        ValueError: if value is not a finite number in [least, most].
    """
    value, given = _plain(name, value), value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}={given!r} must be a finite number")
    if not least <= value <= most:
        raise ValueError(f"{name}={value} must be in [{least:g}, {most:g}]")
    return float(value)


def as_steps(name: str, value: Any) -> int | str | tuple[int, ...]:
    """Return a `Steps` option in the form that means the same and can be hashed: "25" and np.int64(25) become 25.

    Raises:
        ValueError: if value is none.
    """
    value, given = _plain(name, value), value
    if isinstance(value, str):
        text = re.sub(r"\s*,\s*", ",", value.strip())
        return int(text) if text.isdecimal() else text
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping, set)):
        found = [_plain(name, step) for step in value]
        if found and all(isinstance(step, numbers.Integral) and not isinstance(step, bool) for step in found):
            return tuple(map(int, found))
    raise ValueError(
        f'{name}={given!r} must be a number of steps, a string like "25" or "ddim25", or increasing timesteps'
    )


def respaced(process: GaussianProcess, name: str, steps: Steps) -> GaussianProcess:
    """Return `respace(process, steps)`; errors name the option.

    Raises:
        ValueError: if the process has no such steps.
    """
    try:
        return respace(process, as_steps(name, steps))
    except ValueError as error:
        raise ValueError(str(error).replace("spec=", f"{name}=", 1)) from None


def as_prompts(prompts: Iterable[str]) -> list[str]:
    """Return captions as a list of strings.

    Args:
        prompts: a list, a tuple, an array of strings or an iterator.

    Raises:
        ValueError: if there is none, they are one string, or one of them is no string; the message names which.
    """
    if isinstance(prompts, (str, bytes)):
        raise ValueError("prompts must be a sequence of at least one caption, got one string; put it into a list")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise ValueError(f"prompts must be a sequence of captions, got {type(prompts).__name__}")
    found = list(prompts)
    if not found:
        raise ValueError("prompts must hold at least one caption")
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"prompts[{number}] must be a string, got {text!r}")
    return [str(text) for text in found]


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, *, name: str = "prompts", allow_empty: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int32[B, L] and mask bool[B, L] of captions.

    Args:
        tokenizer: encodes them.
        texts: B captions.
        length: L.
        name: of the argument that the captions are from.
        allow_empty: True encodes a caption without words as `Tokenizer.null`, the unconditional one.

    Raises:
        ValueError: as the tokenizer; the message names the caption.
    """
    rows = []
    for number, text in enumerate(texts):
        try:
            empty = allow_empty and not tokenizer.ids(text)
            rows.append(tokenizer.null(length) if empty else tokenizer([text], length))
        except ValueError as error:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise ValueError(f"{name}[{number}] = {shown!r}: {error}") from None
    tokens, masks = zip(*rows, strict=True)
    return np.concatenate(tokens), np.concatenate(masks)


class NotFiniteError(ValueError):
    """A network returned NaN or infinity, of which no image can be made."""


def check_finite(stages: Sequence[str], finite: Sequence[jax.Array], rows: np.ndarray, name: str = "prompts") -> None:
    """Refuse a batch in which a stage returned a value that is not finite.

    Args:
        stages: their names, in the order in which they run.
        finite: bool[B] for each stage, whether all its values are finite.
        rows: int[B], the positions of the batch's examples in the argument `name`.

    Raises:
        NotFiniteError: the message names the first such stage and the examples.
    """
    for stage, flags in zip(stages, finite, strict=True):
        bad = np.unique(rows[~np.asarray(flags)[: len(rows)]])
        if bad.size:
            which = ", ".join(f"{name}[{row}]" for row in bad[:8]) + (", ..." if bad.size > 8 else "")
            raise NotFiniteError(
                f"the {stage} returned values that are not finite (NaN or infinity) for {which}: its weights are "
                "damaged, or its numbers overflow in the dtype that it computes in"
            )


def _plain(name: str, value: Any) -> Any:
    """Return the Python number or string of a scalar, and anything else as it is."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a concrete value, not one that JAX traces")
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
