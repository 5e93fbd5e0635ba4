"""The one loop that runs every sampler: a scan of a ``Step`` over a time grid, with a key for every example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_static
from ddpm_jax.diffusion.process import GaussianProcess, Prediction, predict
from ddpm_jax.diffusion.samplers.ancestral import ancestral_step
from ddpm_jax.diffusion.samplers.grid import Point, time_grid
from ddpm_jax.diffusion.samplers.noise import RecordedNoise, check_keys, per_example_normal, transition_keys
from ddpm_jax.types import Denoiser, PredictionType, Step, Variance


def sample(
    process: GaussianProcess,
    denoise: Denoiser,
    keys: jax.Array | RecordedNoise,
    shape: tuple[int, ...],
    *,
    step: Step | None = None,
    prediction: PredictionType = "eps",
    variance: Variance = "fixed_small",
    x0_transform: Callable[[jax.Array], jax.Array] | None = None,
    x_init: jax.Array | None = None,
    stop: int | None = None,
    trajectory: bool = False,
    progress: Callable[[int], None] | None = None,
    progress_every: int = 10,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Generate one sample for every key: start from noise and take T steps down the time grid, as one ``lax.scan``.

    Sample i is a function of keys[i] (and of whatever the denoiser makes of example i) only. Use it under ``jax.jit``
    with process, parameters and keys as arguments; outside, every call compiles again.

    Args:
        process: T steps, usually from ``respace`` or ``discretize``; T network calls with most steps, see
            docs/samplers.md.
        denoise: the network, parameters, conditions and guidance closed over; receives original timesteps
            int32[B], or times float32[B].
        keys: keys [B] of any generator, from ``example_keys``; or ``RecordedNoise``, to compare with another
            implementation.
        shape: of one example, e.g. (H, W, C) or (D,).
        step: ``ancestral_step()`` by default, ``ddim_step(eta)``, ...
        prediction: what the network predicts: "eps", "x0", "v", "score" or "mean".
        variance: "fixed_small", "fixed_large" or "learned_range".
        x0_transform: applied to every estimate of x0, e.g. ``guidance.static_threshold()``.
        x_init: float[B, *shape] to start from, instead of noise of standard deviation ``process.prior_std``. Needed
            where the process ends in the less noisy half of the steps of the one it was made from.
        stop: make this number of the T transitions alone, at least 1, and return x_t there.
        trajectory: also return the state after every step.
        progress: called with the number of steps made, after every ``progress_every`` of them and after the last; at
            the others the compiled program is not left. Not for use under ``vmap``.
        progress_every: >= 1.

    Returns:
        x0, float32[B, *shape], or x_t with ``stop``; with ``trajectory`` the pair of it and float32[T, B, *shape],
        whose last entry it is.

    Raises:
        ValueError: if keys or x_init do not fit, prediction, variance and the network's output contradict each other,
            the process ends too early to start from noise, or stop or progress_every are out of their range.
    """
    keys = check_keys(keys)
    count = process.num_steps if stop is None else stop
    _check_options(process, keys, shape, count, trajectory, progress_every)
    step = ancestral_step() if step is None else step
    dtype = process.betas.dtype
    if x_init is None:
        check_start(process)
        x_init = initial_noise(process, keys, shape)
    elif x_init.shape != (keys.shape[0], *shape):
        raise ValueError(f"x_init must have shape {(keys.shape[0], *shape)} (keys, *shape), got {x_init.shape}")

    def predict_fn(xt: jax.Array, point: Point) -> Prediction:
        output = denoise(xt, jnp.broadcast_to(point.t, xt.shape[:1]))
        index = jnp.broadcast_to(point.index, xt.shape[:1])
        at = (point.alpha, point.sigma)
        return predict(
            process, output, xt, index, prediction=prediction, variance=variance, x0_transform=x0_transform, at=at
        )

    def transition(state: tuple, inputs: tuple) -> tuple[tuple, jax.Array | None]:
        xt, carry = state
        number, here, there = inputs
        xt, carry = step.update(predict_fn, transition_keys(keys, number), xt, here, there, carry)
        if progress is not None:
            due = (number % progress_every == 0) | (number == count)
            jax.lax.cond(due, lambda: jax.debug.callback(_report(progress), number, ordered=False), lambda: None)
        return (xt, carry), xt if trajectory else None

    x_init = x_init.astype(dtype)
    grid = time_grid(process)
    here, there = jax.tree.map(lambda a: a[:count], grid), jax.tree.map(lambda a: a[1 : count + 1], grid)
    numbers = jnp.arange(1, count + 1)  # 0 is the initial noise
    (x0, _), states = jax.lax.scan(transition, (x_init, step.init(x_init)), (numbers, here, there))
    return (x0, states) if trajectory else x0


def _check_options(
    process: GaussianProcess,
    keys: jax.Array | RecordedNoise,
    shape: tuple[int, ...],
    stop: int,
    trajectory: bool,
    progress_every: int,
) -> None:
    if isinstance(keys, RecordedNoise) and keys.values.shape[1:2] != (process.num_steps + 1,):
        raise ValueError(
            f"recorded noise must have {process.num_steps + 1} entries along axis 1, the initial noise and one for "
            f"each of {process.num_steps} transitions, got shape {keys.values.shape}"
        )
    check_static("shape", shape, "since arrays are made of it")
    check_static("stop", stop, "since it is the length of the loop")
    if not 1 <= stop <= process.num_steps:
        raise ValueError(f"{stop=} must be a number of transitions in [1, {process.num_steps}]")
    check_static("trajectory", trajectory, "since it decides what is returned")
    check_static("progress_every", progress_every, "since it is compiled into the loop")
    if progress_every < 1:
        raise ValueError(f"{progress_every=} must be at least 1")


def initial_noise(process: GaussianProcess, keys: jax.Array | RecordedNoise, shape: tuple[int, ...]) -> jax.Array:
    """Return the noise that `sample` starts from, float32[B, *shape] of standard deviation ``process.prior_std``.

    Given as ``x_init`` it starts a process at any of its steps from noise, as published pipelines do.
    """
    keys = check_keys(keys)
    like = jnp.zeros((keys.shape[0], *shape), process.betas.dtype)
    return process.prior_std * per_example_normal(transition_keys(keys, 0), like)


def check_start(process: GaussianProcess) -> None:
    """Raise ValueError if sampling cannot start from pure noise: the process ends where x_t is mostly data."""
    if process.reach < 0.5:
        raise ValueError(
            f"sampling cannot start from pure noise: the process ends at {process.reach:.1%} of the steps of the one "
            'it was made from. A list given to respace is timesteps; section counts are a string like "10,15,20". '
            "To start there on purpose, give x_init, as sdedit does"
        )


def _report(progress: Callable[[int], None]) -> Callable[[jax.Array], None]:
    return lambda number: progress(int(number))
