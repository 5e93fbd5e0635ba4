"""Models on disk: a directory that loads without flags, and without the recipe or the library that it came from.

Stages that are trained here and checkpoints that were converted are the same kind of directory. It holds

    model.json       the networks with all their fields, and metadata: what else is needed to use them
    checkpoints/     the parameters of a stage that is trained here (`storage.checkpoint`), or
    NAME.safetensors the parameters of each network, written out; in shards of half a gigabyte if they are larger
    moments.json     of a diffusion model, second moments for the sampler "analytic" (`storage.moments`)
    model_card.md    of a converted checkpoint: the same for people
    source/          of a converted checkpoint: the small files beside the source (configs, tokenizer)
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_model, shown
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.errors import LoadError, ReadError
from ddpm_jax.extras import needs_extra
from ddpm_jax.models.traced import apply_traced
from ddpm_jax.paths import as_path, is_remote, local_path
from ddpm_jax.storage.json_file import read_json, write_json
from ddpm_jax.storage.metadata import check_metadata, diffusion_from, freeze, thaw
from ddpm_jax.storage.moments import read_moments, write_moments
from ddpm_jax.storage.network_check import check_parameters
from ddpm_jax.storage.networks import build, describe
from ddpm_jax.storage.tensor_file import read_tensors
from ddpm_jax.temporary import temporary_path
from ddpm_jax.version import __version__

FORMAT, OLD_FORMAT = "ddpm_jax model 2", "ddpm_jax converted 1"
FAMILY = "ddpm_jax"  # of what is trained here
MODEL_FILE, CARD_FILE, SOURCE, NETWORK = "model.json", "model_card.md", "source", "model"
SHARD_BYTES = 2**29
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VERSION = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}[A-Za-z0-9.+-]{0,40}")


class Model(flax.struct.PyTreeNode):
    """A network with its parameters: a tree of arrays, so that it can be an argument of a jitted function.

    Attributes:
        params: {"params": ...}, as `network.apply` takes them.
        network: a Flax module.
        metadata: plain data in `FrozenDict` and tuples: "diffusion", "image_size", "conditions" and the like.
        family: "ddpm_jax" if it was trained here, else the family that it was converted from.
        moments: float32[T], for the sampler "analytic", see `diffusion.samplers.analytic_moments`; or None.
    """

    params: Any
    network: nn.Module = flax.struct.field(pytree_node=False)
    metadata: Mapping[str, Any] = flax.struct.field(pytree_node=False, default=freeze({}))
    family: str = flax.struct.field(pytree_node=False, default=FAMILY)
    moments: jax.Array | None = None

    def apply(self, *args: Any, **options: Any) -> Any:
        """Return `network.apply(params, *args, **options)`."""
        return self.network.apply(self.params, *args, **options)

    def apply_traced(self, *args: Any, **inputs: Any) -> Any:
        """Return `apply(*args, **inputs)`, traced once for arrays of the same shapes (see `models.traced`)."""
        return apply_traced(self.network, self.params, *args, **inputs)

    @property
    def diffusion(self) -> Diffusion:
        """The noise process that the network was trained with, and what it predicts.

        Raises:
            LoadError: if the metadata does not say it.
        """
        if "diffusion" not in self.metadata:
            raise LoadError(f"this {type(self.network).__name__} is no diffusion model: its metadata has no diffusion")
        return diffusion_from(thaw(self.metadata["diffusion"]))


class Converted(NamedTuple):
    """Networks and parameters of a converted checkpoint.

    Attributes:
        family: a value of `ddpm_jax.convert --from`.
        models: networks by name.
        params: their parameters by the same names, without the outer {"params": ...}.
        metadata: plain data, such as the schedule and the tokenizer.
    """

    family: str
    models: dict[str, nn.Module]
    params: dict[str, Any]
    metadata: dict[str, Any]


# ---- Writing ---------------------------------------------------------------------------------------------------------


def write_description(
    directory: str | os.PathLike, networks: Mapping[str, nn.Module], metadata: Mapping[str, Any]
) -> None:
    """Write the model.json of a stage that is trained here, whole or not at all, by the first process alone.

    Args:
        directory: the stage's; it is created.
        networks: by name; one alone is called "model".
        metadata: plain data; see docs/design.md for the names with a meaning.

    Raises:
        ValueError: if a network or the metadata cannot be stored.
        OSError: if the file cannot be written.
    """
    described = _described(FAMILY, networks, metadata)
    as_path(directory).mkdir(parents=True, exist_ok=True)
    write_json(as_path(directory) / MODEL_FILE, described)


def _described(family: str, networks: Mapping[str, nn.Module], metadata: Mapping[str, Any]) -> dict[str, Any]:
    metadata = thaw(metadata)
    try:
        check_metadata(metadata, "metadata")
    except LoadError as error:
        raise ValueError(str(error)) from None
    return {
        "format": FORMAT,
        "version": __version__,
        "family": family,
        "networks": {name: describe(network) for name, network in networks.items()},
        "metadata": metadata,
    }


def save_model(
    model: Model, directory: str | os.PathLike, *, dtype: Any = np.float32, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model with its parameters, whole or not at all; `open_model` reads it.

    Args:
        model: what to write.
        directory: to make; it must not exist, or be empty.
        dtype: of the parameters on disk.
        metadata: in place of the model's own.

    Raises:
        FileExistsError: if there is something at `directory`.
        ValueError: if `dtype` cannot hold a parameter, or the network cannot be described.
    """
    others = set(model.params) - {"params"}
    if others:
        raise ValueError(f"the model has the collection {min(others)!r}; only parameters are stored")
    converted = Converted(
        model.family,
        {NETWORK: model.network},
        {NETWORK: model.params["params"]},
        thaw(model.metadata if metadata is None else metadata),
    )
    save(converted, directory, dtype=dtype, moments=model.moments)


