"""The training loop: one for every stage, read from top to bottom.

The loop is deterministic: a step sees its own batch of the loader and its own key, both functions of the step's number,
and a checkpoint holds the state and the loader's position. So an interrupted run ends with the very bits of one that
was not. The device is never waited for except to log, to save, for a preview, and to keep two steps in flight at most.
"""

import contextlib
import functools
import os
import signal as signals
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data import image_grid as pictures
from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel.mesh import data_sharding, replicated, shard_batch
from ddpm_jax.progress import progress_bar
from ddpm_jax.stopping import StopRequest
from ddpm_jax.storage.checkpoint import NOT_COMPARED, CheckpointError, Checkpoints
from ddpm_jax.training.metrics import MetricWriter, format_flops, step_flops
from ddpm_jax.training.state import TrainState, abstract_state, create_state
from ddpm_jax.training.step import TrainStep, make_train_step
from ddpm_jax.types import Task

with needs_extra("train"):
    import optax
    from absl import logging

STEPS_IN_FLIGHT = 2


class Loader(Protocol):
    """An endless iterator over batches (dicts of numpy arrays) whose position can be stored."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class TrainingDiverged(RuntimeError):
    """The loss or its gradient stopped being finite; the message says where, and which checkpoint is good."""


class Interrupted(RuntimeError):
    """The run was asked to stop and did, after saving.

    Attributes:
      signum: the signal; the conventional exit status is 128 + signum.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def train(
    task: Task,
    loader: Loader,
    *,
    workdir: str | os.PathLike,
    num_steps: int,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    ema_decay: float,
    config: Mapping[str, Any],
    version: str,
    schedule: optax.Schedule | None = None,
    ema_warmup: bool = True,
    accumulate: int = 1,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    preview_every: int = 0,
    keep: int = 2,
    ignore: Collection[str] = NOT_COMPARED,
    items_per_step: int | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> TrainState:
    """Train one stage, from its newest checkpoint when there is one.

    Args:
      task: what is trained. `task.frozen` is a tree of arrays or None; when it is not None,
        `task.prepare(frozen, batch)` runs under its own jit before each step.
      loader: gives batches whose arrays share a leading axis; put where the checkpoint says before the first batch.
      workdir: the stage's directory: checkpoints/, previews/, metrics.jsonl.
      num_steps: updates in all, at least 1; a stage that has made them already is returned as it was saved.
      tx, schedule: from `make_optimizer`; the schedule is only logged.
      mesh: where it runs.
      seed: of the parameters and of all noise.
      ema_decay, ema_warmup, accumulate: see `make_train_step`.
      config: the resolved config, kept in every checkpoint; a run with another one is refused.
      version: the package's version, kept in every checkpoint.
      checkpoint_every, log_every: in steps, at least 1; the last step does both.
      preview_every: in steps; 0 for never. The last step makes one too. `task.preview(params, key)` gets raw and
        averaged parameters and the same key each time, so its noise is the same from preview to preview.
      keep: how many checkpoints stay.
      ignore: fields of the config that may differ, see `Checkpoints.restore_latest`.
      items_per_step: pictures a step, for the rate; the leading axis of the batch by default.
      tensorboard: True also writes event files.
      progress: True shows a bar on stderr.

    Returns:
      The state after `num_steps` updates.

    Raises:
      ValueError: for an argument out of its range.
      CheckpointError: when a checkpoint cannot be written, read or used.
      TrainingDiverged: when the loss or its gradient is not finite, of which no checkpoint is written, or a preview.
      Interrupted: after SIGTERM, SIGINT or SIGHUP during the steps. The step in flight is finished and saved first. A
        second signal, and one before the first step, is left to the handlers of the caller.
      OSError: when metrics or previews cannot be written.
    """
    _check_numbers(num_steps, checkpoint_every, log_every, preview_every)
    step_fn = make_train_step(
        task, tx, ema_decay=ema_decay, ema_warmup=ema_warmup, accumulate=accumulate, schedule=schedule
    )
    init_key, train_key, preview_key = jax.random.split(jax.device_put(jax.random.key(seed), replicated(mesh)), 3)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, keep=keep)))

        # ---- State: the newest checkpoint's, or a new one ------------------------------------------------------------
        state, start = _restore_or_create(task, tx, loader, checkpoints, init_key, mesh, config, ignore)
        if not _needs_steps(task, checkpoints, start, num_steps, state):
            return state

        # ---- Programs: frozen networks, and the step -----------------------------------------------------------------
        prepare = _make_prepare(task, mesh)
        batch = prepare(_next_batch(loader, start, mesh))
        update, new_window, flops = _compile(step_fn, state, batch, train_key, mesh, accumulate)
        items = items_per_step or jax.tree.leaves(batch)[0].shape[0]
        report = _Report(
            task.name, Path(workdir), start, num_steps, items=items, flops=flops, tensorboard=tensorboard, bar=progress
        )
        stack.enter_context(report)

        # ---- Steps: until the first of them there is nothing to save, and a signal ends the process as it may --------
        stop = stack.enter_context(StopRequest())
        window, in_flight = new_window(), deque()
        for step in range(start + 1, num_steps + 1):
            state, window, done = update(state, window, batch, train_key)
            in_flight.append(done)
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()

            last = step == num_steps
            log = last or step % log_every == 0
            checkpoint = last or step % checkpoint_every == 0 or stop.signum is not None
            preview = preview_every > 0 and (last or step % preview_every == 0)
            if log or checkpoint or preview:
                means = _read_window(window, step, task, checkpoints)
            report.tick()
            if log:
                checkpoints.check()
                report.write(step, means)
                window = new_window()
            if checkpoint:
                data = loader.get_state()
                checkpoints.save(state, step=step, data=data, config=config, version=version, stage=task.name)
            if preview:
                try:
                    report.preview(step, task, state, preview_key)
                except FloatingPointError as error:
                    raise TrainingDiverged(_bad_preview(task, step, checkpoints, error)) from error
            if checkpoint and stop.signum is not None:
                checkpoints.wait()
                raise Interrupted(_interruption(task, stop.signum, step, num_steps, checkpoints), stop.signum)
            if not last:
                batch = prepare(_next_batch(loader, step, mesh))
        checkpoints.wait()
    return state


