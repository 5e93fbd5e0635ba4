"""The training loop: one for every stage, read from top to bottom.

The loop is deterministic: a step sees its own batch of the loader and its own key, both functions of the step's number,
and a checkpoint holds the state and the loader's position. So an interrupted run ends with the very bits of one that
was not. The device is never waited for except to log, to save, for a preview, and to keep two steps in flight at most.
"""

import contextlib
import dataclasses
import functools
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.mesh import shard_batch
from ddpm_jax.parallel.placing import split_key
from ddpm_jax.parallel.sharding import Rule
from ddpm_jax.paths import as_path
from ddpm_jax.storage.checkpoint import CheckpointError, Checkpoints
from ddpm_jax.storage.config_difference import NOT_COMPARED
from ddpm_jax.training.best import with_measures
from ddpm_jax.training.flops import count_flops
from ddpm_jax.training.guard import MOST, NEW, STOP, Bad, Policy, read_window
from ddpm_jax.training.programs import compile_update, make_parameter_gather, make_prepare
from ddpm_jax.training.report import Due, Evaluate, Examples, Profile, Report, make_evaluate, warn_without_trace
from ddpm_jax.training.state import TrainState, abstract_state, create_state
from ddpm_jax.training.step import make_train_step
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
    abstract: TrainState | None = None,
    schedule: optax.Schedule | None = None,
    ema_warmup: bool = True,
    accumulate: int = 1,
    sam_rho: float | None = None,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    preview_every: int = 0,
    eval_every: int = 0,
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None = None,
    evaluate_every: int = 0,
    measure: Callable[[Any, int], dict[str, float]] | None = None,
    max_to_keep: int = 2,
    ignore: Collection[str] = NOT_COMPARED,
    items_per_step: int | None = None,
    policy: Policy = STOP,
    profile_steps: tuple[int, int] | None = None,
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
      ema_decay, ema_warmup, accumulate, sam_rho: see `make_train_step`.
      config: what the result depends on, plain data, stored in every checkpoint; a run with another one is refused.
      version: the package's version, stored in every checkpoint.
      frozen: a tree with models whose parameters are not trained; when it is not None, `task.prepare(frozen, batch)`
        runs under its own jit before each step.
      rules: which parameters are split in another way than by default, see `parallel.sharding.parameter_specs`.
      abstract: what `abstract_state` returns for all this, if it is known: then the network is not traced for it.
      checkpoint_every, log_every: in steps, at least 1; the last step does both.
      preview_every: in steps; 0 for never. The last step makes one too. `task.preview(params, batch, key)` gets
        raw and averaged parameters and the same key each time, so its noise is the same from preview to preview.
      eval_every: in steps; 0 for never. The last step evaluates too.
      eval_batches: gives the held-out batches of an evaluation, the same each time. Their mean loss, by
        `task.eval_loss` if there is one, is logged as "eval_loss", and "eval_loss_ema" with the averaged parameters.
      evaluate_every: in steps, a multiple of eval_every; 0 for never. The last step measures too.
      measure: (averaged parameters, step) -> measures for the line of metrics.jsonl, see `training.best`.
      max_to_keep: how many checkpoints stay.
      ignore: fields of the config that may differ, see `Checkpoints.restore_latest`.
      items_per_step: images a step, for the rate; the leading axis of the batch by default.
      policy: what follows a step whose loss or gradient is not finite, or whose loss is a spike. The update of such a
        step is not made.
      profile_steps: the first and the last step of a trace, written to `<workdir>/profile`.
      tensorboard: True also writes event files.
      progress: True shows a bar on stderr.

    Returns:
      The state after `num_steps` steps.

    Raises:
      ValueError: for an argument out of its range.
      CheckpointError: when a checkpoint cannot be written, read or used.
      TrainingDiverged: when the loss or its gradient is not finite, of which no checkpoint is written, or a preview.
      Interrupted: after SIGTERM, SIGINT or SIGHUP during the steps, on all hosts after the same one. The step in flight
        is finished and saved first; an evaluation or previews that were under way are made when the run continues. A
        second signal, and one before the first step, is left to the handlers of the caller.
      OSError: when metrics or previews cannot be written.
    """
    positive = {"num_steps": num_steps, "checkpoint_every": checkpoint_every, "log_every": log_every}
    _check_numbers(preview_every, **positive, max_to_keep=max_to_keep)
    if eval_every < 0 or (eval_every and eval_batches is None):
        raise ValueError(f"{eval_every=} must be 0 (never), or more with eval_batches")
    init_key, train_key, preview_key = split_key(seed, 3, mesh)

    with contextlib.ExitStack() as stack:
        # ---- State: the newest checkpoint's, or a new one ------------------------------------------------------------
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, max_to_keep=max_to_keep)))
        run = _Run(task, name, checkpoints, mesh, frozen, rules)
        restore = functools.partial(_restore_or_create, run, tx, init_key, example, config, ignore, abstract)
        state, start, notes = restore(loader)
        seen = {"rollbacks": notes.get("rollbacks", 0), "tensorboard": tensorboard, "bar": progress}
        warn_without_trace(name, profile_steps, start, num_steps)
        items = items_per_step or jax.tree.leaves(example)[0].shape[0]
        report = stack.enter_context(Report(name, as_path(workdir), start, num_steps, items=items, **seen))
        left = hosts.current().gather("the last step", report.unfinished(notes.get("due")))[0]
        if not _needs_steps(run, start, num_steps, state) and left is None:
            return state

        # ---- Programs: frozen networks, the step, and an evaluation --------------------------------------------------
        prepare = make_prepare(task, mesh, frozen)
        batch = prepare(_next_batch(loader, start, mesh))
        gather = make_parameter_gather(task, mesh, state, batch)
        how = {"ema_decay": ema_decay, "ema_warmup": ema_warmup, "accumulate": accumulate, "sam_rho": sam_rho}
        step_fn = make_train_step(task, tx, schedule=schedule, gather=gather, **how)
        update, new_window = compile_update(step_fn, state, batch, train_key, mesh, policy)
        report.flops = _model_flops(task, state, batch, train_key, 1 if sam_rho is None else 2)
        # Collectives on CPUs give up after 30 s; a host may compile for longer.
        hosts.current().barrier("the compiled step")
        evaluate = None
        if eval_every:
            evaluate = make_evaluate(task, mesh, prepare, eval_batches, gather, hosts.current(), frozen)
        if evaluate_every:
            evaluate = with_measures(evaluate, measure, evaluate_every, num_steps)
        examples = Examples(task, _prepare_example(run, example), mesh) if preview_every else None
        show = functools.partial(_show, run, report, evaluate, examples, preview_key)
        profile = stack.enter_context(contextlib.closing(Profile(profile_steps, as_path(workdir) / "profile")))

        # ---- Steps: until the first of them there is nothing to save, and a signal ends the process as it may --------
        stack.enter_context(hosts.current().saving())
        report.begin()
        every = _Every(num_steps, log_every, checkpoint_every, preview_every, eval_every or evaluate_every)
        meta = {"config": config, "version": version, "stage": name}
        steps = _Steps(
            run, loader, prepare, update, train_key, new_window, show, restore, report, profile, policy, every, meta
        )
        if left is not None and not show(state, Due(*left)):
            raise steps.interruption(start)
        at = _Position(state, start, batch, notes.get("running", NEW), notes.get("rollbacks", 0))
        del state, batch  # the devices would keep the first ones
        return steps.make(at)


def _check_numbers(preview_every: int, **positive: int) -> None:
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if preview_every < 0:
        raise ValueError(f"{preview_every=} must be 0 (never) or more")


class _Every(NamedTuple):
    """Steps between logs, checkpoints, previews and evaluations, 0 for never; the last step has each of them."""

    num_steps: int
    log: int
    checkpoint: int
    preview: int
    evaluate: int

    def due(self, step: int) -> "_DueAfter":
        """Return what is due after a step."""
        log, checkpoint, preview, evaluate = (
            each > 0 and (step == self.num_steps or step % each == 0) for each in self[1:]
        )
        return _DueAfter(log or evaluate, checkpoint, preview, evaluate)


class _DueAfter(NamedTuple):
    log: bool
    checkpoint: bool
    preview: bool
    evaluate: bool


class _Run(NamedTuple):
    """A stage, and where it is trained."""

    task: Task
    name: str
    checkpoints: Checkpoints
    mesh: Mesh
    frozen: Any
    rules: Sequence[Rule] = ()

    def newest_checkpoint(self) -> Any:
        """Wait for the checkpoint that is being written, and return the path of the newest; None without any."""
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return self.checkpoints.directory / str(steps[-1]) if steps else None

    def last_checkpoint(self, what: str = "the last checkpoint") -> str:
        """Return "the last checkpoint is PATH"."""
        newest = self.newest_checkpoint()
        return "no checkpoint was saved" if newest is None else f"{what} is {newest}"


@dataclasses.dataclass
class _Position:
    """What changes from step to step.

    Attributes:
      state: after `step` steps.
      batch: of the next step.
      running: what spikes are measured by, see `guard.NEW`.
      rollbacks: how many times the stage was rolled back.
      window: the sums since the last line of the log.
    """

    state: TrainState
    step: int
    batch: Any
    running: Mapping[str, float]
    rollbacks: int
    window: Any = None


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The steps of a stage, and what they share; see `fit`.

    Attributes:
      update, new_window: from `compile_update`.
      show: `_show` without its last two arguments.
      restore: `_restore_or_create` without its last argument.
      meta: what every checkpoint says.
    """

    run: _Run
    loader: Loader
    prepare: Callable[[Any], Any]
    update: Callable[..., tuple]
    key: jax.Array
    new_window: Callable[[Mapping[str, float]], Any]
    show: Callable[[TrainState, Due], bool]
    restore: Callable[[Loader | None], tuple[TrainState, int, dict[str, Any]]]
    report: Report
    profile: Profile
    policy: Policy
    every: _Every
    meta: Mapping[str, Any]

    def make(self, at: _Position) -> TrainState:
        """Make the steps that are left; return the state after the last."""
        at.window, in_flight = self.new_window(at.running), deque()
        while at.step < self.every.num_steps:
            in_flight.append(self._make_one(at))
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            stopping = hosts.current().point(f"{self.run.name} step {at.step}")
            due, row = self.every.due(at.step), None
            if any(due) or stopping or at.step % MOST == 0:
                self.run.checkpoints.check()
                means, found, at.running = read_window(at.window, at.step)
                bad = _judge(self.run, self.policy, found, self.report, at.step, at.rollbacks)
                if bad is not None:
                    self._go_back(at, bad)
                    at.batch = self._next_batch(at.step)
                    in_flight.clear()
                    continue
                if due.log or found:
                    row, at.window = self.report.row(means), self.new_window(at.running)
            self._write(at, Due(at.step, row, due.evaluate, due.preview), due.checkpoint, stopping)
            if at.step < self.every.num_steps:
                at.batch = self._next_batch(at.step)
        self.run.checkpoints.wait()
        return at.state

    def _make_one(self, at: _Position) -> jax.Array:
        """Make a step; return an array that is ready when it is made."""
        at.step += 1
        self.profile.before(at.step)
        at.state, at.window, done = self.update(at.state, at.window, at.batch, self.key)
        self.profile.after(at.step, done)
        self.report.tick()
        return done

    def _next_batch(self, step: int) -> Any:
        with self.report.waiting():
            batch = _next_batch(self.loader, step, self.run.mesh)
        return self.prepare(batch)

    def _go_back(self, at: _Position, bad: Bad) -> None:
        """Continue from the newest checkpoint; the loader stays where it is."""
        last = at.step
        (at.state, at.step, _), at.rollbacks = self.restore(None), at.rollbacks + 1
        self.report.rewind(at.step, last - at.step)
        seen = {"loss": bad.loss, "grad_norm": bad.grad_norm}
        self.report.event(at.step, "roll_back", rollback=at.rollbacks, last_step=last, bad_step=bad.step, **seen)
        at.running = {**at.running, "in_row": 0}  # the bad steps at the end of the window are undone
        at.window = self.new_window(at.running)

    def _write(self, at: _Position, due: Due, checkpoint: bool, stopping: bool) -> None:
        """Save, and show what is due; raise Interrupted, with a checkpoint, when the hosts stop."""
        if checkpoint:
            self._save(at, due)
        if (due.row is not None or due.preview) and not (stopping and (due.evaluate or due.preview)):
            stopping |= not self.show(at.state, due)
        if stopping:
            if not checkpoint:
                self._save(at, due)
            self.run.checkpoints.wait()
            raise self.interruption(at.step)

    def _save(self, at: _Position, due: Due) -> None:
        """Begin to save the state, the position in the data, and what is due after the step."""
        notes = {"due": due._asdict(), "running": at.running, "rollbacks": at.rollbacks}
        data = self.loader.get_state()
        self.run.checkpoints.save(at.state.trees(), data=data, step=at.step, notes=notes, **self.meta)

    def interruption(self, step: int) -> Interrupted:
        """Return the error that says why and after which step the hosts stop."""
        host, saved = hosts.current(), self.run.checkpoints.directory / str(step)
        return Interrupted(
            f"{self.run.name}: stopped by {host.describe_reason()} after step {step} of {self.every.num_steps}; the "
            f"same command continues from {saved}",
            host.status(),
        )


