"""Noise processes in continuous time: x_t = alpha(t) x0 + sigma(t) eps, their SDEs, and grids of them.

A schedule is two functions of t and the interval on which they hold. All else follows (Song et al. 2021, "score
SDE", sections 3 and D.1; Kingma et al. 2021, "VDM"; Karras et al. 2022, "EDM", appendix B):

    (1)  log_snr = 2 (log alpha - log sigma)
    (2)  dx = f(t) x dt + g(t) dw,   f = d log alpha / dt,
         g^2 = d sigma^2 / dt - 2 f sigma^2 = -sigma^2 d log_snr / dt
    (3)  reverse:  dx = (f x - g^2 score) dt + g dw,         score = -eps / sigma
    (4)  probability flow:  dx = (f x - g^2 score / 2) dt

Noise grows with t. ``discretize`` makes a ``GaussianProcess`` of a schedule, and with it every sampler and loss of this
package serves it; the network then receives t itself, as float32.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_number, check_static
from ddpm_jax.diffusion.keys import one_key
from ddpm_jax.diffusion.process import GaussianProcess, from_tables
from ddpm_jax.types import Denoiser

Table = Callable[[jax.Array], jax.Array]
_GRIDS = "since grids are made in float64 by numpy"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A noise process in continuous time.

    Attributes:
        log_alpha, log_sigma: t float[...] -> float[...], elementwise and differentiable.
        t_min, t_max: where the functions hold and networks are trained and sampled, 0 <= t_min < t_max.
        prior_std: standard deviation of the noise that sampling starts from.
        variance_preserving: whether alpha^2 + sigma^2 = 1.
    """

    log_alpha: Table
    log_sigma: Table
    t_min: float
    t_max: float
    prior_std: float = 1.0
    variance_preserving: bool = True

    def check_prediction(self, prediction: str) -> None:
        """Raise ValueError for what a network of this process cannot predict."""
        if prediction not in ("eps", "x0", "v", "score") or (prediction == "v" and not self.variance_preserving):
            raise ValueError(f"{prediction=} must be 'eps', 'x0', 'score', or where alpha^2 + sigma^2 = 1 'v'")

    def alpha(self, t: jax.Array) -> jax.Array:
        """Return the scale of the data."""
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        """Return the standard deviation of the noise."""
        return jnp.exp(self.log_sigma(t))

    def log_snr(self, t: jax.Array) -> jax.Array:
        """Return (1)."""
        return 2.0 * (self.log_alpha(t) - self.log_sigma(t))

    def drift(self, t: jax.Array) -> jax.Array:
        """Return f of (2), which multiplies x."""
        return _slope(self.log_alpha, t)

    def diffusion_squared(self, t: jax.Array) -> jax.Array:
        """Return g^2 of (2)."""
        return -jnp.square(self.sigma(t)) * _slope(self.log_snr, t)


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-5) -> Schedule:
    """Return the VP-SDE of score SDE (eqs. 32 and 33), DDPM's linear schedule in continuous time.

    beta(t) = beta_min + t (beta_max - beta_min), B(t) its integral; alpha = exp(-B / 2), sigma^2 = 1 - exp(-B); t in
    [t_min, 1].

    Raises:
        ValueError: if not 0 < beta_min <= beta_max, or t_min is outside (0, 1).
    """
    integral = _linear_integral(beta_min, beta_max, t_min)
    log_sigma = lambda t: 0.5 * jnp.log(-jnp.expm1(-integral(t)))
    return Schedule(lambda t: -0.5 * integral(t), log_sigma, t_min, 1.0)


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-5) -> Schedule:
    """Return the sub-VP-SDE of score SDE (eqs. 28 and 29): ``vp_linear`` with sigma = 1 - exp(-B), less noise.

    Raises:
        ValueError: as ``vp_linear``.
    """
    integral = _linear_integral(beta_min, beta_max, t_min)
    log_sigma = lambda t: jnp.log(-jnp.expm1(-integral(t)))
    return Schedule(lambda t: -0.5 * integral(t), log_sigma, t_min, 1.0, variance_preserving=False)


