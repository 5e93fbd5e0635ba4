"""A whole run: the stages of a pipeline, one after the other, in one working directory.

workdir/run.json              the resolved config, the tokenizer, the version
workdir/<stage>/              checkpoints/, previews/, metrics.jsonl
workdir/embeddings/           CLIP embeddings of the data set, computed once
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ddpm_jax
from ddpm_jax import build
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.shapes.hard_negatives import Families
from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.data.transforms import AverageDown, Keep, RandomCrop, Tokenize
from ddpm_jax.parallel.mesh import DATA_AXIS, data_sharding, make_local_mesh, make_mesh, replicated
from ddpm_jax.pipelines import stages
from ddpm_jax.pipelines.weights import CLIP_WEIGHTS, RUN_FILE, LoadError, read_run
from ddpm_jax.storage.checkpoint import NOT_COMPARED, SUBDIRECTORY, config_differences, lock_workdir, restore_params
from ddpm_jax.temporary import temporary_path
from ddpm_jax.training.embeddings import EmbeddedSource, cached_embeddings, tree_fingerprint
from ddpm_jax.training.loop import train
from ddpm_jax.training.state import abstract_state
from ddpm_jax.training.tasks import ClipTask, DecoderTask, PriorTask, UpsamplerTask
from ddpm_jax.types import Source, Task

NUM_PREVIEWS = 16
_NEED_CLIP = ("prior", "decoder")
_DECODER_LOSS = ("kind", "objective", "variance", "vlb_weight", "timesteps", "drop_image", "drop_text")
_UPSAMPLER_LOSS = ("image_size", "low_size", "kind", "blur_sigma", "blur_rate", "noise", "mix_colours")


def run_stages(config: Mapping[str, Any], workdir: str | os.PathLike, names: Sequence[str]) -> None:
    """Train stages in the order of the config; finished ones are skipped, an unfinished one continues.

    Args:
        config: the resolved config, plain dicts.
        workdir: created if missing; must be empty or hold a run with this config.
        names: the stages to train.

    Raises:
        ValueError: if the config cannot work or a stage needs another one that has not been trained.
        LoadError: if the directory is foreign.
        CheckpointError, TrainingDiverged, Interrupted, WorkdirInUse: see `training.loop` and `training.checkpoint`.
    """
    build.check_config(config)
    workdir = Path(workdir)
    # Before the lock too, which would leave its file in a directory that is not ours.
    run = _Run(config, workdir, build.make_tokenizer(config))
    _check_workdir(run)
    for i, name in enumerate(names):
        if name in _NEED_CLIP and "clip" not in names[:i] and not is_trained(config, workdir, "clip"):
            raise ValueError(f"stage {name} needs a trained CLIP in {workdir}; train the stage clip first")
    if not (workdir / RUN_FILE).exists() or read_run(workdir)["config"] != json.loads(json.dumps(config)):
        _rehearse(run)
    # On a shared disk the first process holds the directory for all of them.
    with lock_workdir(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        _check_workdir(run)
        run.claim()
        for name in names:
            run.start(name)


def is_trained(config: Mapping[str, Any], workdir: str | os.PathLike, stage: str) -> bool:
    """Return whether a stage has a checkpoint of its last step."""
    return (Path(workdir) / stage / SUBDIRECTORY / str(config[stage]["num_steps"])).is_dir()


class _Run:
    """What the stages of one run share."""

    def __init__(self, config: Mapping[str, Any], workdir: Path, tokenizer: Tokenizer):
        self.config, self.workdir, self.tokenizer = config, workdir, tokenizer
        self.clip = build.make_clip(config, tokenizer.vocab_size)

    def claim(self) -> None:
        """Write run.json."""
        run = {"version": ddpm_jax.__version__, "config": self.config, "tokenizer": self.tokenizer.to_config()}
        write_json(self.workdir / RUN_FILE, run)

    def start(self, stage: str) -> None:
        """Train a stage, or find it finished."""
        _STAGES[stage](self)

    def tokenize(self) -> Tokenize:
        """Return the transform that reads captions."""
        return Tokenize(self.tokenizer, self.config["text"]["length"])

    def clip_params(self) -> Any:
        """Return CLIP's averaged parameters."""
        params, _ = restore_params(self.workdir / "clip", step=self.config["clip"]["num_steps"])
        return params

    def train(self, task: Task, source: Source, transforms: Sequence[Any], **made_with: str) -> None:
        """Train one stage; `made_with` is kept with its config, so that a stage never goes on with other weights."""
        config, name = self.config, task.name
        stage = config[name]
        mesh = make_mesh({"data": -1})
        loader = make_loader(
            source,
            batch_size=stage["batch_size"] // stage.get("family", 1),
            seed=config["seed"],
            transforms=transforms,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )
        tx, schedule = build.make_stage_optimizer(stage, mesh)
        kept = {field: config[field] for field in ("seed", *build.DEPENDS[name], name)} | made_with
        train(
            task,
            loader,
            workdir=self.workdir / name,
            num_steps=stage["num_steps"],
            tx=tx,
            schedule=schedule,
            mesh=mesh,
            seed=config["seed"],
            ema_decay=stage["ema_decay"],
            accumulate=stage["accumulate"],
            checkpoint_every=stage["checkpoint_every"],
            log_every=stage["log_every"],
            preview_every=stage["preview_every"],
            keep=stage["keep"],
            config=kept,
            version=ddpm_jax.__version__,
            tensorboard=config["tensorboard"],
            progress=config["progress"],
            items_per_step=stage["batch_size"],
        )

    def embedded(self, source: Source, clip_params: Any) -> EmbeddedSource:
        """Return the source with its CLIP embeddings, computed when they are not there yet."""
        embed, mesh = jax.jit(self._embed), make_local_mesh()
        clip_params = jax.device_put(clip_params, replicated(mesh))
        cache = cached_embeddings(
            self.workdir / "embeddings",
            source,
            (self.tokenize(), Keep(("image", "tokens", "mask"))),
            lambda batch: embed(clip_params, jax.device_put(batch, data_sharding(mesh))),
            fingerprint={"clip": tree_fingerprint(clip_params), "source": repr(source)},
            batch_size=-(-256 // mesh.shape[DATA_AXIS]) * mesh.shape[DATA_AXIS],
            progress=self.config["progress"],
        )
        return EmbeddedSource(source, cache)

    def _embed(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        images = stages.to_float(batch["image"])
        text = stages.encode_text(self.clip, params, batch["tokens"], batch["mask"])
        return stages.encode_image(self.clip, params, images), text.z

    def previews(self, source: Source, transforms: Sequence[Callable], task: Any) -> dict[str, np.ndarray]:
        """Return a prepared batch of the first records."""
        records = []
        for i in range(min(NUM_PREVIEWS, len(source))):
            record = source[i]
            for transform in transforms:
                record = transform(record)
            records.append(record)
        batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
        # On the host: the previews run wherever the state of the task is.
        return jax.device_get(task.prepare(task.frozen, batch)) if task.frozen is not None else batch


def _train_clip(run: _Run) -> None:
    config = run.config["clip"]
    source = Families(build.make_source(run.config, resolution=config["image_size"]), config["family"])
    run.train(ClipTask(run.clip), source, (run.tokenize(), Keep(("image", "tokens", "mask"))))


def _prior_task(run: _Run, clip_params: Any) -> PriorTask:
    config = run.config["prior"]
    return PriorTask(
        build.make_prior(run.config, run.tokenizer.vocab_size),
        run.clip,
        None if config["text_encoder"] else clip_params,
        build.make_stage_process(config),
        embed_scale=config["embed_scale"],
        drop_text=config["drop_text"],
    )


def _train_prior(run: _Run) -> None:
    params = run.clip_params()
    source = run.embedded(build.make_source(run.config, resolution=run.config["clip"]["image_size"]), params)
    transforms = (run.tokenize(), Keep(("tokens", "mask", "z_image", "z_text")))
    run.train(_prior_task(run, params), source, transforms, **{CLIP_WEIGHTS: tree_fingerprint(params)})


def _decoder_task(run: _Run, clip_params: Any) -> DecoderTask:
    config = run.config["decoder"]
    return DecoderTask(
        build.make_decoder(run.config, run.tokenizer.vocab_size),
        run.clip,
        None if config["text_encoder"] else clip_params,
        build.make_stage_process(config),
        image_size=config["image_size"],
        sampling=build.make_sampling(run.config, "decoder"),
        weighting=build.make_weighting(config),
        **{name: config[name] for name in _DECODER_LOSS},
    )


def _train_decoder(run: _Run) -> None:
    config = run.config["decoder"]
    params = run.clip_params()
    clip_source = build.make_source(run.config, resolution=run.config["clip"]["image_size"])
    cache = run.embedded(clip_source, params).embeddings
    scale = config["supersample"]
    source = EmbeddedSource(build.make_source(run.config, resolution=config["image_size"] * scale), cache)
    shrink = () if scale == 1 else (AverageDown(scale),)
    transforms = (run.tokenize(), Keep(("image", "tokens", "mask", "z_image", "z_text")), *shrink)
    task = _decoder_task(run, params)
    task.preview_batch = run.previews(source, transforms, task)
    run.train(task, source, transforms, **{CLIP_WEIGHTS: tree_fingerprint(params)})


def _upsampler_task(run: _Run) -> UpsamplerTask:
    config = run.config["upsampler"]
    return UpsamplerTask(
        build.make_upsampler(run.config),
        build.make_stage_process(config),
        sampling=build.make_sampling(run.config, "upsampler"),
        weighting=build.make_weighting(config),
        **{name: config[name] for name in _UPSAMPLER_LOSS},
    )


def _train_upsampler(run: _Run) -> None:
    config = run.config["upsampler"]
    source = build.make_source(run.config, resolution=config["image_size"])
    keep = Keep(("image",))
    task = _upsampler_task(run)
    task.preview_batch = run.previews(source, (keep,), task)
    crop = () if config["crop"] == config["image_size"] else (RandomCrop(config["crop"]),)
    run.train(task, source, (keep, *crop))


_STAGES: dict[str, Callable[[_Run], None]] = {
    "clip": _train_clip,
    "prior": _train_prior,
    "decoder": _train_decoder,
    "upsampler": _train_upsampler,
}


def _rehearse(run: _Run) -> None:
    """Raise ValueError for what would stop a stage only after those before it have been trained; computes nothing."""
    mesh = make_mesh({"data": -1})
    tasks: dict[str, Callable[[], Task]] = {
        "clip": lambda: ClipTask(run.clip),
        "prior": lambda: _prior_task(run, clip_params={}),
        "decoder": lambda: _decoder_task(run, clip_params={}),
        "upsampler": lambda: _upsampler_task(run),
    }
    for name, make_task in tasks.items():
        stage = run.config[name]
        parts = {"devices": mesh.shape[DATA_AXIS], "accumulate": stage["accumulate"], "family": stage.get("family", 1)}
        unit = math.prod(parts.values())
        if stage["batch_size"] % unit:
            product = " x ".join(f"{count} ({what})" for what, count in parts.items() if count > 1)
            raise ValueError(f"{name}.batch_size={stage['batch_size']} must be a multiple of {unit} = {product}")
        try:
            tx, _ = build.make_stage_optimizer(stage)
            abstract_state(make_task(), tx, jax.random.key(0), mesh)
        except (ValueError, TypeError) as error:
            raise ValueError(f"the config of stage {name} cannot work: {error}") from error


def _check_workdir(run: _Run) -> None:
    """Raise LoadError for a foreign directory, or one with a run of another config or another vocabulary."""
    workdir, config = run.workdir, run.config
    if workdir.exists() and not workdir.is_dir():
        raise LoadError(f"workdir {workdir} is a file, not a directory")
    if (workdir / RUN_FILE).exists():
        earlier = read_run(workdir)
        saved = earlier["config"]
        # A stage that has saved nothing yet may be changed; every checkpoint holds the config that it depends on.
        fresh = {stage for stage in build.STAGES if not _has_checkpoint(workdir / stage)}
        ignore = NOT_COMPARED | {"sample", "evaluation", "stages"} | fresh
        differences = config_differences(saved, json.loads(json.dumps(config)), ignore=ignore)
        if differences:
            raise LoadError(
                f"workdir {workdir} holds a run of another config: {'; '.join(differences)}; give that config or "
                "another workdir"
            )
        if fresh != set(build.STAGES) and earlier["tokenizer"] != json.loads(json.dumps(run.tokenizer.to_config())):
            raise LoadError(
                f"workdir {workdir} holds a run of another vocabulary, of version {earlier['version']} of this "
                "package; give another workdir"
            )
    elif workdir.exists() and any(not _is_own(entry.name) for entry in workdir.iterdir()):
        raise LoadError(f"workdir {workdir} is not empty and holds no training run; give a new or empty directory")


def _has_checkpoint(stage: Path) -> bool:
    return (stage / SUBDIRECTORY).is_dir() and any(entry.name.isdigit() for entry in (stage / SUBDIRECTORY).iterdir())


def _is_own(name: str) -> bool:
    """Return whether a run that was killed before it wrote run.json may have left a file of this name."""
    return name == ".lock" or (name.startswith(RUN_FILE) and name.endswith(".tmp"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    if jax.process_index() != 0:
        return
    # One name, so that what a kill leaves is written over by the next run.
    try:
        with temporary_path(path.with_name(path.name + ".tmp")) as new:
            new.write_text(json.dumps(value, indent=1) + "\n")
            os.replace(new, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write the file: {error.strerror}", str(path)) from error
