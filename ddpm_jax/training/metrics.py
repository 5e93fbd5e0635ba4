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
from ddpm_jax.paths import as_path, is_remote, write_whole

with needs_extra("train"):
    from absl import logging

FILE_NAME = "metrics.jsonl"
REMOTE_SECONDS = 30.0


class MetricWriter:
    """Writes JSON Lines to `<directory>/metrics.jsonl`, and scalars and images to TensorBoard.

    Lines of steps past `start_step` are dropped first: they belong to steps that are about to be made again, so that
    the file holds each step once however often the run was interrupted.

    Args:
      directory: the stage's directory; it exists.
      start_step: the step the run continues from, 0 for a new one.
      rollbacks: how many times it was rolled back before; lines on later ones ("rollback") are dropped too.
      tensorboard: True writes event files to `<directory>/tensorboard` through clu, which imports TensorFlow.

    Raises:
      OSError: when the file cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike, *, start_step: int = 0, rollbacks: int = 0, tensorboard: bool = False
    ):
        self._path = as_path(directory) / FILE_NAME
        self._tensorboard = None
        self._lines: _Lines | None = None
        if jax.process_index() == 0:
            if tensorboard:
                self._tensorboard = _tensorboard_writer(Path(directory) / "tensorboard")
            _keep_until(self._path, start_step, rollbacks)
            self._lines = _Lines(self._path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line: `step`, `time` (seconds since 1970) and the values; what is not finite becomes null.

        Raises:
          OSError: when the line cannot be written.
        """
        if self._lines is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        row = {"step": step, "time": time.time()}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._append(row)
        if self._tensorboard is not None:
            self._tensorboard.write_scalars(step, numbers)

    def write_event(self, step: int, event: str, **fields: Any) -> None:
        """Append one line on something that happened: `step`, `time`, `event` and the fields, numbers."""
        if self._lines is not None:
            numbers = {name: value if math.isfinite(value) else None for name, value in fields.items()}
            self._append({"step": step, "time": time.time(), "event": event, **numbers})

    def rewind(self, step: int) -> None:
        """Drop the lines of steps past `step`."""
        if self._lines is not None:
            self._lines.close()
            _keep_until(self._path, step, math.inf)
            self._lines = _Lines(self._path)

    def last_step(self) -> int:
        """Return the step of the last line of metrics, or 0."""
        steps = [row["step"] for row in read_metrics(self._path.parent) if "event" not in row]
        return steps[-1] if steps else 0

    def _append(self, row: dict[str, Any]) -> None:
        try:
            self._lines.append(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"could not write metrics: {error.strerror}", str(self._path)) from error

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Send images, uint8[H, W, 3] each, to TensorBoard; nothing without it."""
        if self._tensorboard is not None:
            self._tensorboard.write_images(step, {name: image[None] for name, image in images.items()})

    def close(self) -> None:
        """Close the files."""
        if self._lines is not None:
            try:
                self._lines.close()
            except OSError as error:
                logging.warning("could not close %s: %s", self._path, error.strerror)
        if self._tensorboard is not None:
            self._tensorboard.flush()
            self._tensorboard.close()


class _Lines:
    """A file that lines are appended to. An object of a bucket is written again, at most every `REMOTE_SECONDS`."""

    def __init__(self, path: Any):
        self._path, self._text, self._time, self._file = path, "", -math.inf, None
        if is_remote(path):
            self._text = path.read_text() if path.exists() else ""
        else:
            # Without a buffer, whose rest a full disk would leave for `close`.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open until close)

    def append(self, line: str) -> None:
        """Append a line."""
        if self._file is not None:
            data = line.encode()
            while data:
                data = data[self._file.write(data) :]
            return
        self._text += line
        if time.monotonic() - self._time > REMOTE_SECONDS:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()
        else:
            self._write()

    def _write(self) -> None:
        self._path.write_text(self._text)
        self._time = time.monotonic()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a stage's `metrics.jsonl`, oldest first; a last line that was cut short is left out."""
    path = as_path(directory) / FILE_NAME
    rows = []
    for line in path.read_bytes().decode().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def format_flops(flops_per_second: float) -> str:
    """Return "45.1 GFLOP/s" or "1.3 TFLOP/s"."""
    if flops_per_second >= 1e12:
        return f"{flops_per_second / 1e12:.1f} TFLOP/s"
    return f"{flops_per_second / 1e9:.1f} GFLOP/s"


def _keep_until(path: Any, last_step: int, rollbacks: float) -> None:
    if not path.exists():
        return
    rows = [
        row for row in read_metrics(path.parent) if row["step"] <= last_step and row.get("rollback", 0) <= rollbacks
    ]
    try:
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:
        raise OSError(error.errno, f"could not write metrics: {error.strerror}", str(path)) from error


def _tensorboard_writer(directory: Path) -> Any:
    try:
        from clu.metric_writers.summary_writer import SummaryWriter
    except ImportError as error:
        logging.info("no TensorBoard event files: %s; install ddpm_jax[tensorboard] for them", error)
        return None
    return SummaryWriter(str(directory))
