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
MOST = 256
"""Bad steps that a window holds; it is read at least after as many steps."""


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
    """A step whose update was not made.

    Attributes:
      step: its number.
      in_row: how many bad steps in a row end with it.
      finite: whether it was a spike.
      loss, grad_norm: of it.
    """

    step: int
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
    kept = {name: np.asarray(running[name], np.float32 if name == "mean" else np.int32) for name in NEW}
    found = {name: np.zeros(MOST, np.float32 if name in ("loss", "grad_norm") else np.int32) for name in Bad._fields}
    count = np.zeros((), np.int32)
    return {"count": count, "bad": count, "sums": sums, "found": found, "running": kept}


def make_update(step_fn: TrainStep, policy: Policy) -> Callable[..., tuple[TrainState, Any, jax.Array]]:
    """Return `(state, window, batch, key) -> (state, window, made)`, to be compiled."""

    def update(state: TrainState, window: Any, batch: Any, key: jax.Array) -> tuple[TrainState, Any, jax.Array]:
        running = window["running"]
        limit = jnp.float32(jnp.inf)
        if policy.spike_factor is not None:
            limit = jnp.where(running["seen"] >= SETTLED, policy.spike_factor * running["mean"], limit)
        state, metrics = step_fn(state, batch, key, limit)
        finite, made = metrics.pop("finite"), metrics.pop("made")
        seen = jnp.minimum(running["seen"] + 1, AVERAGED)
        running = {
            "in_row": jnp.where(made, 0, running["in_row"] + 1),
            "mean": jnp.where(made, running["mean"] + (metrics["loss"] - running["mean"]) / seen, running["mean"]),
            "seen": jnp.where(made, seen, running["seen"]),
        }
        count = window["count"] + 1
        bad = Bad(count, running["in_row"], finite, metrics["loss"], metrics["grad_norm"])
        place = jnp.where(made, MOST, window["bad"])  # past the end, where nothing is written
        window = {
            "count": count,
            "bad": window["bad"] + ~made,
            "sums": jax.tree.map(lambda total, new: total + jnp.where(made, new, 0), window["sums"], metrics),
            "found": {
                name: kept.at[place].set(getattr(bad, name).astype(kept.dtype), mode="drop")
                for name, kept in window["found"].items()
            },
            "running": running,
        }
        return state, window, made

    return update


def read_window(window: Any, step: int) -> tuple[dict[str, float], list[Bad], dict[str, float]]:
    """Return the means over the good steps of a window that ends with `step`, its bad ones, and what runs on."""
    values = jax.device_get(window)
    count, bad = int(values["count"]), int(values["bad"])
    means = {name: float(value) / max(count - bad, 1) for name, value in values["sums"].items()}
    found = []
    for each in zip(*(values["found"][name][:bad].tolist() for name in Bad._fields), strict=True):
        one = Bad(*each)
        found.append(one._replace(step=step - count + one.step, finite=bool(one.finite)))
    return means, found, jax.tree.map(float, values["running"])
