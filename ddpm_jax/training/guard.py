"""Steps whose update is not made: the loss or its gradient is not finite, or the loss is a spike.

The sums over a logging window are on the devices, and so is what a spike is measured by, so that no step waits.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import TrainStep

SETTLED, AVERAGED = 20, 100  # steps: a mean of fewer losses is no measure; and how many it is about


class Policy(NamedTuple):
    """What follows a step whose update was not made.

    Attributes:
      nonfinite: "stop", "skip" (go on without it) or "roll_back" (to the newest checkpoint, with other data).
      spike: the same, for a loss of more than `spike_factor` times its running mean.
      spike_factor: None finds no spikes.
      max_bad_steps: how many in a row are skipped, and how many times a stage is rolled back.
    """

    nonfinite: str = "stop"
    spike: str = "stop"
    spike_factor: float | None = None
    max_bad_steps: int = 3


STOP = Policy()


class Bad(NamedTuple):
    """The steps of a window whose update was not made.

    Attributes:
      step: the first of them.
      count: how many they are.
      in_row: the longest run of them, which may have begun before the window.
      finite: whether the first one was a spike.
      loss, grad_norm: of the first one.
    """

    step: int
    count: int
    in_row: int
    finite: bool
    loss: float
    grad_norm: float

    def describe(self, name: str) -> str:
        """Return a phrase such as "base: step 5 is not finite (loss nan, gradient norm nan)"."""
        what = "is a spike" if self.finite else "is not finite"
        return f"{name}: step {self.step} {what} (loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g})"


NEW = {"in_row": 0, "mean": 0.0, "seen": 0}
"""The running mean of the loss, of how many steps it is, and how many steps in a row were bad; of a new stage."""


def empty_window(metrics: Mapping[str, Any], running: Mapping[str, float]) -> dict[str, Any]:
    """Return the sums of a window without steps, numpy.

    Args:
      metrics: of a step.
      running: `NEW`, or what a read window had.
    """
    sums = {name: np.zeros((), np.float32) for name in metrics if name not in ("finite", "made")}
    counts = {name: np.zeros((), np.int32) for name in ("count", "bad", "first", "in_row", "finite")}
    kept = {name: np.asarray(running[name], np.float32 if name == "mean" else np.int32) for name in NEW}
    return {**counts, "sums": sums, "worst": sums, "running": kept}


def make_update(step_fn: TrainStep, policy: Policy) -> Callable[..., tuple[TrainState, Any, jax.Array]]:
    """Return `(state, window, batch, key) -> (state, window, made)`, to be compiled."""

    def update(state: TrainState, window: Any, batch: Any, key: jax.Array) -> tuple[TrainState, Any, jax.Array]:
        running = window["running"]
        limit = jnp.float32(jnp.inf)
        if policy.spike_factor is not None:
            limit = jnp.where(running["seen"] >= SETTLED, policy.spike_factor * running["mean"], limit)
        state, metrics = step_fn(state, batch, key, limit)
        finite, made = metrics.pop("finite"), metrics.pop("made")
        is_first = ~made & (window["bad"] == 0)
        seen = jnp.minimum(running["seen"] + 1, AVERAGED)
        running = {
            "in_row": jnp.where(made, 0, running["in_row"] + 1),
            "mean": jnp.where(made, running["mean"] + (metrics["loss"] - running["mean"]) / seen, running["mean"]),
            "seen": jnp.where(made, seen, running["seen"]),
        }
        window = {
            "count": window["count"] + 1,
            "bad": window["bad"] + ~made,
            "first": jnp.where(is_first, window["count"] + 1, window["first"]),
            "in_row": jnp.maximum(window["in_row"], running["in_row"]),
            "finite": jnp.where(is_first, finite.astype(jnp.int32), window["finite"]),
            "sums": jax.tree.map(lambda total, new: total + jnp.where(made, new, 0), window["sums"], metrics),
            "worst": jax.tree.map(lambda kept, new: jnp.where(is_first, new, kept), window["worst"], metrics),
            "running": running,
        }
        return state, window, made

    return update


def read_window(window: Any, step: int) -> tuple[dict[str, float], Bad | None, dict[str, float]]:
    """Return the means over the good steps of a window that ends with `step`, its bad ones, and what runs on."""
    values = jax.tree.map(float, jax.device_get(window))
    count, bad = int(values["count"]), int(values["bad"])
    means = {name: value / max(count - bad, 1) for name, value in values["sums"].items()}
    if not bad:
        return means, None, values["running"]
    first, worst = step - count + int(values["first"]), values["worst"]
    numbers = worst["loss"], worst["grad_norm"]
    return means, Bad(first, bad, int(values["in_row"]), bool(values["finite"]), *numbers), values["running"]
