"""Description of training: a `Stage` is a task, its data, optimization options and the stages that it needs."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddpm_jax.checks import check_model, is_finite, shown
from ddpm_jax.data.source import transformed
from ddpm_jax.parallel.sharding import Rule
from ddpm_jax.types import Source, Task

_FLOATS = ("learning_rate", "final_fraction", "weight_decay", "b1", "b2", "eps", "clip_norm", "muon_learning_rate")
_FLOATS += ("ema_decay", "spike_factor", "sam_rho")
_OPTIONAL = ("clip_norm", "muon_learning_rate", "spike_factor", "sam_rho")
_ACTIONS = ("stop", "skip", "roll_back")
_POSITIVE = ("batch_size", "num_steps", "accumulate", "checkpoint_every", "max_to_keep", "log_every", "eval_batches")
_COUNTS = ("warmup_steps", "preview_every", "num_previews", "eval_every", "evaluate_every", "moment_examples")
_LEASTS = dict.fromkeys((*_POSITIVE, "max_bad_steps"), 1) | dict.fromkeys((*_COUNTS, "num_workers"), 0)

Transform = Any
"""A callable record -> record, or an object with `random_map(record, rng)`; see `data.transforms`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Options of optimization, logging and checkpoints of a stage.

    Attributes:
        batch_size: examples of a step, over all devices and hosts.
        num_steps: updates in all. A finished stage resumes if it is raised, with the schedule of the new total.
        learning_rate: its peak; see `training.optimizer.make_optimizer` for this and the fields down to `clip_norm`.
        seed: of the parameters, the data order and all noise, in [0, 2**32).
        optimizer: "adamw", or "muon" for the matrices of hidden layers beside it.
        muon_learning_rate: needed with "muon".
        ema_decay: of the moving average of the parameters, in [0, 1).
        accumulate: micro-batches that a batch is cut into.
        sam_rho: > 0, of sharpness-aware minimization, which takes two gradients a step, see `training.step`; None is
            without it.
        checkpoint_every: steps; the last step saves too.
        max_to_keep: checkpoints that stay.
        log_every: steps between lines of metrics.jsonl.
        preview_every: steps between previews, 0 for none.
        num_previews: examples in a preview.
        eval_every: steps between evaluations of the loss on held-out records (`Stage.eval_source`), 0 for none.
        eval_batches: batches of an evaluation.
        evaluate_every: steps between measurements of samples by `Stage.evaluate`, 0 for none; a multiple of eval_every.
            The last step measures too, and the best averaged parameters stay in `<stage>/best/`.
        moment_examples: records on which a diffusion stage estimates, after its last step, the second moments that the
            sampler "analytic" needs, 0 for none; a few hundred give them to about 1 %. A finished stage estimates
            them when it is raised.
        nonfinite: what follows a step whose loss or gradient is not finite, whose update is not made. "stop" ends the
            run, "skip" goes on, "roll_back" goes on from the newest checkpoint, with the data that follow.
        spike: the same, for a step whose loss is a spike.
        spike_factor: a loss of more than this multiple of its running mean (of about 100 steps, from the 20th on) is a
            spike; None finds none. For losses that are positive.
        max_bad_steps: bad steps in a row that are skipped, and times that a stage is rolled back, before it stops.
        num_workers: processes that read and transform records; 0 uses threads of this one.
        tensorboard: True also writes event files.
        progress: True shows a bar on stderr.
    """

    batch_size: int
    num_steps: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 0
    decay: str = "constant"
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    optimizer: str = "adamw"
    muon_learning_rate: float | None = None
    ema_decay: float = 0.9999
    accumulate: int = 1
    sam_rho: float | None = dataclasses.field(default=None, metadata={"describe": "unless default"})
    checkpoint_every: int = 1000
    max_to_keep: int = 2
    log_every: int = 50
    preview_every: int = 1000
    num_previews: int = 16
    eval_every: int = 0
    eval_batches: int = 4
    evaluate_every: int = dataclasses.field(default=0, metadata={"describe": "unless default"})
    moment_examples: int = 0
    nonfinite: str = "stop"
    spike: str = "stop"
    spike_factor: float | None = None
    max_bad_steps: int = 3
    num_workers: int = 0
    tensorboard: bool = False
    progress: bool = True

    @property
    def gradients(self) -> int:
        """The number of gradients of a step and a micro-batch."""
        return 1 if self.sam_rho is None else 2

    def check(self) -> None:
        """Raise ValueError for a field out of its range; a `Stage` calls it."""
        for name in (*_LEASTS, "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be an integer")
            if value > 10**9 and name != "seed":
                raise ValueError(f"{name}={shown(value)} must be at most {10**9}")
            if value < _LEASTS.get(name, value):
                raise ValueError(f"{name}={shown(value)} must be at least {_LEASTS[name]}")
        for name in _FLOATS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not is_finite(value):
                raise ValueError(f"{name}={shown(value)} must be a finite number")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={shown(self.seed)} must lie in [0, 2**32)")
        if not 0 <= self.ema_decay < 1:
            reason = ", or the average never leaves the first parameters" if self.ema_decay == 1 else ""
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1){reason}")
        for name in ("nonfinite", "spike"):
            if getattr(self, name) not in _ACTIONS:
                raise ValueError(f"{name}={shown(getattr(self, name))} must be one of {', '.join(_ACTIONS)}")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"spike_factor={self.spike_factor} must be more than 1")
        if self.sam_rho is not None and self.sam_rho <= 0:
            raise ValueError(f"sam_rho={self.sam_rho} must be positive; None is without it")
        if self.eval_every and self.evaluate_every % self.eval_every:
            raise ValueError(f"evaluate_every={self.evaluate_every} must be a multiple of eval_every={self.eval_every}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One network and all that training it takes.

    Attributes:
        name: of its directory, `<workdir>/<name>/`, which holds model.json, checkpoints/, previews/ and metrics.jsonl.
        task: network, loss and previews.
        source: random-access records, see `data`; its fingerprint is stored in every checkpoint.
        transforms: applied to each record, on the host.
        training: batch size, optimizer and so on.
        needs: role -> the name of an earlier stage, or the path of a model directory. Their models are given to
            `task.prepare`, and to a source that computes something from them (`training.embeddings.Embedded`).
        eval_source: held-out records for `training.eval_every`.
        evaluate: measures samples for `training.evaluate_every`, as `evaluation.during_training.SampleQuality`.
        examples_per_record: examples that one record holds, e.g. a group of hard negatives.
        sharding_rules: which parameters are split over the devices in another way than by default, for a mesh with the
            axes "fsdp" or "tensor"; see `parallel.sharding.parameter_specs`.
    """

    name: str
    task: Task
    source: Source
    training: Training
    transforms: Sequence[Transform] = ()
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eval_source: Source | None = None
    evaluate: Any = None
    examples_per_record: int = 1
    sharding_rules: Sequence[Rule] = ()

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(
                f"name={self.name!r} of a stage must be letters, digits, - and _, since it names a directory"
            )
        if self.name in ("embeddings", "embeddings_held_out"):
            raise ValueError(f"name={self.name!r} of a stage is a directory of the run itself; give another name")
        for field in ("task", "source", "transforms", "needs", "eval_source"):
            try:
                _CHECKS[field](getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field} of stage {self.name} {error}") from None
        if not isinstance(self.training, Training):
            raise ValueError(f"training of stage {self.name} must be a Training, got {type(self.training).__name__}")
        try:
            self.training.check()
        except ValueError as error:
            raise ValueError(f"stage {self.name}: {error}") from None
        if self.training.eval_every and self.eval_source is None:
            raise ValueError(f"stage {self.name}: eval_every={self.training.eval_every} needs an eval_source")
        if self.training.evaluate_every and not (callable(self.evaluate) and hasattr(self.evaluate, "metric")):
            raise ValueError(
                f"stage {self.name}: evaluate_every={self.training.evaluate_every} needs evaluate, an object such as "
                f"SampleQuality(...), got {shown(self.evaluate)}"
            )
        if self.training.moment_examples and not hasattr(self.task, "moments"):
            raise ValueError(
                f"stage {self.name}: moment_examples={self.training.moment_examples} is for a DiffusionTask, whose "
                f"network predicts noise, and not for a {type(self.task).__name__}"
            )
        if isinstance(self.examples_per_record, bool) or not isinstance(self.examples_per_record, int):
            raise ValueError(f"stage {self.name}: examples_per_record={self.examples_per_record!r} must be an integer")
        if self.examples_per_record < 1:
            raise ValueError(f"stage {self.name}: examples_per_record={self.examples_per_record} must be at least 1")
        if self.training.batch_size % self.examples_per_record:
            raise ValueError(
                f"stage {self.name}: batch_size={self.training.batch_size} must be a multiple of the "
                f"{self.examples_per_record} examples of a record"
            )

    def replace(self, **fields: Any) -> "Stage":
        """Return a copy with other fields."""
        return dataclasses.replace(self, **fields)


