"""Networks as plain data: the class and the fields of each, checked one by one before anything is made of them.

A description comes from a file that anyone may have written. So the classes are those of one list, every field must be
of the type that the class declares and in the range of its name, and nothing is built from numbers outside of it.
"""

import collections.abc
import dataclasses
import difflib
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import LoadError
from ddpm_jax.models import (
    adm,
    autoencoder,
    autoregressive_prior,
    clip,
    decoder,
    embedding_codes,
    embedding_norm,
    glide,
    inception,
    mlp,
    modified_resnet,
    ncsnpp,
    noised_clip,
    prior,
    text_encoder,
    transformer,
    unet,
    upsampler,
)
from ddpm_jax.types import DTYPES

NETWORKS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        adm.Classifier, adm.ClassUNet, adm.SuperUNet, autoencoder.Autoencoder,
        autoregressive_prior.AutoregressivePrior, embedding_codes.EmbeddingCodes, clip.CLIP, clip.VisionTransformer,
        embedding_norm.EmbeddingStatistics,
        decoder.Decoder, glide.Glide, inception.Inception, mlp.TimeMLP, modified_resnet.ModifiedResNet,
        ncsnpp.NCSNpp,
        noised_clip.NoisedCLIP,
        noised_clip.NoisedVisionTransformer, prior.DiffusionPrior, text_encoder.RecurrentTextEncoder,
        text_encoder.TextEncoder, unet.UNet, upsampler.Upsampler,
    )
}  # fmt: skip
FUNCTIONS = {function.__name__: function for function in (transformer.gelu, transformer.quick_gelu)}
# The classes of a field that is declared as any network.
_MEMBERS = {"text_encoder": (text_encoder.TextEncoder, text_encoder.RecurrentTextEncoder)}
_CHOICES = {
    "pool": adm.POOLS, "combine": ncsnpp.COMBINERS, "embedding": ncsnpp.EMBEDDINGS, "input_pyramid": ncsnpp.PYRAMIDS,
    "output_pyramid": ncsnpp.PYRAMIDS,
}  # fmt: skip
# The largest published values are far below: 48 layers, widths of 8192, 49408 tokens, 21841 classes.
_LARGEST, _IDS, _LEVELS = 65_536, 10_000_000, 16
_INTEGERS = {
    "buckets": (2, _LARGEST),
    "dot_buckets": (2, _LARGEST),
    "attention_levels": (0, _LEVELS - 1),
    "frequency_shift": (0, 1),
    "heads": (1, 4096),
    "heads_up": (1, 4096),
    "layers": (1, 1000),
    "cond_map_channels": (0, _LARGEST),
    "cond_map_heads": (0, 4096),
    "num_classes": (1, _IDS),
    "num_res_blocks": (1, 100),
    "num_steps": (1, 100_000),
    "patch": (1, 1024),
    "vocab_size": (1, _IDS),
    "word_vectors": (0, _IDS),
}
# Fields of model.json that had another name.
_RENAMED = {"layout_channels": "cond_map_channels", "layout_heads": "cond_map_heads"}
_NUMBERS = {"channel_mult": (1e-3, 1024.0), "dropout": (0.0, 0.999), "norm_eps": (1e-12, 1.0), "scale": (1e-6, 1e6)}
_NUMBERS |= {"sigma_range": (1e-9, 1e9), "sigma_unit": (1e-6, 1e6)}


