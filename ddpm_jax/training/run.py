"""Training stages in a working directory, one after the other.

workdir/run.json              the version, and the config if the stages were made from one
workdir/<stage>/              model.json, checkpoints/, previews/, metrics.jsonl
workdir/embeddings/           CLIP embeddings of a data set, computed once; those of held-out records beside it
workdir/pipeline.json         how the stages are sampled together, if the caller says so
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.checks import shown
from ddpm_jax.data.source import read_record
from ddpm_jax.diffusion.sampling import NO_MOMENTS
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.distributed import watch_hosts
from ddpm_jax.parallel.mesh import AXES, batch_shards, make_mesh
from ddpm_jax.paths import as_path
from ddpm_jax.storage.checkpoint import SUBDIRECTORY, Checkpoints, restore_params
from ddpm_jax.storage.config_difference import flatten
from ddpm_jax.storage.fingerprint import tree_fingerprint
from ddpm_jax.storage.json_file import write_json
from ddpm_jax.storage.lock import lock_workdir
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model, open_model, write_description
from ddpm_jax.storage.networks import check_fields
from ddpm_jax.training.describe import describe
from ddpm_jax.training.guard import Policy
from ddpm_jax.training.loop import fit
from ddpm_jax.training.moments import estimate_moments
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.stage import Stage, apply_transforms
from ddpm_jax.training.state import abstract_state
from ddpm_jax.training.workdir import RUN_FILE, check_workdir
from ddpm_jax.types import Source, Task
from ddpm_jax.version import __version__

EMBEDDINGS, HELD_OUT = "embeddings", "embeddings_held_out"
_OPTIMIZER = ("learning_rate", "warmup_steps", "decay", "final_fraction", "b1", "b2", "eps", "weight_decay")
_OPTIMIZER += ("clip_norm", "optimizer", "muon_learning_rate")
_LOOP = ("num_steps", "seed", "ema_decay", "accumulate", "checkpoint_every", "log_every", "preview_every", "eval_every")
_LOOP += ("max_to_keep", "tensorboard", "progress")


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
        profile_steps: the first and the last step of a profiler trace, written to `<workdir>/<stage>/profile`.

    Raises:
        ValueError: if a stage cannot work, or needs another one that has not been trained.
        LoadError: if the directory is foreign, or a model that is needed cannot be loaded.
        CheckpointError: if a checkpoint cannot be written, read or used, or was made with other settings.
        TrainingDiverged, Interrupted: see `training.loop.fit`.
        WorkdirInUse: if another run holds the directory.
        ClusterError: if the hosts of the run disagree on what is trained.
    """
    stages = _as_stages(stages)
    if not isinstance(workdir, (str, os.PathLike)):
        raise ValueError(f"workdir={shown(workdir)} must be the path of a directory")
    if mesh is not None and (not isinstance(mesh, Mesh) or not set(mesh.shape) & set(AXES)):
        raise ValueError(f"mesh={shown(mesh)} must be a Mesh with axes of {', '.join(AXES)}, as make_mesh returns")
    watch_hosts()
    run = _Run(stages, as_path(workdir), make_mesh({"data": -1}) if mesh is None else mesh)
    chosen = [run.stages[name] for name in run.check_names(names)]
    if pipeline is not None:
        _check_pipeline(pipeline, run)
    # Before the lock, which would leave its file in a directory that is not ours.
    check_workdir(run.workdir)
    for stage in chosen:
        run.dry_run(stage)
    # On a shared disk the first process holds the directory for all of them.
    with lock_workdir(run.workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        if jax.process_index() == 0:
            check_workdir(run.workdir)
            document = {"version": __version__, "stages": list(run.stages), "config": config}
            write_json(run.workdir / RUN_FILE, document)
            if pipeline is not None:
                pipeline.write(run.workdir)
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


def is_trained(stage: Stage, workdir: str | os.PathLike) -> bool:
    """Return whether a stage has a checkpoint of its last step."""
    return (as_path(workdir) / stage.name / SUBDIRECTORY / str(stage.training.num_steps)).is_dir()


class _Run:
    """The stages of one run, and the models that they need."""

    def __init__(self, stages: Sequence[Stage], workdir: Path, mesh: Mesh):
        if not stages:
            raise ValueError("there is no stage to train")
        self.stages = {stage.name: stage for stage in stages}
        if len(self.stages) != len(stages):
            twice = next(name for name in self.stages if sum(stage.name == name for stage in stages) > 1)
            raise ValueError(f"two stages have the name {twice!r}; each needs a separate directory")
        self.workdir, self.mesh = workdir, mesh
        self._models: dict[str, Model] = {}
        self._fingerprints: dict[str, str] = {}
        self._abstract: dict[str, Any] = {}
        self._batches: dict[tuple[str, bool], Any] = {}

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
                    if not os.path.isdir(needed):
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
                self._models[needed] = open_model(needed)
        return self._models[needed]

    def _abstract_models(self, stage: Stage) -> dict[str, Model]:
        """Return the same with shapes in place of parameters that may not be there yet."""
        found = {}
        for role, needed in stage.needs.items():
            if needed in self.stages:
                other = self.stages[needed]
                params = self._abstract_state(other).params
                found[role] = Model(params, other.task.model, freeze(other.task.metadata()))
            else:
                found[role] = self._model(needed)
        return found

    def fingerprints(self, stage: Stage) -> dict[str, str]:
        """Return the hash of the parameters of each model that a stage needs."""
        for needed in stage.needs.values():
            if needed not in self._fingerprints:
                self._fingerprints[needed] = tree_fingerprint(self._model(needed).params)
        return {role: self._fingerprints[needed] for role, needed in stage.needs.items()}

    # ---- Before anything is trained ----------------------------------------------------------------------------------

    def dry_run(self, stage: Stage) -> None:
        """Raise ValueError for what would stop a stage only after those before it have been trained."""
        training = stage.training
        parts = {"devices": batch_shards(self.mesh), "accumulate": training.accumulate}
        parts["examples of a record"] = stage.examples_per_record
        unit = math.prod(parts.values())
        if training.batch_size % unit:
            product = " x ".join(f"{count} ({what})" for what, count in parts.items() if count > 1)
            raise ValueError(
                f"stage {stage.name}: batch_size={training.batch_size} must be a multiple of {unit} = {product}"
            )
        try:
            check_fields(getattr(stage.task, "model", None))
            _make_optimizer(stage, None)
            self._trace_loss(stage)
            if stage.eval_source is not None:
                self._trace_loss(stage, evaluated=True)
        except KeyError as error:
            raise ValueError(f"stage {stage.name}: {_missing(stage, error)}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"stage {stage.name} cannot work: {error}") from error
        self._compare(stage)

    def agree(self, chosen: Sequence[Stage]) -> None:
        """Raise ClusterError on all hosts if one has another idea of the devices, a stage or its records."""
        fields: dict[str, Any] = {"the mesh": dict(self.mesh.shape)}
        for stage in chosen:
            described = flatten(_description(stage, dict.fromkeys(stage.needs.values(), "")))
            fields |= {f"{name} of stage {stage.name}": value for name, value in described.items()}
        hosts.current().agree(fields)

    def _trace_loss(self, stage: Stage, *, evaluated: bool = False) -> None:
        """Trace the loss on a record of the source, or that of an evaluation on a held-out one."""
        params, key = self._abstract_state(stage).params, jax.random.key(0)
        if evaluated:
            loss = getattr(stage.task, "eval_loss", stage.task.loss)
            jax.eval_shape(loss, params, self._prepared(stage, evaluated=True), key)
            return
        extra = getattr(stage.task, "extra_state", None)
        batch = self._prepared(stage)
        loss = _checked_loss(stage.task)
        jax.eval_shape(loss, params, batch, key, *(() if extra is None else (extra,)))

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

    def _prepared(self, stage: Stage, *, evaluated: bool = False) -> Any:
        """Return the shapes of a prepared micro-batch, by the first record of the source or of the held-out one."""
        if (stage.name, evaluated) not in self._batches:
            models = self._abstract_models(stage)
            source = stage.eval_source if evaluated else stage.source
            example = _stack(stage, [_example_record(stage, models, source)])
            size = stage.training.batch_size // stage.training.accumulate // stage.examples_per_record
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), example)
            prepare = lambda models, batch: stage.task.prepare(_Roles(models), batch)  # noqa: E731
            self._batches[stage.name, evaluated] = jax.eval_shape(prepare, models, shapes)
        return self._batches[stage.name, evaluated]

    def _abstract_state(self, stage: Stage) -> Any:
        if stage.name not in self._abstract:
            tx, _ = _make_optimizer(stage, None)
            prepared = self._prepared(stage)
            rules = stage.sharding_rules
            self._abstract[stage.name] = abstract_state(stage.task, tx, jax.random.key(0), self.mesh, prepared, rules)
        return self._abstract[stage.name]

    # ---- Training ----------------------------------------------------------------------------------------------------

    def train(self, stage: Stage, profile_steps: tuple[int, int] | None = None) -> None:
        """Train one stage, or find it finished."""
        training, directory = stage.training, self.workdir / stage.name
        models = self.models(stage)
        needs = self.fingerprints(stage)
        description = _description(stage, needs)
        self._describe_model(stage, needs)
        source = self._computed(stage.source, models, training, EMBEDDINGS)
        eval_source = self._computed(stage.eval_source, models, training, HELD_OUT)
        tx, schedule = _make_optimizer(stage, self.mesh)
        options = {name: getattr(training, name) for name in _LOOP}
        loader = self._loader(stage, source)
        with contextlib.ExitStack() as stack:
            if hasattr(loader, "close"):
                stack.callback(loader.close)
            fit(
                stage.task,
                loader,
                name=stage.name,
                example=_example(stage, source),
                workdir=directory,
                tx=tx,
                schedule=schedule,
                mesh=self.mesh,
                config=description,
                version=__version__,
                frozen=models,
                rules=stage.sharding_rules,
                eval_batches=None if eval_source is None else lambda: self._eval_batches(stage, eval_source),
                items_per_step=training.batch_size,
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
                _First(stage, source, training.moment_examples),
                directory,
                seed=training.seed,
                step=training.num_steps,
                progress=training.progress,
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

    def _loader(self, stage: Stage, source: Source, **options: Any) -> Any:
        # Here, since Grain takes long to import and nothing else needs it.
        from ddpm_jax.data.loader import make_loader

        first = apply_transforms(dict(read_record(source, 0)), stage.transforms, np.random.default_rng(0))
        return make_loader(
            source,
            batch_size=stage.training.batch_size // stage.examples_per_record,
            seed=stage.training.seed,
            transforms=(*stage.transforms, _LikeFirst(stage.name, first)),
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
            **({"num_workers": stage.training.num_workers} | options),
        )

    def _eval_batches(self, stage: Stage, source: Source) -> Iterator[Mapping[str, np.ndarray]]:
        # Created for each evaluation, so that each evaluation sees the same records.
        loader = self._loader(stage, source, num_workers=0)
        try:
            for _ in range(stage.training.eval_batches):
                yield next(loader)
        finally:
            if hasattr(loader, "close"):
                loader.close()


def _checked_loss(task: Task) -> Callable[..., Any]:
    """Return the task's loss, with a sentence for one that returns something else than (loss, metrics)."""

    def loss(*arguments: Any) -> Any:
        found = task.loss(*arguments)
        pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)
        if not pair or not jnp.issubdtype(getattr(found[0], "dtype", bool), jnp.floating):
            shown = ", ".join(type(part).__name__ for part in found) if isinstance(found, tuple) else "one value"
            raise ValueError(f"loss of its task must return (float32[B], a dict of metrics), got {shown}")
        return found

    return loss


