"""Per-example training losses; nothing here averages over the batch.

The variational bound of a diffusion model (DDPM eq. 5, in nats; this module reports bits per dimension) is a sum over
steps:

    L_vlb = L_T + sum_{t = 1 .. T-1} KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) - log p(x0 | x_0)

where, with t = 0 the least noisy step, the last term is the likelihood of 8-bit data under a Gaussian integrated over
the 256 bins (DDPM eq. 13). L_T has no parameters. One uniformly sampled step, times T, estimates the sum without bias.

    simple:  || target - output ||^2                      (DDPM eq. 14)
    vlb:     T * L_t                                      (Improved DDPM eq. 4)
    hybrid:  simple + vlb_weight * T * L_t                (Improved DDPM eq. 16), L_t with the mean held constant

With vlb_weight = 0.001 the hybrid is that of the paper and that of the published code with rescaled learned sigmas,
which multiplies L_t by T / 1000. The code without the rescaling weights L_t by 1: vlb_weight = 1 / T.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from ddpm_jax.checks import check_data, check_number, check_static, is_known, look_up
from ddpm_jax.diffusion.continuous import Schedule
from ddpm_jax.diffusion.keys import one_key
from ddpm_jax.diffusion.process import (
    GaussianProcess,
    Prediction,
    predict,
    q_posterior,
    q_sample,
    split_output,
    target,
    to_x0_eps,
)
from ddpm_jax.types import Denoiser, PredictionType, Variance

Objective = Literal["simple", "hybrid", "vlb"]
OBJECTIVES = ("simple", "hybrid", "vlb")
WEIGHTED_PREDICTIONS = ("eps", "x0", "v")
Weighting = Callable[[jax.Array], jax.Array]


def denoising_loss(
    process: GaussianProcess,
    denoise: Denoiser,
    key: jax.Array,
    x0: jax.Array,
    *,
    prediction: PredictionType = "eps",
    objective: Objective = "simple",
    variance: Variance = "fixed_small",
    weighting: Weighting | None = None,
    vlb_weight: float = 1e-3,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of every example at one timestep each; the objectives are in the module docstring.

    Args:
        process: T steps; ``denoise`` receives ``process.timestep_map[t]``.
        denoise: the network, parameters and conditions closed over.
        key: one key, for t and noise.
        x0: float[B, ..., C], clean data; in [-1, 1] where L_0 is to mean bits of 8-bit data.
        prediction: what the network predicts: "eps", "x0", "v", "score" or "mean".
        objective: "simple", "hybrid" or "vlb".
        variance: "fixed_small", "fixed_large" or "learned_range"; "hybrid" needs the last, "simple" excludes it, since
            it would leave the variance half untrained.
        weighting: log_snr float32[B] -> weight float32[B] of the squared error, e.g. ``min_snr(5.0, prediction)``.
        vlb_weight: lambda of the hybrid objective.
        t: int32[B] in [0, T), instead of uniform samples.
        noise: float[B, ..., C], instead of standard normal samples.

    Returns:
        loss, float32[B], and aux, each float32[B]: "mse", the unweighted squared error, mean over dimensions; and for
        "hybrid" and "vlb", "vlb", the term L_t in bits per dimension (not multiplied by T).

    Raises:
        ValueError: if an option is unknown, options contradict each other, shapes do not fit, or a network that is to
            predict eps could not be sampled from, since the process ends in pure noise. Traced t out of range give NaN.
    """
    check_objective(objective, variance, weighting)
    if prediction in ("eps", "score") and process.zero_terminal:
        raise ValueError(f"{prediction=} could not be sampled from pure noise, where alpha_bar is 0; use 'v' or 'x0'")
    check_data(x0)
    x0 = x0.astype(process.betas.dtype)
    t_key, noise_key = jax.random.split(one_key(key))
    if t is None:
        t = jax.random.randint(t_key, x0.shape[:1], 0, process.num_steps, jnp.int32)
    if noise is None:
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    noise = jnp.asarray(noise, x0.dtype)
    xt = q_sample(process, x0, t, noise)
    output = denoise(xt, look_up(process.timestep_map, t)).astype(x0.dtype)
    mean_output, range_output = split_output(output, xt, variance)
    mse = _mean_per_example((target(process, x0, noise, t, prediction=prediction) - mean_output) ** 2)
    aux = {"mse": mse}
    if objective == "simple":
        return _weighted(process, mse, t, weighting), aux
    if objective == "hybrid":
        # The squared error alone trains the mean; the bound would drown it in noise (Improved DDPM, section 3.1).
        output = jnp.concatenate([jax.lax.stop_gradient(mean_output), range_output], axis=-1)
    aux["vlb"] = vlb_terms(
        process, predict(process, output, xt, t, prediction=prediction, variance=variance), x0, xt, t
    )
    vlb = process.num_steps * aux["vlb"]
    if objective == "vlb":
        return vlb, aux
    return _weighted(process, mse, t, weighting) + vlb_weight * vlb, aux


