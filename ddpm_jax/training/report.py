"""What is seen of a stage while it trains: the progress bar, metrics, previews, evaluations and profiles."""

import contextlib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data import image_grid
from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel.chips import device_peak_flops
from ddpm_jax.parallel.hosts import Alone, Hosts
from ddpm_jax.parallel.mesh import batch_shards, data_sharding, replicated, shard_batch
from ddpm_jax.parallel.placing import pad_and_put, put
from ddpm_jax.paths import is_remote
from ddpm_jax.progress import progress_bar
from ddpm_jax.training.metrics import MetricWriter, format_flops
from ddpm_jax.training.state import TrainState
from ddpm_jax.types import Task

with needs_extra("train"):
    from absl import logging

Evaluate = Callable[[TrainState, jax.Array], dict[str, float] | None]


class Due(NamedTuple):
    """What is to be written of a step once it is made.

    Attributes:
      step: its number.
      row: the line of metrics.jsonl, without an evaluation; None for no line.
      evaluate: whether the line has an evaluation.
      preview: whether there is a preview.
    """

    step: int
    row: dict[str, float] | None
    evaluate: bool
    preview: bool


class Report:
    """The progress bar, the metrics and the previews of one stage.

    Args:
      name: of the stage.
      workdir: of the stage.
      start: the step that the run continues from.
      rollbacks: how many times it was rolled back before.
      num_steps: in all.
      items: images of a step.
      tensorboard: True also writes event files.
      bar: True shows a bar on stderr.
    """

    def __init__(
        self,
        name: str,
        workdir: Path,
        start: int,
        num_steps: int,
        *,
        rollbacks: int,
        items: int,
        tensorboard: bool,
        bar: bool,
    ):
        self._name, self._workdir, self._items = name, workdir, items
        self.flops: float | None = None
        self._writer = MetricWriter(workdir, start_step=start, rollbacks=rollbacks, tensorboard=tensorboard)
        shown = bar and jax.process_index() == 0
        begin = {"description": name, "unit": "step", "initial": start, "shown": shown}
        self._make_bar = functools.partial(progress_bar, num_steps, **begin)
        self._bar: Any = None
        peak = device_peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()
        self._loss: float | None = None
        self._eval_loss: float | None = None
        self._begin, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._writer.close()

    def begin(self) -> None:
        """Show the bar and begin to count time: the steps begin."""
        self._bar = self._make_bar()
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of what runs inside out of the rates."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of what runs inside as waiting for the input."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def tick(self) -> None:
        """Count one step."""
        self._steps += 1
        self._bar.update()

    def rewind(self, step: int, steps: int) -> None:
        """Drop the lines of steps past `step`, which is `steps` before the last one and comes again."""
        self._writer.rewind(step)
        self._bar.update(-steps)
        self._begin, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def event(self, step: int, event: str, **fields: Any) -> None:
        """Write a line on something that happened, {"step", "time", "event", ...}."""
        self._writer.write_event(step, event, **fields)

    def row(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the line of the steps since the last call: their means, rates and use of the hardware."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rate = self._steps / seconds
        row = dict(means) | {"steps_per_second": rate, "images_per_second": rate * self._items}
        row["input_bound"] = min(self._waited / seconds, 1.0)
        if self.flops is not None:
            row["flops_per_second"] = rate * self.flops
            if self._peak is not None:
                row["utilization"] = rate * self.flops / self._peak
        memory = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
        if memory:
            row["hbm_bytes"] = max(stats.get("bytes_in_use", 0) for stats in memory)
            row["hbm_peak_bytes"] = max(stats.get("peak_bytes_in_use", 0) for stats in memory)
        self._begin, self._steps, self._waited = time.perf_counter(), 0, 0.0
        return row

    def write(self, step: int, row: Mapping[str, float], held_out: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl, and show the most of it beside the bar."""
        self._writer.write(step, {**row, **held_out})
        self._loss = row["loss"] if self._loss is None else 0.8 * self._loss + 0.2 * row["loss"]
        self._eval_loss = held_out.get("eval_loss_ema", self._eval_loss)
        held = [] if self._eval_loss is None else [f"held-out {self._eval_loss:.4g}"]
        speed = [f"loss {self._loss:.4g}", *held, f"{row['images_per_second']:.4g} images/s"]
        if "flops_per_second" in row:
            speed.append(format_flops(row["flops_per_second"]))
        if "utilization" in row:
            speed.append(f"{100 * row['utilization']:.0f}% of peak")
        if row["input_bound"] >= 0.1:
            speed.append(f"{100 * row['input_bound']:.0f}% waiting for input")
        self._bar.set_postfix_str(", ".join(speed), refresh=False)

    def preview(self, step: int, name: str, images: np.ndarray) -> None:
        """Write previews/step_<step>_<name>.png."""
        if jax.process_index() != 0:
            return
        image = image_grid.grid(images)
        image_grid.save_png(self.preview_path(step, name), image)
        self._writer.write_images(step, {f"preview_{name}": np.asarray(image)})
        if name == "ema":
            _show_inline(image, f"{self._name}, step {step}")

    def preview_path(self, step: int, name: str) -> Path:
        """Return where a preview is."""
        return self._workdir / "previews" / f"step_{step:06d}_{name}.png"

    def unfinished(self, notes: Mapping[str, Any] | None) -> Due | None:
        """Return what the run that saved a checkpoint with these notes was stopped before, or None."""
        if not notes or jax.process_index() != 0:
            return None
        due = Due(**notes)
        written = self._writer.last_step() == due.step
        preview = due.preview and not self.preview_path(due.step, "ema").exists()
        row = None if written else due.row
        if row is None and not preview:
            return None
        return due._replace(row=row, evaluate=due.evaluate and row is not None, preview=preview)


class Examples:
    """The examples of the previews, prepared and where the previews run.

    Args:
      task: makes them.
      prepared: arrays [N, ...] on the host.
      mesh: of the run. Several hosts split the examples, if the task has `shares_previews`.
    """

    def __init__(self, task: Task, prepared: Any, mesh: Mesh):
        self._task, self._count = task, jax.tree.leaves(prepared)[0].shape[0]
        shares = jax.process_count() > 1 and getattr(task, "shares_previews", False)
        self._batch = pad_and_put(prepared, batch_shards(mesh), mesh) if shares else prepared

    def preview(self, params: Any, key: jax.Array) -> np.ndarray | None:
        """Return the images of the examples, uint8[N, H, W, 3]."""
        images = self._task.preview(params, self._batch, key)
        return None if images is None else images[: self._count]


def make_evaluate(
    task: Task,
    mesh: Mesh,
    prepare: Callable[[Any], Any],
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    gather: Callable[[Any], Any] | None,
    stop: Alone | Hosts,
    frozen: Mapping[str, Any] | None = None,
) -> Evaluate:
    """Return the function that computes metrics of held-out batches, or None when the hosts stop meanwhile.

    They are the means of the loss, by raw and by averaged parameters, and for a task with `health_needs` of what its
    `health` returns, by averaged ones; frozen: the models of the stage's needs.
    """
    loss = getattr(task, "eval_loss", task.loss)
    place, split = replicated(mesh), data_sharding(mesh)

    @functools.partial(jax.jit, in_shardings=(None, None, split, place), out_shardings=place)
    def mean_losses(params: Any, ema_params: Any, batch: Any, key: jax.Array) -> list[jax.Array]:
        both = (params, ema_params) if gather is None else (gather(params), gather(ema_params))
        losses = [jnp.mean(loss(each, batch, key)[0], dtype=jnp.float32) for each in both]
        return dict(zip(("eval_loss", "eval_loss_ema"), losses, strict=True))

    health = _health(task, mesh, frozen, gather)

    def evaluate(state: TrainState, key: jax.Array) -> dict[str, float] | None:
        found: list[dict[str, jax.Array]] = []
        for number, batch in enumerate(eval_batches()):
            prepared, own = prepare(shard_batch(batch, mesh)), jax.random.fold_in(key, number)
            # One program at a time: two with sums over the devices of a CPU can wait for each other (`checksum`).
            jax.block_until_ready(found[-1:])
            found.append(mean_losses(state.params, state.ema_params, prepared, own))
            if health is not None:
                jax.block_until_ready(found[-1:])
                found[-1] |= health(state.ema_params, prepared, own)
            if stop.point(f"batch {number + 1} of an evaluation"):
                return None
        rows = jax.device_get(found)
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    return evaluate


def _health(
    task: Task, mesh: Mesh, frozen: Mapping[str, Any] | None, gather: Callable[[Any], Any] | None
) -> Callable[[Any, Any, jax.Array], dict[str, jax.Array]] | None:
    """Return (averaged parameters, prepared batch, key) -> metrics of a prior; None for a task that has none."""
    needs = getattr(task, "health_needs", None)
    if needs is None:
        return None
    place, split = replicated(mesh), data_sharding(mesh)
    models = jax.tree.map(lambda leaf: put(leaf, place), {role: frozen[role] for role in needs})

    @functools.partial(jax.jit, in_shardings=(None, place, split, place), out_shardings=place)
    def measure(params: Any, models: Any, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        params = params if gather is None else gather(params)
        return {f"eval_{name}": value for name, value in task.health(params, models, batch, key).items()}

    return lambda params, batch, key: measure(params, models, batch, key)


def warn_without_trace(name: str, steps: tuple[int, int] | None, start: int, num_steps: int) -> None:
    """Warn if none of the steps of a trace is made by a stage that continues after `start` and ends at `num_steps`."""
    if steps is not None and max(steps[0], start + 1) > min(steps[1], num_steps):
        made = f"it makes steps {start + 1} to {num_steps}" if start < num_steps else "it makes no more steps"
        logging.warning("%s: no profiler trace of steps %d to %d is written: %s", name, *steps, made)


class Profile:
    """A profiler trace of some steps, for XProf or Perfetto; in place of a bucket in a temporary directory.

    Args:
      steps: the first and the last step; None for no trace.
      directory: created if missing.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: str | os.PathLike):
        self._steps, self._directory, self._active = steps, os.fspath(directory), False

    def before(self, step: int) -> None:
        """Begin the trace if this is its first step."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and not self._active:
            if is_remote(self._directory):  # the profiler writes to disks
                self._directory = tempfile.mkdtemp(prefix="profile-")
            jax.profiler.start_trace(self._directory)
            self._active = True

    def after(self, step: int, done: jax.Array) -> None:
        """End the trace if this was its last step."""
        if self._active and self._steps is not None and step >= self._steps[1]:
            done.block_until_ready()
            self.close()

    def close(self) -> None:
        """End the trace."""
        if self._active:
            self._active, self._steps = False, None
            jax.profiler.stop_trace()
            logging.info("wrote a profile to %s", self._directory)


def _show_inline(image: Any, title: str) -> None:
    """Show an image below the cell of a notebook; elsewhere do nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and hasattr(shell, "kernel"):
        sys.modules["IPython.display"].display(title, image)
