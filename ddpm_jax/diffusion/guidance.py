"""Guidance: dropout of conditions in training, and guided denoisers for sampling.

Denoiser in, denoiser out; thresholds are functions of x0 and go in as ``x0_transform`` (see ``process.predict``).
"""

import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_number, check_static, is_known, look_up
from ddpm_jax.diffusion.keys import one_key
from ddpm_jax.diffusion.process import GaussianProcess, to_x0_eps
from ddpm_jax.types import Denoiser, PredictionType


def keep_mask(key: jax.Array, rate: float, batch_size: int) -> jax.Array:
    """Sample which examples keep their condition in training (Ho & Salimans 2022, algorithm 1).

    Call it once per condition, each with its own key, so that drops are independent.

    Args:
        key: one key.
        rate: probability of dropping, in [0, 1]; 0 keeps and 1 drops every example.
        batch_size: B.

    Returns:
        bool[B], True with probability 1 - rate; the caller replaces the condition by its null where it is False.

    Raises:
        ValueError: if rate is outside [0, 1]. A traced rate below 0 keeps every example, one above 1 drops every one.
    """
    check_number("rate", rate, lambda v: (v >= 0) & (v <= 1), "must be in [0, 1]")
    check_static("batch_size", batch_size, "since it is a shape")
    return jax.random.uniform(one_key(key), (batch_size,), jnp.float32) >= rate


drop = keep_mask  # the earlier name


def classifier_free(
    cond: Denoiser | Sequence[Denoiser],
    null: Denoiser,
    scale: float | jax.Array | Sequence[float | jax.Array],
    *,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """Guide a denoiser by its own condition: null + scale * (cond - null) (Ho & Salimans 2022, eq. 6).

    The paper writes w = scale - 1. When the output has twice the channels of xt, only the first half, the prediction,
    is guided; the variance half is that of the (first) conditional network. Works for eps, x0 and v outputs alike.

    Several conditions, each with its scale: null + sum_i scale_i (cond_i - null) (Liu et al. 2022, "composable
    diffusion", eq. 11).

    Args:
        cond: the denoiser with its condition closed over, or several of them.
        null: the same network with the null condition closed over.
        scale: a float, or float[B], one for every example; for several conditions one of these for each. With the
            Python number 1 and one condition ``null`` is never called.
        interval: (first, last), inclusive: the timesteps to guide at; at others the result is the (first) conditional
            network's (Kynkaanniemi et al. 2024). It goes by t as the network receives it.
        rescale: phi in [0, 1] of Lin et al. 2024 (eqs. 15 and 16): the guided prediction is brought towards the
            standard deviation of the conditional one, over all axes of an example: phi guided * std(cond) / std(guided)
            + (1 - phi) guided. Against overexposed images at high scales. An example whose guided prediction is
            constant, to rounding, has no standard deviation to bring back and stays as it is.

    Returns:
        A denoiser, float32.

    Raises:
        ValueError: if there is not one scale for each condition, one is not finite, no null, or rescale is outside
            [0, 1]; and when called, if the outputs differ in shape or do not fit xt, or a scale is neither scalar nor
            [B]. scale, interval and rescale may be traced; a traced rescale outside [0, 1] gives NaN.
    """
    several = not callable(cond)
    conds, scales = (tuple(cond), tuple(scale)) if several else ((cond,), (scale,))
    if len(conds) != len(scales) or not conds:
        raise ValueError(f"there must be a scale for each condition, got {len(scales)} for {len(conds)}")
    for each in scales:
        _check_scale(each)
    rescale = check_number("rescale", rescale, lambda v: (v >= 0) & (v <= 1), "must be in [0, 1]")
    if interval is not None and is_known(interval):
        interval = tuple(np.asarray(bound).item() for bound in interval)
    if interval is not None and is_known(interval) and not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"{interval=} must be two timesteps, the first not above the last")
    if len(conds) == 1 and isinstance(scales[0], numbers.Real) and scales[0] == 1:
        return conds[0]
    if not callable(null):
        raise ValueError(f"null must be the network with its null condition, got {null!r}; only scale 1 needs none")

    def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
        outputs, without = [each(xt, t) for each in conds], null(xt, t)
        channels = xt.shape[-1]
        for output in outputs:
            fits = output.shape[:-1] == xt.shape[:-1] and output.shape[-1] in (channels, 2 * channels)
            if output.shape != without.shape or not fits:
                raise ValueError(
                    f"cond and null must return the shape of xt {xt.shape}, or twice its channels, both the same, "
                    f"got {output.shape} and {without.shape}"
                )
        dtype = jnp.promote_types(outputs[0].dtype, jnp.float32)
        outputs, base = [output.astype(dtype) for output in outputs], without.astype(dtype)[..., :channels]
        first = outputs[0][..., :channels]
        guided = base
        for output, its_scale in zip(outputs, scales, strict=True):
            guided = guided + _per_example(its_scale, xt).astype(dtype) * (output[..., :channels] - base)
        if not is_known(rescale) or rescale:
            guided = rescale * guided * _spread_ratio(first, guided) + (1.0 - rescale) * guided
        if interval is not None:
            inside = (t >= interval[0]) & (t <= interval[1])
            guided = jnp.where(inside.reshape(inside.shape + (1,) * (xt.ndim - 1)), guided, first)
        return jnp.concatenate([guided, outputs[0][..., channels:]], axis=-1)

    return denoise