def continuous_loss(
    schedule: Schedule,
    denoise: Denoiser,
    key: jax.Array,
    x0: jax.Array,
    *,
    prediction: PredictionType = "eps",
    objective: Literal["simple", "likelihood"] = "simple",
    weighting: Weighting | None = None,
    t: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of every example at one time each, in continuous time.

        simple:      w(log_snr) || target - output ||^2, mean over dimensions
        likelihood:  (t_max - t_min) (-d log_snr / dt) || eps - eps_hat ||^2 / 2, in bits per dimension: without bias,
                     for uniform t, the variational bound's integral over time (VDM, eq. 17), which is score matching
                     weighted by g^2 (Song et al. 2021b, "likelihood weighting", eq. 8)

    Args:
        schedule: from ``continuous``; its functions may be traced, so that a learned schedule gets gradients.
        denoise: the network, parameters and conditions closed over; receives t itself, float32[B].
        key: one key, for t and noise.
        x0: float[B, ..., C], clean data.
        prediction: what the network predicts: "eps", "x0", "v" or "score".
        objective: "simple" or "likelihood".
        weighting: log_snr float32[B] -> weight float32[B], with "simple".
        t: float32[B] in [t_min, t_max], instead of uniform samples, e.g. ``stratified_times`` or ``log_normal_times``.
        noise: float[B, ..., C], instead of standard normal samples.

    Returns:
        loss, float32[B], and aux: "mse", the unweighted squared error of the output, float32[B].

    Raises:
        ValueError: if an option is unknown, options contradict each other, or x0 is not a batch of floats.
    """
    schedule.check_prediction(prediction)
    if objective not in ("simple", "likelihood") or (objective == "likelihood" and weighting is not None):
        raise ValueError(f"{objective=} must be 'simple', or 'likelihood' without a weighting, which it has")
    check_data(x0)
    x0 = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
    t_key, noise_key = jax.random.split(one_key(key))
    if t is None:
        t = jax.random.uniform(t_key, x0.shape[:1], x0.dtype, schedule.t_min, schedule.t_max)
    if noise is None:
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    noise = jnp.asarray(noise, x0.dtype)
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must be one time for each of {x0.shape[0]} examples, got shape {t.shape}")
    wide = lambda values: values.reshape(values.shape + (1,) * (x0.ndim - 1))  # noqa: E731
    alpha, sigma = wide(schedule.alpha(t)), wide(schedule.sigma(t))
    xt = alpha * x0 + sigma * noise
    output = denoise(xt, t).astype(x0.dtype)
    if output.shape != x0.shape:
        raise ValueError(f"the network must return the shape of x0 {x0.shape}, got {output.shape}")
    goal = {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0, "score": -noise / sigma}[prediction]
    mse = _mean_per_example((goal - output) ** 2)
    if objective == "simple":
        return mse if weighting is None else weighting(schedule.log_snr(t)) * mse, {"mse": mse}
    _, eps = to_x0_eps(output, xt, alpha, sigma, prediction)
    rate = schedule.diffusion_squared(t) / jnp.square(schedule.sigma(t))  # -d log_snr / dt
    nats = 0.5 * rate * _mean_per_example((noise - eps) ** 2)
    return (schedule.t_max - schedule.t_min) * nats / math.log(2.0), {"mse": mse}


def stratified_times(key: jax.Array, batch_size: int, schedule: Schedule) -> jax.Array:
    """Sample times that are uniform each and evenly spread over the batch, as ``stratified_timesteps``; float32[B]."""
    return schedule.t_min + (schedule.t_max - schedule.t_min) * _stratified(key, batch_size)


def log_normal_times(key: jax.Array, batch_size: int, mean: float = -1.2, std: float = 1.2) -> jax.Array:
    """Sample EDM's training noise levels, log sigma ~ N(mean, std^2) (table 1), for ``continuous.edm``; float32[B]."""
    check_static("batch_size", batch_size, "since it is a shape")
    return jnp.exp(mean + std * jax.random.normal(one_key(key), (batch_size,), jnp.float32))


def stratified_timesteps(key: jax.Array, batch_size: int, num_steps: int) -> jax.Array:
    """Sample timesteps that are uniform each and evenly spread over the batch (Kingma et al. 2021, VDM, appendix I.1).

    t_i = floor(T ((u + i / B) mod 1)) with one u for the batch: the loss varies less than with independent samples.

    Args:
        key: one key.
        batch_size: B.
        num_steps: T.

    Returns:
        int32[B] in [0, T), in an order that has nothing to do with the examples' if those are shuffled.
    """
    return jnp.minimum(_stratified(key, batch_size) * num_steps, num_steps - 1).astype(jnp.int32)


def vlb_terms(
    process: GaussianProcess, prediction: Prediction, x0: jax.Array, xt: jax.Array, t: jax.Array
) -> jax.Array:
    """Return the term of the variational bound at each example's timestep, in bits per dimension.

    L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x0 | x_0) at t = 0 (DDPM eqs. 5 and 13).

    Args:
        process: T steps.
        prediction: the model's reverse step, from ``process.predict`` at the same xt and t.
        x0: float[B, ...] in [-1, 1].
        xt: float[B, ...].
        t: int32[B] in [0, T).

    Returns:
        float32[B], mean over dimensions.

    Raises:
        ValueError: if the shapes do not fit.
    """
    mean, _, log_variance = q_posterior(process, x0, xt, t)
    kl = normal_kl(mean, log_variance, prediction.mean, prediction.log_variance)
    nll = -discretized_log_likelihood(x0, prediction.mean, 0.5 * prediction.log_variance)
    return jnp.where(t == 0, _mean_per_example(nll), _mean_per_example(kl)) / math.log(2.0)


def normal_kl(mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array) -> jax.Array:
    """Return KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise.

    (exp(d) - 1 - d + (mean1 - mean2)^2 / exp(log_variance2)) / 2 with d = log_variance1 - log_variance2; all arguments
    have one shape.
    """
    difference = log_variance1 - log_variance2
    # exp(d) - 1 - d near d = 0 would cancel; expm1 keeps it.
    return 0.5 * (jnp.expm1(difference) - difference + (mean1 - mean2) ** 2 * jnp.exp(-log_variance2))


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Return the log probability of 8-bit data under a Gaussian integrated over its bin, in nats (DDPM eq. 13).

    x in {-1, -1 + 2/255, ..., 1}; the bin of x is x +- 1/255, the outermost two reach to infinity. Computed from
    log-CDFs, so that it is finite and has a gradient at any distance from the mean.

    Args:
        x: float[...] in [-1, 1].
        mean: float[...].
        log_scale: float[...], log of the standard deviation.

    Returns:
        float[...], <= 0.
    """
    inverse_scale = jnp.exp(-log_scale)
    centred = x - mean
    # By symmetry the bin is mirrored to the lower tail, where log-CDFs lose nothing.
    upper = (1.0 / 255.0 - jnp.abs(centred)) * inverse_scale
    lower = (-1.0 / 255.0 - jnp.abs(centred)) * inverse_scale
    log_upper, log_lower = log_ndtr(upper), log_ndtr(lower)
    tiny = jnp.finfo(log_upper.dtype).eps
    inside = log_upper + jnp.log(-jnp.expm1(jnp.minimum(log_lower - log_upper, -tiny)))
    below = log_ndtr((centred + 1.0 / 255.0) * inverse_scale)
    above = log_ndtr((1.0 / 255.0 - centred) * inverse_scale)
    return jnp.where(x < -0.999, below, jnp.where(x > 0.999, above, inside))


def min_snr(gamma: float, prediction: PredictionType) -> Weighting:
    """Return min-SNR-gamma weights of the squared error (Hang et al. 2023, section 3.4).

    min(snr, gamma) for x0, min(snr, gamma) / snr for eps, min(snr, gamma) / (snr + 1) for v: the same weight on x0.

    Args:
        gamma: where the weight stops growing, > 0; 5 in the paper.
        prediction: "eps", "x0" or "v".

    Returns:
        log_snr float32[B] -> weight float32[B].

    Raises:
        ValueError: if gamma <= 0 or prediction is unknown. A traced gamma <= 0 gives NaN.
    """
    gamma = check_number("gamma", gamma, lambda v: v > 0, "must be positive")
    return snr_power(1.0, gamma, prediction)


def snr_power(power: float, bound: float, prediction: PredictionType) -> Weighting:
    """Return weights that amount to min(snr^power, bound) on the squared error of x0, whatever the network predicts.

    power = 1 is min-SNR, 0 with bound 1 the plain error of x0. In between, steps at which x0 is half hidden count more
    than with either: where noise is low x0 is almost known, and where it is high it cannot be inferred.

    Args:
        power: in [0, 1].
        bound: where the weight stops growing, > 0.
        prediction: "eps", "x0" or "v".

    Returns:
        log_snr float32[B] -> weight float32[B].

    Raises:
        ValueError: if an argument is out of its range. A traced one that is gives NaN.
    """
    power = check_number("power", power, lambda v: (v >= 0) & (v <= 1), "must be in [0, 1]")
    log_bound = _log(check_number("bound", bound, lambda v: (v > 0) | (v != v), "must be positive"))
    return _weighting(lambda log_snr: jnp.minimum(power * log_snr, log_bound), prediction)


def p2(gamma: float, k: float = 1.0, *, prediction: PredictionType) -> Weighting:
    """Return the perception-prioritised weights of Choi et al. 2022 (eq. 8): 1 / (k + snr)^gamma on the error of eps.

    For another prediction type the weight is what amounts to that on eps: times snr for x0, times snr / (snr + 1)
    for v. gamma = 0 is the plain error of eps.

    Args:
        gamma: >= 0; 0.5 or 1 in the paper.
        k: > 0; 1 in the paper.
        prediction: "eps", "x0" or "v".

    Returns:
        log_snr float32[B] -> weight float32[B].

    Raises:
        ValueError: if an argument is out of its range. A traced one that is gives NaN.
    """
    gamma = check_number("gamma", gamma, lambda v: v >= 0, "must not be negative")
    log_k = _log(check_number("k", k, lambda v: v > 0, "must be positive"))
    return _weighting(lambda log_snr: log_snr - gamma * jnp.logaddexp(log_k, log_snr), prediction)


def edm_weighting(sigma_data: float = 0.5, *, prediction: PredictionType = "x0") -> Weighting:
    """Return EDM's weights (table 1): (sigma^2 + d^2) / (sigma d)^2 = snr + 1 / d^2 on the squared error of x0.

    For another prediction type the weight is what amounts to that on x0. Arguments: sigma_data > 0, the standard
    deviation d of the data; prediction "eps", "x0" or "v".

    Raises:
        ValueError: if an argument is out of its range. A traced one that is gives NaN.
    """
    log_sigma = _log(check_number("sigma_data", sigma_data, lambda v: v > 0, "must be positive"))
    return _weighting(lambda log_snr: jnp.logaddexp(log_snr, -2.0 * log_sigma), prediction)


def inverse_snr(log_snr: jax.Array) -> jax.Array:
    """Return 1 / SNR, a weight that makes of the squared error of a score that of the noise, where alpha is 1.

    It is lambda = sigma^2 of Song et al. (2021), eq. 7, for the VE-SDE. float32[B] -> float32[B].
    """
    return jnp.exp(-log_snr)


def vp_variance(log_snr: jax.Array) -> jax.Array:
    """Return sigma^2 where alpha^2 + sigma^2 = 1: `inverse_snr` for the VP-SDE. float32[B] -> float32[B]."""
    return jax.nn.sigmoid(-log_snr)


def sub_vp_variance(log_snr: jax.Array) -> jax.Array:
    """Return sigma^2 of the sub-VP-SDE, alpha^2 + sigma = 1: `inverse_snr` for it. float32[B] -> float32[B]."""
    return jnp.square(2.0 / (1.0 + jnp.sqrt(1.0 + 4.0 * jnp.exp(log_snr))))


def contrastive_loss(
    z_image: jax.Array, z_text: jax.Array, log_scale: jax.Array, *, chunk_size: int | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return CLIP's symmetric contrastive loss of every pair (Radford et al. 2021, figure 3).

    With logits_ij = exp(log_scale) <z_image_i, z_text_j>: the mean of -log softmax_j(logits)_ii and
    -log softmax_i(logits)_ii.

    Args:
        z_image: float[B, D], l2-normalised by the caller; row i belongs to row i of z_text.
        z_text: float[B, D], l2-normalised by the caller.
        log_scale: float[], log of the inverse temperature, clamped by the caller.
        chunk_size: rows of the logits that are computed at a time, and again for the gradient, so that the matrix
            [B, B] never exists; it divides B. None computes it at once. If the batch is split over n devices, each
            computes chunk_size / n of the rows.

    Returns:
        loss, float32[B], and aux, each float32[B]: "image_to_text" and "text_to_image", 1 where the right partner has
        the largest logit.

    Raises:
        ValueError: if the embeddings are not two matrices of one shape, or chunk_size does not divide B.
    """
    if z_image.ndim != 2 or z_image.shape != z_text.shape:
        raise ValueError(f"z_image and z_text must be [B, D] of one shape, got {z_image.shape} and {z_text.shape}")
    dtype = jnp.promote_types(z_image.dtype, jnp.float32)
    z_image, z_text, scale = z_image.astype(dtype), z_text.astype(dtype), jnp.exp(log_scale).astype(dtype)
    if chunk_size is not None:
        check_static("chunk_size", chunk_size, "since it is a shape")
        if chunk_size < 1 or z_image.shape[0] % chunk_size:
            raise ValueError(f"{chunk_size=} must be at least 1 and divide the batch of {z_image.shape[0]}")
        return _contrastive_loss_in_chunks(z_image, z_text, scale, chunk_size)
    logits = scale * jnp.matmul(z_image, z_text.T)
    by_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    by_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    pairs = jnp.arange(logits.shape[0])
    aux = {
        "image_to_text": (jnp.argmax(logits, axis=1) == pairs).astype(dtype),
        "text_to_image": (jnp.argmax(logits, axis=0) == pairs).astype(dtype),
    }
    return -0.5 * (by_text + by_image), aux


def _contrastive_loss_in_chunks(z_image: jax.Array, z_text: jax.Array, scale: jax.Array, chunk_size: int) -> tuple:
    """Return the same loss; the columns' sums and largest logits are carried from chunk to chunk.

    A column's sum is kept relative to its largest logit so far, so that no exponential overflows.
    """
    b, count = z_image.shape[0], z_image.shape[0] // chunk_size
    # Every count-th row, so that a chunk of a batch that is split over devices has as many rows of each.
    split = lambda x: jnp.swapaxes(x.reshape(chunk_size, count, *x.shape[1:]), 0, 1)  # noqa: E731
    join = lambda x: jnp.swapaxes(x, 0, 1).reshape(b)  # noqa: E731

    def add(carry: tuple, chunk: tuple) -> tuple[tuple, tuple]:
        (largest, row_of_largest, total), (z, rows) = carry, chunk
        logits = scale * jnp.matmul(z, z_text.T)
        fixed = jax.lax.stop_gradient(logits)
        new = jnp.maximum(largest, fixed.max(0))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[None]).sum(0)
        row_of_largest = jnp.where(fixed.max(0) > largest, rows[jnp.argmax(fixed, axis=0)], row_of_largest)
        return (new, row_of_largest, total), (jax.nn.logsumexp(logits, axis=1), jnp.argmax(fixed, axis=1))

    pairs = jnp.arange(b)
    start = (jnp.full(b, -jnp.inf, z_image.dtype), jnp.zeros(b, pairs.dtype), jnp.zeros(b, z_image.dtype))
    (largest, rows, total), found = jax.lax.scan(jax.checkpoint(add), start, (split(z_image), split(pairs)))
    row_sums, columns = (join(each) for each in found)
    own = scale * jnp.sum(z_image * z_text, axis=1)
    aux = {
        "image_to_text": (columns == pairs).astype(z_image.dtype),
        "text_to_image": (rows == pairs).astype(z_image.dtype),
    }
    return 0.5 * (row_sums + largest + jnp.log(total)) - own, aux


