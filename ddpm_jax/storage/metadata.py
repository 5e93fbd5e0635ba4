"""The metadata of a model: plain data, of which the parts that loaders use are checked here, field by field."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from flax.core import FrozenDict

from ddpm_jax.data.tokenizer import tokenizer_from_config
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.errors import LoadError

_DEPTH, _LARGEST, _CLASSES = 16, 65_536, 10_000_000


def check_metadata(metadata: Any, where: str) -> None:
    """Check that metadata is plain data, and that the fields with a meaning to loaders are in their ranges.

    Raises:
        LoadError: otherwise; it begins with `where` and the name of the field.
    """
    if not isinstance(metadata, Mapping):
        raise LoadError(f"{where} must be an object, got {type(metadata).__name__}")
    check_plain(metadata, where)
    for name, check in _CHECKS.items():
        if metadata.get(name) is not None:
            check(f"{where}.{name}", metadata[name])


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise LoadError unless a value is made of objects, lists, texts and finite numbers, not deeply nested."""
    if depth > _DEPTH:
        raise LoadError(f"{where} is nested more than {_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str):
                raise LoadError(f"{where} has the name {name!r}, which is no text")
            check_plain(part, f"{where}.{name}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            check_plain(part, f"{where}[{number}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise LoadError(f"{where}={value} must be a finite number")
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise LoadError(f"{where} is an integer of more than 63 bits")
    elif value is not None and not isinstance(value, (bool, str)):
        raise LoadError(f"{where} is a {type(value).__name__}, which cannot be stored")


def freeze(value: Any) -> Any:
    """Return plain data in a form that can be hashed: `FrozenDict` and tuples."""
    if isinstance(value, Mapping):
        return FrozenDict({name: freeze(part) for name, part in value.items()})
    return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value


def thaw(value: Any) -> Any:
    """Return frozen data as dictionaries and lists, which JSON can hold."""
    if isinstance(value, Mapping):
        return {name: thaw(part) for name, part in value.items()}
    return list(map(thaw, value)) if isinstance(value, (list, tuple)) else value


def diffusion_from(fields: Any, where: str = "diffusion") -> Diffusion:
    """Return the `Diffusion` of plain data.

    Raises:
        LoadError: if a field is unknown or out of its range.
    """
    known = tuple(Diffusion.__dataclass_fields__)
    if not isinstance(fields, Mapping):
        raise LoadError(f"{where} must be an object with {', '.join(known)}")
    for name in fields:
        if name not in known:
            raise LoadError(f"{where} has no field {name!r}; it has {', '.join(known)}")
    try:
        return Diffusion(**fields)
    except (ValueError, TypeError) as error:
        raise LoadError(f"{where}: {error}") from None


def integer(least: int, most: int) -> Callable[[str, Any], None]:
    """Return a check that a value is an integer in a range."""

    def check(where: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise LoadError(f"{where}={value!r:.60} must be an integer in [{least}, {most}]")

    return check


def number(least: float, most: float) -> Callable[[str, Any], None]:
    """Return a check that a value is a number in a range."""

    def check(where: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise LoadError(f"{where}={value!r:.60} must be a number in [{least:g}, {most:g}]")

    return check


def flag(where: str, value: Any) -> None:
    """Raise LoadError unless a value is True or False."""
    if not isinstance(value, bool):
        raise LoadError(f"{where}={value!r:.60} must be true or false")


def _parts(**checks: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Return a check of an object's fields; one that is absent or null is not checked."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise LoadError(f"{where}={value!r:.60} must be an object")
        for name, inner in checks.items():
            if value.get(name) is not None:
                inner(f"{where}.{name}", value[name])

    return check


def _texts(where: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise LoadError(f"{where}={value!r:.60} must be a list of texts")


def _labels(where: str, value: Any) -> None:
    _parts(num_classes=integer(1, _CLASSES), null=integer(0, _CLASSES), names=_texts)(where, value)
    if value.get("num_classes") is None:
        raise LoadError(f"{where} lacks the field num_classes")
    if value.get("names") is not None and len(value["names"]) != value["num_classes"]:
        raise LoadError(f"{where} has {len(value['names'])} names for num_classes={value['num_classes']}")


def _tokenizer(where: str, value: Any) -> None:
    try:
        tokenizer_from_config(value)
    except ModuleNotFoundError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoadError(f"{where} is not a tokenizer of this version: {error}") from None


def _sampling(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise LoadError(f"{where}={value!r:.60} must be an object with the options of a sampler")
    try:
        sampling_from(value, name=where)
    except (ValueError, TypeError) as error:
        raise LoadError(str(error)) from None


def _fingerprints(where: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) and len(text) == 64 for text in value.values()):
        raise LoadError(f"{where}={value!r:.60} must be an object of SHA-256 sums in hexadecimal digits")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "caption": _parts(length=integer(3, _LARGEST), own_tokens=flag),
    "channels": integer(1, _LARGEST),
    "conditions": _texts,
    "diffusion": lambda where, value: diffusion_from(value, where) and None,
    "embedding": _parts(scale=number(1e-6, 1e6), size=integer(1, _LARGEST), standardized=flag),
    "image_size": integer(1, _LARGEST),
    "labels": _labels,
    "length": integer(3, _LARGEST),
    "low_resolution": _parts(size=integer(1, _LARGEST), noise_level_input=flag, sampling_noise_level=number(0, 1)),
    "needs": _fingerprints,
    "num_steps": integer(1, 100_000),
    "sampling": _sampling,
    "timestep_scale": number(1e-6, 1e6),
    "noised": flag,
    "tokenizer": _tokenizer,
    "tokens": _parts(length=integer(1, _LARGEST), drop=number(0, 1), tokenizer=_tokenizer),
}
