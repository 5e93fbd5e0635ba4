"""Pipelines from disk: from a training run, from the weights that the package carries, and into one file.

A weights file is safetensors: arrays named <stage>/<module>/.../<parameter>, and in its metadata the resolved config,
the tokenizer and the version, so that loading needs no flags. Reading it runs no code from it.
"""

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from ddpm_jax import build
from ddpm_jax.data.tokenizer import Tokenizer, tokenizer_from_config
from ddpm_jax.errors import LoadError
from ddpm_jax.extras import needs_extra
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.storage.json_file import parse_json, read_json
from ddpm_jax.storage.tensor_file import ReadError, read_tensors
from ddpm_jax.storage.tensors import Tensors
from ddpm_jax.temporary import temporary_path

FORMAT = "ddpm_jax unclip 1"
RUN_FILE = "run.json"
# In the config of a stage's checkpoint: the fingerprint of the CLIP that the stage was trained with.
CLIP_WEIGHTS = "clip_weights"
_BUNDLED = resources.files("ddpm_jax") / "weights" / "shapes.safetensors"


def load(path: str | os.PathLike | None = None, *, ema: bool = True) -> Any:
    """Load a pipeline: `UnCLIP`, or what was converted (`Karlo`, `StableDiffusion`, or `converted.Converted` networks).

    Args:
        path: a workdir of `ddpm_jax.train`, a directory of `ddpm_jax.convert`, a weights file, or None for the weights
            that the package carries.
        ema: for a workdir, True takes the averaged parameters and False the raw ones; of CLIP always the average, with
            which the other stages were trained.

    Raises:
        LoadError: if there is nothing to load there, or it cannot be read.
    """
    if path is None:
        with resources.as_file(_BUNDLED) as file:
            return load_file(file)
    path = Path(path)
    if (path / "model.json").is_file():
        return load_converted(path)
    if path.is_dir():
        return load_run(path, ema=ema)
    if not path.exists():
        raise LoadError(_missing(path))
    return load_file(path)


def _missing(path: Path) -> str:
    return f"{path} does not exist; give the workdir of a training run or a weights file"