def classifier_guided(
    process: GaussianProcess,
    denoise: Denoiser,
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    scale: float | jax.Array,
    *,
    prediction: PredictionType = "eps",
) -> Denoiser:
    """Guide a denoiser by the gradient of a classifier, for DDIM and ODE solvers (Dhariwal & Nichol 2021, algorithm 2).

        eps_guided = eps - sigma_t scale grad_xt log p(y | xt)

    and the same shift for the other prediction types: x0 + sigma_t^2 / alpha_t scale grad, v - sigma_t / alpha_t scale
    grad, and none of these where alpha_t = 0. A variance half passes through. For ancestral sampling, whose mean
    the paper shifts by the variance times the gradient (algorithm 1), see ``ancestral_step(guide=...)``.

    A sampler's ``x0_transform`` acts on the guided x0. The published code clips x0 before it is shifted, and not after:
    give this the clipped x0 as ``denoise``, with prediction="x0".

    Args:
        process: the one that the network was trained with or the respaced one that is sampled, which read the same:
            alpha and sigma are looked up by original timestep.
        denoise: the network.
        log_prob: (xt, t) -> float[B], log p(y | xt) of each example, e.g. a noised classifier's log-softmax at y. CLIP
            guidance (GLIDE, section 2.4) is this with the dot product of noised image and text embeddings.
        scale: a float, or float[B].
        prediction: what the network predicts.

    Returns:
        A denoiser, float32.

    Raises:
        ValueError: for an unknown prediction type; when called, if log_prob does not return one number an example, or t
            is not an integer timestep of the process. For a traced t out of range the output is NaN.
    """
    _check_shiftable(prediction)
    _check_scale(scale)

    def guided(xt: jax.Array, t: jax.Array) -> jax.Array:
        output = denoise(xt, t)
        output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
        push = _per_example(scale, xt) * log_prob_gradient(log_prob, xt, t)
        alpha, sigma = _levels(process, xt, t)
        # Pure noise, alpha = 0, says nothing about y: x0 and v are not shifted there.
        per_alpha = jnp.where(alpha > 0.0, sigma / jnp.where(alpha > 0.0, alpha, 1.0), 0.0)
        per_alpha = jnp.where(jnp.isnan(alpha), alpha, per_alpha)
        shift = {"eps": -sigma, "x0": sigma * per_alpha, "v": -per_alpha, "score": 1.0}[prediction] * push
        channels = xt.shape[-1]
        return jnp.concatenate([output[..., :channels] + shift, output[..., channels:]], axis=-1)

    return guided


