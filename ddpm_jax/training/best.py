"""Measures of samples while a stage trains, and the best parameters so far as a model directory.

<stage>/best/best.json   which step is the best one, by which measure
<stage>/best/<step>/     its averaged parameters; `ddpm_jax.load` opens it
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.placing import fetch
from ddpm_jax.storage.json_file import read_json, write_json
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model, save_model
from ddpm_jax.training.report import Evaluate
from ddpm_jax.training.state import TrainState

BEST, BEST_FILE = "best", "best.json"


class Evaluation(Protocol):
    """Measures a model of a stage that is being trained, as `evaluation.during_training.SampleQuality`.

    Attributes:
        metric: name of the measure that says which parameters are best.
        higher_is_better: of that measure.
    """

    metric: str
    higher_is_better: bool

    def check(self, model: Model) -> None:
        """Raise ValueError or LoadError, before anything is trained, if a model with such shapes cannot be measured."""
        ...

    def __call__(self, model: Model) -> Mapping[str, float]:
        """Return measures by name; all hosts call it, with the whole model, and get the same."""
        ...


def with_measures(
    evaluate: Evaluate | None, measure: Callable[[Any, int], dict[str, float]], every: int, num_steps: int
) -> Evaluate:
    """Return an evaluation that also measures samples, every `evaluate_every` steps and after the last.

    Args:
        evaluate: of the loss on held-out records, or None.
        measure: (averaged parameters, step) -> measures by their names in metrics.jsonl.
        every: steps between measurements.
        num_steps: of the stage.
    """

    def both(state: TrainState, key: jax.Array) -> dict[str, float] | None:
        found, step = {} if evaluate is None else evaluate(state, key), int(np.asarray(state.step))
        if found is None or (step % every and step != num_steps):
            return found
        return found | measure(state.ema_params, step)

    return both


def measure_and_keep(
    evaluation: Evaluation, network: Any, metadata: Mapping[str, Any], directory: Path, params: Any, step: int
) -> dict[str, float]:
    """Measure a model, and keep it if it is the best so far.

    Args:
        evaluation: measures it.
        network, metadata: of the stage's model.
        directory: of the stage.
        params: averaged parameters, on the devices of the run.
        step: of the parameters.

    Returns:
        {"eval_<name>": value}.

    Raises:
        ValueError: if the evaluation does not return its own metric.
        OSError: if the model cannot be written.
    """
    model = Model(fetch(params), network, freeze(metadata))
    found = {name: float(value) for name, value in evaluation(model).items()}
    if evaluation.metric not in found:
        raise ValueError(f"metric={evaluation.metric!r} of the evaluation must be one of {', '.join(found)}")
    if jax.process_index() == 0:
        _keep(directory / BEST, model, step, evaluation, found)
    hosts.current().barrier("the best model is written")
    return {f"eval_{name}": value for name, value in found.items()}


def read_best(directory: Path) -> dict[str, Any] | None:
    """Return what best.json of a stage says, "step", "metric", "value" and "measures"; None without one."""
    try:
        return read_json(directory / BEST / BEST_FILE)
    except FileNotFoundError:
        return None


def _keep(place: Path, model: Model, step: int, evaluation: Evaluation, found: Mapping[str, float]) -> None:
    """Write a model and best.json if it is better than the last best one, which is then removed; never for NaN."""
    before, value = read_best(place.parent), found[evaluation.metric]
    if math.isnan(value):
        return
    is_same = before is not None and before.get("metric") == evaluation.metric and before["step"] != step
    if is_same and (before["value"] >= value if evaluation.higher_is_better else before["value"] <= value):
        return
    shutil.rmtree(place / str(step), ignore_errors=True)  # of a run that was stopped while it was written
    save_model(model, place / str(step))
    write_json(place / BEST_FILE, {"step": step, "metric": evaluation.metric, "value": value, "measures": dict(found)})
    for other in place.iterdir():
        if other.name.isdecimal() and other.name != str(step):
            shutil.rmtree(other)
