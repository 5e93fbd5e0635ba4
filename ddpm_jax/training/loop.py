"""The training loop: one for every stage, read from top to bottom.

The loop is deterministic: a step sees its own batch of the loader and its own key, both functions of the step's number,
and a checkpoint holds the state and the loader's position. So an interrupted run ends with the very bits of one that
was not. The device is never waited for except to log, to save, for a preview, and to keep two steps in flight at most.
"""

import contextlib
import functools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data import image_grid
from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.mesh import data_sharding, replicated, shard_batch
from ddpm_jax.parallel.placing import put, split_key
from ddpm_jax.parallel.sharding import Rule, is_sharded, make_gather, used_dtypes
from ddpm_jax.progress import progress_bar
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
    """The run was asked to stop and did, after saving; on all hosts at the same step.

    Attributes:
      status: exit status of a command, 128 + the signal's number, or 75 after a preemption notice.
      signum: the signal, or None after a preemption notice.
      of_all_hosts: all hosts raise it.
    """

    of_all_hosts = True

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status, self.signum = status, status - 128 if status > 128 else None


def fit(
    task: Task,
    loader: Loader,
    *,
    name: str,
    example: Mapping[str, Any],
    workdir: str | os.PathLike,
    num_steps: int,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    ema_decay: float,
    config: Mapping[str, Any],
    version: str,
    frozen: Any = None,
    rules: Sequence[Rule] = (),
    schedule: optax.Schedule | None = None,
    ema_warmup: bool = True,
    accumulate: int = 1,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    preview_every: int = 0,
    eval_every: int = 0,
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None = None,
    max_to_keep: int = 2,
    ignore: Collection[str] = NOT_COMPARED,
    items_per_step: int | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> TrainState:
    """Train one stage, from its newest checkpoint when there is one.

    Args:
      task: what is trained.
      loader: gives batches whose arrays share a leading axis; put where the checkpoint says before the first batch.
      name: of the stage, stored in every checkpoint.
      example: a batch of the form of the loader's, of any number of examples: previews are of them, and their shapes
        are those that the network is made for.
      workdir: the stage's directory: checkpoints/, previews/, metrics.jsonl.
      num_steps: updates in all, at least 1; a stage that has made them already is returned as it was saved.
      tx, schedule: from `make_optimizer`; the schedule is only logged.
      mesh: where it runs; the batch is split over its axes "data" and "fsdp", the state over "fsdp" and "tensor".
      seed: of the parameters and of all noise.
      ema_decay, ema_warmup, accumulate: see `make_train_step`.
      config: what the result depends on, plain data, stored in every checkpoint; a run with another one is refused.
      version: the package's version, stored in every checkpoint.
      frozen: a tree with models whose parameters are not trained; when it is not None, `task.prepare(frozen, batch)`
        runs under its own jit before each step.
      rules: which parameters are split in another way than by default, see `parallel.sharding.parameter_specs`.
      checkpoint_every, log_every: in steps, at least 1; the last step does both.
      preview_every: in steps; 0 for never. The last step makes one too. `task.preview(params, batch, key)` gets
        raw and averaged parameters and the same key each time, so its noise is the same from preview to preview.
      eval_every: in steps; 0 for never. The last step evaluates too.
      eval_batches: gives the held-out batches of an evaluation, the same each time. Their mean loss, by
        `task.eval_loss` if there is one, is logged as "eval_loss", and "eval_loss_ema" with the averaged parameters.
      max_to_keep: how many checkpoints stay.
      ignore: fields of the config that may differ, see `Checkpoints.restore_latest`.
      items_per_step: images a step, for the rate; the leading axis of the batch by default.
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
    _check_numbers(
        preview_every,
        num_steps=num_steps,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        max_to_keep=max_to_keep,
    )
    if eval_every < 0 or (eval_every and eval_batches is None):
        raise ValueError(f"{eval_every=} must be 0 (never), or more with eval_batches")
    init_key, train_key, preview_key = split_key(seed, 3, mesh)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, max_to_keep=max_to_keep)))
        run = _Run(task, name, checkpoints, mesh, frozen, rules)

        # ---- State: the newest checkpoint's, or a new one ------------------------------------------------------------
        state, start = _restore_or_create(run, tx, loader, init_key, example, config, ignore)
        if not _needs_steps(run, start, num_steps, state):
            return state

        # ---- Programs: frozen networks, and the step -----------------------------------------------------------------
        prepare = _make_prepare(task, mesh, frozen)
        batch = prepare(_next_batch(loader, start, mesh))
        gather = make_parameter_gather(task, mesh, state, batch)
        averaging = {"ema_decay": ema_decay, "ema_warmup": ema_warmup}
        step_fn = make_train_step(task, tx, accumulate=accumulate, schedule=schedule, gather=gather, **averaging)
        update, new_window, flops = _compile(step_fn, state, batch, train_key, mesh, accumulate)
        evaluate = _make_evaluate(run, prepare, eval_batches, gather) if eval_every else None
        shown = _prepare_example(run, example) if preview_every else None
        items = items_per_step or jax.tree.leaves(batch)[0].shape[0]
        report = _Report(
            name, Path(workdir), start, num_steps, items=items, flops=flops, tensorboard=tensorboard, bar=progress
        )
        stack.enter_context(report)

        # ---- Steps: until the first of them there is nothing to save, and a signal ends the process as it may --------
        stop = stack.enter_context(hosts.current().saving())
        window, in_flight = new_window(), deque()
        for step in range(start + 1, num_steps + 1):
            state, window, done = update(state, window, batch, train_key)
            in_flight.append(done)
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()

            last, stopping = step == num_steps, stop.point(f"{name} step {step}")
            evaluated = eval_every > 0 and (last or step % eval_every == 0)
            log = last or evaluated or step % log_every == 0
            checkpoint = last or step % checkpoint_every == 0 or stopping
            preview = preview_every > 0 and (last or step % preview_every == 0)
            if log or checkpoint or preview:
                means = _read_window(window, step, run)
            report.tick()
            if log:
                checkpoints.check()
                with report.pause():
                    held_out = evaluate(state, preview_key) if evaluated else {}
                report.write(step, means, held_out)
                window = new_window()
            if checkpoint:
                data = loader.get_state()
                checkpoints.save(state.trees(), step=step, data=data, config=config, version=version, stage=name)
            if preview:
                try:
                    report.preview(step, task, state, shown, preview_key)
                except FloatingPointError as error:
                    raise TrainingDiverged(_bad_preview(run, step, error)) from error
            if checkpoint and stopping:
                checkpoints.wait()
                raise Interrupted(_interruption(run, stop.describe_reason(), step, num_steps), stop.status())
            if not last:
                batch = prepare(_next_batch(loader, step, mesh))
        checkpoints.wait()
    return state


def _check_numbers(preview_every: int, **positive: int) -> None:
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if preview_every < 0:
        raise ValueError(f"{preview_every=} must be 0 (never) or more")


class _Run(NamedTuple):
    """What the steps of a run share."""

    task: Task
    name: str
    checkpoints: Checkpoints
    mesh: Mesh
    frozen: Any
    rules: Sequence[Rule] = ()

    def last_checkpoint(self, what: str = "the last checkpoint") -> str:
        """Wait for the checkpoint that is being written, and say which is the newest."""
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"{what} is {self.checkpoints.directory / str(steps[-1])}" if steps else "none was saved"


def _restore_or_create(
    run: _Run,
    tx: optax.GradientTransformation,
    loader: Loader,
    key: jax.Array,
    example: Mapping[str, Any],
    config: Mapping[str, Any],
    ignore: Collection[str],
) -> tuple[TrainState, int]:
    """Return the state to continue from and its step, with the loader at the batch that comes next."""
    prepared = example if run.frozen is None else jax.eval_shape(run.task.prepare, run.frozen, example)
    abstract = abstract_state(run.task, tx, key, run.mesh, prepared, run.rules)
    restored = run.checkpoints.restore_latest(abstract.trees(), config=config, stage=run.name, ignore=ignore)
    if restored is None:
        return create_state(run.task, tx, key, run.mesh, prepared, run.rules), 0
    loader.set_state(restored.data)
    return TrainState.from_trees(restored.trees), restored.meta["step"]


def _needs_steps(run: _Run, start: int, num_steps: int, state: TrainState) -> bool:
    """Return whether there is something left to do; raise when more was done than is asked for, or the disk is full."""
    if start > num_steps:
        raise CheckpointError(f"{run.name}: the checkpoint is of step {start}, and {num_steps=} is less")
    if start > 0:
        logging.info("%s: %s after step %d", run.name, "is finished" if start == num_steps else "continues", start)
    if start < num_steps:
        run.checkpoints.check_space(state.trees())
    return start < num_steps


def _interruption(run: _Run, reason: str, step: int, num_steps: int) -> str:
    saved = run.checkpoints.directory / str(step)
    return f"{run.name}: stopped by {reason} after step {step} of {num_steps}; the same command continues from {saved}"


def _bad_preview(run: _Run, step: int, error: FloatingPointError) -> str:
    return f"{run.name}: the preview of step {step} failed: {error}; {run.last_checkpoint()}"


def _next_batch(loader: Loader, step: int, mesh: Mesh) -> Any:
    try:
        return shard_batch(next(loader), mesh)
    except StopIteration:
        raise ValueError(f"the loader ended after step {step}; it must be endless") from None


def _make_prepare(task: Task, mesh: Mesh, frozen: Any) -> Callable[[Any], Any]:
    """Return the function that runs the task's frozen networks on a sharded batch."""
    if frozen is None:
        return lambda batch: batch
    place, split = replicated(mesh), data_sharding(mesh)
    # The weights are an argument: closed over, they would be constants of the program.
    frozen = put(frozen, place)
    return functools.partial(jax.jit(task.prepare, in_shardings=(place, split), out_shardings=split), frozen)


def make_parameter_gather(task: Task, mesh: Mesh, state: TrainState, batch: Any) -> Callable[[Any], Any] | None:
    """Return what gathers the parameters inside of a loss, or None if every device has them whole.

    Args:
      task: whose loss it is.
      mesh: where the state is.
      state, batch: arrays, or their shapes; the leaves of the state have shardings.
    """
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    if not is_sharded(specs, mesh):
        return None
    extra = () if state.extra_state is None else (state.extra_state,)

    def loss(params: Any) -> Any:  # of zeros, which are never computed
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (batch, *extra))
        return task.loss(params, zeros[0], jax.random.key(0), *zeros[1:])

    return make_gather(mesh, specs, used_dtypes(loss, state.params))


