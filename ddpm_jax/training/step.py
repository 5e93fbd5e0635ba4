"""One update of the parameters and of their moving average."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.extras import needs_extra
from ddpm_jax.training.state import TrainState
from ddpm_jax.types import Task

with needs_extra("train"):
    import optax

TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
RESERVED_METRICS = ("loss", "grad_norm", "param_norm", "lr", "finite", "made")


def ema_decay_at(step: jax.Array, decay: float, *, warmup: bool = True) -> jax.Array:
    """Return the decay of the moving average for the update after `step` updates.

    d(n) = min(decay, (1 + n) / (10 + n)), the ramp of `tf.train.ExponentialMovingAverage(num_updates=n)`: the average
    forgets the random start at once and reaches `decay` when it holds enough steps.

    Args:
      step: int32[], n >= 0.
      decay: in [0, 1).
      warmup: False uses `decay` from the first update.

    Returns:
      float32[].
    """
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if warmup else jnp.full_like(n, decay)


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    ema_warmup: bool = True,
    accumulate: int = 1,
    schedule: optax.Schedule | None = None,
    gather: Callable[[Any], Any] | None = None,
    sam_rho: float | None = None,
) -> TrainStep:
    """Make the pure function `(state, batch, key) -> (state, metrics)`; the caller jits it and donates the state.

    The key is folded with `state.step`, so the same key is given at every step. An update whose loss or gradient is not
    finite is not made: the state comes back as it went in, and `metrics["finite"]` is False. A fourth argument,
    float32[], is the largest loss of which an update is made; then `metrics["made"]` says whether it was.

    Args:
      task: its `loss(params, batch, key)` gives (float32[B], dict of float32[] or float32[B]); with an
        extra state, see `types.Task`, which micro-batches all see as it was before the step.
      tx: the optimizer.
      ema_decay: decay of the parameters' moving average, in [0, 1).
      ema_warmup: see `ema_decay_at`.
      accumulate: micro-batches a batch is cut into, one after the other; it must divide B. The update is that of the
        whole batch up to rounding, except that each micro-batch samples its own noise.
      schedule: adds the learning rate to the metrics.
      gather: params -> params inside of the differentiated loss (`parallel.sharding.make_gather`), for parameters that
        are sharded; what it returns is not stored for the backward pass.
      sam_rho: > 0, of sharpness-aware minimization (Foret et al. 2021, algorithm 1): with the gradient g at the
        parameters w, the update is by the gradient at w + rho g / |g|, of the same examples and the same noise, which
        doubles the work. With accumulation each micro-batch has its own g. None takes g itself. The loss and the task's
        metrics are those at w.

    Returns:
      The step. Its metrics are float32[] `loss`, `grad_norm` (before clipping), `param_norm` (before the update), `lr`
      and the task's own, averaged over the batch, and bool[] `finite`.

    Raises:
      ValueError: for an argument out of its range and, while tracing, when `accumulate` does not divide the batch or a
        metric of the task takes a name that is the step's.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"{ema_decay=} must be in [0, 1)")
    if accumulate < 1:
        raise ValueError(f"{accumulate=} must be at least 1")
    if sam_rho is not None and not (sam_rho > 0 and math.isfinite(sam_rho)):
        raise ValueError(f"{sam_rho=} must be a positive number, or None")

    def step(
        state: TrainState, batch: Any, key: jax.Array, limit: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads, aux = _gradients(task, state, batch, key, accumulate, gather, sam_rho)
        clash = sorted(set(metrics) & set(RESERVED_METRICS))
        if clash:
            raise ValueError(f"the task returns metrics named {clash}, which the training step uses itself")
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def make_update() -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            decay = ema_decay_at(state.step, ema_decay, warmup=ema_warmup)
            ema_params = jax.tree.map(lambda ema, p: ema + (1 - decay) * (p - ema), state.ema_params, params)
            extra = None if state.extra_state is None else task.update_extra_state(state.extra_state, aux)
            return TrainState(state.step + 1, params, ema_params, opt_state, extra)

        made = finite if limit is None else finite & (loss <= limit)
        new_state = jax.lax.cond(made, make_update, lambda: state)
        metrics |= {"loss": loss, "grad_norm": grad_norm, "param_norm": optax.tree.norm(state.params)}
        if schedule is not None:
            metrics["lr"] = jnp.asarray(schedule(state.step), jnp.float32)
        return new_state, metrics | {"finite": finite} | ({} if limit is None else {"made": made})

    return step


def _gradients(
    task: Task,
    state: TrainState,
    batch: Any,
    key: jax.Array,
    accumulate: int,
    gather: Callable[[Any], Any] | None = None,
    sam_rho: float | None = None,
) -> tuple[tuple, Any, Any]:
    """Return (mean loss, mean metrics) and gradients over `accumulate` micro-batches, and the task's aux."""
    extra = () if state.extra_state is None else (state.extra_state,)

    def mean_loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        params = params if gather is None else gather(params)
        loss, metrics = task.loss(params, batch, key, *extra)
        aux = metrics.pop("aux") if extra else None
        means = {name: jnp.mean(value, dtype=jnp.float32) for name, value in metrics.items()}
        return jnp.mean(loss, dtype=jnp.float32), (means, aux)

    def value_and_grad(batch: Any, key: jax.Array) -> tuple[tuple, Any]:
        (loss, (means, aux)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params, batch, key)
        if sam_rho is not None:
            climb = sam_rho / jnp.maximum(optax.tree.norm(grads), jnp.finfo(jnp.float32).tiny)
            nearby = jax.tree.map(lambda p, g: p + climb * g, state.params, grads)
            grads, _ = jax.grad(mean_loss, has_aux=True)(nearby, batch, key)
        return ((loss, means), grads), aux

    if accumulate == 1:
        found, aux = value_and_grad(batch, key)
        return *found, aux

    def split(array: jax.Array) -> jax.Array:
        if array.shape[0] % accumulate != 0:
            raise ValueError(f"{accumulate=} must divide the batch, whose leading axis is {array.shape[0]}")
        # Every accumulate-th example, so that a batch sharded over devices stays where it is.
        return jnp.swapaxes(array.reshape(-1, accumulate, *array.shape[1:]), 0, 1)

    micro_batches = jax.tree.map(split, batch)
    keys = jax.random.split(key, accumulate)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda *of: value_and_grad(*of)[0], first, keys[0])
    )

    def add(total: Any, micro: tuple) -> tuple[Any, Any]:
        found, aux = value_and_grad(*micro)
        return jax.tree.map(jnp.add, total, found), aux

    total, aux = jax.lax.scan(add, zeros, (micro_batches, keys))
    aux = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), aux)
    return *jax.tree.map(lambda x: x / accumulate, total), aux
