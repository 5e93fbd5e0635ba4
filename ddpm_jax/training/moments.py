"""Second moments of a trained network, estimated on records of its stage, for the sampler "analytic"."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.mesh import batch_shards, data_sharding, make_local_mesh, replicated
from ddpm_jax.progress import progress_bar
from ddpm_jax.storage.moments import examples_of, write_moments

MOST_AT_A_TIME = 64
_KEY = 0x6D6F6D  # of this noise, and no other


class Measurable(Protocol):
    """A task whose network has second moments.

    Attributes:
        diffusion: the process.
    """

    diffusion: Diffusion

    def prepare(self, frozen: Any, batch: Any) -> Any:
        """See `types.Task`."""

    def moments(self, params: Any, batch: Any, key: jax.Array) -> jax.Array:
        """Return their means over a prepared batch, float32[T]."""


def estimate_moments(
    task: Measurable,
    params: Any,
    frozen: Any,
    records: Sequence[Mapping[str, np.ndarray]],
    directory: Path,
    *,
    seed: int = 0,
    step: int | None = None,
    progress: bool = True,
) -> None:
    """Estimate second moments, and write them into a model's directory, unless as good ones are there.

    Args:
        task: whose `moments` are estimated.
        params: averaged parameters, whole.
        frozen: models for `task.prepare`.
        records: transformed; each host reads a share of them. The shares are of equal size, so that up to
            hosts x devices - 1 records are used twice.
        directory: of the model.
        seed: of the noise.
        step: of the checkpoint that params are from.
        progress: True shows a bar on stderr.

    Raises:
        OSError: if the file cannot be written.
        FloatingPointError: if the network returns NaN or infinity.
    """
    others, mesh = hosts.current(), make_local_mesh()
    there = examples_of(directory, task.diffusion.num_steps, step)
    if all(others.gather("looking for moments", there >= len(records))):
        return
    place, shards = replicated(mesh), batch_shards(mesh)
    params, frozen = jax.device_put((params, frozen), place)
    share = -(-len(records) // (others.count * shards)) * shards
    size = max(shards, min(share, MOST_AT_A_TIME // shards * shards))
    own = np.arange(others.index * share, (others.index + 1) * share) % len(records)
    prepare, moments = jax.jit(task.prepare), jax.jit(task.moments)
    total, used = 0.0, 0
    with progress_bar(share, description="moments", unit="record", shown=progress and others.index == 0) as bar:
        for start in range(0, share, size):
            rows = own[start : start + size]
            others.busy(f"moments of record {rows[0]}")
            read = [records[row] for row in rows]
            batch = {name: np.stack([record[name] for record in read]) for name in read[0]}
            batch = prepare(frozen, jax.device_put(batch, data_sharding(mesh)))
            key = jax.random.fold_in(jax.random.key(seed), _KEY + start + others.index * share)
            total += len(rows) * np.asarray(moments(params, batch, key), np.float64)
            used += len(rows)
            bar.update(len(rows))
    values = np.mean(others.gather("the moments", (total / used).tolist()), axis=0)
    if not np.isfinite(values).all():
        raise FloatingPointError(f"the network in {directory} returns values that are not finite (NaN or infinity)")
    write_moments(directory, values, examples=len(records), step=step)
    others.barrier("the moments are written")
