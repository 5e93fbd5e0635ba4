"""The state of a training run: arrays only."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel.sharding import Rule, named_shardings, parameter_specs, specs_like
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
      extra_state: arrays of the task besides the parameters, see `types.Task`; None for nothing.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    extra_state: Any = None

    def trees(self) -> dict[str, Any]:
        """Return the trees that a checkpoint holds."""
        optimizer = {"step": self.step, "opt_state": self.opt_state}
        optimizer |= {} if self.extra_state is None else {"extra_state": self.extra_state}
        return {"params": self.params, "ema_params": self.ema_params, "optimizer": optimizer}

    @classmethod
    def from_trees(cls, trees: Mapping[str, Any]) -> "TrainState":
        """Return the state of the trees of a checkpoint."""
        return cls(params=trees["params"], ema_params=trees["ema_params"], **trees["optimizer"])


def create_state(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    batch: Mapping[str, Any],
    rules: Sequence[Rule] = (),
    *,
    abstract: TrainState | None = None,
) -> TrainState:
    """Make the state of step 0 directly on the devices of `mesh`, each with its part.

    Args:
      task: its `init(key, batch)` gives the parameters.
      tx: the optimizer.
      key: a typed PRNG key.
      mesh: where the state lives.
      batch: a prepared batch, or the shapes of one; only shapes and dtypes are read.
      rules: of sharding, see `parallel.sharding.parameter_specs`.
      abstract: what `abstract_state` returns for the same arguments, if it is known.

    Returns:
      A `TrainState` with step 0 and the average equal to the parameters.

    Raises:
      ValueError: for a rule that does not fit.
    """
    init = _initial_state(task, tx, batch)
    if abstract is None:
        place = state_shardings(jax.eval_shape(init, key), mesh, rules)
    else:
        place = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=place)(key)


def abstract_state(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    batch: Mapping[str, Any],
    rules: Sequence[Rule] = (),
) -> TrainState:
    """Return `create_state`'s result as `jax.ShapeDtypeStruct`s with shardings, without computing anything."""
    shapes = jax.eval_shape(_initial_state(task, tx, batch), key)
    place = state_shardings(shapes, mesh, rules)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, place)


def state_shardings(state: TrainState, mesh: Mesh, rules: Sequence[Rule] = ()) -> TrainState:
    """Return the shardings of a state: average and optimizer state are split like the parameters.

    Args:
      state: of arrays, or of shapes.
      mesh: where the state lives.
      rules: see `parallel.sharding.parameter_specs`.

    Returns:
      A `TrainState` of `jax.sharding.NamedSharding`.

    Raises:
      ValueError: for a rule that does not fit.
    """
    specs = parameter_specs(state.params, mesh, rules)
    optimizer, extra = (specs_like(tree, state.params, specs) for tree in (state.opt_state, state.extra_state))
    return named_shardings(mesh, TrainState(PartitionSpec(), specs, specs, optimizer, extra))


def count_parameters(params: Any) -> int:
    """Return the number of scalars in a tree of arrays or of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _initial_state(
    task: Task, tx: optax.GradientTransformation, batch: Mapping[str, Any]
) -> Callable[[jax.Array], TrainState]:
    # One example of zeros: parameters depend on the shapes of examples alone.
    shapes = jax.tree.map(lambda x: (1, *x.shape[1:]), dict(batch))
    dtypes = jax.tree.map(lambda x: x.dtype, dict(batch))

    def init(key: jax.Array) -> TrainState:
        is_shape = lambda x: isinstance(x, tuple)
        example = jax.tree.map(jnp.zeros, shapes, dtypes, is_leaf=is_shape)
        params = task.init(key, example)
        # A copy, because the step donates its state and one buffer cannot be donated twice.
        ema_params = jax.tree.map(jnp.copy, params)
        return TrainState(
            jnp.zeros((), jnp.int32), params, ema_params, tx.init(params), getattr(task, "extra_state", None)
        )

    return init