def _prepare_example(run: _Run, example: Mapping[str, Any]) -> Any:
    """Return the prepared example on the host: the previews run wherever the state of the task is."""
    return example if run.frozen is None else jax.device_get(jax.jit(run.task.prepare)(run.frozen, example))


def _make_evaluate(
    run: _Run,
    prepare: Callable[[Any], Any],
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    gather: Callable[[Any], Any] | None,
) -> Callable[[TrainState, jax.Array], dict[str, float]]:
    """Return the function that computes the mean loss of held-out batches with both sets of parameters."""
    loss = getattr(run.task, "eval_loss", run.task.loss)
    place, split = replicated(run.mesh), data_sharding(run.mesh)

    @functools.partial(jax.jit, in_shardings=(None, split, place), out_shardings=place)
    def mean_loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        params = params if gather is None else gather(params)
        return jnp.mean(loss(params, batch, key)[0], dtype=jnp.float32)

    def evaluate(state: TrainState, key: jax.Array) -> dict[str, float]:
        found: dict[str, list[jax.Array]] = {"eval_loss": [], "eval_loss_ema": []}
        for number, batch in enumerate(eval_batches()):
            prepared, own = prepare(shard_batch(batch, run.mesh)), jax.random.fold_in(key, number)
            found["eval_loss"].append(mean_loss(state.params, prepared, own))
            found["eval_loss_ema"].append(mean_loss(state.ema_params, prepared, own))
        return {name: float(np.mean(jax.device_get(values))) for name, values in found.items()}

    return evaluate