def check_objective(objective: str, variance: str, weighting: Weighting | None) -> None:
    """Raise ValueError for an objective, a variance and a weighting that do not go together."""
    if objective not in OBJECTIVES:
        raise ValueError(f"{objective=} must be one of {OBJECTIVES}")
    if objective == "hybrid" and variance != "learned_range":
        raise ValueError(f"objective='hybrid' trains the variance and needs variance='learned_range', got {variance=}")
    if objective == "simple" and variance == "learned_range":
        raise ValueError("objective='simple' would leave variance='learned_range' untrained; use objective='hybrid'")
    if objective == "vlb" and weighting is not None:
        raise ValueError("weighting applies to the squared error, which objective='vlb' does not have")


def _weighted(process: GaussianProcess, mse: jax.Array, t: jax.Array, weighting: Weighting | None) -> jax.Array:
    return mse if weighting is None else weighting(look_up(process.log_snr, t)) * mse


def _log(value: float | jax.Array) -> float | jax.Array:
    return math.log(value) if is_known(value) else jnp.log(value)


def _mean_per_example(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _stratified(key: jax.Array, batch_size: int) -> jax.Array:
    """Return (u + i / B) mod 1, float32[B]."""
    check_static("batch_size", batch_size, "since it is a shape")
    u = jax.random.uniform(one_key(key), (), jnp.float32)
    return (u + jnp.arange(batch_size, dtype=jnp.float32) / batch_size) % 1.0


def _weighting(log_weight: Callable[[jax.Array], jax.Array], prediction: PredictionType) -> Weighting:
    """Convert a weight of the squared error of x0 to one of this prediction type; both are functions of log_snr."""
    if prediction not in WEIGHTED_PREDICTIONS:
        raise ValueError(f"{prediction=} must be one of {WEIGHTED_PREDICTIONS}")

    def weight(log_snr: jax.Array) -> jax.Array:
        log_snr = jnp.maximum(log_snr, -60.0)  # it is -inf where alpha_bar is 0, and 0 * inf has no value
        relative = {"x0": 0.0, "eps": log_snr, "v": jax.nn.softplus(log_snr)}
        return jnp.exp(log_weight(log_snr) - relative[prediction])

    return weight