def implicit_gradient(
    process: GaussianProcess,
    cond: Denoiser,
    null: Denoiser,
    scale: float | jax.Array = 1.0,
    *,
    prediction: PredictionType = "eps",
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the gradient of the classifier that a network and its null condition make (Ho & Salimans 2022, section 3).

        grad_xt log p(c | xt) = grad_xt log p(xt | c) - grad_xt log p(xt) = (eps_null - eps_cond) / sigma_t

    As the guide of ``ancestral_step`` it is weighted by the variance of the step, which the network has learned for
    every channel of every pixel if variance="learned_range". ``classifier_free`` with scale + 1 moves all of them by
    beta_t / sqrt(1 - beta_t) instead: the same in the limit of many steps, more with few. The learned variance differs
    from beta_t most in the last steps into the data, and in short chains.

        sample(short, cond, keys, shape, step=ancestral_step(implicit_gradient(process, cond, null, 2.0)),
               variance="learned_range")

    Args:
        process: the one that the network was trained with or the respaced one that is sampled, as for
            ``classifier_guided``.
        cond: the denoiser with its condition closed over; a variance half is not read.
        null: the same network with the null condition closed over.
        scale: of the gradient; a float, or float[B].
        prediction: what the networks predict: "eps", "x0", "v" or "score".

    Returns:
        (xt, t) -> float32[B, ...], for integer t.

    Raises:
        ValueError: for an unknown prediction type; when called, if t is not an integer timestep of the process. For
            a traced t out of range the gradient is NaN.
    """
    _check_shiftable(prediction)
    _check_scale(scale)

    def gradient(xt: jax.Array, t: jax.Array) -> jax.Array:
        alpha, sigma = _levels(process, xt, t)

        def eps(denoise: Denoiser) -> jax.Array:
            output = denoise(xt, t)[..., : xt.shape[-1]]
            output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
            return to_x0_eps(output, xt, alpha, sigma, prediction)[1]

        return _per_example(scale, xt) * (eps(null) - eps(cond)) / sigma

    return gradient


def log_prob_gradient(log_prob: Callable[[jax.Array, jax.Array], jax.Array], xt: jax.Array, t: jax.Array) -> jax.Array:
    """Return the gradient of each example's log probability with respect to its own xt.

    Args:
        log_prob: (xt, t) -> float[B], each entry a function of its own example alone.
        xt: float[B, ...].
        t: int32[B].

    Raises:
        ValueError: if log_prob does not return one number an example.
    """

    def total(xt: jax.Array) -> jax.Array:
        values = log_prob(xt, t)
        if values.shape != xt.shape[:1]:
            raise ValueError(f"log_prob must return one number an example, {xt.shape[:1]}, got shape {values.shape}")
        return values.sum()

    return jax.grad(total)(xt)


def static_threshold(bound: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """Return the ``x0_transform`` that clips x0 to [-bound, bound] (DDPM's code; Imagen section 2.3).

    Raises:
        ValueError: if bound is not positive. A traced bound that is not gives NaN.
    """
    bound = check_number("bound", bound, lambda v: v > 0, "must be positive")
    return lambda x0: jnp.clip(x0, -bound, bound)


def dynamic_threshold(quantile: float = 0.995, bound: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """Return the ``x0_transform`` of Imagen (section 2.3): clip x0 to [-s, s] and divide by s / bound.

    s is the quantile of |x0| over an example, or ``bound`` where that is larger, so that nothing is ever scaled up.

    Args:
        quantile: in (0, 1]; 0.995 in the paper.
        bound: of the data, > 0.

    Raises:
        ValueError: if an argument is out of its range. A traced one that is gives NaN.
    """
    quantile = check_number("quantile", quantile, lambda v: (v > 0) & (v <= 1), "must be in (0, 1]")
    bound = check_number("bound", bound, lambda v: v > 0, "must be positive")

    def transform(x0: jax.Array) -> jax.Array:
        size = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), quantile, axis=1)
        size = jnp.maximum(size, bound).reshape((-1,) + (1,) * (x0.ndim - 1))
        return jnp.clip(x0, -size, size) * (bound / size)

    return transform


def _check_shiftable(prediction: str) -> None:
    if prediction not in (options := ("eps", "x0", "v", "score")):
        raise ValueError(f"{prediction=} must be one of {options}")


def _levels(process: GaussianProcess, xt: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return alpha and sigma at the original timesteps t, broadcastable to xt; NaN where the process has none of t."""
    if not jnp.issubdtype(t.dtype, jnp.integer) or not jnp.issubdtype(process.timestep_map.dtype, jnp.integer):
        raise ValueError("this guidance reads alpha and sigma at integer timesteps, but the process has times")
    order = jnp.argsort(process.timestep_map)
    place = jnp.searchsorted(process.timestep_map[order], t)
    place = order[jnp.minimum(place, process.num_steps - 1)]
    found = process.timestep_map[place] == t
    if is_known(found) and not bool(found.all()):
        missing = np.unique(np.asarray(t)[~np.asarray(found)])
        raise ValueError(f"t must be timesteps of the process that guidance was given, which does not have {missing}")
    index = jnp.where(found, place, process.num_steps)
    wide = lambda table: look_up(table, index).reshape(t.shape + (1,) * (xt.ndim - 1))  # noqa: E731
    return wide(process.alpha), wide(process.sigma)


def _check_scale(scale: float | jax.Array) -> None:
    if is_known(scale) and not np.all(np.isfinite(np.asarray(scale, np.float64))):
        raise ValueError(f"{scale=} must be finite")


def _spread_ratio(first: jax.Array, guided: jax.Array) -> jax.Array:
    """Return std(first) / std(guided) of each example, [B, 1, ...]; 1 where guided is constant to rounding."""
    axes = tuple(range(1, guided.ndim))

    def spread(x: jax.Array) -> jax.Array:
        variance = x.var(axes, keepdims=True)
        positive = variance > 0.0  # the root has no gradient at 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)

    own = spread(guided)
    rounding = 8.0 * jnp.finfo(guided.dtype).eps * jnp.max(jnp.abs(guided), axes, keepdims=True)
    constant = own <= rounding
    return jnp.where(constant, 1.0, spread(first) / jnp.where(constant, 1.0, own))


def _per_example(scale: float | jax.Array, xt: jax.Array) -> jax.Array:
    scale = jnp.asarray(scale).astype(jnp.promote_types(xt.dtype, jnp.float32))
    if scale.ndim == 0:
        return scale
    if scale.shape != xt.shape[:1]:
        raise ValueError(f"scale must be a number or one for each of {xt.shape[0]} examples, got shape {scale.shape}")
    return scale.reshape(scale.shape + (1,) * (xt.ndim - 1))