def lower_update(
    step_fn: TrainStep, state: TrainState, batch: Any, key: jax.Array, mesh: Mesh
) -> tuple[jax.stages.Lowered, Any]:
    """Lower the step together with the sums over a logging window, as `fit` runs it.

    Args:
      step_fn: from `make_train_step`.
      state, batch, key: arrays, or their shapes; the leaves of the state have shardings.
      mesh: where it runs.

    Returns:
      (lowered, empty): `update(state, window, batch, key) -> (state, window, done)`, which donates its first two
      arguments; `done` is an array that is ready when the step is. `empty` is the window at its beginning.
    """
    step_fn = jax.jit(step_fn, inline=True)  # traced once, here
    _, metrics = jax.eval_shape(step_fn, state, batch, key)
    place, split = replicated(mesh), data_sharding(mesh)
    parts = jax.tree.map(lambda leaf: leaf.sharding, state)
    sums = {name: np.zeros((), np.float32) for name in metrics if name != "finite"}
    empty = {"count": np.zeros((), np.int32), "good": np.zeros((), np.int32), "sums": sums, "bad": sums}

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
        in_shardings=(parts, place, split, place),
        out_shardings=(parts, place, place),
    )
    return jitted.lower(state, empty, batch, key), empty


def _compile(
    step_fn: TrainStep, state: TrainState, batch: Any, key: jax.Array, mesh: Mesh, accumulate: int
) -> tuple[Callable[..., tuple], Callable[[], Any], float | None]:
    """Compile the update of `lower_update`.

    Returns:
      (update, new_window, flops): the number of one step, or None.
    """
    lowered, empty = lower_update(step_fn, state, batch, key, mesh)
    new_window = lambda: put(empty, replicated(mesh))  # noqa: E731
    return lowered.compile(), new_window, step_flops(lowered, accumulate=accumulate)


