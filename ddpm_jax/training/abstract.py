"""The stages of a run without numbers: shapes of models, batches and states, which show what cannot work."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel.mesh import batch_shards
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model, open_model
from ddpm_jax.storage.networks import check_fields
from ddpm_jax.training.optimizer import training_optimizer
from ddpm_jax.training.records import example_record, missing_entry, stack_records
from ddpm_jax.training.stage import Stage
from ddpm_jax.training.state import TrainState, abstract_state
from ddpm_jax.types import Task

with needs_extra("train"):
    import optax


class AbstractStages:
    """Stages and their shapes on a mesh.

    Args:
        stages: of one run.
        mesh: where they run.

    Attributes:
        stages: by name.

    Raises:
        ValueError: if there is none, or two have one name.
    """

    def __init__(self, stages: Sequence[Stage], mesh: Mesh):
        if not stages:
            raise ValueError("there is no stage to train")
        self.stages = {stage.name: stage for stage in stages}
        if len(self.stages) != len(stages):
            twice = next(name for name in self.stages if sum(stage.name == name for stage in stages) > 1)
            raise ValueError(f"two stages have the name {twice!r}; each needs a separate directory")
        self.mesh = mesh
        self._opened: dict[str, Model] = {}
        self._states: dict[str, TrainState] = {}
        self._batches: dict[tuple[str, bool], Any] = {}

    def open(self, directory: str) -> Model:
        """Return the model of a directory, which is read once."""
        if directory not in self._opened:
            self._opened[directory] = open_model(directory)
        return self._opened[directory]

    def models(self, stage: Stage) -> dict[str, Model]:
        """Return the models that a stage needs, by role; those of other stages with shapes in place of parameters."""
        found = {}
        for role, needed in stage.needs.items():
            if needed in self.stages:
                found[role] = self.model(self.stages[needed])
            else:
                found[role] = self.open(needed)
        return found

    def model(self, stage: Stage) -> Model:
        """Return the model that a stage trains, with shapes as parameters."""
        return Model(self.state(stage).params, stage.task.model, freeze(stage.task.metadata()))

    def batch(self, stage: Stage, *, evaluated: bool = False) -> Any:
        """Return the shapes of a prepared micro-batch, by the first record of the source or of the held-out one."""
        if (stage.name, evaluated) not in self._batches:
            models = self.models(stage)
            source = stage.eval_source if evaluated else stage.source
            example = stack_records(stage, [example_record(stage, models, source)])
            size = stage.training.batch_size // stage.training.accumulate // stage.examples_per_record
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), example)
            prepare = lambda models, batch: stage.task.prepare(Roles(models), batch)  # noqa: E731
            self._batches[stage.name, evaluated] = jax.eval_shape(prepare, models, shapes)
        return self._batches[stage.name, evaluated]

    def state(self, stage: Stage) -> TrainState:
        """Return the shapes and shardings of the training state of a stage."""
        if stage.name not in self._states:
            fitted = hasattr(stage.task, "fitted")
            tx = optax.identity() if fitted else training_optimizer(stage.training, self.mesh)[0]
            prepared = self.batch(stage)
            rules = stage.sharding_rules
            self._states[stage.name] = abstract_state(stage.task, tx, jax.random.key(0), self.mesh, prepared, rules)
        return self._states[stage.name]

    def check(self, stage: Stage) -> None:
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
            if hasattr(stage.task, "fitted"):
                least, given = getattr(stage.task, "min_examples", 1), training.num_steps * training.batch_size
                if given < least:
                    raise ValueError(
                        f"num_steps={training.num_steps} batches have {given} of the {least} examples needed"
                    )
                jax.eval_shape(stage.task.sums, self.batch(stage))
                self.state(stage)
                return
            training_optimizer(training)
            self._trace_loss(stage)
            if stage.eval_source is not None:
                self._trace_loss(stage, evaluated=True)
        except KeyError as error:
            raise ValueError(f"stage {stage.name}: {missing_entry(stage, error)}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"stage {stage.name} cannot work: {error}") from error

    def _trace_loss(self, stage: Stage, *, evaluated: bool = False) -> None:
        """Trace the loss on a record of the source, or that of an evaluation on a held-out one."""
        params, key = self.state(stage).params, jax.random.key(0)
        if evaluated:
            loss = getattr(stage.task, "eval_loss", stage.task.loss)
            batch = self.batch(stage, evaluated=True)
            jax.eval_shape(loss, params, batch, key)
            if getattr(stage.task, "health_needs", None) is not None:
                health = lambda params, models, batch, key: stage.task.health(params, Roles(models), batch, key)
                jax.eval_shape(health, params, self.models(stage), batch, key)
            return
        extra = getattr(stage.task, "extra_state", None)
        batch = self.batch(stage)
        loss = _checked_loss(stage.task)
        jax.eval_shape(loss, params, batch, key, *(() if extra is None else (extra,)))


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


class Roles(dict):
    """Models by role, with a sentence for one that is missing."""

    def __missing__(self, role: str) -> Any:
        raise ValueError(f"its task needs a model for the role {role!r}; give the stage needs={{{role!r}: ...}}")
