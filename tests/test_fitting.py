"""Stages that are fitted in closed form, from sums over batches."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_train import TARGETS, make_stage, run

from ddpm_jax.storage.checkpoint import CheckpointError, restore_params
from ddpm_jax.training.metrics import read_metrics
from ddpm_jax.training.run import is_trained


class Moments:
    """A task in closed form: the mean brightness of the images."""

    def init(self, key, batch):
        return {"params": {"mean": jnp.zeros(())}}

    def prepare(self, frozen, batch):
        return batch

    def sums(self, batch):
        return {"count": jnp.full((), len(batch["y"])), "y": batch["y"].sum()}

    def fitted(self, sums):
        if sums["count"] < 2:
            raise ValueError("needs more records")
        return {"params": {"mean": np.float32(sums["y"] / sums["count"])}}, {"count": float(sums["count"])}

    def measure(self, params, batch):
        return {"error": jnp.abs(batch["y"] - params["params"]["mean"])}


def test_a_stage_in_closed_form(tmp_path):
    """Five batches of 8 are each of the 40 records once; a second run finds it, a changed option is refused."""
    training = {"num_steps": 5, "learning_rate": 1.0}
    fitted = make_stage(Moments(), training=training)
    run([fitted], tmp_path / "run")
    params, _ = restore_params(tmp_path / "run" / "own")
    assert float(params["params"]["mean"]) == pytest.approx(TARGETS.astype(np.float64).mean(), rel=1e-6)
    (row,) = read_metrics(tmp_path / "run" / "own")
    assert row["step"] == 5 and row["count"] == 40 and row["error"] > 0
    assert is_trained(fitted, tmp_path / "run")
    run([fitted], tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / "own")) == 1
    with pytest.raises(CheckpointError, match="seed"):
        run([make_stage(Moments(), training=training | {"seed": 1})], tmp_path / "run")