def _read_window(window: Any, step: int, run: _Run) -> dict[str, float]:
    """Return the means over the window that ends with `step`; raise when one of its steps was not finite."""
    values = jax.tree.map(float, jax.device_get(window))
    count, good = int(values["count"]), int(values["good"])
    if good < count:
        loss, grad_norm = values["bad"]["loss"], values["bad"]["grad_norm"]
        raise TrainingDiverged(
            f"{run.name}: step {step - count + good + 1} is not finite (loss {loss:.4g}, gradient norm "
            f"{grad_norm:.4g}) and training stopped; {run.last_checkpoint('the last good checkpoint')}; try a lower "
            "learning rate, a longer warm-up or a smaller clip_norm"
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
        self._name, self._workdir, self._items, self._flops = name, workdir, items, flops
        self._writer = MetricWriter(workdir, start_step=start, tensorboard=tensorboard)
        shown = bar and jax.process_index() == 0
        self._bar = progress_bar(num_steps, description=name, unit="step", initial=start, shown=shown)
        self._loss: float | None = None
        self._eval_loss: float | None = None
        self._begin, self._steps = time.perf_counter(), 0

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._writer.close()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of what runs inside out of the rates."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def tick(self) -> None:
        """Count one step."""
        self._steps += 1
        self._bar.update()

    def write(self, step: int, means: dict[str, float], evaluated: dict[str, float]) -> None:
        """Log the means over the steps since the last call, with their rates, and an evaluation."""
        now = time.perf_counter()
        rate = self._steps / max(now - self._begin, 1e-9)
        rates = {"steps_per_second": rate, "images_per_second": rate * self._items}
        if self._flops is not None:
            rates["flops_per_second"] = rate * self._flops
        self._writer.write(step, means | evaluated | rates)
        self._loss = means["loss"] if self._loss is None else 0.8 * self._loss + 0.2 * means["loss"]
        self._eval_loss = evaluated.get("eval_loss_ema", self._eval_loss)
        held_out = [] if self._eval_loss is None else [f"held-out {self._eval_loss:.4g}"]
        speed = [f"loss {self._loss:.4g}", *held_out, f"{rates['images_per_second']:.4g} images/s"]
        if self._flops is not None:
            speed.append(format_flops(rates["flops_per_second"]))
        self._bar.set_postfix_str(", ".join(speed), refresh=False)
        self._begin, self._steps = now, 0

    def preview(self, step: int, task: Task, state: TrainState, batch: Any, key: jax.Array) -> None:
        """Write previews/step_<step>_{raw,ema}.png; the time they take does not count in the rates."""
        for name, params in {"raw": state.params, "ema": state.ema_params}.items():
            with self.pause():
                images = task.preview(params, batch, key)
            if images is None or jax.process_index() != 0:
                continue
            image = image_grid.grid(images)
            image_grid.save_png(self._workdir / "previews" / f"step_{step:06d}_{name}.png", image)
            self._writer.write_images(step, {f"preview_{name}": np.asarray(image)})
            if name == "ema":
                _show_inline(image, f"{self._name}, step {step}")


def _show_inline(image: Any, title: str) -> None:
    """Show an image below the cell of a notebook; elsewhere do nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and hasattr(shell, "kernel"):
        sys.modules["IPython.display"].display(title, image)
