"""A stage as plain data: what a checkpoint is compared with, so that resuming refuses whatever changes the result."""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np


def describe(value: Any) -> Any:
    """Return an object as plain data: dicts, lists, strings and numbers, which differ if its behaviour differs.

    A dataclass or Flax module becomes its class and fields, a function its name, with what its closure holds, a source
    its fingerprint, an array the hash of its bytes. Other objects become their class and attributes, also those that
    begin with "_"; one whose attributes change while it is used needs `fingerprint()` or `to_config()`.

    Raises:
      ValueError: if an object without these refers to itself.
    """
    try:
        return _describe(value)
    except RecursionError:
        raise ValueError(
            f"an object of the class {type(value).__name__} cannot be described, since it refers to itself; give it a "
            "method fingerprint() that returns a text"
        ) from None


def _describe(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _describe(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_describe(entry) for entry in value), key=repr)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.dtype):
        return value.name
    if inspect.ismodule(value):
        return value.__name__
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (np.ndarray, jax.Array)):
        array = np.ascontiguousarray(value)
        return {"array": f"{array.dtype}{list(array.shape)}", "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    if callable(getattr(value, "fingerprint", None)):
        return {"class": type(value).__name__, "fingerprint": value.fingerprint()}
    if isinstance(value, functools.partial):
        return {"function": _describe(value.func), "args": _describe(value.args), "keywords": _describe(value.keywords)}
    if inspect.isfunction(value):
        return _describe_function(value)
    if inspect.ismethod(value):
        return {"method": value.__qualname__, "of": _describe(value.__self__)}
    if not inspect.isclass(value) and inspect.isfunction(inspect.unwrap(value)) and not isinstance(value, nn.Module):
        return {"function": _describe(inspect.unwrap(value))}  # jitted, for example
    if inspect.isclass(value) or callable(value) and hasattr(value, "__qualname__"):
        return _dtype_name(value) or f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_config"):
        return {"class": type(value).__name__, "config": _describe(value.to_config())}
    return {"class": type(value).__name__} | {name: _describe(entry) for name, entry in _fields(value).items()}


def _describe_function(function: Any) -> Any:
    name = f"{function.__module__}.{function.__qualname__}"
    closure = inspect.getclosurevars(function).nonlocals
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if not closure and not defaults:
        return name
    return {"function": name, "closure": _describe(closure), "defaults": _describe(defaults)}


def _dtype_name(value: Any) -> str | None:
    try:
        return np.dtype(value).name if not isinstance(value, str) else None
    except TypeError:
        return None


def _is_described(field: dataclasses.Field, value: Any) -> bool:
    """Return whether a field is compared: always, never, or unless it has its default.

    The last is for fields that are added, so that checkpoints of earlier versions can be resumed.
    """
    how = field.metadata.get("describe", True)
    return value != field.default if how == "unless default" else how


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        # How activations are stored changes no result.
        hidden = ("parent", "name", "remat") if isinstance(value, nn.Module) else ()
        return {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name not in hidden and _is_described(field, getattr(value, field.name))
        }
    attributes = dict(getattr(value, "__dict__", {}))
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
    attributes |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return attributes
