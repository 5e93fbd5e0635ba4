"""AdamW, or Muon for the matrices beside it, with warm-up, decay, weight decay and gradient clipping."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddpm_jax.extras import needs_extra
from ddpm_jax.training.muon import is_muon_weight, scale_by_muon
from ddpm_jax.training.stage import Training

with needs_extra("train"):
    import optax

Decay = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw", "muon"]
_OPTIONS = ("learning_rate", "warmup_steps", "decay", "final_fraction", "b1", "b2", "eps", "weight_decay")
_OPTIONS += ("clip_norm", "optimizer", "muon_learning_rate")


def make_schedule(
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    decay: Decay = "cosine",
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Make a learning rate that rises linearly and then decays.

    With n the updates already made, W the warm-up and N the total, r = clip((n - W) / (N - W), 0, 1):

      lr(n) = learning_rate * min(1, (n + 1) / W) * (f + (1 - f) g(r)),
      g(r) = (1 + cos(pi r)) / 2 (cosine; SGDR, arXiv:1608.03983, eq. 5) or 1 - r (linear),

    where f is the final fraction; with "constant" the second factor is 1.

    Args:
      learning_rate: the peak, > 0.
      warmup_steps: W in [0, N]; the first update already uses learning_rate / W, not 0.
      total_steps: N >= 1.
      decay: the shape after the warm-up.
      final_fraction: f in [0, 1]; ignored when `decay` is "constant".

    Returns:
      A function int32[] -> float32[].

    Raises:
      ValueError: for an argument out of its range.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"{learning_rate=} must be a positive number")
    if total_steps < 1:
        raise ValueError(f"{total_steps=} must be at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"{warmup_steps=} must be between 0 and {total_steps=}")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"{final_fraction=} must be between 0 and 1")
    if decay not in ("cosine", "linear", "constant"):
        raise ValueError(f'{decay=} must be one of "cosine", "linear", "constant"')

    def schedule(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warmup = jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))
        r = jnp.clip((count - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        if decay == "constant":
            return learning_rate * warmup
        g = (1 + jnp.cos(jnp.pi * r)) / 2 if decay == "cosine" else 1 - r
        return learning_rate * warmup * (final_fraction + (1 - final_fraction) * g)

    return schedule


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    decay: Decay = "cosine",
    final_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    optimizer: Optimizer = "adamw",
    muon_learning_rate: float | None = None,
    mesh: Mesh | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Make AdamW (arXiv:1711.05101, algorithm 2) behind a clip of the gradients' global norm.

    With "muon" the hidden matrices (`is_muon_weight`) are trained by Muon instead, behind the same clip, with the same
    weight decay and a schedule of the same shape and another peak.

    Weight decay acts on matrices and kernels alone: not on arrays with fewer than two axes, nor on those named "bias"
    or "scale" (attention biases have two axes).

    Args:
      learning_rate, warmup_steps, total_steps, decay, final_fraction: as in `make_schedule`.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0.
      weight_decay: >= 0, multiplied by the learning rate of the step.
      clip_norm: the largest global norm of the gradients, > 0; None leaves them alone.
      optimizer: "adamw" for everything, or "muon" for the hidden matrices and AdamW for the rest.
      muon_learning_rate: the peak for the matrices, > 0; needed with "muon", not used with "adamw".
      mesh: devices that share Muon's work (`scale_by_muon`).

    Returns:
      (optimizer, schedule): the schedule is given beside the optimizer so that the learning rate can be logged; it is
      AdamW's.

    Raises:
      ValueError: for an argument out of its range.
    """
    shape: dict[str, Any] = {
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
        "decay": decay,
        "final_fraction": final_fraction,
    }
    schedule = make_schedule(learning_rate=learning_rate, **shape)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"{b1=} and {b2=} must be in [0, 1)")
    if not eps > 0:
        raise ValueError(f"{eps=} must be positive")
    if not weight_decay >= 0:
        raise ValueError(f"{weight_decay=} must be 0 or more")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"{clip_norm=} must be positive, or None for no clipping")
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f'{optimizer=} must be one of "adamw", "muon"')
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    adam = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    if optimizer == "adamw":
        return optax.chain(clip, adam), schedule
    if muon_learning_rate is None or not (muon_learning_rate > 0 and math.isfinite(muon_learning_rate)):
        raise ValueError(f'{muon_learning_rate=} must be a positive number with optimizer="muon"')
    muon = optax.chain(
        scale_by_muon(mesh=mesh),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(make_schedule(learning_rate=muon_learning_rate, **shape)),
    )
    return optax.chain(clip, optax.multi_transform({"muon": muon, "adamw": adam}, assigned)), schedule


def assigned(params: Any) -> Any:
    """Return a tree of the structure of `params` that names each leaf's optimizer, "muon" or "adamw"."""
    name = lambda path, leaf: "muon" if is_muon_weight(path, leaf) else "adamw"
    return jax.tree_util.tree_map_with_path(name, params)


def decayed(params: Any) -> Any:
    """Return a tree of bools of the structure of `params`: True where weight decay applies."""

    def is_decayed(path: tuple, leaf: jax.Array) -> bool:
        name = str(getattr(path[-1], "key", "")).partition("_")[0] if path else ""
        return leaf.ndim >= 2 and name not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def training_optimizer(
    training: Training, mesh: Mesh | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Make the optimizer and the schedule of a stage, see `make_optimizer`."""
    options = {name: getattr(training, name) for name in _OPTIONS}
    return make_optimizer(total_steps=training.num_steps, mesh=mesh, **options)