def save(
    converted: Converted,
    directory: str | os.PathLike,
    *,
    sources: Mapping[str, str] | None = None,
    assumed: Mapping[str, Any] | None = None,
    source_files: Mapping[str, Path] | None = None,
    dtype: Any = np.float32,
    moments: Any = None,
) -> str:
    """Write a directory, whole or not at all, and return its model card.

    Args:
        converted: what to write.
        directory: to make; it must not exist, or be empty.
        sources: name -> sha256 of the files that were read.
        assumed: defaults used for what those do not say.
        source_files: small files to copy, by their path under `source/`.
        dtype: of the parameters on disk.
        moments: float32[T] of the only network, for the sampler "analytic"; or None.

    Raises:
        FileExistsError: if there is something at `directory`.
        ValueError: if `dtype` cannot hold a parameter, or a network or the metadata cannot be stored.
    """
    directory = local_path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists already; give a new directory")
    described = _described(converted.family, converted.models, converted.metadata)
    directory.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: flax.traverse_util.flatten_dict(dict(tree), sep="/") for name, tree in converted.params.items()}
    described |= {
        "parameters": {name: sum(int(np.size(x)) for x in arrays.values()) for name, arrays in flat.items()},
        "dtype": np.dtype(dtype).name,
        "shapes": {name: {key: list(np.shape(x)) for key, x in arrays.items()} for name, arrays in flat.items()},
        "assumed": dict(assumed or {}),
        "sources": dict(sources or {}),
    }
    with temporary_path(directory.with_name(f".{secrets.token_hex(8)}.tmp")) as new:
        new.mkdir(mode=0o700)
        for name, arrays in flat.items():
            write_tensors(new, name, arrays, dtype)
        for place, file in (source_files or {}).items():
            (new / SOURCE / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, new / SOURCE / place)
        if moments is not None:
            write_moments(new, moments)
        text = card(described)
        if sources:
            (new / CARD_FILE).write_text(text)
        (new / MODEL_FILE).write_text(json.dumps(described, indent=1))
        new.chmod(0o777 & ~_mask())
        os.replace(new, directory)
    return text


