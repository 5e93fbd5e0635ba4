r"""Importance sampling of timesteps by the second moment of their losses (Improved DDPM, section 3.3).

The terms L_t of the variational bound differ by orders of magnitude, so one uniformly sampled step estimates their sum
with much noise. Drawn with p_t and weighted by 1 / (T p_t), a step estimates it without bias, and with the least
variance for

    p_t \propto sqrt(E[L_t^2])     (eq. 18)

The expectation is the mean over the last losses seen at t, ten in the paper, and until every step has as many, steps
are sampled uniformly. All of it is arrays: the history is part of the training state.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from ddpm_jax.checks import check_indices, check_number, check_static
from ddpm_jax.diffusion.keys import one_key

Timesteps = Literal["uniform", "stratified", "importance"]


@struct.dataclass
class LossHistory:
    """The last losses at every timestep; make it with ``loss_history``.

    Attributes:
        losses: float32[T, K], a ring for each step, of which the first ``counts`` entries have been written.
        counts: int32[T], how many losses have been recorded, ever.
    """

    losses: jax.Array
    counts: jax.Array


def loss_history(num_steps: int, length: int = 10) -> LossHistory:
    """Return an empty history of the last ``length`` losses at each of ``num_steps`` steps.

    Raises:
        ValueError: if an argument is below 1.
    """
    check_static("num_steps and length", (num_steps, length), "since they are a shape")
    if num_steps < 1 or length < 1:
        raise ValueError(f"{num_steps=} and {length=} must be at least 1")
    return LossHistory(jnp.zeros((num_steps, length), jnp.float32), jnp.zeros(num_steps, jnp.int32))


def timestep_probabilities(history: LossHistory, uniform: float = 1e-3) -> jax.Array:
    """Return p_t, float32[T]: eq. (18), mixed with a share ``uniform`` of equal ones (the published code).

    All are equal until every step has a full history.

    Raises:
        ValueError: if uniform is outside [0, 1]. A traced one outside it gives NaN.
    """
    uniform = check_number("uniform", uniform, lambda v: (v >= 0) & (v <= 1), "must be in [0, 1]")
    num_steps, length = history.losses.shape
    # Relative to the largest, whose square might not be finite.
    largest = jnp.max(jnp.abs(history.losses))
    size = jnp.sqrt(jnp.mean((history.losses / jnp.where(largest > 0.0, largest, 1.0)) ** 2, axis=1))
    total = jnp.sum(size)
    full = jnp.all(history.counts >= length) & (total > 0.0)
    p = jnp.where(full, size / jnp.where(full, total, 1.0), 1.0 / num_steps)
    return (1.0 - uniform) * p + uniform / num_steps


def importance_timesteps(
    key: jax.Array, batch_size: int, history: LossHistory, uniform: float = 1e-3
) -> tuple[jax.Array, jax.Array]:
    """Sample timesteps from ``timestep_probabilities``.

    Args:
        key: one key.
        batch_size: B.
        history: of T steps.
        uniform: see ``timestep_probabilities``.

    Returns:
        t, int32[B], and 1 / (T p_t), float32[B], by which losses are multiplied.
    """
    check_static("batch_size", batch_size, "since it is a shape")
    p = timestep_probabilities(history, uniform)
    t = jax.random.choice(one_key(key), p.shape[0], (batch_size,), p=p).astype(jnp.int32)
    return t, 1.0 / (p.shape[0] * p[t])


def record_losses(history: LossHistory, t: jax.Array, losses: jax.Array) -> LossHistory:
    """Return the history with a batch's losses in it, in the order of the batch; the oldest of a step go first.

    Args:
        history: of T steps.
        t: int32[B] in [0, T).
        losses: float[B], not weighted. None of them is recorded unless all are finite and all t in range.

    Raises:
        ValueError: if t and losses are not vectors of one length, or t is known and out of range.
    """
    if t.ndim != 1 or t.shape != losses.shape:
        raise ValueError(f"t and losses must be vectors of one length, got shapes {t.shape} and {losses.shape}")
    check_indices("t", t, history.losses.shape[0])
    t = jnp.asarray(t, jnp.int32)  # the number of steps need not fit into a smaller type
    length, order = history.losses.shape[1], jnp.arange(t.shape[0], dtype=jnp.int32)
    # Sorted by t, equal ones are neighbours, and how many stand before one is its distance from the first of them.
    by_step = jnp.argsort(t, stable=True)
    ordered = t[by_step]
    first, end = (jnp.searchsorted(ordered, ordered, side=side).astype(jnp.int32) for side in ("left", "right"))
    earlier = jnp.zeros_like(order).at[by_step].set(order - first)
    later = jnp.zeros_like(order).at[by_step].set(end - 1 - order)
    # Of more than K losses at one step the last K are stored: two writes to one place would have no order.
    row = jnp.where(later < length, t, history.losses.shape[0])
    place = (history.counts[t] + earlier) % length
    losses = jax.lax.stop_gradient(losses).astype(jnp.float32)
    written = LossHistory(
        history.losses.at[row, place].set(losses, mode="drop"), history.counts.at[t].add(1, mode="drop")
    )
    inside = (t >= 0) & (t < history.losses.shape[0])
    finite = jnp.all(jnp.isfinite(losses) & inside)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), written, history)