def _check_numbers(num_steps: int, checkpoint_every: int, log_every: int, preview_every: int) -> None:
    for name, value in {"num_steps": num_steps, "checkpoint_every": checkpoint_every, "log_every": log_every}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if preview_every < 0:
        raise ValueError(f"{preview_every=} must be 0 (never) or more")


def _restore_or_create(
    task: Task,
    tx: optax.GradientTransformation,
    loader: Loader,
    checkpoints: Checkpoints,
    key: jax.Array,
    mesh: Mesh,
    config: Mapping[str, Any],
    ignore: Collection[str],
) -> tuple[TrainState, int]:
    """Return the state to continue from and its step, with the loader at the batch that comes next."""
    abstract = abstract_state(task, tx, key, mesh)
    restored = checkpoints.restore_latest(abstract, config=config, stage=task.name, ignore=ignore)
    if restored is None:
        return create_state(task, tx, key, mesh), 0
    loader.set_state(restored.data)
    return restored.state, restored.meta["step"]


def _needs_steps(task: Task, checkpoints: Checkpoints, start: int, num_steps: int, state: TrainState) -> bool:
    """Return whether there is something left to do; raise when more was done than is asked for, or the disk is full."""
    if start > num_steps:
        raise CheckpointError(f"{task.name}: the checkpoint is of step {start}, and {num_steps=} is less")
    if start > 0:
        logging.info("%s: %s after step %d", task.name, "is finished" if start == num_steps else "continues", start)
    if start < num_steps:
        checkpoints.check_space(state)
    return start < num_steps


def _interruption(task: Task, signum: int, step: int, num_steps: int, checkpoints: Checkpoints) -> str:
    name, saved = signals.Signals(signum).name, checkpoints.directory / str(step)
    return f"{task.name}: stopped by {name} after step {step} of {num_steps}; the same command continues from {saved}"


def _bad_preview(task: Task, step: int, checkpoints: Checkpoints, error: FloatingPointError) -> str:
    checkpoints.wait()
    steps = checkpoints.steps()
    last = f"the last checkpoint is {checkpoints.directory / str(steps[-1])}" if steps else "none was saved"
    return f"{task.name}: the preview of step {step} failed: {error}; {last}"


def _next_batch(loader: Loader, step: int, mesh: Mesh) -> Any:
    try:
        return shard_batch(next(loader), mesh)
    except StopIteration:
        raise ValueError(f"the loader ended after step {step}; it must be endless") from None


def _make_prepare(task: Task, mesh: Mesh) -> Callable[[Any], Any]:
    """Return the function that runs the task's frozen networks on a sharded batch."""
    frozen = task.frozen
    if frozen is None:
        return lambda batch: batch
    place, split = replicated(mesh), data_sharding(mesh)
    # The weights are an argument: closed over, they would be constants of the program.
    frozen = jax.device_put(frozen, place)
    return functools.partial(jax.jit(task.prepare, in_shardings=(place, split), out_shardings=split), frozen)