def write_tensors(
    directory: Path, name: str, arrays: Mapping[str, Any], dtype: Any = np.float32, *, whole: bool = False
) -> None:
    """Write arrays as `name`.safetensors, or as shards and their index if they are larger than half a gigabyte.

    whole: no shards, for libraries without support for shards; the arrays are then in memory twice.

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


# ---- Reading ---------------------------------------------------------------------------------------------------------


def place_of(directory: Path, place: str | os.PathLike) -> Any:
    """Return the path of a model that is named in a directory: relative to it, or in a bucket, or from ~ on."""
    path = as_path(place)
    return path if is_remote(path) else directory / path


def is_model_directory(path: str | os.PathLike) -> bool:
    """Return whether there is a model.json in a directory."""
    return (as_path(path) / MODEL_FILE).is_file()


def open_model(
    directory: str | os.PathLike, *, ema: bool = True, dtype: Any = None, network: nn.Module | None = None
) -> Model:
    """Open a directory with one network: a stage that is trained here, or a converted checkpoint.

    Args:
        directory: that holds a model.json.
        ema: of a stage that is trained here, True takes the averaged parameters and False the raw ones.
        dtype: that the network computes in; as described by default.
        network: in place of the described one, which may then be of a class that this package does not have.

    Raises:
        LoadError: if it cannot be read, holds several networks, or network and parameters do not fit each other.
    """
    check_given(network)
    directory, described = as_path(directory), read_description(directory)
    if len(described["networks"]) != 1:
        names = ", ".join(described["networks"])
        raise LoadError(f"{directory} holds the networks {names}, and not one model; ddpm_jax.load opens the whole")
    if "shapes" in described:
        converted, step = _read(directory, described, dtype, network), None
        (params,), (network,) = converted.params.values(), converted.models.values()
    else:
        params, network, step = _read_stage(directory, described, ema=ema, dtype=dtype, network=network)
    params = {"params": jax.tree.map(jnp.asarray, params)}
    model = Model(params, network, freeze(described["metadata"]), described["family"])
    if "diffusion" in model.metadata and (ema or step is None):
        model = model.replace(moments=read_moments(directory, model.diffusion.num_steps, step=step))
    return model


def check_given(network: Any) -> None:
    """Raise LoadError unless a network that is given in place of the described one is None or a network."""
    if network is not None:
        try:
            check_model(network)
        except ValueError as error:
            raise LoadError(str(error).replace("model must be a network", "network must be a model", 1)) from None


def _named(directory: Path, name: str, given: nn.Module | None) -> str:
    """Return what messages call a network."""
    return f"the network {name} of {directory / MODEL_FILE}" if given is None else f"network={shown(given)}"


def load(directory: str | os.PathLike, *, dtype: Any = None) -> Converted:
    """Read a directory that `save` wrote; parameters become float32 numpy arrays.

    Raises:
        LoadError: if it cannot be read; the message is one sentence.
    """
    directory, described = as_path(directory), read_description(directory)
    if "shapes" not in described:
        raise LoadError(f"{directory} is a stage that is trained here, and not a converted checkpoint")
    return _read(directory, described, dtype, None)


def _read(directory: Path, described: Mapping[str, Any], dtype: Any, network: nn.Module | None) -> Converted:
    """Read a directory with files of parameters: everything is compared with their headers before a number is read."""
    models, params = {}, {}
    for name, fields in described["networks"].items():
        where = f"{directory / MODEL_FILE}: networks.{name}"
        models[name] = build(fields, where=where, dtype=dtype) if network is None else network
    for name, shapes in described["shapes"].items():
        files = [directory / f"{name}.safetensors.index.json", directory / f"{name}.safetensors"]
        file = next((file for file in files if file.is_file()), files[1])
        tensors = read_tensors(file)
        there = {key: tuple(array.shape) for key, array in tensors.items()}
        if there != shapes:
            odd = min(key for key in {*there, *shapes} if there.get(key) != shapes.get(key))
            raise ReadError(f"{directory / name}.safetensors does not hold what {MODEL_FILE} says: {odd}")
        if name in models:
            where = _named(directory, name, network)
            check_parameters(models[name], there, described["metadata"], where=where, file=str(file))
        flat = {key: np.array(array, np.float32) for key, array in tensors.items()}
        odd = sorted(key for key, array in flat.items() if not np.isfinite(array).all())
        if odd:
            raise ReadError(f"{file} does not hold what {MODEL_FILE} says: {odd[0]} has values that are not finite")
        params[name] = flax.traverse_util.unflatten_dict(flat, sep="/")
    missing = [name for name in models if name not in params]
    if missing:
        raise LoadError(f"{directory / MODEL_FILE} has no shapes of the parameters of the network {missing[0]}")
    return Converted(described["family"], models, params, described["metadata"])


def _read_stage(
    directory: Path, described: Mapping[str, Any], *, ema: bool, dtype: Any, network: nn.Module | None
) -> tuple[Any, nn.Module, int]:
    """Read the newest checkpoint of a stage that is trained here; also return its step."""
    ((name, fields),) = described["networks"].items()
    where = f"{directory / MODEL_FILE}: networks.{name}"
    given, network = network, build(fields, where=where, dtype=dtype) if network is None else network
    # Here and not above: it loads Orbax, which files of parameters do not need.
    from ddpm_jax.storage.checkpoint import CheckpointError, restore_trained

    try:
        variables, _, step = restore_trained(directory, ema=ema)
    except CheckpointError as error:
        raise LoadError(f"{directory} cannot be loaded: {error}") from error
    params = variables.get("params", variables) if isinstance(variables, Mapping) else {}
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    shapes = {key: tuple(array.shape) for key, array in flat.items()}
    file = f"the checkpoint in {directory}"
    where = _named(directory, name, given)
    check_parameters(network, shapes, described["metadata"], where=where, file=file)
    return params, network, step


def read_description(directory: str | os.PathLike) -> dict[str, Any]:
    """Return what model.json says; networks are still plain data, and everything else is checked.

    Raises:
        LoadError: if it is missing, not such a file, or has a field that cannot be.
    """
    path = as_path(directory) / MODEL_FILE
    try:
        described = read_json(path)
    except FileNotFoundError:
        raise ReadError(f"{directory} is not a model directory of this package (it has no {MODEL_FILE})") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ReadError(f"{path} is not the description of a model of this package: {reason}") from None
    if not isinstance(described, dict) or not isinstance(described.get("format"), str):
        raise ReadError(f"{path} is not the description of a model of this package (it has no format)")
    if described["format"] == OLD_FORMAT:
        described = described | {"metadata": described.get("facts")}
    elif described["format"] != FORMAT:
        raise ReadError(
            f"{path} has the format {described['format']!r:.60}, and this version reads {FORMAT!r}; open it with the "
            f"version of ddpm_jax that wrote it ({described.get('version')!r:.40}), or make it again"
        )
    if not isinstance(described.get("version"), str) or not _VERSION.fullmatch(described["version"]):
        raise LoadError(f"{path}: version={described.get('version')!r:.60} must be a version such as {__version__!r}")
    if not isinstance(described.get("family"), str) or not _NAME.fullmatch(described["family"]):
        raise LoadError(f"{path}: family={described.get('family')!r:.60} must be a name")
    _check_names(path, "networks", described.get("networks"))
    if not described["networks"]:
        raise LoadError(f"{path}: networks is empty")
    check_metadata(described.get("metadata"), f"{path}: metadata")
    if "shapes" in described:
        described["shapes"] = _checked_shapes(path, described["shapes"])
    return described


def _check_names(path: Path, field: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > 100:
        raise LoadError(f"{path}: {field} must be an object with a part for each network, got {type(value).__name__}")
    for name in value:
        if not _NAME.fullmatch(name):
            raise LoadError(f"{path}: {field} has the name {name!r:.60}, which is not of letters, digits, _, - and .")


def _checked_shapes(path: Path, shapes: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the parameters of each network as tuples."""
    _check_names(path, "shapes", shapes)
    for name, arrays in shapes.items():
        if not isinstance(arrays, dict):
            raise LoadError(f"{path}: shapes.{name} must be an object with the shape of each parameter")
        for key, shape in arrays.items():
            if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
                raise LoadError(f"{path}: shapes.{name} has {shape!r:.60} for {key!r:.60}, which is not a shape")
    return {name: {key: tuple(shape) for key, shape in arrays.items()} for name, arrays in shapes.items()}


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
