"""Fitting of a model in closed form, from sums over batches, for tasks that have no loss."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.mesh import data_sharding, replicated, shard_batch
from ddpm_jax.parallel.placing import put
from ddpm_jax.progress import progress_bar
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.training.metrics import MetricWriter
from ddpm_jax.training.programs import make_prepare


class FittedTask(Protocol):
    """Interface of a task whose parameters follow from sums over the data."""

    def init(self, key: jax.Array, batch: Any) -> Any:
        """Return parameters of their shapes, see `types.Task`."""

    def prepare(self, frozen: Any, batch: Any) -> Any:
        """See `types.Task`."""

    def sums(self, batch: Any) -> Any:
        """Return the sums over a prepared batch, a tree of arrays."""

    def fitted(self, sums: Any) -> tuple[Any, Mapping[str, float]]:
        """Return parameters and metrics; sums: of all batches, float64."""

    def measure(self, params: Any, batch: Any) -> Mapping[str, jax.Array]:
        """Return metrics of parameters on a prepared batch."""


def fit_sums(
    task: FittedTask,
    loader: Iterator[Any],
    *,
    name: str,
    workdir: str | os.PathLike,
    num_steps: int,
    frozen: Any,
    mesh: Mesh,
    config: Mapping[str, Any],
    version: str,
    progress: bool = True,
) -> None:
    """Add up over batches, fit, and write the parameters as a checkpoint of step `num_steps` and a line of metrics.

    An interrupted fit begins from the first batch again.

    Args:
        task: what is fitted.
        loader: host batches, without end.
        name: of the stage.
        workdir: the stage's directory.
        num_steps: batches.
        frozen: models for `task.prepare`.
        mesh: where batches are.
        config: plain data that the result depends on.
        version: the package's version.
        progress: True shows a bar on stderr.

    Raises:
        CheckpointError: if there is a checkpoint of other settings, or it cannot be written.
        ValueError: if the data cannot be fitted.
    """
    with contextlib.closing(Checkpoints(workdir, max_to_keep=1)) as checkpoints:
        if num_steps in checkpoints.steps():
            checkpoints.compare(config)
            return
        others, place, split = hosts.current(), replicated(mesh), data_sharding(mesh)
        prepare = make_prepare(task, mesh, frozen)
        sums_of = jax.jit(task.sums, in_shardings=split, out_shardings=place)
        total = None
        with progress_bar(num_steps, description=name, unit="step", shown=progress and others.index == 0) as bar:
            for number in range(1, num_steps + 1):
                others.busy(f"{name} batch {number}")
                batch = prepare(shard_batch(next(loader), mesh))
                sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums_of(batch))
                total = sums if total is None else jax.tree.map(np.add, total, sums)
                bar.update()
        params, metrics = task.fitted(total)
        params = put(params, place)
        measured = jax.jit(task.measure, in_shardings=(place, split), out_shardings=place)(params, batch)
        metrics = {**metrics, **{key: float(np.mean(value)) for key, value in measured.items()}}
        trees = {"params": params, "ema_params": params, "optimizer": {"step": put(jnp.int32(num_steps), place)}}
        checkpoints.save(trees, step=num_steps, data=loader.get_state(), config=config, version=version, stage=name)
        checkpoints.wait()
    with contextlib.closing(MetricWriter(workdir)) as writer:
        writer.write(num_steps, metrics)
