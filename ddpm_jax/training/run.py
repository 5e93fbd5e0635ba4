"""Training stages in a working directory, one after the other.

workdir/run.json              the version, and the config if the stages were made from one
workdir/<stage>/              model.json, checkpoints/, previews/, metrics.jsonl
workdir/embeddings/           CLIP embeddings of a data set, computed once; those of held-out records beside it
workdir/pipeline.json         how the stages are sampled together, if the caller says so
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.checks import shown
from ddpm_jax.data.source import read_record
from ddpm_jax.diffusion.sampling import NO_MOMENTS
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.distributed import watch_hosts
from ddpm_jax.parallel.mesh import AXES, batch_shards, make_mesh, process_shards
from ddpm_jax.parallel.shared_directory import check_shared
from ddpm_jax.paths import as_path, local_path
from ddpm_jax.storage.checkpoint import SUBDIRECTORY, Checkpoints, restore_params
from ddpm_jax.storage.config_difference import flatten
from ddpm_jax.storage.fingerprint import tree_fingerprint
from ddpm_jax.storage.json_file import write_json
from ddpm_jax.storage.lock import lock_workdir
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model, place_of, write_description
from ddpm_jax.training.abstract import AbstractStages
from ddpm_jax.training.best import measure_and_keep
from ddpm_jax.training.describe import describe
from ddpm_jax.training.fitting import fit_sums
from ddpm_jax.training.guard import Policy
from ddpm_jax.training.loop import fit
from ddpm_jax.training.moments import estimate_moments
from ddpm_jax.training.optimizer import training_optimizer
from ddpm_jax.training.records import LikeFirst, example_batch, random_records
from ddpm_jax.training.stage import Stage, apply_transforms
from ddpm_jax.training.workdir import RUN_FILE, check_workdir
from ddpm_jax.types import Source
from ddpm_jax.version import __version__

EMBEDDINGS, HELD_OUT = "embeddings", "embeddings_held_out"
_LOOP = ("num_steps", "seed", "ema_decay", "accumulate", "checkpoint_every", "log_every", "preview_every", "eval_every")
_LOOP += ("evaluate_every", "max_to_keep", "tensorboard", "progress", "sam_rho")


def train(
    stages: Stage | Sequence[Stage],
    workdir: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    pipeline: Any = None,
    config: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> None:
    """Train stages in their order; finished ones are skipped, an unfinished one resumes.

    Before anything is computed, every stage is traced without numbers, so that what cannot work is refused at once.
    `ddpm_jax.load(workdir)` then gives the pipeline, and `ddpm_jax.load(workdir / stage.name)` one network.

        stage = Stage(name="base", task=DiffusionTask(...), source=ArraySource(images), training=Training(...))
        train(stage, "runs/own")
        images = ddpm_jax.load("runs/own").generate(16)

    Args:
        stages: one stage, or several, each after those it needs.
        workdir: created if missing; must be empty or hold a run.
        names: the stages to train; all by default.
        pipeline: how the stages are sampled together, a `pipelines.PipelineDescription`; written to pipeline.json.
        config: what the stages were made from, plain data, for the record.
        mesh: devices along "data", "fsdp" and "tensor" (`parallel.mesh.make_mesh`); by default all along "data".
        profile_steps: the first and the last step of a profiler trace, written to `<workdir>/<stage>/profile`; a stage
            that makes none of them warns.

    Raises:
        ValueError: if a stage cannot work, or needs another one that has not been trained.
        LoadError: if the directory is foreign, or a model that is needed cannot be loaded.
        CheckpointError: if a checkpoint cannot be written, read or used, or was made with other settings.
        TrainingDiverged, Interrupted: see `training.loop.fit`.
        WorkdirInUse: if another run holds the directory.
        ClusterError: if the hosts of the run disagree on what is trained, or have different directories.
    """
    stages = _as_stages(stages)
    if not isinstance(workdir, (str, os.PathLike)):
        raise ValueError(f"workdir={shown(workdir)} must be the path of a directory")
    if mesh is not None and (not isinstance(mesh, Mesh) or not mesh.shape or not set(mesh.shape) <= set(AXES)):
        raise ValueError(f"mesh={shown(mesh)} must be a Mesh with axes out of {', '.join(AXES)}, as make_mesh returns")
    watch_hosts()
    mesh = make_mesh({"data": -1}) if mesh is None else mesh
    for process in range(jax.process_count()):
        process_shards(mesh, process)
    run = _Run(stages, as_path(workdir), mesh)
    chosen = [run.stages[name] for name in run.check_names(names)]
    _check_profile(profile_steps, chosen)
    if pipeline is not None:
        _check_pipeline(pipeline, run)
    # Before the lock, which would leave its file in a directory that is not ours.
    check_workdir(run.workdir)
    for stage in chosen:
        run.check(stage)
    # On a shared disk the first process holds the directory for all of them.
    with lock_workdir(run.workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        if jax.process_index() == 0:
            check_workdir(run.workdir)
            document = {"version": __version__, "stages": list(run.stages), "config": config}
            write_json(run.workdir / RUN_FILE, document)
            if pipeline is not None:
                pipeline.write(run.workdir)
        check_shared(run.workdir, "workdir")
        run.agree(chosen)
        for stage in chosen:
            run.train(stage, profile_steps)


def _as_stages(stages: Any) -> tuple[Stage, ...]:
    given = (stages,) if isinstance(stages, Stage) else stages
    if isinstance(given, Mapping) or not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise ValueError(f"stages={shown(stages)} must be a Stage, or a sequence of them")
    given = tuple(given)
    for number, stage in enumerate(given):
        if not isinstance(stage, Stage):
            raise ValueError(f"stages[{number}]={shown(stage)} must be a Stage")
    return given


def _check_profile(steps: Any, stages: Sequence[Stage]) -> None:
    """Raise ValueError for steps of a trace that no stage has."""
    if steps is None:
        return
    numbers = steps if isinstance(steps, Sequence) else ()
    if len(numbers) != 2 or not all(type(each) is int for each in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(f"profile_steps={shown(steps)} must be the first and the last step, such as (100, 105)")
    if stages and all(stage.training.num_steps < numbers[0] for stage in stages):
        ends = ", ".join(f"{stage.name} has {stage.training.num_steps}" for stage in stages)
        raise ValueError(f"profile_steps={shown(steps)} are steps that no stage makes: {ends}")


def is_trained(stage: Stage, workdir: str | os.PathLike) -> bool:
    """Return whether a stage has a checkpoint of its last step."""
    return (as_path(workdir) / stage.name / SUBDIRECTORY / str(stage.training.num_steps)).is_dir()


class _Run:
    """The stages of one run, and the models that they need."""

    def __init__(self, stages: Sequence[Stage], workdir: Path, mesh: Mesh):
        self.abstract = AbstractStages(stages, mesh)
        self.stages, self.workdir, self.mesh = self.abstract.stages, workdir, mesh
        self._models: dict[str, Model] = {}
        self._fingerprints: dict[str, str] = {}

    def check_names(self, names: Sequence[str] | None) -> list[str]:
        """Return the stages to train, in order; raise ValueError for one that is unknown or lacks what it needs."""
        if isinstance(names, str):
            raise ValueError(f"names={names!r} must be a sequence of names of stages; write [{names!r}]")
        names = list(self.stages) if names is None else list(names)
        for name in names:
            if name not in self.stages:
                raise ValueError(f"there is no stage {name!r}; there are {', '.join(self.stages)}")
        names = [name for name in self.stages if name in names]
        order = list(self.stages)
        for i, name in enumerate(names):
            for role, needed in self.stages[name].needs.items():
                if needed not in self.stages:
                    if not as_path(needed).is_dir():
                        known = ", ".join(order[: order.index(name)]) or "none"
                        raise ValueError(
                            f"stage {name} needs {needed!r} as {role}, which is neither an earlier stage ({known}) nor "
                            "a model directory"
                        )
                elif order.index(needed) >= order.index(name):
                    raise ValueError(f"stage {name} needs {needed} as {role}, which must come before it")
                elif not all(hasattr(self.stages[needed].task, part) for part in ("model", "metadata")):
                    kind = type(self.stages[needed].task).__name__
                    raise ValueError(
                        f"stage {name} needs {needed} as {role}, whose task {kind} has no model and metadata"
                    )
                elif needed not in names[:i] and not is_trained(self.stages[needed], self.workdir):
                    raise ValueError(
                        f"stage {name} needs a trained {needed} in {self.workdir}; train the stage {needed} first"
                    )
        return names

    # ---- Models that a stage needs -----------------------------------------------------------------------------------

    def models(self, stage: Stage) -> dict[str, Model]:
        """Return the models that a stage needs, by role, with the averaged parameters."""
        return {role: self._model(needed) for role, needed in stage.needs.items()}

    def _model(self, needed: str) -> Model:
        if needed not in self._models:
            if needed in self.stages:
                stage = self.stages[needed]
                params, _ = restore_params(self.workdir / needed, step=stage.training.num_steps)
                self._models[needed] = Model(params, stage.task.model, freeze(stage.task.metadata()))
            else:
                self._models[needed] = self.abstract.open(needed)
        return self._models[needed]

    def fingerprints(self, stage: Stage) -> dict[str, str]:
        """Return the hash of the parameters of each model that a stage needs."""
        for needed in stage.needs.values():
            if needed not in self._fingerprints:
                self._fingerprints[needed] = tree_fingerprint(self._model(needed).params)
        return {role: self._fingerprints[needed] for role, needed in stage.needs.items()}

    # ---- Before anything is trained ----------------------------------------------------------------------------------

    def check(self, stage: Stage) -> None:
        """Raise an error for what would stop a stage only after those before it have been trained."""
        self.abstract.check(stage)
        self._compare(stage)
        if stage.training.evaluate_every:
            local_path(self.workdir)  # where the best model is written
            self._check_evaluation(stage)

    def _check_evaluation(self, stage: Stage) -> None:
        """Raise ValueError or LoadError if the samples of a stage cannot be measured."""
        try:
            stage.evaluate.check(self.abstract.model(stage))
        except ValueError as error:
            raise ValueError(f"samples of stage {stage.name} cannot be measured: {error}") from None

    def agree(self, chosen: Sequence[Stage]) -> None:
        """Raise ClusterError on all hosts if one has another idea of the devices, a stage or its records."""
        fields: dict[str, Any] = {"the mesh": dict(self.mesh.shape)}
        for stage in chosen:
            described = flatten(_description(stage, dict.fromkeys(stage.needs.values(), "")))
            fields |= {f"{name} of stage {stage.name}": value for name, value in described.items()}
        hosts.current().agree(fields)

    def _compare(self, stage: Stage) -> None:
        """Raise CheckpointError for a checkpoint of other settings; models that are needed are compared later."""
        directory = self.workdir / stage.name
        if (directory / SUBDIRECTORY).is_dir():
            checkpoints = Checkpoints(directory, read_only=True)
            with contextlib.closing(checkpoints):
                found = checkpoints.read_config()
                if found is not None:
                    needs = found[1].get("needs", {})
                    checkpoints.compare(_description(stage, needs if needs.keys() == stage.needs.keys() else {}))

    # ---- Training ----------------------------------------------------------------------------------------------------

    def train(self, stage: Stage, profile_steps: tuple[int, int] | None = None) -> None:
        """Train one stage, or find it finished."""
        training, directory = stage.training, self.workdir / stage.name
        models = self.models(stage)
        needs = self.fingerprints(stage)
        description = _description(stage, needs)
        if (directory / SUBDIRECTORY).is_dir():  # before model.json is written, which must say what the checkpoint is
            with contextlib.closing(Checkpoints(directory, read_only=True)) as checkpoints:
                checkpoints.compare(description)
        self._describe_model(stage, needs)
        source = self._computed(stage.source, models, training, EMBEDDINGS)
        eval_source = self._computed(stage.eval_source, models, training, HELD_OUT)
        if hasattr(stage.task, "fitted"):
            self._fit(stage, source, models, description)
            return
        tx, schedule = training_optimizer(training, self.mesh)
        options = {name: getattr(training, name) for name in _LOOP}
        with self._loading(stage, source) as loader:
            fit(
                stage.task,
                loader,
                name=stage.name,
                example=example_batch(stage, source),
                workdir=directory,
                tx=tx,
                schedule=schedule,
                mesh=self.mesh,
                config=description,
                version=__version__,
                frozen=models,
                rules=stage.sharding_rules,
                abstract=self.abstract.state(stage),
                eval_batches=None if eval_source is None else lambda: self._eval_batches(stage, eval_source),
                items_per_step=training.batch_size,
                measure=self._measure(stage, needs),
                policy=Policy(*(getattr(training, name) for name in Policy._fields)),
                profile_steps=profile_steps,
                **options,
            )

        if training.moment_examples:
            frozen = self.models(stage)
            estimate_moments(
                stage.task,
                self._model(stage.name).params,
                frozen,
                random_records(stage, source, training.moment_examples),
                directory,
                seed=training.seed,
                step=training.num_steps,
                progress=training.progress,
            )

    def _measure(self, stage: Stage, needs: Mapping[str, str]) -> Any:
        """Return what measures samples of the averaged parameters of a stage, and keeps the best."""
        if not stage.training.evaluate_every:
            return None
        metadata = stage.task.metadata() | ({"needs": dict(needs)} if needs else {})
        directory = local_path(self.workdir / stage.name)
        return functools.partial(measure_and_keep, stage.evaluate, stage.task.model, metadata, directory)

    def _fit(self, stage: Stage, source: Source, models: Mapping[str, Model], description: Mapping[str, Any]) -> None:
        """Fit a stage in closed form, or find it finished."""
        with self._loading(stage, source) as loader:
            fit_sums(
                stage.task,
                loader,
                name=stage.name,
                workdir=self.workdir / stage.name,
                num_steps=stage.training.num_steps,
                frozen=models,
                mesh=self.mesh,
                config=description,
                version=__version__,
                progress=stage.training.progress,
            )

    def _computed(self, source: Source | None, models: Mapping[str, Model], training: Any, name: str) -> Source | None:
        compute = getattr(source, "compute", None)
        return source if compute is None else compute(models, self.workdir / name, progress=training.progress)

    def _describe_model(self, stage: Stage, needs: Mapping[str, str]) -> None:
        """Write model.json, if the task has a network of this package's form."""
        network, metadata = getattr(stage.task, "model", None), getattr(stage.task, "metadata", None)
        if network is None or metadata is None or jax.process_index() != 0:
            return
        found = metadata() | ({"needs": dict(needs)} if needs else {})
        write_description(self.workdir / stage.name, {"model": network}, found)

    @contextlib.contextmanager
    def _loading(self, stage: Stage, source: Source, **options: Any) -> Iterator[Any]:
        """Give the loader of a stage, and close it."""
        loader = self._loader(stage, source, **options)
        try:
            yield loader
        finally:
            if hasattr(loader, "close"):
                loader.close()

    def _loader(self, stage: Stage, source: Source, **options: Any) -> Any:
        # Here, since Grain takes long to import and nothing else needs it.
        from ddpm_jax.data.loader import make_loader

        first = apply_transforms(dict(read_record(source, 0)), stage.transforms, np.random.default_rng(0))
        return make_loader(
            source,
            batch_size=stage.training.batch_size // stage.examples_per_record,
            seed=stage.training.seed,
            transforms=(*stage.transforms, LikeFirst(stage, first)),
            shard_index=process_shards(self.mesh),
            shard_count=batch_shards(self.mesh),
            **({"num_workers": stage.training.num_workers} | options),
        )

    def _eval_batches(self, stage: Stage, source: Source) -> Iterator[Mapping[str, np.ndarray]]:
        # Created for each evaluation, so that each evaluation sees the same records.
        with self._loading(stage, source, num_workers=0) as loader:
            for _ in range(stage.training.eval_batches):
                yield next(loader)