def _restore_or_create(
    run: _Run,
    tx: optax.GradientTransformation,
    key: jax.Array,
    example: Mapping[str, Any],
    config: Mapping[str, Any],
    ignore: Collection[str],
    abstract: TrainState | None,
    loader: Loader | None,
) -> tuple[TrainState, int, dict[str, Any]]:
    """Return the state to continue from, its step and the notes of its checkpoint; the loader continues with it."""
    prepared = example if run.frozen is None else jax.eval_shape(run.task.prepare, run.frozen, example)
    if abstract is None:
        abstract = abstract_state(run.task, tx, key, run.mesh, prepared, run.rules)
    restored = run.checkpoints.restore_latest(abstract.trees(), config=config, stage=run.name, ignore=ignore)
    if restored is None:
        return create_state(run.task, tx, key, run.mesh, prepared, run.rules, abstract=abstract), 0, {}
    if loader is not None:
        loader.set_state(restored.data)
    return TrainState.from_trees(restored.trees), restored.meta["step"], restored.meta.get("notes") or {}


def _needs_steps(run: _Run, start: int, num_steps: int, state: TrainState) -> bool:
    """Return whether there is something left to do; raise when more was done than is asked for, or the disk is full."""
    if start > num_steps:
        raise CheckpointError(f"{run.name}: the checkpoint is of step {start}, and {num_steps=} is less")
    if start > 0:
        logging.info("%s: %s after step %d", run.name, "is finished" if start == num_steps else "continues", start)
    if start < num_steps:
        run.checkpoints.check_space(state.trees())
    return start < num_steps


