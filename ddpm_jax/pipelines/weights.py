"""Pipelines from disk: from a training run, from the weights that the package carries, and into one file.

A weights file is safetensors: arrays named <stage>/<module>/.../<parameter>, and in its metadata the resolved config,
the tokenizer and the version, so that loading needs no flags. Reading it runs no code from it.
"""

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ddpm_jax import build
from ddpm_jax.data.tokenizer import tokenizer_from_config
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.errors import LoadError
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.storage.json_file import read_json
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model

FORMAT = "ddpm_jax unclip 1"
RUN_FILE = "run.json"
# In the config of a stage's checkpoint: the fingerprint of the CLIP that the stage was trained with.
CLIP_WEIGHTS = "clip_weights"
_BUNDLED = resources.files("ddpm_jax") / "weights" / "shapes.safetensors"


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


def _assemble(place: str | os.PathLike, config: Any, params: Mapping[str, Any], tokenizer: Any) -> UnCLIP:
    try:
        return from_config(config, params, tokenizer)
    except (KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{place} was made by another version of this package: its config does not fit ({type(error).__name__}: "
            f"{error})"
        ) from error


def from_config(config: Mapping[str, Any], params: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> UnCLIP:
    """Build the pipeline that a run's config describes, around its parameters."""
    words = tokenizer_from_config(tokenizer)
    length, sizes = config["text"]["length"], {}
    diffusion = {
        stage: {"schedule": config[stage]["schedule"], "num_steps": config[stage]["diffusion_steps"]}
        for stage in build.STAGES[1:]
    }
    diffusion["prior"]["prediction"] = "x0"
    diffusion["decoder"] |= {"prediction": config["decoder"]["kind"], "variance": config["decoder"]["variance"]}
    diffusion["upsampler"]["prediction"] = config["upsampler"]["kind"]
    sizes = {stage: {"image_size": config[stage]["image_size"], "channels": 3} for stage in ("decoder", "upsampler")}
    caption = lambda stage: {"length": length, "own_tokens": config[stage]["text_encoder"] is not None}
    metadata = {
        "clip": {"tokenizer": words.to_config(), "length": length, "image_size": config["clip"]["image_size"]},
        "prior": {
            "diffusion": diffusion["prior"],
            "embedding": {"scale": config["prior"]["embed_scale"], "size": config["clip"]["embed_dim"]},
            "conditions": ["caption"],
            "caption": caption("prior"),
        },
        "decoder": sizes["decoder"]
        | {
            "diffusion": diffusion["decoder"],
            "conditions": ["image_embedding", "caption"],
            "image_embedding": {},
            "caption": caption("decoder"),
        },
        "upsampler": sizes["upsampler"]
        | {
            "diffusion": diffusion["upsampler"],
            "conditions": ["low_resolution"],
            "low_resolution": {"size": config["upsampler"]["low_size"], "noise_level_input": False},
        },
    }
    networks = {
        "clip": build.make_clip(config, words.vocab_size),
        "prior": build.make_prior(config, words.vocab_size),
        "decoder": build.make_decoder(config, words.vocab_size),
        "upsampler": build.make_upsampler(config),
    }
    models = {stage: Model(params[stage], networks[stage], freeze(metadata[stage])) for stage in build.STAGES}
    sampling = {}
    for stage in build.STAGES[1:]:
        how = config["sample"][stage]
        sampling[stage] = Sampling(
            "ancestral" if how["eta"] is None else "ddim",
            how["steps"],
            eta=how["eta"],
            scale=how["scale"],
            threshold=None if stage == "prior" else 1.0,
        ).checked()
    return UnCLIP(
        clip=models["clip"],
        prior=models["prior"],
        decoder=models["decoder"],
        upsamplers=(models["upsampler"],),
        sampling=sampling,
        candidates=config["sample"]["prior"]["candidates"],
        batch_size=config["sample"]["batch_size"],
    ).checked()
