"""The programs of a training stage, lowered from shapes: nothing is computed, and the devices need not exist."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.embedding_norm import EmbeddingNorm
from ddpm_jax.parallel.mesh import data_sharding, replicated
from ddpm_jax.training.abstract import AbstractStages, Roles
from ddpm_jax.training.optimizer import training_optimizer
from ddpm_jax.training.programs import lower_update, make_parameter_gather, prepare_program
from ddpm_jax.training.records import example_record, stack_records
from ddpm_jax.training.stage import Stage
from ddpm_jax.training.state import TrainState, abstract_state
from ddpm_jax.training.step import make_train_step
from ddpm_jax.training.tasks.diffusion import DiffusionTask, sample_batch


@dataclasses.dataclass(frozen=True)
class LoweredStage:
    """What `train` compiles for a stage.

    Attributes:
        stage: the stage.
        mesh: the devices.
        state: shapes and shardings of the training state.
        batch: shapes and shardings of a prepared batch.
        frozen: shapes of the models that the stage needs, by role.
        raw: shapes and shardings of a batch as the loader gives it.
    """

    stage: Stage
    mesh: Mesh
    state: TrainState
    batch: Any
    frozen: Any
    raw: Any

    def lower_step(self) -> jax.stages.Lowered:
        """Lower the training step."""
        stage, training, key = self.stage, self.stage.training, self._key()
        tx, schedule = training_optimizer(training, self.mesh)
        step = make_train_step(
            stage.task,
            tx,
            ema_decay=training.ema_decay,
            accumulate=training.accumulate,
            sam_rho=training.sam_rho,
            schedule=schedule,
            gather=make_parameter_gather(stage.task, self.mesh, self.state, self.batch),
        )
        return lower_update(step, self.state, self.batch, key, self.mesh)[0]

    def lower_prepare(self) -> jax.stages.Lowered | None:
        """Lower what frozen networks compute before each step; None if they compute nothing."""
        if not self.frozen:
            return None
        prepare = lambda models, batch: self.stage.task.prepare(Roles(models), batch)  # noqa: E731
        program, _ = prepare_program(prepare, self.mesh, self.frozen)
        return program.lower(self.frozen, self.raw)

    def frozen_bytes(self) -> int:
        """Return the bytes of the frozen networks that each device holds."""
        _, places = prepare_program(self.stage.task.prepare, self.mesh, self.frozen)
        sizes = jax.tree.map(
            lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, self.frozen, places
        )
        return sum(jax.tree.leaves(sizes))

    def lower_sampler(self, sampling: Sampling | None) -> jax.stages.Lowered:
        """Lower the sampling of a batch by whole parameters on every device, see `sampler`."""
        place, split = replicated(self.mesh), data_sharding(self.mesh)
        sample, args = self.sampler(sampling)
        return jax.jit(sample, in_shardings=(place, split, place), out_shardings=split).lower(*args)

    def sampler(self, sampling: Sampling | None) -> tuple[Callable[..., Any], tuple]:
        """Return the function that samples a batch, and the shapes of its arguments.

        Args:
            sampling: how; None samples as the task's previews do.

        Raises:
            ValueError: for a task that has nothing to sample.
        """
        task = self.stage.task
        sampling = stage_sampling(self.stage, sampling)
        if sampling is None:
            raise ValueError(f"stage {self.stage.name} has no sampler")
        checked = sampling.checked()
        # As much work as with the scale or the statistics of the embeddings.
        project = EmbeddingNorm().project if checked.l2_clamp else None
        sample = lambda params, batch, key: sample_batch(task, checked, params, batch, key, project=project)  # noqa: E731
        whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.state.params)
        return sample, (whole, self.batch, self._key())

    def loss(self) -> tuple[Callable[..., Any], tuple]:
        """Return the loss and the shapes of its arguments."""
        extra = () if self.state.extra_state is None else (self.state.extra_state,)
        return self.stage.task.loss, (self.state.params, self.batch, self._key(), *extra)

    def _key(self) -> Any:
        return jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated(self.mesh))


def stage_sampling(stage: Stage, sampling: Sampling | None = None) -> Sampling | None:
    """Return how a stage is sampled: as given, or as its previews are; None for a stage that has nothing to sample."""
    if not isinstance(stage.task, DiffusionTask):
        return None
    return stage.task.sampling if sampling is None else sampling


def lower_stage(stages: Sequence[Stage], name: str, mesh: Mesh) -> LoweredStage:
    """Find the shapes of all that a stage is trained with.

    Args:
        stages: of a recipe; those that the stage needs need not be trained.
        name: of the stage.
        mesh: where it would run; its devices may be those of a topology.

    Raises:
        ValueError: for a stage that `train` would refuse.
    """
    abstract = AbstractStages(stages, mesh)
    stage = abstract.stages[name]
    abstract.check(stage)
    models = abstract.models(stage)
    models = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), models)
    example = stack_records(stage, [example_record(stage, models, stage.source)])
    records = stage.training.batch_size // stage.examples_per_record
    split = data_sharding(mesh)
    raw = {
        name: jax.ShapeDtypeStruct((records, *array.shape[1:]), array.dtype, sharding=split)
        for name, array in example.items()
    }
    prepared = jax.eval_shape(lambda models, batch: stage.task.prepare(Roles(models), batch), models, raw)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), prepared)
    tx, _ = training_optimizer(stage.training)
    state = abstract_state(stage.task, tx, jax.random.key(0), mesh, batch, stage.sharding_rules)
    return LoweredStage(stage, mesh, state, batch, models, raw)