def _check_task(task: Any) -> None:
    methods = ("init", "prepare", *(("sums", "measure") if hasattr(task, "fitted") else ("loss", "preview")))
    missing = [name for name in methods if not callable(getattr(task, name, None))]
    if inspect.isclass(task) or missing:
        if inspect.isclass(task):
            given = f"the class {task.__name__}"
        else:
            given = f"{type(task).__name__} without the method {missing[0]}"
        raise ValueError(f"must be a task such as DiffusionTask(...), with the methods of types.Task, got {given}")
    if hasattr(task, "model") and hasattr(task, "metadata"):  # which are written to model.json
        try:
            check_model(task.model)
        except ValueError as error:
            raise ValueError(f"cannot be trained: {error}") from None


def _check_source(source: Any) -> None:
    hint = "must hold records, dicts of arrays, by index"
    if isinstance(source, (str, bytes, os.PathLike)):
        raise ValueError(f"{hint}, got {shown(source)}; data.open_source.open_source opens a path")
    if hasattr(source, "dtype"):
        raise ValueError(f"{hint}, got an array; data.arrays.ArraySource(images) makes a source of it")
    if inspect.isclass(source) or isinstance(source, Mapping) or not _is_source(source):
        kind = f"the class {source.__name__}" if inspect.isclass(source) else type(source).__name__
        raise ValueError(f"{hint}, as ArraySource and ImageFolder do, got {kind}")