class _Roles(dict):
    """Models by role, with a sentence for one that is missing."""

    def __missing__(self, role: str) -> Any:
        raise ValueError(f"its task needs a model for the role {role!r}; give the stage needs={{{role!r}: ...}}")


def _check_pipeline(pipeline: Any, run: _Run) -> None:
    """Raise ValueError for a model that is neither a stage of the run nor a directory, or steps that it cannot make."""
    if not hasattr(pipeline, "write") or not isinstance(getattr(pipeline, "models", None), Mapping):
        raise ValueError(f"pipeline={shown(pipeline)} must be a pipelines.PipelineDescription")
    for role, place in pipeline.models.items():
        for each in [place] if isinstance(place, str | os.PathLike) else place:
            if str(each) not in run.stages and not (run.workdir / each).is_dir():
                raise ValueError(
                    f"the pipeline's {role} is {str(each)!r}, which is neither a stage ({', '.join(run.stages)}) nor a "
                    "model directory"
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


def _make_optimizer(stage: Stage, mesh: Mesh | None) -> Any:
    options = {name: getattr(stage.training, name) for name in _OPTIMIZER}
    return make_optimizer(total_steps=stage.training.num_steps, mesh=mesh, **options)


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


def _without_text(record: dict) -> dict:
    """Leave out what is not numbers, such as a file's name, which no device can hold."""
    return {name: value for name, value in record.items() if np.asarray(value).dtype.kind not in "OSU"}


class _LikeFirst:
    """Leave out text, and raise ValueError for a record that cannot be in one batch with the first."""

    def __init__(self, stage: str, first: dict):
        self._stage, self._shapes = stage, self._shapes_of(_without_text(first))

    def __call__(self, record: dict) -> dict:
        record = _without_text(record)
        shapes = self._shapes_of(record)
        if shapes != self._shapes:
            raise ValueError(_unequal(self._stage, self._shapes, shapes))
        return record

    @staticmethod
    def _shapes_of(record: dict) -> dict[str, tuple[int, ...]]:
        return {name: np.shape(value) for name, value in record.items()}


def _unequal(stage: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return a sentence on records, name -> shape, that cannot be in one batch."""
    if first.keys() != other.keys():
        entries = " and ".join(", ".join(record) for record in (first, other))
        return f"stage {stage}: the records have different entries, {entries}; Select can bring them to the same"
    name = next(name for name in first if first[name] != other[name])
    shapes = f"{first[name]} and {other[name]}"
    return f"stage {stage}: {name!r} of the records has different shapes, {shapes}; CenterCrop can bring them to one"


def _example_record(stage: Stage, models: Mapping[str, Model], source: Source) -> dict:
    """Return the first record after the transforms, with zeros for embeddings that are not computed yet."""
    if len(source) < 1:
        raise ValueError("its source has no records")
    record = source.example(models) if hasattr(source, "example") else read_record(source, 0)
    return _without_text(apply_transforms(dict(record), stage.transforms, np.random.default_rng(0)))


def _example(stage: Stage, source: Source) -> dict[str, np.ndarray]:
    """Return a batch of the first records, for previews and for the shapes of the network."""
    return _stack(stage, list(_First(stage, source, max(stage.training.num_previews, 1))))


class _First(Sequence):
    """The first records of a stage after the transforms, without text."""

    def __init__(self, stage: Stage, source: Source, count: int):
        self._stage, self._source, self._count = stage, source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        index = index.__index__()
        rng = np.random.default_rng((self._stage.training.seed, index))
        return _without_text(apply_transforms(dict(read_record(self._source, index)), self._stage.transforms, rng))


def _stack(stage: Stage, records: Sequence[dict]) -> dict[str, np.ndarray]:
    check = _LikeFirst(stage.name, records[0])
    records = [check(record) for record in records]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _missing(stage: Stage, error: KeyError) -> str:
    """Return a sentence on a record, or a model, that lacks an entry."""
    name = error.args[0] if error.args else error
    with contextlib.suppress(Exception):
        for which in ("source", "eval_source"):
            record = getattr(stage, which)[0]
            if name in record and name not in _without_text(record):
                kind = type(record[name]).__name__
                return f"its task or transforms read {name!r}, which is of type {kind} in its {which}, and not an array"
            if name not in record:
                entries = ", ".join(map(str, record))
                return f"its task or transforms read {name!r}, and the records of its {which} have {entries}"
    return f"its task or transforms read {name!r}, which the records do not have"
