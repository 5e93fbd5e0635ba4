"""Models and pipelines from disk, and back: what a training run left, what was converted, what the package carries."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import shown
from ddpm_jax.data.tokenizer import Tokenizer, tokenizer_from_config
from ddpm_jax.errors import LoadError
from ddpm_jax.models.adm import Classifier
from ddpm_jax.models.noised_clip import NoisedCLIP
from ddpm_jax.paths import as_path, local_path
from ddpm_jax.pipelines.cascade import Cascade
from ddpm_jax.pipelines.converted import PIPELINES, pipeline_of
from ddpm_jax.pipelines.description import PIPELINE_FILE, PipelineDescription, read_pipeline
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.storage import model_directory
from ddpm_jax.storage.fingerprint import tree_fingerprint
from ddpm_jax.storage.metadata import thaw
from ddpm_jax.storage.model_directory import (
    MODEL_FILE,
    Model,
    check_given,
    open_model,
    place_of,
    read_description,
    save_model,
)
from ddpm_jax.temporary import temporary_path

CLASSES: dict[str, type] = {"UnCLIP": UnCLIP, "Cascade": Cascade}
BUNDLED = Path(__file__).parents[1] / "weights" / "shapes"


def load(path: str | os.PathLike | None = None, *, ema: bool = True, network: nn.Module | None = None) -> Any:
    """Open a model or a pipeline.

    Args:
        path: the workdir of a training run or another directory with a pipeline.json, a directory with a model.json (a
            stage of a run, or what `ddpm_jax.convert` wrote), or None for the pipeline that the package carries. The
            workdir of a single stage that generates images needs no pipeline.json: it is a `Cascade` of that stage.
        ema: True takes the averaged parameters of stages that were trained here and False the raw ones; of a model that
            other stages were trained with, such as CLIP, always the average.
        network: of one model, in place of the one that its model.json describes; it may be of any class. Needed for a
            custom network class, since a file does not choose what is imported.

    Returns:
        A pipeline (`UnCLIP`, `Cascade`, `Karlo`, `StableDiffusion`), or a `Model` if the directory holds one network.

    Raises:
        LoadError: if there is nothing to open there, or it cannot be opened; the message is one sentence.
    """
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise LoadError(f"path={shown(path)} must be the path of a directory, or None for the bundled pipeline")
    check_given(network)
    directory = BUNDLED if path is None else as_path(path)
    if (directory / PIPELINE_FILE).is_file():
        if network is not None:
            raise LoadError(f"{directory} is a pipeline of several models; give network= for the directory of one")
        return _open_pipeline(directory, read_pipeline(directory), ema)
    if (directory / MODEL_FILE).is_file():
        if read_description(directory)["family"] in PIPELINES:
            return _open_converted(directory)
        return open_model(directory, ema=ema, network=network)
    if not directory.exists():
        raise LoadError(f"{directory} does not exist; give the directory of a training run, a model or a pipeline")
    if not directory.is_dir():
        raise LoadError(
            f"{directory} is a file; give a directory, such as python -m ddpm_jax.convert makes of a checkpoint"
        )
    models = sorted(file.parent.name for file in directory.glob(f"*/{MODEL_FILE}"))
    if len(models) == 1:
        model = open_model(directory / models[0], ema=ema, network=network)
        alone = {"diffusion", "image_size"} <= set(model.metadata) and "low_resolution" not in model.metadata
        alone = alone and not isinstance(model.network, (Classifier, NoisedCLIP))
        return Cascade(base=model).checked() if alone else model
    hint = f"; it holds the models {', '.join(models)}, each of which can be opened alone" if models else ""
    raise LoadError(f"{directory} holds neither a pipeline ({PIPELINE_FILE}) nor a model ({MODEL_FILE}){hint}")


def read_tokenizer(path: str | os.PathLike | None = None) -> Tokenizer | None:
    """Read the tokenizer of what `load` would open, without the parameters; None if there is none.

    Raises:
        LoadError: if it cannot be read.
    """
    directory = BUNDLED if path is None else as_path(path)
    if (directory / PIPELINE_FILE).is_file():
        models = read_pipeline(directory).models
        place = models.get("clip", models.get("noised_clip", models.get("base")))
        if place is None:
            return None
        directory = place_of(directory, place)
    if not (directory / MODEL_FILE).is_file():
        return None
    metadata = read_description(directory)["metadata"]
    config = metadata.get("tokenizer", metadata.get("tokens", {}).get("tokenizer"))
    return None if config is None else tokenizer_from_config(config)


def _open_converted(directory: Path) -> Any:
    converted = model_directory.load(directory)
    try:
        return pipeline_of(converted)
    except LoadError as error:
        raise LoadError(f"{directory / MODEL_FILE}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise LoadError(f"{directory} does not fit this version: {type(error).__name__}: {error}") from error


def _open_pipeline(directory: Path, description: PipelineDescription, ema: bool) -> Any:
    """Open the models of a pipeline, and check that each was trained with those that it is used with."""
    places = {role: place_of(directory, place) for role, place in description.models.items() if role != "upsamplers"}
    enlarging = dict(zip(description.upsamplers, description.models.get("upsamplers", ())))
    large = {name: place_of(directory, place) for name, place in enlarging.items()}
    for role, place in {**places, **large}.items():
        if not (place / MODEL_FILE).is_file():
            raise LoadError(
                f"the pipeline of {directory} needs {role}, and {place} is not a model directory of this package (it "
                f"has no {MODEL_FILE}); train the stage first"
            )
    described = {role: read_description(place)["metadata"] for role, place in places.items()}
    needed = {role for metadata in described.values() for role in metadata.get("needs") or ()} | {"clip"}
    models = {role: open_model(place, ema=ema or role in needed) for role, place in places.items()}
    upsamplers = [open_model(place, ema=ema) for place in large.values()]
    prints: dict[str, str] = {}
    for role, model in [*models.items(), *zip(description.upsamplers, upsamplers)]:
        for other, trained_with in (model.metadata.get("needs") or {}).items():
            if other not in models:
                continue
            prints[other] = prints.get(other) or tree_fingerprint(models[other].params)
            if prints[other] != trained_with:
                raise LoadError(
                    f"{role} of {directory} was trained with another {other} than the one in {places[other]}; put back "
                    f"that one, or train {role} again, in a new workdir or after removing its directory"
                )
    try:
        return CLASSES[description.kind](
            **models,
            upsamplers=tuple(upsamplers),
            names=description.upsamplers,
            sampling=dict(description.sampling),
            **description.options,
        ).checked()
    except ValueError as error:
        raise LoadError(f"the pipeline of {directory} cannot work: {error}") from None


def save(pipeline: UnCLIP | Cascade | Model, directory: str | os.PathLike, *, dtype: Any = np.float32) -> None:
    """Write a model or a pipeline, whole or not at all; `load` opens it.

    Args:
        pipeline: a pipeline of models, or one model. What was converted (`Karlo`, `StableDiffusion`) is in a directory
            already.
        directory: to make; it must not exist, or be empty.
        dtype: of the parameters on disk; they are float32 in memory.

    Raises:
        FileExistsError: if there is something at `directory`.
        ValueError: if `dtype` cannot hold a parameter.
        TypeError: if it is neither.
    """
    directory = local_path(directory)
    if isinstance(pipeline, Model):
        save_model(pipeline, directory, dtype=dtype)
        return
    kind = next((name for name, cls in CLASSES.items() if isinstance(pipeline, cls)), None)
    if kind is None:
        raise TypeError(f"pipeline must be a Model, UnCLIP or Cascade, got a {type(pipeline).__name__}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists already; give a new directory")
    pipeline = pipeline.checked()
    models, upsamplers = pipeline.models, dict(zip(pipeline.names, pipeline.upsamplers))
    description = PipelineDescription(
        kind,
        {role: role for role in models} | {"upsamplers": list(upsamplers)},
        dict(pipeline.sampling),
        pipeline.options,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(directory.with_name(f".{secrets.token_hex(8)}.tmp")) as new:
        new.mkdir()
        for name, model in {**models, **upsamplers}.items():
            save_model(model, new / name, dtype=dtype, metadata=_stored_metadata(model, models, dtype))
        description.write(new)
        os.replace(new, directory)


def _stored_metadata(model: Model, models: Mapping[str, Model], dtype: Any) -> dict[str, Any]:
    """Return a model's metadata, in which the fingerprints are those of the rounded parameters."""
    metadata = thaw(model.metadata)
    for role in metadata.get("needs") or ():
        if role in models:
            rounded = jax.tree.map(lambda x: jnp.float32(np.asarray(x).astype(dtype)), models[role].params)
            metadata["needs"][role] = tree_fingerprint(rounded)
    return metadata