def read_tokenizer(path: str | os.PathLike | None = None) -> Tokenizer | None:
    """Read the tokenizer of what `load` would load, without the weights; None if it has none.

    Raises:
        LoadError: if there is nothing to load there, or it cannot be read.
    """
    if path is None:
        with resources.as_file(_BUNDLED) as file:
            return read_tokenizer(file)
    path = Path(path)
    if (path / "model.json").is_file():
        from ddpm_jax.storage.model_directory import read_description

        try:
            config = read_description(path).get("metadata", {}).get("tokenizer")
        except (ReadError, AttributeError) as error:
            raise LoadError(str(error)) from error
    elif path.is_dir():
        config = read_run(path)["tokenizer"]
    elif not path.exists():
        raise LoadError(_missing(path))
    else:
        config = _read_file(path)[2]
    try:
        return None if config is None else tokenizer_from_config(config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoadError(f"the tokenizer of {path} cannot be read: {error}") from error


def load_converted(path: str | os.PathLike) -> Any:
    """Load what `ddpm_jax.convert` wrote."""
    # Here and not above: it knows every network of every family.
    from ddpm_jax.interop.families import pipeline_of
    from ddpm_jax.storage import model_directory as converted

    try:
        return pipeline_of(converted.load(path))
    except ReadError as error:
        raise LoadError(str(error)) from error
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise LoadError(f"{path} does not fit this version: {type(error).__name__}: {error}") from error


def read_run(workdir: str | os.PathLike) -> dict[str, Any]:
    """Read what a training run wrote of itself: {"config", "tokenizer", "version"}.

    Raises:
        LoadError: if the directory is missing or is not a workdir of this package.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise LoadError(f"workdir {workdir} does not exist")
    try:
        run = read_json(workdir / RUN_FILE)
        return {"config": run["config"], "tokenizer": run["tokenizer"], "version": run["version"]}
    except FileNotFoundError:
        raise LoadError(f"workdir {workdir} holds no training run (it has no {RUN_FILE})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{workdir / RUN_FILE} cannot be read as a training run: {error}") from None


def load_run(workdir: str | os.PathLike, *, ema: bool = True) -> UnCLIP:
    """Load the pipeline that a training run made; every stage must have a checkpoint."""
    run = read_run(workdir)
    # Here and not above: it loads Orbax, which a weights file does not need.
    from ddpm_jax.storage.checkpoint import CheckpointError, config_differences, restore_params
    from ddpm_jax.training.embeddings import tree_fingerprint

    params = {}
    for stage in build.STAGES:
        try:
            # The other stages were trained with the average of CLIP.
            params[stage], config = restore_params(Path(workdir) / stage, ema=ema or stage == "clip")
        except CheckpointError as error:
            raise LoadError(f"stage {stage} of {workdir} cannot be loaded: {error}") from error
        trained_with = config.pop(CLIP_WEIGHTS, None)
        if trained_with not in (None, tree_fingerprint(params["clip"])):
            raise LoadError(
                f"stage {stage} of {workdir} was trained with another CLIP than the one there; train {stage} again, in "
                "a new workdir or after removing its directory"
            )
        differences = config_differences(config, {field: run["config"].get(field) for field in config})
        if differences:
            raise LoadError(
                f"the checkpoint of stage {stage} in {workdir} is not of this run, whose config is in {RUN_FILE}: "
                f"{'; '.join(differences)}"
            )
    return _assemble(workdir, run["config"], params, run["tokenizer"])


def load_file(path: str | os.PathLike) -> UnCLIP:
    """Load a weights file; parameters become float32."""
    tensors, config, tokenizer = _read_file(path)
    flat = {name: jnp.asarray(array, jnp.float32) for name, array in tensors.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    missing = [stage for stage in build.STAGES if stage not in params]
    if missing:
        raise LoadError(f"weights file {path} lacks the stage {missing[0]}")
    return _assemble(path, config, params, tokenizer)


def _read_file(path: str | os.PathLike) -> tuple[Tensors, Any, Any]:
    """Return the mapped arrays of a weights file, its config and its tokenizer's."""
    try:
        tensors = read_tensors(path)
    except ReadError as error:
        raise LoadError(str(error)) from None
    meta = tensors.metadata
    if meta.get("format") != FORMAT:
        raise LoadError(f"{path} is not a weights file of this package (format {meta.get('format')!r})")
    try:
        config, tokenizer = (parse_json(meta[name].encode()) for name in ("config", "tokenizer"))
    except (ValueError, KeyError) as error:
        raise LoadError(f"weights file {path} cannot be read: {error}") from None
    return tensors, config, tokenizer


def _assemble(place: str | os.PathLike, config: Any, params: Mapping[str, Any], tokenizer: Any) -> UnCLIP:
    try:
        return UnCLIP.from_config(config, params, tokenizer)
    except (KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{place} was made by another version of this package: its config does not fit ({type(error).__name__}: "
            f"{error})"
        ) from error


def save_file(pipeline: UnCLIP, path: str | os.PathLike, *, dtype: Any = np.float16) -> None:
    """Write a pipeline's parameters, config and tokenizer to one file, whole or not at all."""
    with needs_extra("train"):
        from safetensors.numpy import save_file as save

    flat = flax.traverse_util.flatten_dict(dict(pipeline.params), sep="/")
    arrays = {name: np.array(array, dtype, order="C") for name, array in flat.items()}
    overflow = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if overflow:
        raise ValueError(f"{overflow[0]} has values that {np.dtype(dtype).name} cannot hold")
    meta: Mapping[str, str] = {
        "format": FORMAT,
        "version": ddpm_jax.__version__,
        "config": json.dumps(pipeline.config),
        "tokenizer": json.dumps(pipeline.tokenizer.to_config()),
    }
    path = Path(path)
    with temporary_path(path.with_name(path.name + ".tmp")) as new:
        save(arrays, str(new), metadata=dict(meta))
        # safetensors makes its files private; this one gets the rights that any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        new.chmod(0o666 & ~mask)
        os.replace(new, path)
