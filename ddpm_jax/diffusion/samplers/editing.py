"""Image editing: SDEdit, RePaint and DDNM's projection for linear inverse problems."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_data, check_static
from ddpm_jax.diffusion.process import GaussianProcess, q_sample
from ddpm_jax.diffusion.samplers.ancestral import ancestral_step
from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.diffusion.samplers.loop import sample
from ddpm_jax.diffusion.samplers.noise import check_draws, check_keys, per_example_normal, transition_keys
from ddpm_jax.diffusion.schedules import left_steps_out
from ddpm_jax.types import Denoiser, PredictFn, Step


def truncate(process: GaussianProcess, num_steps: int) -> GaussianProcess:
    """Return the process that ends after its first (least noisy) ``num_steps`` steps.

    Raises:
        ValueError: if num_steps is outside [1, T].
    """
    check_static("num_steps", num_steps, "since it is a shape")
    if not 1 <= num_steps <= process.num_steps:
        raise ValueError(f"{num_steps=} must be in [1, {process.num_steps}]")
    shorter = jax.tree.map(lambda table: table[:num_steps] if table.ndim else table, process)
    whole = num_steps == process.num_steps
    left = left_steps_out(process.reach, process.ends, process.num_steps, range(num_steps))
    return shorter.replace(zero_terminal=process.zero_terminal and whole, **left)


def sdedit(
    process: GaussianProcess,
    denoise: Denoiser,
    keys: jax.Array,
    x0: jax.Array,
    *,
    strength: float = 0.5,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Noise an image partially and denoise it (Meng et al. 2022, "SDEdit", algorithm 1).

    Args:
        process: T steps, usually from ``respace``.
        denoise: as in ``sample``.
        keys: keys [B], or ``RecordedNoise`` for the steps that are taken.
        x0: float[B, ..., C], the guide.
        strength: fraction of the T steps that are taken, in (0, 1]; larger values preserve less of the guide.
        options: ``step``, ``prediction``, ``variance``, ``x0_transform``, ``trajectory`` as in ``sample``.

    Returns:
        As ``sample``.

    Raises:
        ValueError: if strength is outside (0, 1], and as ``sample``.
    """
    check_static("strength", strength, "since it decides how many steps are taken")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"{strength=} must be in (0, 1]")
    keys = check_keys(keys, x0.shape[0])
    shorter = truncate(process, max(1, round(strength * process.num_steps)))
    check_data(x0)
    x0 = x0.astype(process.betas.dtype)
    last = jnp.full(x0.shape[:1], shorter.num_steps - 1, jnp.int32)
    xt = q_sample(shorter, x0, last, per_example_normal(transition_keys(keys, 0), x0))
    return sample(shorter, denoise, keys, x0.shape[1:], x_init=xt, **options)


def repaint_step(x0: jax.Array, mask: jax.Array, *, step: Step | None = None, resample: int = 10) -> Step:
    """Return the step for inpainting (Lugmayr et al. 2022, "RePaint", algorithm 1, jumps of one step).

    Each transition is repeated ``resample`` times: ``step`` samples the unknown part, the known part is sampled from
    q(x_there | x0), and between repetitions x is noised back from there to here, which harmonises both parts.

    Args:
        x0: float[B, ..., C], the image; its values where the mask is 0 are not used.
        mask: bool or float, broadcastable to x0; 1 where the image is known.
        step: ``ancestral_step()`` by default; without carry.
        resample: U of the paper, >= 1. U network calls a step, one for the last.

    Returns:
        A Step.

    Raises:
        ValueError: if resample < 1 or the step carries history.
    """
    check_data(x0)
    check_static("resample", resample, "since it is compiled into the loop")
    if resample < 1:
        raise ValueError(f"{resample=} must be at least 1")
    step = ancestral_step() if step is None else step
    if step.init is not ancestral_step().init:
        raise ValueError("step must not carry history from transition to transition; use ancestral_step or ddim_step")

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        check_draws(keys, xt, 3 * resample - 1, f"repaint_step with {resample=}")
        weight = jnp.broadcast_to(jnp.asarray(mask, xt.dtype), xt.shape)
        known = jnp.where(weight > 0.0, x0.astype(xt.dtype), 0.0)

        def fill(x: jax.Array, number: jax.Array) -> jax.Array:
            of = lambda part: transition_keys(keys, 3 * number + part)  # noqa: E731
            sampled, _ = step.update(predict_fn, of(0), x, here, there, carry)
            noised = there.alpha * known + there.sigma * per_example_normal(of(1), x)
            return jnp.where(weight > 0.0, weight * noised + (1.0 - weight) * sampled, sampled)

        def again(number: jax.Array, x: jax.Array) -> jax.Array:
            back = per_example_normal(transition_keys(keys, 3 * number - 1), x)
            back = here.alpha / there.alpha * x + jnp.sqrt(here.beta) * back
            return fill(back, number)

        filled = fill(xt, 0)
        # The last transition has nothing to harmonise: one pass. The bounds of the loop are static for reverse mode.
        repeated = lambda: jax.lax.fori_loop(1, resample, again, filled)
        return jax.lax.cond(there.sigma > 0.0, repeated, lambda: filled), carry

    return Step(update)


def ddnm_projection(
    measure: Callable[[jax.Array], jax.Array], restore: Callable[[jax.Array], jax.Array], y: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """Return the ``x0_transform`` that projects every estimate of x0 onto {x0: A x0 = y}, for a linear measurement y.

    x0 <- x0 - A^+ (A x0 - y)     (Wang et al. 2023, "DDNM", eq. 13; score SDE, appendix I, projects x_t likewise)

    Args:
        measure: A, [B, ..., C] -> [B, ...].
        restore: its pseudo-inverse A^+, with A A^+ A = A.
        y: the measurement, float[B, ...].

    Returns:
        A function x0 -> x0, float[B, ..., C].
    """
    return lambda x0: x0 - restore(measure(x0) - y)


def colorization(y: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Return the ``x0_transform`` for colorization: the mean of the three channels is y, float[B, H, W, 1]."""
    return ddnm_projection(
        lambda x: x.mean(-1, keepdims=True), lambda grey: jnp.broadcast_to(grey, (*grey.shape[:-1], 3)), y
    )


def super_resolution(y: jax.Array, factor: int) -> Callable[[jax.Array], jax.Array]:
    """Return the ``x0_transform`` for super-resolution: averages of factor x factor pixels are y, float[B, h, w, C].

    Raises:
        ValueError: if factor is traced, and in use, if images are not ``factor`` times as large as y.
    """
    check_static("factor", factor, "since it is a shape")

    def measure(x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        if (height, width) != (y.shape[1] * factor, y.shape[2] * factor):
            raise ValueError(f"{factor=} must bring y {y.shape} to the size of the images, {height} x {width}")
        return x.reshape(b, height // factor, factor, width // factor, factor, c).mean((2, 4))

    def restore(small: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(small, factor, axis=1), factor, axis=2)

    return ddnm_projection(measure, restore, y)


# Earlier names.
measured = ddnm_projection
grey_of = colorization
average_of = super_resolution