def describe(network: nn.Module) -> dict[str, Any]:
    """Return a network as plain data: its class and all its fields.

    A network of another class than those of this package is described for the record: it is not built from a file, and
    fields that are not plain data become text.

    Raises:
        ValueError: if a field of a network of this package is neither plain data, a network, an activation of this
            package nor a dtype.
    """
    kind = type(network)
    own = NETWORKS.get(kind.__name__) is kind
    found: dict[str, Any] = {"class": kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"}
    for field in _fields(kind):
        try:
            found[field.name] = _described(f"{kind.__name__}.{field.name}", getattr(network, field.name))
        except ValueError:
            if own:
                raise
            value = getattr(network, field.name)
            found[field.name] = {"text": getattr(value, "__name__", type(value).__name__)}
    return found


def _described(where: str, value: Any) -> Any:
    if isinstance(value, nn.Module):
        return describe(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (tuple, list)):
        return [_described(where, part) for part in value]
    if getattr(value, "__name__", None) in FUNCTIONS and FUNCTIONS[value.__name__] is value:
        return {"function": value.__name__}
    for name, dtype in DTYPES.items():
        if isinstance(value, (type, np.dtype)) and jnp.dtype(value) == jnp.dtype(dtype):
            return name
    raise ValueError(f"{where}={value!r} cannot be stored: it must be plain data, a network of this package or a dtype")


def check_fields(network: Any, where: str = "") -> None:
    """Raise ValueError if a field of a network of this package could not be read back from model.json.

    Args:
        network: any object; those of other classes are not checked.
        where: put before the names of fields in messages; the name of the class by default.
    """
    kind = type(network)
    if NETWORKS.get(kind.__name__) is not kind:
        return
    for field in _fields(kind):
        name, value = f"{where or kind.__name__}.{field.name}", getattr(network, field.name)
        if isinstance(value, nn.Module):
            check_fields(value, name)
            continue
        try:
            _value(name, field.name, _described(name, value), field.type, None)
        except LoadError as error:
            raise ValueError(str(error)) from None


def build(description: Any, *, where: str = "network", dtype: Any = None) -> nn.Module:
    """Return the network of a description.

    Args:
        description: what `describe` returned.
        where: put before the names of fields in messages.
        dtype: that it computes in, in place of the one in the description (float32 if there is none).

    Raises:
        LoadError: if a field is unknown, missing, or not of its type and in its range.
    """
    return _build(description, where, dtype, tuple(NETWORKS.values()))


def _build(description: Any, where: str, dtype: Any, allowed: tuple[type[nn.Module], ...]) -> nn.Module:
    if not isinstance(description, Mapping):
        raise LoadError(f"{where}={_short(description)} must be an object with the class and the fields of a network")
    name = description.get("class")
    kind = NETWORKS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise LoadError(
            f"{where}: there is no network {_short(name)} in this version, which has {', '.join(NETWORKS)}; pass a "
            "custom network as ddpm_jax.load(path, network=...)"
        )
    if kind not in allowed:
        names = " or ".join(cls.__name__ for cls in allowed)
        raise LoadError(f"{where} has the class {name}, and must be {names}")
    fields = {field.name: field for field in _fields(kind)}
    values = {}
    for key, value in description.items():
        if key == "class":
            continue
        key = _RENAMED.get(key, key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise LoadError(f"{where}: {name} has no field {_short(key)} in this version{hint}")
        values[key] = _value(f"{where}.{key}", key, value, fields[key].type, dtype)
    if "dtype" in fields and dtype is not None:
        values["dtype"] = dtype
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise LoadError(f"{where} lacks the field {key}, which {name} needs")
    return kind(**values)


def _fields(kind: type[nn.Module]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.name not in ("parent", "name")]


def _value(where: str, name: str, value: Any, declared: Any, dtype: Any) -> Any:
    """Return a field's value as the class takes it."""
    if name == "dtype":
        if not isinstance(value, str) or value not in DTYPES:
            raise LoadError(f"{where}={_short(value)} must be one of {', '.join(map(repr, DTYPES))}")
        return DTYPES[value]
    if name == "remat":
        if value not in (False, True, "products") or isinstance(value, (int, float)) != isinstance(value, bool):
            raise LoadError(f"{where}={_short(value)} must be true, false or 'products'")
        return value
    options = get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    networks = tuple(option for option in options if inspect.isclass(option) and issubclass(option, nn.Module))
    if networks:
        return _build(value, where, dtype, _MEMBERS[name] if networks == (nn.Module,) else networks)
    (option,) = options
    if option in (Callable, collections.abc.Callable):
        function = value.get("function") if isinstance(value, Mapping) and len(value) == 1 else None
        if not isinstance(function, str) or function not in FUNCTIONS:
            raise LoadError(f"{where}={_short(value)} must name a function, one of {', '.join(FUNCTIONS)}")
        return FUNCTIONS[function]
    if get_origin(option) is tuple:
        return _values(where, name, value, get_args(option))
    return _scalar(where, name, value, option)


def _values(where: str, name: str, value: Any, parts: tuple[Any, ...]) -> tuple:
    exact = len(parts) if Ellipsis not in parts else None
    length = f"{exact} entries" if exact else f"at most {_LEVELS} entries"
    least = 1 if name == "channel_mult" else 0
    size = len(value) if isinstance(value, (list, tuple)) else -1
    if not (size == exact if exact else least <= size <= _LEVELS):
        raise LoadError(f"{where}={_short(value)} must be a list with {length}" + (", and not empty" if least else ""))
    return tuple(_scalar(f"{where}[{i}]", name, part, parts[0]) for i, part in enumerate(value))


def _scalar(where: str, name: str, value: Any, kind: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise LoadError(f"{where}={_short(value)} must be true or false")
    elif kind is int:
        least, most = _INTEGERS.get(name, (1, _LARGEST))
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise LoadError(f"{where}={_short(value)} must be an integer in [{least}, {most}]")
    elif kind is float:
        least, most = _NUMBERS.get(name, (-1e6, 1e6))
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise LoadError(f"{where}={_short(value)} must be a number in [{least:g}, {most:g}]")
    elif kind is str:
        if not isinstance(value, str) or value not in _CHOICES.get(name, (value,)) or len(value) > 1000:
            known = ", ".join(map(repr, _CHOICES[name])) if name in _CHOICES else ""
            raise LoadError(f"{where}={_short(value)} must be " + (f"one of {known}" if known else "a short text"))
    else:
        raise LoadError(f"{where} cannot be read from a file: its class declares it as {kind}")
    return value


def _short(value: Any) -> str:
    """Return a value out of a file as a message shows it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
