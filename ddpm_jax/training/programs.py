"""The programs of a training stage, each compiled once: frozen networks, and the update with its logging window."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddpm_jax.parallel.mesh import data_sharding, on_mesh, replicated
from ddpm_jax.parallel.placing import put
from ddpm_jax.parallel.sharding import is_sharded, make_gather, named_shardings, parameter_specs, used_dtypes
from ddpm_jax.training.guard import NEW, STOP, Policy, empty_window, make_update
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import TrainStep
from ddpm_jax.types import Task


def make_prepare(task: Task, mesh: Mesh, frozen: Any) -> Callable[[Any], Any]:
    """Return the function that runs the task's frozen networks on a sharded batch; without any, the identity."""
    if frozen is None:
        return lambda batch: batch
    # The weights are an argument: closed over, they would be constants of the program.
    prepare, places = prepare_program(task.prepare, mesh, frozen)
    return functools.partial(prepare, jax.tree.map(put, frozen, places))


def prepare_program(prepare: Callable[[Any, Any], Any], mesh: Mesh, frozen: Any) -> tuple[Callable[..., Any], Any]:
    """Return the jitted function that runs frozen networks, and where their weights are.

    Between the steps they are split along "fsdp" like parameters that are trained; they are gathered where they are
    used.

    Args:
      prepare: of a task.
      mesh: where batches are.
      frozen: models by role, of arrays or of shapes.

    Returns:
      (program, places): program(frozen, batch) -> prepared batch; places: a tree of shardings like frozen.
    """
    specs, split = parameter_specs(frozen, mesh), data_sharding(mesh)
    places, run = named_shardings(mesh, specs), on_mesh(prepare, mesh)
    if is_sharded(specs, mesh):
        gather = make_gather(mesh, specs)
        run = on_mesh(lambda models, batch: prepare(gather(models), batch), mesh)
    return jax.jit(run, in_shardings=(places, split), out_shardings=split), places


def make_parameter_gather(task: Task, mesh: Mesh, state: TrainState, batch: Any) -> Callable[[Any], Any] | None:
    """Return what gathers the parameters inside of a loss, or None if every device has them whole.

    Args:
      task: whose loss it is.
      mesh: where the state is.
      state, batch: arrays, or their shapes; the leaves of the state have shardings.
    """
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    if not is_sharded(specs, mesh):
        return None
    extra = () if state.extra_state is None else (state.extra_state,)

    def loss(params: Any) -> Any:  # of zeros, which are never computed
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (batch, *extra))
        return task.loss(params, zeros[0], jax.random.key(0), *zeros[1:])

    return make_gather(mesh, specs, used_dtypes(loss, state.params))


def lower_update(
    step_fn: TrainStep, state: TrainState, batch: Any, key: jax.Array, mesh: Mesh, policy: Policy = STOP
) -> tuple[jax.stages.Lowered, Any]:
    """Lower the step together with the sums over a logging window, as `fit` runs it.

    Args:
      step_fn: from `make_train_step`.
      state, batch, key: arrays, or their shapes; the leaves of the state have shardings.
      mesh: where it runs.
      policy: says which steps are bad.

    Returns:
      (lowered, empty): `update(state, window, batch, key) -> (state, window, done)`, which donates its first two
      arguments; `done` is an array that is ready when the step is. `empty` is the window at its beginning.
    """
    step_fn = jax.jit(on_mesh(step_fn, mesh), inline=True)
    # Traced once, here: the update calls it with the same types.
    _, metrics = jax.eval_shape(step_fn, state, batch, key, jax.ShapeDtypeStruct((), jnp.float32))
    place, split = replicated(mesh), data_sharding(mesh)
    parts = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(
        make_update(step_fn, policy),
        donate_argnums=(0, 1),
        in_shardings=(parts, place, split, place),
        out_shardings=(parts, place, place),
    )
    empty = empty_window(metrics, NEW)
    return jitted.lower(state, empty, batch, key), empty


def compile_update(
    step_fn: TrainStep, state: TrainState, batch: Any, key: jax.Array, mesh: Mesh, policy: Policy
) -> tuple[Callable[..., tuple], Callable[[Mapping[str, float]], Any]]:
    """Compile the update of `lower_update`.

    Returns:
      (update, new_window): `new_window(running)` gives sums without steps.
    """
    lowered, empty = lower_update(step_fn, state, batch, key, mesh, policy)
    new_window = lambda running: put(empty_window(empty["sums"], running), replicated(mesh))  # noqa: E731
    return lowered.compile(), new_window
