r"""The Gaussian noise process of diffusion models in discrete time: forward, posterior, and what a network predicts.

Derivation (Ho et al. 2020, "DDPM"; Nichol & Dhariwal 2021, "Improved DDPM"; Salimans & Ho 2022). With betas
beta_t in (0, 1), t = 0 .. T - 1, alpha_t = 1 - beta_t and x_{-1} = x0 the clean data, noise is added step by step:

    (1)  q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I)

Composing Gaussians gives any x_t in one sample, with alpha_bar_t = prod_{s <= t} alpha_s (DDPM eq. 4):

    (2)  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)

Bayes' rule, with alpha_bar_prev = alpha_bar_{t-1} and alpha_bar_{-1} = 1, gives the posterior (DDPM eqs. 6 and 7):

    (3)  q(x_{t-1} | x_t, x0) = N(c_x0 x0 + c_xt x_t, beta_tilde_t I)
    (4)  c_x0 = beta_t sqrt(alpha_bar_prev) / (1 - alpha_bar_t)
         c_xt = (1 - alpha_bar_prev) sqrt(alpha_t) / (1 - alpha_bar_t)
    (5)  beta_tilde_t = beta_t (1 - alpha_bar_prev) / (1 - alpha_bar_t)

The reverse step p(x_{t-1} | x_t) is (3) with x0 replaced by the network's estimate. Writing alpha = sqrt(alpha_bar_t)
and sigma = sqrt(1 - alpha_bar_t), the network may predict any of three equivalent quantities:

    (6)  eps:  x0 = (x_t - sigma eps) / alpha                       (DDPM eq. 15)
    (7)  x0:   eps = (x_t - alpha x0) / sigma
    (8)  v = alpha eps - sigma x0:  x0 = alpha x_t - sigma v,  eps = sigma x_t + alpha v    (Salimans & Ho, section 4)

or the score grad log q(x_t) = -eps / sigma (Song & Ermon 2019), or the mean of (3) itself (DDPM, section 3.2).

The variance of the reverse step lies between two bounds, and is one of them or learned in log space with a network
output v in [-1, 1] (Improved DDPM eq. 15, in the [-1, 1] form of its code):

    (9)  fixed_small:    beta_tilde_t                (exact when x0 is a point)
    (10) fixed_large:    beta_t                      (exact when x0 ~ N(0, I)); beta_tilde_1 at t = 0
    (11) learned_range:  exp(f log beta_t + (1 - f) log beta_tilde_t),   f = (v + 1) / 2

beta_tilde_0 = 0 has no logarithm; its log is replaced by that of beta_tilde_1 ("clipped"), as in the DDPM code.

A process of only the timesteps S_0 < S_1 < ... has the same marginals (2) there, so (Improved DDPM, eq. 19)

    (12) beta'_i = 1 - alpha_bar_{S_i} / alpha_bar_{S_{i-1}}

None of it needs alpha^2 + sigma^2 = 1. With x_t = alpha_t x0 + sigma_t eps for any decreasing alpha / sigma (Kingma et
al. 2021, "VDM", appendix A), (1) and (3) to (5) become

    (13) q(x_t | x_{t-1}) = N((alpha_t / alpha_{t-1}) x_{t-1}, beta_t I),
         beta_t = sigma_t^2 - (alpha_t / alpha_{t-1})^2 sigma_{t-1}^2
    (14) c_x0 = alpha_{t-1} beta_t / sigma_t^2,   c_xt = (alpha_t / alpha_{t-1}) sigma_{t-1}^2 / sigma_t^2
         beta_tilde_t = beta_t sigma_{t-1}^2 / sigma_t^2

with alpha_{-1} = 1 and sigma_{-1} = 0, the data. ``continuous.discretize`` makes such a process of any schedule.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ddpm_jax.checks import check_indices, check_static, is_known, look_up
from ddpm_jax.diffusion.schedules import left_steps_out, respaced_timesteps
from ddpm_jax.types import PredictionType, Variance

PREDICTIONS = ("eps", "x0", "v", "score", "mean")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


@struct.dataclass
class GaussianProcess:
    """The tables of one noise process, float32[T] each; make it with ``make_process`` or ``continuous.discretize``.

    Attributes:
        betas: beta_t of (1), or (13).
        alpha_bar: alpha_bar_t of (2); alpha^2 in any case.
        alpha_bar_low: alpha_bar minus its float32 value; ``respace`` adds both, since (12) cancels four digits.
        alpha_bar_prev: alpha_bar_{t-1}, 1 at t = 0.
        alpha, sigma: of (6) to (8) and (13); x_t = alpha x0 + sigma eps.
        posterior_coef_x0, posterior_coef_xt: (4), or (14).
        posterior_variance, posterior_log_variance: (5), and its clipped log.
        log_betas, large_log_variance: log beta_t, and the log of (10).
        log_snr: log(alpha^2 / sigma^2).
        timestep_map: what the network receives as t for each step of this process: int32[T], the timestep it was
            trained with, or float32[T] where time is continuous.
        prior_std: float32[], the standard deviation of the noise that sampling starts from.
        zero_terminal: static; True where the last alpha_bar is 0, so that eps there says nothing about x0.
        variance_preserving: static; True where alpha^2 + sigma^2 = 1, which v and ``respace`` need.
        shortened: static; True where steps were left out, so that the mean of (3) is not what a network was trained on.
        time_is_sigma: static; True where alpha = 1 and the network receives sigma as t, as EDM's.
        reach: static; where a list of timesteps or ``truncate`` ends, as a share of the steps; ``sample`` needs half.
        ends: static; (t + 1) / T of each step, t of the T steps first made; () where none was left out.
    """

    betas: jax.Array
    alpha_bar: jax.Array
    alpha_bar_low: jax.Array
    alpha_bar_prev: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    posterior_coef_x0: jax.Array
    posterior_coef_xt: jax.Array
    posterior_variance: jax.Array
    posterior_log_variance: jax.Array
    log_betas: jax.Array
    large_log_variance: jax.Array
    log_snr: jax.Array
    timestep_map: jax.Array
    prior_std: jax.Array
    zero_terminal: bool = struct.field(pytree_node=False, default=False)
    variance_preserving: bool = struct.field(pytree_node=False, default=True)
    shortened: bool = struct.field(pytree_node=False, default=False)
    time_is_sigma: bool = struct.field(pytree_node=False, default=False)
    reach: float = struct.field(pytree_node=False, default=1.0)
    ends: tuple[float, ...] = struct.field(pytree_node=False, default=())

    @property
    def num_steps(self) -> int:
        """T, the number of noise steps."""
        return self.betas.shape[0]


@struct.dataclass
class Prediction:
    """Reverse step from x_t to x_{t-1} according to a network; every field has the shape of xt.

    Attributes:
        x0: the clean data.
        eps: the noise that goes with x0 by (2), also after an ``x0_transform``.
        mean: mean of p(x_{t-1} | x_t), (3).
        variance, log_variance: of p(x_{t-1} | x_t), (9) to (11). ``log_variance`` is clipped at t = 0.
    """

    x0: jax.Array
    eps: jax.Array
    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array


def make_process(
    betas: np.ndarray | Sequence[float],
    timestep_map: np.ndarray | Sequence[int] | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> GaussianProcess:
    """Make the tables of the process (1) from its betas.

    Args:
        betas: [T], each in (0, 1); taken as float64. The last may be 1 (``schedules.zero_terminal_snr``).
        timestep_map: int[T], what the network receives as t at each step; 0 .. T - 1 by default.
        dtype: dtype of the tables; they are computed in float64 in any case.

    Returns:
        A GaussianProcess.

    Raises:
        ValueError: if betas is not a vector inside (0, 1), timestep_map has another length, or one of them is traced.
    """
    check_static("betas and timestep_map", (betas, timestep_map), "since tables are made in float64")
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 1:
        raise ValueError(f"betas must be a vector of at least 1 step, got shape {betas.shape}")
    if not (np.all((betas > 0.0) & (betas <= 1.0)) and np.all(betas[:-1] < 1.0)) or betas[0] == 1.0:
        raise ValueError(
            f"betas must be inside (0, 1), or 1 at the last of several steps, got values from {betas.min():g} to "
            f"{betas.max():g}"
        )
    if timestep_map is None:
        timestep_map = np.arange(betas.size)
    timestep_map = np.asarray(timestep_map, np.int32)
    if timestep_map.shape != betas.shape:
        raise ValueError(f"timestep_map must have one entry a step: shape {betas.shape}, got {timestep_map.shape}")
    return _preserving(betas, np.cumprod(1.0 - betas), timestep_map, dtype)


def respace(process: GaussianProcess, spec: str | int | Sequence[int]) -> GaussianProcess:
    """Return the process of a subset of the timesteps, (12).

    The marginals at the chosen steps are unchanged, so the network is too; it still receives the original timesteps
    through ``timestep_map``. Respacing a respaced process composes the two.

    A list is timesteps, where guided-diffusion's ``space_timesteps`` takes section counts, which are a string here:
    ``"10,15,20"``. ``sample`` refuses to start from noise if the last of a list is in the less noisy half.

    Args:
        process: T steps. Tables are made in float64, or, where it is traced, in its own dtype.
        spec: see ``schedules.respaced_timesteps``.

    Returns:
        A GaussianProcess with as many steps as the spec selects.

    Raises:
        ValueError: if the spec is invalid for T steps, or the process does not preserve variance (see ``discretize``).
    """
    if not process.variance_preserving:
        raise ValueError("only a process with alpha^2 + sigma^2 = 1 can be respaced; use discretize at fewer times")
    chosen = np.asarray(respaced_timesteps(steps := process.num_steps, spec))
    shorter = _respaced(process, chosen) if is_known(process) else _respaced_traced(process, chosen)
    return shorter.replace(
        zero_terminal=process.zero_terminal and bool(chosen[-1] == steps - 1),
        shortened=process.shortened or len(chosen) < steps,
        **left_steps_out(
            process.reach, process.ends, steps, chosen, published=isinstance(spec, (str, int, np.integer))
        ),
    )


def _respaced(process: GaussianProcess, chosen: np.ndarray) -> GaussianProcess:
    """Respace a process whose numbers are known, in float64."""
    alpha_bar = (np.asarray(process.alpha_bar, np.float64) + np.asarray(process.alpha_bar_low, np.float64))[chosen]
    betas = 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return _preserving(betas, alpha_bar, np.asarray(process.timestep_map)[chosen], process.betas.dtype)


def _respaced_traced(process: GaussianProcess, chosen: np.ndarray) -> GaussianProcess:
    """Respace a traced process, in the dtype of its tables; (12) is a difference of the two parts of alpha_bar."""
    high, low = process.alpha_bar[chosen], process.alpha_bar_low[chosen]
    one, zero = jnp.ones_like(high[:1]), jnp.zeros_like(high[:1])
    high_prev, low_prev = jnp.append(one, high[:-1]), jnp.append(zero, low[:-1])
    betas = ((high_prev - high) + (low_prev - low)) / high_prev
    alpha, sigma = process.alpha[chosen], process.sigma[chosen]
    alpha_prev, var, var_prev = jnp.append(one, alpha[:-1]), sigma**2, jnp.append(zero, sigma[:-1] ** 2)
    variance = betas * var_prev / var
    clipped = jnp.append(variance[1:2] if len(chosen) > 1 else betas[:1], variance[1:])
    return process.replace(
        betas=betas,
        alpha_bar=high,
        alpha_bar_low=low,
        alpha_bar_prev=high_prev,
        alpha=alpha,
        sigma=sigma,
        posterior_coef_x0=betas * alpha_prev / var,
        posterior_coef_xt=var_prev * (alpha / alpha_prev) / var,
        posterior_variance=variance,
        posterior_log_variance=jnp.log(clipped),
        log_betas=jnp.log(betas),
        large_log_variance=jnp.log(jnp.append(clipped[:1], betas[1:])),
        log_snr=process.log_snr[chosen],
        timestep_map=process.timestep_map[chosen],
    )


def _preserving(
    betas: np.ndarray, alpha_bar: np.ndarray, timestep_map: np.ndarray, dtype: jax.typing.DTypeLike
) -> GaussianProcess:
    """Fill the tables of (1) to (5) from float64 betas and alpha_bar."""
    return from_tables(np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar), betas, alpha_bar, timestep_map, dtype)


def from_tables(
    alpha: np.ndarray,
    sigma: np.ndarray,
    betas: np.ndarray,
    alpha_bar: np.ndarray,
    timestep_map: np.ndarray,
    dtype: jax.typing.DTypeLike,
    *,
    prior_std: float = 1.0,
    variance_preserving: bool = True,
    time_is_sigma: bool = False,
) -> GaussianProcess:
    """Fill every table of (13) and (14) from float64 columns, each [T]; the caller has checked them."""
    alpha_prev, var, var_prev = np.append(1.0, alpha[:-1]), sigma**2, np.append(0.0, sigma[:-1] ** 2)
    posterior_variance = betas * var_prev / var  # (5), (14)
    # The variance is 0 at t = 0 and has no log there; with a single step there is no neighbour to borrow from.
    first = posterior_variance[1] if betas.size > 1 else betas[0]
    clipped = np.append(first, posterior_variance[1:])
    rounded = np.asarray(alpha_bar, dtype).astype(np.float64)
    with np.errstate(divide="ignore"):  # where the last alpha_bar is 0
        log_alpha_bar = np.log(alpha_bar)

    def table(values: np.ndarray, dtype: jax.typing.DTypeLike | None = dtype) -> jax.Array:
        with jax.ensure_compile_time_eval():  # inside of a jitted function too, a table is numbers
            return jnp.asarray(values, dtype)

    return GaussianProcess(
        betas=table(betas),
        alpha_bar=table(alpha_bar),
        alpha_bar_low=table(alpha_bar - rounded),
        alpha_bar_prev=table(alpha_prev**2),
        alpha=table(alpha),
        sigma=table(sigma),
        posterior_coef_x0=table(betas * alpha_prev / var),  # (4), (14)
        posterior_coef_xt=table(var_prev * (alpha / alpha_prev) / var),  # (4), (14)
        posterior_variance=table(posterior_variance),
        posterior_log_variance=table(np.log(clipped)),
        log_betas=table(np.log(betas)),
        large_log_variance=table(np.log(np.append(first, betas[1:]))),  # (10)
        log_snr=table(log_alpha_bar - np.log(var)),
        timestep_map=table(timestep_map, None),
        prior_std=table(prior_std),
        zero_terminal=bool(alpha_bar[-1] == 0.0),
        variance_preserving=variance_preserving,
        time_is_sigma=time_is_sigma,
    )


def q_sample(process: GaussianProcess, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Sample x_t given x0 and its noise: alpha_t x0 + sigma_t eps, (2), DDPM eq. 4.

    Args:
        process: T steps.
        x0: float[B, ...].
        t: int32[B] in [0, T).
        eps: float[B, ...], standard normal.

    Returns:
        xt, [B, ...].

    Raises:
        ValueError: if the shapes do not fit or t is out of range. Traced t out of range give NaN.
    """
    _check_shapes(process, x0, t, eps, "eps")
    return _at(process.alpha, t, x0) * x0 + _at(process.sigma, t, x0) * eps


