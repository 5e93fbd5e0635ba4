"""A task small enough to train in a test, and its loader. Run as a program it trains one stage in its own process."""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.training.loop import Interrupted, fit
from ddpm_jax.training.optimizer import make_optimizer

BATCH, FEATURES, TARGETS = 16, 5, 3


class ToyTask:
    """Linear regression on noisy targets; it needs no frozen network."""

    def init(self, key, batch):
        return {"dense": {"kernel": jax.random.normal(key, (FEATURES, TARGETS)), "bias": jnp.zeros((TARGETS,))}}

    def prepare(self, frozen, batch):
        return batch

    def loss(self, params, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        error = batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"][None] - batch["y"] - noise
        return jnp.mean(error**2, axis=-1), {"absolute": jnp.mean(jnp.abs(error), axis=-1)}

    def preview(self, params, batch, key):
        level = jax.nn.sigmoid(params["dense"]["kernel"].sum() / 10 + jax.random.normal(key) / 10)
        return np.full((3, 8, 8, 3), np.uint8(255 * level))


def toy_batch(number):
    """Batch `number` of the loader."""
    rng = np.random.default_rng(number)
    return {name: rng.normal(size=(BATCH, n)).astype(np.float32) for name, n in (("x", FEATURES), ("y", TARGETS))}


class ToyLoader:
    """Batch i is a function of i. Every batch handed out is counted in `served`."""

    def __init__(self, nan_at=None, pause=0.0, note=None):
        self.position, self.served = 0, []
        self.nan_at, self.pause, self.note = nan_at, pause, note

    def __next__(self):
        self.position += 1
        self.served.append(self.position)
        if self.note is not None:
            with open(self.note, "a") as file:
                file.write(f"{self.position}\n")
        time.sleep(self.pause)
        batch = toy_batch(self.position)
        if self.position == self.nan_at:
            batch["x"][0, 0] = np.nan
        return batch

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def run(workdir, *, task=None, loader=None, name="toy", num_steps=12, devices=None, mesh=None, **options):
    """Train the toy, on two devices and with defaults that log and save often; returns the final state."""
    tx, schedule = make_optimizer(
        learning_rate=0.05, warmup_steps=2, total_steps=100, decay="constant", weight_decay=0.01, clip_norm=1.0
    )
    defaults = {"config": {"lr": 0.05}, "version": "0", "checkpoint_every": 4, "log_every": 2, "progress": False}
    return fit(
        task or ToyTask(),
        loader or ToyLoader(),
        name=name,
        example=toy_batch(0),
        workdir=workdir,
        num_steps=num_steps,
        tx=tx,
        schedule=schedule,
        mesh=mesh or make_mesh({"data": -1}, devices=devices or jax.devices()[:2]),
        seed=3,
        ema_decay=0.9,
        **(defaults | options),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--num_steps", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    arguments = parser.parse_args()
    arguments.workdir.mkdir(exist_ok=True)
    loader = ToyLoader(pause=arguments.pause, note=arguments.workdir / "served.txt")
    try:
        state = run(arguments.workdir, loader=loader, num_steps=arguments.num_steps, log_every=1)
    except Interrupted as error:
        print(error)
        raise SystemExit(128 + error.signum) from None
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    digest = {name: np.asarray(leaf).tobytes().hex() for name, leaf in leaves.items()}
    (arguments.workdir / "final.json").write_text(json.dumps(digest))


if __name__ == "__main__":
    main()