def _check_pipeline(pipeline: Any, run: _Run) -> None:
    """Raise ValueError for a model that is neither a stage of the run nor a directory, or steps that it cannot make."""
    if not hasattr(pipeline, "write") or not isinstance(getattr(pipeline, "models", None), Mapping):
        raise ValueError(f"pipeline={shown(pipeline)} must be a pipelines.PipelineDescription")
    for role, place in pipeline.models.items():
        for each in [place] if isinstance(place, str | os.PathLike) else place:
            if str(each) not in run.stages and not place_of(run.workdir, each).is_dir():
                raise ValueError(
                    f"the pipeline's {role} is {str(each)!r}, which is neither a stage ({', '.join(run.stages)}) nor a "
                    "model directory"
                )
    prior = run.stages.get(str(pipeline.models.get("prior", "")))
    network = None if prior is None else getattr(prior.task, "model", None)
    if prior is not None and isinstance(network, AutoregressivePrior) != ("codes" in pipeline.models):
        kind = type(network).__name__
        needs = "needs the pipeline's codes" if kind == "AutoregressivePrior" else "takes no codes"
        raise ValueError(f"the pipeline's prior is the stage {prior.name}, a {kind}, which {needs}")
    own = None if prior is None else prior.needs.get(getattr(getattr(prior.task, "x0", None), "statistics", None))
    if prior is not None and pipeline.models.get("statistics") != own:
        raise ValueError(
            f"the pipeline's statistics are {pipeline.models.get('statistics')!r}, and its prior is the stage "
            f"{prior.name}, which is trained with {own!r}"
        )
    for name, sampling in getattr(pipeline, "sampling", {}).items():
        stage = run.stages.get(str(pipeline.models.get(name, name)))
        if stage is not None and hasattr(stage.task, "diffusion"):
            if sampling.sampler == "analytic" and not stage.training.moment_examples:
                raise ValueError(f"the pipeline cannot sample {name}: sampler='analytic' {NO_MOMENTS}")
            try:
                sampling.checked().process(stage.task.diffusion)
            except ValueError as error:
                raise ValueError(f"the pipeline cannot sample {name}: {error}") from None
    _check_noise_levels(pipeline, run)


def _check_noise_levels(pipeline: Any, run: _Run) -> None:
    """Raise ValueError for a noise level of the pipeline that an upsampler is not trained with."""
    for name, level in getattr(pipeline, "options", {}).get("noise_levels", {}).items():
        task = getattr(run.stages.get(str(pipeline.models.get(name, name))), "task", None)
        metadata = task.metadata() if hasattr(task, "metadata") else {}
        trained = metadata.get("low_resolution", {}).get("noise")
        if trained is not None and level > trained:
            raise ValueError(
                f"the pipeline cannot sample {name}: its noise level {level} must be at most {trained}, the largest "
                "that the stage is trained with"
            )


def _description(stage: Stage, needs: Mapping[str, str]) -> dict[str, Any]:
    """Return all that a stage's result depends on, as plain data."""
    return {
        "task": describe(stage.task),
        "source": describe(stage.source),
        "transforms": describe(stage.transforms),
        "training": describe(stage.training),
        "examples_per_record": stage.examples_per_record,
        "needs": dict(needs),
    }
