"""Metrics of a run: JSON lines always, TensorBoard event files on request."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.extras import needs_extra
from ddpm_jax.temporary import temporary_path

with needs_extra("train"):
    from absl import logging

FILE_NAME = "metrics.jsonl"


class MetricWriter:
    """Writes JSON Lines to `<directory>/metrics.jsonl`, and scalars and images to TensorBoard.

    Lines of steps past `start_step` are dropped first: they belong to steps that are about to be made again, so that
    the file holds each step once however often the run was interrupted.

    Args:
      directory: the stage's directory; it exists.
      start_step: the step the run continues from, 0 for a new one.
      tensorboard: True writes event files to `<directory>/tensorboard` through clu, which imports TensorFlow.

    Raises:
      OSError: when the file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, *, start_step: int = 0, tensorboard: bool = False):
        self._path = Path(directory) / FILE_NAME
        self._tensorboard = None
        self._file = None
        if jax.process_index() == 0:
            if tensorboard:
                self._tensorboard = _tensorboard_writer(Path(directory) / "tensorboard")
            _keep_until(self._path, start_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open until close)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line: `step`, `time` (seconds since 1970) and the values; what is not finite becomes null.

        Raises:
          OSError: when the line cannot be written.
        """
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        row = {"step": step, "time": time.time()}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"could not write metrics: {error.strerror}", str(self._path)) from error
        if self._tensorboard is not None:
            self._tensorboard.write_scalars(step, numbers)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Send images, uint8[H, W, 3] each, to TensorBoard; nothing without it."""
        if self._tensorboard is not None:
            self._tensorboard.write_images(step, {name: image[None] for name, image in images.items()})

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                logging.warning("could not close %s: %s", self._path, error.strerror)
        if self._tensorboard is not None:
            self._tensorboard.flush()
            self._tensorboard.close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a stage's `metrics.jsonl`, oldest first; a last line that was cut short is left out."""
    path = Path(directory) / FILE_NAME
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def step_flops(lowered: jax.stages.Lowered, *, accumulate: int = 1) -> float | None:
    """Return the floating-point operations of one training step, as XLA counts them before partitioning.

    XLA counts the body of a loop once. The loop over micro-batches is put right here; a network that scans over its
    layers is undercounted.

    Args:
      lowered: the step, `jax.jit(step).lower(...)`.
      accumulate: the micro-batches of a step.

    Returns:
      The number over all devices, or None when the backend does not count.
    """
    cost = lowered.cost_analysis()
    flops = cost.get("flops", 0.0) if cost else 0.0
    return flops * accumulate if flops > 0 else None


def format_flops(flops_per_second: float) -> str:
    """Return "45.1 GFLOP/s" or "1.3 TFLOP/s"."""
    if flops_per_second >= 1e12:
        return f"{flops_per_second / 1e12:.1f} TFLOP/s"
    return f"{flops_per_second / 1e9:.1f} GFLOP/s"


def _keep_until(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    rows = [row for row in read_metrics(path.parent) if row["step"] <= last_step]
    try:
        with temporary_path(path.with_suffix(".tmp")) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"could not write metrics: {error.strerror}", str(path)) from error


def _tensorboard_writer(directory: Path) -> Any:
    try:
        from clu.metric_writers.summary_writer import SummaryWriter
    except ImportError as error:
        logging.info("no TensorBoard event files: %s; install ddpm_jax[tensorboard] for them", error)
        return None
    return SummaryWriter(str(directory))