def cosine(shift: float = 1.0, *, t_min: float = 1e-4, t_max: float = 0.9999) -> Schedule:
    """Return alpha = cos(pi t / 2), sigma = sin(pi t / 2) (VDM and Imagen's continuous cosine schedule), shifted.

    log_snr = -2 log(tan(pi t / 2) / shift), alpha^2 = sigmoid(log_snr); a shift of 64 / d keeps the noise of an image
    of d pixels a side when it is seen at 64 (Hoogeboom et al. 2023, "simple diffusion", eq. 9).

    Raises:
        ValueError: if shift is not positive, or not 0 < t_min < t_max < 1.
    """
    check_static("shift, t_min and t_max", (shift, t_min, t_max), _GRIDS)
    if shift <= 0.0:
        raise ValueError(f"{shift=} must be positive")
    if not 0.0 < t_min < t_max < 1.0:
        raise ValueError(f"{t_min=} and {t_max=} must be inside (0, 1), in this order")
    log_snr = lambda t: -2.0 * (jnp.log(jnp.tan(0.5 * jnp.pi * t)) - math.log(shift))
    return from_log_snr(log_snr, t_min=t_min, t_max=t_max)


def cosine_log_snr(smallest: float = -20.0, largest: float = 20.0) -> Schedule:
    """Return the cosine process whose log-SNR falls from `largest` at t = 0 to `smallest` at t = 1.

    log_snr = -2 log tan(a t + b), b = arctan(exp(-largest / 2)), a = arctan(exp(-smallest / 2)) - b: `cosine` between
    those ends (Ho and Salimans 2022, "Classifier-free guidance", section 2).

    Raises:
        ValueError: if not -40 <= smallest < largest <= 40.
    """
    check_static("smallest and largest", (smallest, largest), _GRIDS)
    if not -40.0 <= smallest < largest <= 40.0:
        raise ValueError(f"{smallest=} and {largest=} must be in [-40, 40], in this order")
    first, last = math.atan(math.exp(-0.5 * largest)), math.atan(math.exp(-0.5 * smallest))
    return from_log_snr(lambda t: -2.0 * jnp.log(jnp.tan((last - first) * t + first)))


def interpolated(betas: np.ndarray) -> Schedule:
    """Return a discrete process between its steps too: alpha^2 is linear in t, and step i is at t = (i + 1) / T.

    A uniform t in [0, 1] is a noise level that is uniform between those of neighbouring steps, the data before the
    first: the training noise of WaveGrad (Chen et al. 2021, algorithm 1) and SR3 (Saharia et al. 2021, section 2.4).

    betas: float64[T], each in (0, 1]. At t = 0 there is no noise, and the log-SNR is infinite.
    """
    kept = np.append(1.0, np.cumprod(1.0 - betas))
    places = np.linspace(0.0, 1.0, len(kept))
    # Both in float64: a difference to 1 would lose the noise of the first steps in float32.
    log_alpha = lambda t: 0.5 * jnp.log(jnp.interp(t, places, kept))
    log_sigma = lambda t: 0.5 * jnp.log(jnp.interp(t, places, 1.0 - kept))
    return Schedule(log_alpha, log_sigma, 0.0, 1.0)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """Return the VE-SDE of score SDE (eq. 30): alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in [0, 1].

    Raises:
        ValueError: if not 0 < sigma_min < sigma_max.
    """
    _check_sigmas(sigma_min, sigma_max)
    log_sigma = lambda t: math.log(sigma_min) + t * math.log(sigma_max / sigma_min)
    return Schedule(jnp.zeros_like, log_sigma, 0.0, 1.0, prior_std=sigma_max, variance_preserving=False)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """Return EDM's process (table 1): alpha = 1 and sigma(t) = t, so that the network receives sigma.

    ``karras_times`` are its usual grid and ``edm_preconditioned`` makes its usual network.

    Raises:
        ValueError: if not 0 < sigma_min < sigma_max.
    """
    _check_sigmas(sigma_min, sigma_max)
    return Schedule(jnp.zeros_like, jnp.log, sigma_min, sigma_max, prior_std=sigma_max, variance_preserving=False)


def from_log_snr(log_snr: Table, *, t_min: float = 0.0, t_max: float = 1.0) -> Schedule:
    """Return the variance-preserving process of any decreasing log-SNR: alpha^2 = sigmoid(log_snr) (VDM, section 3.2).

    A learned schedule is this with the parameters of ``monotone_log_snr`` closed over.
    """
    log_alpha = lambda t: 0.5 * jax.nn.log_sigmoid(log_snr(t))
    log_sigma = lambda t: 0.5 * jax.nn.log_sigmoid(-log_snr(t))
    return Schedule(log_alpha, log_sigma, t_min, t_max)