def _bad_preview(run: _Run, step: int, error: FloatingPointError) -> str:
    return f"{run.name}: the preview of step {step} failed: {error}; {run.last_checkpoint()}"


def _next_batch(loader: Loader, step: int, mesh: Mesh) -> Any:
    try:
        return shard_batch(next(loader), mesh)
    except StopIteration:
        raise ValueError(f"the loader ended after step {step}; it must be endless") from None


def _model_flops(task: Task, state: TrainState, batch: Any, key: jax.Array, gradients: int) -> float | None:
    """Return the operations of a step: for each gradient those of the loss, and twice as many."""
    extra = () if state.extra_state is None else (state.extra_state,)
    return 3 * gradients * count_flops(task.loss, state.params, batch, key, *extra) or None


def _prepare_example(run: _Run, example: Mapping[str, Any]) -> Any:
    """Return the prepared example on the host: the previews run wherever the state of the task is."""
    return example if run.frozen is None else jax.device_get(jax.jit(run.task.prepare)(run.frozen, example))


def _judge(run: _Run, policy: Policy, found: Sequence[Bad], report: Report, step: int, rollbacks: int) -> Bad | None:
    """Judge bad steps in their order.

    Returns:
      The one to go back to a checkpoint for; None to go on.

    Raises:
      TrainingDiverged: if the policy for one of them is to stop.
    """
    for bad in found:
        what, action = bad.describe(run.name), policy.spike if bad.finite else policy.nonfinite
        if action == "skip" and bad.in_row <= policy.max_bad_steps:
            logging.warning("%s and was skipped", what)
            report.event(step, "skip", bad_step=bad.step, loss=bad.loss, grad_norm=bad.grad_norm)
            continue
        newest = run.newest_checkpoint()
        if action == "roll_back" and rollbacks < policy.max_bad_steps:
            place = "the beginning of the stage" if newest is None else newest
            logging.warning("%s; going back to %s, with the data after step %d", what, place, step)
            return bad
        times = {"stop": "", "skip": f", {bad.in_row} in a row are bad,", "roll_back": f" after {rollbacks} times back"}
        raise TrainingDiverged(
            f"{what}{times[action]} and training stopped; {run.last_checkpoint('the last good checkpoint')}; try a "
            "lower learning rate, a longer warm-up or a smaller clip_norm"
        )
    return None


def _show(
    run: _Run,
    report: Report,
    evaluate: Evaluate | None,
    examples: Examples | None,
    key: jax.Array,
    state: TrainState,
    due: Due,
) -> bool:
    """Evaluate, write the line and make the previews of a step; return False if the hosts stop meanwhile."""
    with report.pause():
        held_out = evaluate(state, key) if due.evaluate and evaluate is not None else {}
        if held_out is None:
            return False
        if due.row is not None:
            report.write(due.step, due.row, held_out)
        for name, params in {"raw": state.params, "ema": state.ema_params}.items():
            if not due.preview or examples is None:
                continue
            try:
                images = examples.preview(params, key)
            except FloatingPointError as error:
                raise TrainingDiverged(_bad_preview(run, due.step, error)) from error
            if images is not None:
                report.preview(due.step, name, images)
            if hosts.current().point(f"{run.name} preview of step {due.step}"):
                return False
    return True