def _is_source(source: Any) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def _check_transforms(transforms: Any) -> None:
    hint = "must be a tuple of transforms"
    if not isinstance(transforms, Sequence) or isinstance(transforms, (str, bytes)):
        name = type(transforms).__name__
        example = "; one transform is written as (transform,)" if _is_transform(transforms) else ""
        raise ValueError(f"{hint}, got {name}{example}")
    for number, transform in enumerate(transforms):
        if inspect.isclass(transform):
            raise ValueError(
                f"{hint}, and [{number}] is the class {transform.__name__}; write {transform.__name__}(...)"
            )
        if not _is_transform(transform):
            raise ValueError(f"{hint}, functions of a record, and [{number}] is {shown(transform)}")


def _is_transform(value: Any) -> bool:
    return callable(value) or hasattr(value, "random_map")


def _check_needs(needs: Any) -> None:
    if not isinstance(needs, Mapping):
        raise ValueError(
            f'must be a dict, role -> stage or model directory, such as {{"clip": "clip"}}, got {shown(needs)}'
        )
    for role, needed in needs.items():
        if not isinstance(role, str) or not isinstance(needed, (str, os.PathLike)):
            raise ValueError(
                f"must be names of stages or paths of model directories by role, got {role!r}: {shown(needed)}"
            )


_CHECKS: dict[str, Callable[[Any], None]] = {
    "task": _check_task,
    "source": _check_source,
    "transforms": _check_transforms,
    "needs": _check_needs,
    "eval_source": lambda source: None if source is None else _check_source(source),
}


def apply_transforms(record: dict, transforms: Sequence[Transform], rng: Any) -> dict:
    """Return a record after the transforms; rng serves those that are random."""
    for transform in transforms:
        random: Callable | None = getattr(transform, "random_map", None)
        record = transformed(transform, record) if random is None else transformed(random, record, rng)
    return record