def init_monotone(key: jax.Array, width: int = 1024) -> dict[str, jax.Array]:
    """Return parameters of ``monotone_log_snr``, float32: almost a straight line to begin with; `width` bends."""
    check_static("width", width, "since it is a shape")
    first, second = jax.random.split(one_key(key))
    return {
        "scale": jnp.zeros((), jnp.float32),
        "inner": 0.1 * jax.random.normal(first, (width,), jnp.float32),
        "bias": jax.random.normal(second, (width,), jnp.float32),
        "outer": jnp.full((width,), -5.0, jnp.float32),
    }


def monotone_log_snr(params: dict[str, jax.Array], *, smallest: float = -13.3, largest: float = 5.0) -> Table:
    """Return the learned log-SNR of VDM (appendix H): a monotone network, brought to [smallest, largest] on [0, 1].

    With positive weights w = softplus(.) and hidden width K, l1(t) = w t, and

        r(t) = l1(t) + sum_k w_k sigmoid(v_k l1(t) + b_k) / K,
        log_snr = largest - (largest - smallest) (r(t) - r(0)) / (r(1) - r(0)),

    which decreases for any parameters. The end points stay where they are put.

    Args:
        params: of ``init_monotone``.
        smallest, largest: log-SNR at t = 1 and 0; VDM's are -13.3 and 5.
    """
    positive = jax.nn.softplus

    def raw(t: jax.Array) -> jax.Array:
        line = positive(params["scale"]) * t
        inner, bias, outer = (
            jnp.expand_dims(params[name], tuple(range(line.ndim))) for name in ("inner", "bias", "outer")
        )
        hidden = jax.nn.sigmoid(positive(inner) * line[..., None] + bias)
        return line + jnp.mean(positive(outer) * hidden, axis=-1)

    def log_snr(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t)
        low, high = raw(jnp.zeros((), t.dtype)), raw(jnp.ones((), t.dtype))
        return largest - (largest - smallest) * (raw(t) - low) / (high - low)

    return log_snr


def uniform_times(schedule: Schedule, num_steps: int) -> np.ndarray:
    """Return N times evenly spaced from t_max down to t_min, float64[N]."""
    _check_grid(schedule, num_steps)
    return np.linspace(schedule.t_max, schedule.t_min, num_steps)


def log_snr_times(schedule: Schedule, num_steps: int) -> np.ndarray:
    """Return N times from t_max down to t_min whose log-SNRs are evenly spaced, float64[N], found by bisection.

    The grid that DPM-Solver++ takes by default for models of small images (Lu et al. 2022b, section 6).
    """
    _check_grid(schedule, num_steps)
    ends = _float64(schedule.log_snr, np.array([schedule.t_max, schedule.t_min]))
    wanted = np.linspace(*ends, num_steps)
    low, high = np.full(num_steps, schedule.t_min), np.full(num_steps, schedule.t_max)
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_clean = _float64(schedule.log_snr, middle) > wanted
        low, high = np.where(too_clean, middle, low), np.where(too_clean, high, middle)
    times = 0.5 * (low + high)
    times[0], times[-1] = schedule.t_max, schedule.t_min if num_steps > 1 else schedule.t_max
    return times


def karras_times(schedule: Schedule, num_steps: int, rho: float = 7.0) -> np.ndarray:
    """Return EDM's N times (eq. 5): (t_max^(1/rho) + i / (N - 1) (t_min^(1/rho) - t_max^(1/rho)))^rho, float64[N]."""
    _check_grid(schedule, num_steps)
    check_static("rho", rho, _GRIDS)
    return np.linspace(schedule.t_max ** (1.0 / rho), schedule.t_min ** (1.0 / rho), num_steps) ** rho


