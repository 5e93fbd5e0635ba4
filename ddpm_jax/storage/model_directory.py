"""Converted checkpoints on disk: a directory that loads without flags, and without the library they came from.

`python -m ddpm_jax.convert` makes one. It holds

    model.json       family, networks with all their fields, what was assumed, sha256 of the sources
    NAME.safetensors the parameters of each network, by our names; in shards of half a gigabyte if they are larger
    model_card.md    the same for people
    peer/            the small files that lay beside the source (configs, tokenizer), for the way back
"""

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from ddpm_jax.extras import needs_extra
from ddpm_jax.models import (
    adm,
    autoencoder,
    clip,
    decoder,
    glide,
    inception,
    modified_resnet,
    noised_clip,
    prior,
    text_encoder,
    transformer,
    unet,
    upsampler,
)
from ddpm_jax.storage.json_file import read_json
from ddpm_jax.storage.tensor_file import ReadError, read_tensors
from ddpm_jax.temporary import temporary_path

FORMAT = "ddpm_jax converted 1"
MODEL_FILE, CARD_FILE, PEER = "model.json", "model_card.md", "peer"
SHARD_BYTES = 2**29
_NETWORKS = {
    kind.__name__: kind
    for kind in (
        adm.Classifier, adm.ClassUNet, adm.SuperUNet, autoencoder.Autoencoder, clip.CLIP, clip.VisionTransformer,
        decoder.Decoder, glide.Glide, inception.Inception, modified_resnet.ModifiedResNet, noised_clip.NoisedCLIP,
        noised_clip.NoisedVisionTransformer, prior.DiffusionPrior, text_encoder.TextEncoder, unet.UNet,
        upsampler.Upsampler,
    )
}  # fmt: skip
_FUNCTIONS = {function.__name__: function for function in (transformer.gelu, transformer.quick_gelu)}


class Converted(NamedTuple):
    """Networks and parameters of another library's checkpoint.

    family: as `ddpm_jax.convert --from` calls it. models, params: by the network's name. facts: what the family's
    pipeline needs to know besides, plain data.
    """

    family: str
    models: dict[str, nn.Module]
    params: dict[str, Any]
    facts: dict[str, Any]


def describe(model: nn.Module) -> dict[str, Any]:
    """Return a network as plain data: its class and all its fields but dtype."""
    found: dict[str, Any] = {"class": type(model).__name__}
    for field in dataclasses.fields(model):
        if field.name in ("parent", "name", "dtype"):
            continue
        value = getattr(model, field.name)
        if isinstance(value, nn.Module):
            value = describe(value)
        elif callable(value):
            value = {"function": value.__name__}
        found[field.name] = value
    return found


