"""The state of a training run: arrays only."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel.mesh import replicated
from ddpm_jax.types import Task

with needs_extra("train"):
    import optax


@flax.struct.dataclass
class TrainState:
    """What a training step changes.

    Attributes:
      step: int32[], the number of updates made.
      params: the network's parameters.
      ema_params: their exponential moving average, of the same structure.
      opt_state: the optimizer's state.
      memory: what the task keeps besides, see `types.Task`; None for nothing.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    memory: Any = None


def create_state(task: Task, tx: optax.GradientTransformation, key: jax.Array, mesh: Mesh) -> TrainState:
    """Make the state of step 0 directly on the devices of `mesh`, replicated.

    Args:
      task: its `init(key)` gives the parameters.
      tx: the optimizer.
      key: a typed PRNG key.
      mesh: where the state lives.

    Returns:
      A `TrainState` with step 0 and the average equal to the parameters.
    """
    return jax.jit(_initial_state(task, tx), out_shardings=replicated(mesh))(key)


def abstract_state(task: Task, tx: optax.GradientTransformation, key: jax.Array, mesh: Mesh) -> TrainState:
    """Return `create_state`'s result as `jax.ShapeDtypeStruct`s with shardings, without computing anything."""
    shapes = jax.eval_shape(_initial_state(task, tx), key)
    place = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def count_parameters(params: Any) -> int:
    """Return the number of scalars in a tree of arrays or of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _initial_state(task: Task, tx: optax.GradientTransformation):
    def init(key: jax.Array) -> TrainState:
        params = task.init(key)
        # A copy, because the step donates its state and one buffer cannot be donated twice.
        ema_params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, tx.init(params), getattr(task, "memory", None))

    return init