def discretize(
    schedule: Schedule,
    times: np.ndarray | Sequence[float],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> GaussianProcess:
    """Return the process that visits a schedule at some times: (13) and (14) of ``ddpm_jax.diffusion.process``.

    Its marginals at those times are the schedule's. A sampler takes N transitions, the last one from the smallest time
    into the data. The network receives the times themselves.

    Args:
        schedule: its functions and numbers known (not traced).
        times: [N] strictly decreasing, as from ``uniform_times``, ``log_snr_times`` or ``karras_times``.
        dtype: of the tables; they are computed in float64 in any case.

    Returns:
        A GaussianProcess of N steps.

    Raises:
        ValueError: if the times do not decrease or leave the schedule's interval, or the log-SNR does not grow along
            them; and if the schedule or the times are traced.
    """
    check_static("times", times, _GRIDS)
    _check_grid(schedule, 1)
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or times.size < 1 or np.any(np.diff(times) >= 0.0):
        raise ValueError(f"times must be a vector of decreasing numbers, got shape {times.shape}")
    t = times[::-1]
    log_alpha, log_sigma = _float64(schedule.log_alpha, t), _float64(schedule.log_sigma, t)
    if t[0] < schedule.t_min - 1e-9 or t[-1] > schedule.t_max + 1e-9:
        raise ValueError(f"times must lie in [{schedule.t_min:g}, {schedule.t_max:g}], got {t[0]:g} to {t[-1]:g}")
    log_snr = 2.0 * (log_alpha - log_sigma)
    if not (np.all(np.isfinite(log_snr)) and np.all(np.diff(log_snr) < 0.0)):
        raise ValueError("the log-SNR of the schedule must be finite and decrease with t at all of the times")
    var = np.exp(2.0 * log_sigma)
    betas = var * np.append(1.0, -np.expm1(np.diff(log_snr)))
    return from_tables(
        np.exp(log_alpha),
        np.exp(log_sigma),
        betas,
        np.exp(2.0 * log_alpha),
        t.astype(np.dtype(dtype)),
        dtype,
        prior_std=schedule.prior_std,
        variance_preserving=schedule.variance_preserving,
        time_is_sigma=bool(np.all(log_alpha == 0.0) and np.allclose(np.exp(log_sigma), t)),
    )


def edm_preconditioned(network: Denoiser, sigma_data: float = 0.5) -> Denoiser:
    """Wrap a raw network F as EDM's denoiser of x0 (eq. 7 and table 1), for ``edm`` and prediction="x0".

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),   with d = sigma_data

    c_skip = d^2 / (sigma^2 + d^2),  c_out = sigma d / sqrt(sigma^2 + d^2),  c_in = 1 / sqrt(sigma^2 + d^2),
    c_noise = log(sigma) / 4: input and target of F have variance 1 at every sigma.

    Args:
        network: (x, c_noise float32[B]) -> float[B, ..., C].
        sigma_data: standard deviation of the data, > 0; 0.5 for images in [-1, 1].

    Returns:
        A denoiser whose t is sigma.

    Raises:
        ValueError: if sigma_data is not positive, and when called, if the network's output has another shape than xt.
            A traced sigma_data that is not positive gives NaN.
    """
    sigma_data = check_number("sigma_data", sigma_data, lambda v: v > 0, "must be positive")

    def denoise(xt: jax.Array, sigma: jax.Array) -> jax.Array:
        wide = sigma.reshape(sigma.shape + (1,) * (xt.ndim - 1))
        total = jnp.square(wide) + sigma_data**2
        output = network(xt * jax.lax.rsqrt(total), jnp.log(sigma) / 4.0).astype(xt.dtype)
        if output.shape != xt.shape:
            raise ValueError(f"the network must return the shape of xt {xt.shape}, got {output.shape}")
        return sigma_data**2 / total * xt + wide * sigma_data * jax.lax.rsqrt(total) * output

    return denoise


def _slope(function: Table, t: jax.Array) -> jax.Array:
    t = jnp.asarray(t)
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


def _float64(function: Table, t: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        values = function(jnp.asarray(t, jnp.float64))
    check_static("what the functions of the schedule close over", values, _GRIDS)
    return np.asarray(values, np.float64)


def _linear_integral(beta_min: float, beta_max: float, t_min: float) -> Table:
    check_static("beta_min, beta_max and t_min", (beta_min, beta_max, t_min), _GRIDS)
    if not 0.0 < beta_min <= beta_max:
        raise ValueError(f"{beta_min=} must be positive and not above {beta_max=}")
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"{t_min=} must be inside (0, 1)")
    return lambda t: t * (beta_min + 0.5 * t * (beta_max - beta_min))


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    check_static("sigma_min and sigma_max", (sigma_min, sigma_max), _GRIDS)
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(f"{sigma_min=} must be positive and below {sigma_max=}")


def _check_grid(schedule: Schedule, num_steps: int) -> None:
    check_static("num_steps", num_steps, "since it is a shape")
    check_static("t_min and t_max of the schedule", (schedule.t_min, schedule.t_max), _GRIDS)
    if num_steps < 1:
        raise ValueError(f"{num_steps=} must be at least 1")
