"""The time grid a sampler walks along: from the noisiest step down to the data."""

import jax
import jax.numpy as jnp
from flax import struct

from ddpm_jax.diffusion.process import GaussianProcess


@struct.dataclass
class Point:
    """One point of a time grid, or all N + 1 of them stacked. x = alpha x0 + sigma eps there.

    Attributes:
        index: int32, the step of the process; -1 at the data.
        t: int32 or float32, what the network receives (``process.timestep_map``); -1 at the data, where it is never
            called.
        alpha: float32, 1 at the data.
        sigma: float32, 0 at the data.
        beta: float32, the variance that is added from the next point to this one, (13) of ``process``; 0 at the data.
            From a table made in float64: the difference would be lost to cancellation here.
        time_is_sigma: static, as that of the process.
        num_steps: static, N, the steps of the process; 0 where it is not known.
    """

    index: jax.Array
    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    beta: jax.Array
    time_is_sigma: bool = struct.field(pytree_node=False, default=False)
    num_steps: int = struct.field(pytree_node=False, default=0)


def time_grid(process: GaussianProcess) -> Point:
    """Return the T + 1 points of a process in sampling order: steps T - 1 .. 0, then the data.

    A sampler takes T transitions between them, and evaluates the network at the first T points only.
    """
    dtype = process.betas.dtype

    def downwards(table: jax.Array, at_data: float) -> jax.Array:
        return jnp.append(table[::-1], jnp.asarray(at_data, table.dtype))

    return Point(
        index=downwards(jnp.arange(process.num_steps, dtype=jnp.int32), -1),
        t=downwards(process.timestep_map, -1),
        alpha=downwards(process.alpha.astype(dtype), 1.0),
        sigma=downwards(process.sigma.astype(dtype), 0.0),
        beta=downwards(process.betas, 0.0),
        time_is_sigma=process.time_is_sigma,
        num_steps=process.num_steps,
    )