def q_posterior(
    process: GaussianProcess, x0: jax.Array, xt: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x0), (3) to (5), DDPM eqs. 6 and 7.

    Args:
        process: T steps.
        x0: float[B, ...].
        xt: float[B, ...].
        t: int32[B] in [0, T).

    Returns:
        Three arrays of the shape of xt. The variance is 0 at t = 0; its log there is that at t = 1.

    Raises:
        ValueError: if the shapes do not fit or t is out of range. Traced t out of range give NaN.
    """
    _check_shapes(process, x0, t, xt, "xt")
    mean = _at(process.posterior_coef_x0, t, xt) * x0 + _at(process.posterior_coef_xt, t, xt) * xt
    variance = jnp.broadcast_to(_at(process.posterior_variance, t, xt), xt.shape)
    log_variance = jnp.broadcast_to(_at(process.posterior_log_variance, t, xt), xt.shape)
    return mean, variance, log_variance


def target(
    process: GaussianProcess, x0: jax.Array, eps: jax.Array, t: jax.Array, *, prediction: PredictionType
) -> jax.Array:
    """Return the training target: eps, x0, v = alpha eps - sigma x0 (8), the score -eps / sigma, or the mean (3).

    Args:
        process: T steps.
        x0: float[B, ...].
        eps: float[B, ...].
        t: int32[B] in [0, T).
        prediction: "eps", "x0", "v", "score" or "mean".

    Returns:
        The target, [B, ...].

    Raises:
        ValueError: if prediction is unknown or does not fit the process, the shapes do not fit, or t is out of range.
            Traced t out of range give NaN.
    """
    _check_prediction(prediction, process)
    _check_shapes(process, x0, t, eps, "eps")
    if prediction in ("eps", "x0"):
        # 1, or NaN where t is out of range: under debug_nans NaN must not be made where it is not used.
        return _at(jnp.ones_like(process.betas), t, x0) * (eps if prediction == "eps" else x0)
    if prediction == "mean":
        return q_posterior(process, x0, q_sample(process, x0, t, eps), t)[0]
    sigma = _at(process.sigma, t, x0)
    return -eps / sigma if prediction == "score" else _at(process.alpha, t, x0) * eps - sigma * x0


def predict(
    process: GaussianProcess,
    output: jax.Array,
    xt: jax.Array,
    t: jax.Array,
    *,
    prediction: PredictionType,
    variance: Variance = "fixed_small",
    x0_transform: Callable[[jax.Array], jax.Array] | None = None,
    at: tuple[jax.Array, jax.Array] | None = None,
) -> Prediction:
    """Read a network output as the reverse step p(x_{t-1} | x_t): (6) to (8) for x0, (3) for the mean, (9) to (11).

    Args:
        process: T steps.
        output: float[B, ..., C], or [B, ..., 2C] with variance="learned_range"; any float dtype.
        xt: float[B, ..., C], the network's input.
        t: int32[B] in [0, T), steps of this process (not original timesteps).
        prediction: what the network predicts: "eps", "x0", "v", "score" or "mean".
        variance: "fixed_small", "fixed_large" or "learned_range".
        x0_transform: applied to the estimate of x0, e.g. ``guidance.static_threshold()``; eps then follows by (7). It
            is not a wrapper of the denoiser, because a clipped x0 written back as eps at alpha = 1e-4 is lost to
            cancellation. The mean (3) follows from it. With "mean", DDPM and guided-diffusion keep the network's mean
            and clip only the x0 that they report: omit it to reproduce their ancestral samples, not their DDIM.
        at: (alpha, sigma) of xt, scalars, where it lies between the process' steps (EDM's churn): x0 and eps are read
            there; mean and variance are still those of step t, also where the network predicts the mean.

    Returns:
        A Prediction in the dtype of the tables.

    Raises:
        ValueError: if prediction or variance is unknown, the output does not have the channels they need, prediction is
            "v" and the process does not preserve variance, or "mean" and it has steps left out, or "eps" or "score" and
            it ends in pure noise, or t is out of range. Traced t out of range give NaN.
    """
    _check_prediction(prediction, process)
    _check_t(process, t, xt)
    if prediction in ("eps", "score") and process.zero_terminal:
        raise ValueError(f"{prediction=} cannot give x0 at the last step, where alpha_bar is 0; use 'v' or 'x0'")
    mean_output, range_output = split_output(output.astype(process.betas.dtype), xt, variance)
    xt = xt.astype(process.betas.dtype)
    if at is None:
        at = _at(process.alpha, t, xt), _at(process.sigma, t, xt)
    if prediction == "mean":
        mean_output = mean_output - _at(process.posterior_coef_xt, t, xt) * xt
        mean_output, prediction = mean_output / _at(process.posterior_coef_x0, t, xt), "x0"  # (3)
    x0, eps = to_x0_eps(mean_output, xt, *at, prediction)
    if x0_transform is not None:
        x0 = x0_transform(x0)
        eps = (xt - at[0] * x0) / at[1]  # (7)
    mean, model_variance, log_variance = q_posterior(process, x0, xt, t)
    if variance == "fixed_large":
        log_variance = jnp.broadcast_to(_at(process.large_log_variance, t, xt), xt.shape)  # (10)
        model_variance = jnp.exp(log_variance)
    elif variance == "learned_range":
        fraction = (range_output + 1.0) / 2.0
        upper = _at(process.log_betas, t, xt)
        log_variance = fraction * upper + (1.0 - fraction) * log_variance  # (11)
        model_variance = jnp.exp(log_variance)
    return Prediction(x0, eps, mean, model_variance, log_variance)


def split_output(output: jax.Array, xt: jax.Array, variance: Variance) -> tuple[jax.Array, jax.Array | None]:
    """Split a network output into its prediction and the v of the learned range (None for a fixed variance).

    Args:
        output: float[B, ..., C], or [B, ..., 2C] with variance="learned_range".
        xt: float[B, ..., C], the network's input.
        variance: "fixed_small", "fixed_large" or "learned_range".

    Returns:
        The prediction, [B, ..., C], and v, [B, ..., C] or None.

    Raises:
        ValueError: if variance is unknown or the output does not have the channels it needs.
    """
    if variance not in VARIANCES:
        raise ValueError(f"{variance=} must be one of {VARIANCES}")
    channels = xt.shape[-1]
    if variance == "learned_range":
        if output.shape != (*xt.shape[:-1], 2 * channels):
            raise ValueError(
                f"variance='learned_range' needs an output with 2C = {2 * channels} channels, "
                f"got output {output.shape} for xt {xt.shape}"
            )
        return output[..., :channels], output[..., channels:]
    if output.shape != xt.shape:
        raise ValueError(f"{variance=} needs an output of the shape of xt {xt.shape}, got {output.shape}")
    return output, None


def to_x0_eps(
    output: jax.Array, xt: jax.Array, alpha: jax.Array, sigma: jax.Array, prediction: PredictionType
) -> tuple[jax.Array, jax.Array]:
    """Return x0 and eps from a prediction of "eps", "x0", "v" or "score" at xt = alpha x0 + sigma eps, (6) to (8).

    v needs alpha^2 + sigma^2 = 1. alpha and sigma broadcast to xt.
    """
    if prediction == "x0":
        return output, (xt - alpha * output) / sigma  # (7)
    if prediction == "v":
        return alpha * xt - sigma * output, sigma * xt + alpha * output  # (8)
    eps = output if prediction == "eps" else -sigma * output
    return (xt - sigma * eps) / alpha, eps  # (6)


def _at(table: jax.Array, t: jax.Array, like: jax.Array) -> jax.Array:
    """Read table[t], NaN for t out of range, with singleton axes up to the rank of ``like``."""
    return look_up(table, t).reshape(t.shape + (1,) * (like.ndim - 1))


def _check_prediction(prediction: str, process: GaussianProcess) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"{prediction=} must be one of {PREDICTIONS}")
    if prediction == "v" and not process.variance_preserving:
        raise ValueError("prediction='v' needs a process with alpha^2 + sigma^2 = 1; use 'eps', 'x0' or 'score'")
    if prediction == "mean" and process.shortened:
        raise ValueError("prediction='mean' needs all the steps of training: the mean of a step depends on its length")


def _check_t(process: GaussianProcess, t: jax.Array, x: jax.Array) -> None:
    is_array = isinstance(t, (jax.Array, np.ndarray))
    if not is_array or t.shape != x.shape[:1] or x.ndim < 1 or not jnp.issubdtype(t.dtype, jnp.integer):
        got = f"{t.dtype}{list(t.shape)}" if is_array else f"{type(t).__name__} {t!r}"
        raise ValueError(f"t must be integers of shape {x.shape[:1]}, one an example, got {got}")
    check_indices("t", t, process.num_steps)


def _check_shapes(process: GaussianProcess, x0: jax.Array, t: jax.Array, other: jax.Array, name: str) -> None:
    if x0.shape != other.shape:
        raise ValueError(f"{name} must have the shape of x0 {x0.shape}, got {other.shape}")
    _check_t(process, t, x0)
