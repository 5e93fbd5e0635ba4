"""Checks of arguments: numbers that are known are checked at once, traced ones become NaN where they are out of range.

Under ``jit``, ``grad``, ``vmap`` and the like an argument may be traced: its numbers are not known while the function
runs, so it cannot raise because of them. An out-of-range number must not give a finite, wrong result either, so what is
computed from it is NaN. Where a traced value cannot serve at all, since shapes or Python branches depend on it, the
error says so in one sentence.
"""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_known(*values: Any) -> bool:
    """Return whether the numbers of all values can be read here: none is traced or on another host's devices."""
    for value in jax.tree.leaves(values):
        if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
            return False
    return True


def check_number(name: str, value: Any, valid: Callable[[Any], Any], rule: str) -> Any:
    """Return a number that may be traced, checked by ``valid``.

    Args:
        name: of the argument, for the message.
        value: a Python number, or a scalar array.
        valid: value -> bool or bool[].
        rule: what ``valid`` demands, e.g. "must be in [0, 1]".

    Returns:
        A Python number, which takes the dtype of what it is combined with; a traced value is NaN where it is not valid.

    Raises:
        ValueError: if value is not one real number, or is known and not valid.
    """
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, (np.ndarray, jax.Array))
        and value.ndim == 0
        and (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer))
    )
    if not is_number:
        raise ValueError(f"{name}={value!r} must be one number: it {rule}")
    if not is_known(value):
        value = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.result_type(float))
        return jnp.where(valid(value), value, jnp.nan)
    number = np.asarray(value).item()
    if not valid(number):
        raise ValueError(f"{name}={value} {rule}")
    return number


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a value is an integer of at least 1."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={shown(value)} must be an integer")
    if value < 1:
        raise ValueError(f"{name}={shown(value)} must be at least 1")


def is_finite(value: Any) -> bool:
    """Return whether a value is one real number, of Python or numpy, that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def plain(value: Any) -> Any:
    """Return the Python number or string of a NumPy or JAX scalar, and anything else, also a traced one, as it is."""
    if isinstance(value, jax.core.Tracer):
        return value
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def shown(value: Any) -> str:
    """Return a value as a message shows it: on one line, and short."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def check_model(model: Any) -> None:
    """Raise ValueError unless a model is a network as Flax has them, and not its class."""
    if inspect.isclass(model):
        raise ValueError(f"model must be a network, got the class {model.__name__}; write {model.__name__}(...)")
    if not callable(getattr(model, "apply", None)):
        given = "a function" if inspect.isroutine(model) else shown(model)
        raise ValueError(f"model must be a network such as a flax.linen.Module, with init and apply, got {given}")


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless a value is an instance of a class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={shown(value)} must be a {kind.__name__}, such as {kind.__name__}(...)")


def check_data(x0: Any) -> None:
    """Raise ValueError unless x0 is a batch of floats: losses and samplers take images in [-1, 1], not in [0, 255]."""
    if not isinstance(x0, (jax.Array, np.ndarray)):
        raise ValueError(f"x0 must be an array, a batch of floats (images in [-1, 1]), got a {type(x0).__name__}")
    if x0.ndim < 1 or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 must be a batch of floats (images in [-1, 1]), got {x0.dtype}{list(x0.shape)}")


def check_static(name: str, value: Any, why: str) -> None:
    """Raise ValueError if a value is traced that must be known when a function is traced, e.g. since shapes need it."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        raise ValueError(
            f"{name} must be known outside of jit, {why}: give a Python number or numpy array, or mark it static"
        )


def check_indices(name: str, index: jax.Array, size: int) -> None:
    """Raise ValueError if known indices are outside [0, size); of traced ones the result is NaN, see ``look_up``."""
    if not is_known(index):
        return
    values = np.asarray(index)
    if values.size and (values.min() < 0 or values.max() >= size):
        raise ValueError(f"{name} must be in [0, {size}), got values from {values.min()} to {values.max()}")


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return table[index]; NaN (of an integer table its smallest number) where an index is outside [0, size).

    Indexing would clamp large indices and count negative ones from the end.
    """
    return table.at[index].get(mode="fill", wrap_negative_indices=False)