def build(description: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """Return the network of a description.

    Raises:
        ReadError: if it names what this version does not have.
    """
    fields = dict(description)
    name = fields.pop("class", None)
    if name not in _NETWORKS:
        raise ReadError(f"there is no network {name!r} in this version; it has {', '.join(_NETWORKS)}")
    for key, value in fields.items():
        if isinstance(value, Mapping) and "class" in value:
            fields[key] = build(value, dtype)
        elif isinstance(value, Mapping):
            if value.get("function") not in _FUNCTIONS:
                raise ReadError(f"{name}.{key} is not a function that this version has: {dict(value)}")
            fields[key] = _FUNCTIONS[value["function"]]
        elif isinstance(value, list):
            fields[key] = tuple(value)
    known = {field.name for field in dataclasses.fields(_NETWORKS[name])}
    if "dtype" in known:
        fields["dtype"] = dtype
    try:
        return _NETWORKS[name](**fields)
    except TypeError as error:
        raise ReadError(f"{name} is not described as this version has it: {error}") from None


def is_converted(path: str | os.PathLike) -> bool:
    """Return whether a directory is one that `save` made."""
    return (Path(path) / MODEL_FILE).is_file()


def save(
    converted: Converted,
    directory: str | os.PathLike,
    *,
    sources: Mapping[str, str],
    assumed: Mapping[str, Any],
    peer_files: Mapping[str, Path] | None = None,
    dtype: Any = np.float32,
) -> str:
    """Write a directory, whole or not at all, and return its model card.

    Args:
        converted: what to write.
        directory: to make; it must not exist, or be empty.
        sources: name -> sha256 of the files that were read.
        assumed: what those did not say, and was taken for granted.
        peer_files: small files to keep, by their place under `peer/`.
        dtype: of the parameters on disk.

    Raises:
        FileExistsError: if there is something at `directory`.
        ValueError: if `dtype` cannot hold a parameter.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists already; give a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: flax.traverse_util.flatten_dict(dict(tree), sep="/") for name, tree in converted.params.items()}
    described = {
        "format": FORMAT,
        "version": ddpm_jax.__version__,
        "family": converted.family,
        "networks": {name: describe(model) for name, model in converted.models.items()},
        "parameters": {name: sum(int(np.size(x)) for x in arrays.values()) for name, arrays in flat.items()},
        "dtype": np.dtype(dtype).name,
        "shapes": {name: {key: list(np.shape(x)) for key, x in arrays.items()} for name, arrays in flat.items()},
        "facts": converted.facts,
        "assumed": dict(assumed),
        "sources": dict(sources),
    }
    with temporary_path(directory.with_name(f".{secrets.token_hex(8)}.tmp")) as new:
        new.mkdir(mode=0o700)
        for name, arrays in flat.items():
            write_tensors(new, name, arrays, dtype)
        for place, file in (peer_files or {}).items():
            (new / PEER / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, new / PEER / place)
        text = card(described)
        (new / CARD_FILE).write_text(text)
        (new / MODEL_FILE).write_text(json.dumps(described, indent=1))
        new.chmod(0o777 & ~_mask())
        os.replace(new, directory)
    return text


def write_tensors(
    directory: Path, name: str, arrays: Mapping[str, Any], dtype: Any = np.float32, *, whole: bool = False
) -> None:
    """Write arrays as `name`.safetensors, or as shards and their index if they are larger than half a gigabyte.

    whole: no shards, for peers that know none; the arrays are then in memory twice.

    Raises:
        ValueError: if dtype cannot hold a value.
    """
    with needs_extra("train"):
        from safetensors.numpy import save_file

    shards = [list(arrays)] if whole else list(_shards(arrays, np.dtype(dtype).itemsize))
    where, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = f"{name}.safetensors" if len(shards) == 1 else f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        with np.errstate(over="ignore"):  # said below, with the name
            part = {key: np.asarray(arrays[key], dtype, order="C") for key in names}
        for key, array in part.items():
            if not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"{name}: {key} has values that {np.dtype(dtype).name} cannot hold")
        save_file(part, str(directory / file), metadata={"format": "pt"})
        (directory / file).chmod(0o666 & ~_mask())
        where |= dict.fromkeys(names, file)
        total += sum(array.nbytes for array in part.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def _mask() -> int:
    """Return what the system takes from the rights of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _shards(arrays: Mapping[str, Any], itemsize: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, array in arrays.items():
        if names and size + np.size(array) * itemsize > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += np.size(array) * itemsize
    yield names


def load(directory: str | os.PathLike, *, dtype: Any = jnp.float32) -> Converted:
    """Read a directory that `save` wrote; parameters become float32 numpy arrays.

    Raises:
        ReadError: if it cannot be read; the message is one sentence.
    """
    directory, described = Path(directory), read_description(directory)
    try:
        models = {name: build(fields, dtype) for name, fields in described["networks"].items()}
        params = {}
        for name, shapes in described["shapes"].items():
            files = [directory / f"{name}.safetensors.index.json", directory / f"{name}.safetensors"]
            tensors = read_tensors(next((file for file in files if file.is_file()), files[1]))
            flat = {key: np.array(array, np.float32) for key, array in tensors.items()}
            odd = [key for key in {*flat, *shapes} if key not in flat or list(flat[key].shape) != shapes.get(key)]
            odd += [key for key, array in flat.items() if not np.isfinite(array).all()]
            if odd:
                raise ReadError(
                    f"{directory / name}.safetensors does not hold what {MODEL_FILE} says: {sorted(odd)[0]}"
                )
            params[name] = flax.traverse_util.unflatten_dict(flat, sep="/")
        return Converted(described["family"], models, params, described["facts"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ReadError(
            f"{directory / MODEL_FILE} does not fit this version: {type(error).__name__}: {error}"
        ) from None


def read_description(directory: str | os.PathLike) -> dict[str, Any]:
    """Return what model.json says.

    Raises:
        ReadError: if it is missing, or not such a file.
    """
    path = Path(directory) / MODEL_FILE
    try:
        described = read_json(path)
        if described["format"] != FORMAT:
            raise ReadError(f"{path} has the format {described['format']!r}, not {FORMAT!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReadError(f"{directory} is not a converted checkpoint of this package: {error}") from None
    return described


def card(described: Mapping[str, Any]) -> str:
    """Return the model card of a description, Markdown."""
    lines = [f"# {described['family']}, converted by ddpm_jax {described['version']}", ""]
    lines += ["| network | class | parameters |", "| --- | --- | ---: |"]
    for name, number in described["parameters"].items():
        lines.append(f"| {name} | {described['networks'].get(name, {}).get('class', 'numbers')} | {number:,} |")
    lines.append(f"| all | | {sum(described['parameters'].values()):,} |")
    lines += [
        "",
        f"Parameters are stored as {described['dtype']}.",
        "",
        "What the files did not say, and was taken:",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in described["assumed"].items()] or ["- nothing"]
    lines += ["", "Read from (sha256):", ""]
    lines += [f"- {name}: {digest}" for name, digest in described["sources"].items()]
    return "\n".join(lines) + "\n"