def _compile(
    step_fn: TrainStep, state: TrainState, batch: Any, key: jax.Array, mesh: Mesh, accumulate: int
) -> tuple[Callable[..., tuple], Callable[[], Any], float | None]:
    """Compile the step together with the sums over a logging window.

    Returns:
      (update, new_window, flops): `update(state, window, batch, key) -> (state, window, done)` donates its first two
      arguments; `done` is an array that is ready when the step is; `flops` of one step, or None.
    """
    _, metrics = jax.eval_shape(step_fn, state, batch, key)
    place, split = replicated(mesh), data_sharding(mesh)
    sums = {name: np.zeros((), np.float32) for name in metrics if name != "finite"}
    empty = {"count": np.zeros((), np.int32), "good": np.zeros((), np.int32), "sums": sums, "bad": sums}

    def new_window() -> Any:
        return jax.device_put(empty, place)

    def update(state: TrainState, window: Any, batch: Any, key: jax.Array) -> tuple[TrainState, Any, jax.Array]:
        state, metrics = step_fn(state, batch, key)
        finite = metrics.pop("finite")
        clean = window["good"] == window["count"]
        window = {
            "count": window["count"] + 1,
            "good": window["good"] + (clean & finite),
            "sums": jax.tree.map(jnp.add, window["sums"], metrics),
            # The numbers of the first step that is not finite.
            "bad": jax.tree.map(lambda kept, new: jnp.where(clean, new, kept), window["bad"], metrics),
        }
        return state, window, finite

    jitted = jax.jit(
        update,
        donate_argnums=(0, 1),
        in_shardings=(place, place, split, place),
        out_shardings=(place, place, place),
    )
    lowered = jitted.lower(state, new_window(), batch, key)
    return lowered.compile(), new_window, step_flops(lowered, accumulate=accumulate)


def _read_window(window: Any, step: int, task: Task, checkpoints: Checkpoints) -> dict[str, float]:
    """Return the means over the window that ends with `step`; raise when one of its steps was not finite."""
    values = jax.tree.map(float, jax.device_get(window))
    count, good = int(values["count"]), int(values["good"])
    if good < count:
        checkpoints.wait()
        steps = checkpoints.steps()
        good_one = (
            f"the last good checkpoint is {checkpoints.directory / str(steps[-1])}" if steps else "none was saved"
        )
        loss, grad_norm = values["bad"]["loss"], values["bad"]["grad_norm"]
        raise TrainingDiverged(
            f"{task.name}: step {step - count + good + 1} is not finite (loss {loss:.4g}, gradient norm "
            f"{grad_norm:.4g}) and training stopped; {good_one}; try a lower learning rate, a longer warm-up or a "
            "smaller clip_norm"
        )
    return {name: value / count for name, value in values["sums"].items()}


class _Report:
    """The progress bar, the metrics and the previews of one stage."""

    def __init__(
        self,
        name: str,
        workdir: Path,
        start: int,
        num_steps: int,
        *,
        items: int,
        flops: float | None,
        tensorboard: bool,
        bar: bool,
    ):
        self._workdir, self._items, self._flops = workdir, items, flops
        self._writer = MetricWriter(workdir, start_step=start, tensorboard=tensorboard)
        shown = bar and jax.process_index() == 0
        self._bar = progress_bar(num_steps, description=name, unit="step", initial=start, shown=shown)
        self._loss: float | None = None
        self._begin, self._steps = time.perf_counter(), 0

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._writer.close()

    def tick(self) -> None:
        """Count one step."""
        self._steps += 1
        self._bar.update()

    def write(self, step: int, means: dict[str, float]) -> None:
        """Log the means over the steps since the last call, with their rates."""
        now = time.perf_counter()
        rate = self._steps / max(now - self._begin, 1e-9)
        rates = {"steps_per_second": rate, "images_per_second": rate * self._items}
        if self._flops is not None:
            rates["flops_per_second"] = rate * self._flops
        self._writer.write(step, means | rates)
        self._loss = means["loss"] if self._loss is None else 0.8 * self._loss + 0.2 * means["loss"]
        speed = [f"loss {self._loss:.4g}", f"{rates['images_per_second']:.4g} images/s"]
        if self._flops is not None:
            speed.append(format_flops(rates["flops_per_second"]))
        self._bar.set_postfix_str(", ".join(speed), refresh=False)
        self._begin, self._steps = now, 0

    def preview(self, step: int, task: Task, state: TrainState, key: jax.Array) -> None:
        """Write previews/step_<step>_{raw,ema}.png; the time they take does not count in the rates."""
        begin = time.perf_counter()
        for name, params in {"raw": state.params, "ema": state.ema_params}.items():
            images = task.preview(params, key)
            if images is None or jax.process_index() != 0:
                continue
            image = pictures.grid(images)
            pictures.save_png(self._workdir / "previews" / f"step_{step:06d}_{name}.png", image)
            self._writer.write_images(step, {f"preview_{name}": np.asarray(image)})
        self._begin += time.perf_counter() - begin
