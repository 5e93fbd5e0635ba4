"""Samplers and the exact likelihood against distributions whose networks are known in closed form, in float64.

    python examples/exact_answers.py

prints two tables. A Gaussian and a mixture of three in two dimensions have an exact denoiser, so whatever is left is
the sampler's: the error of mean and covariance, the energy distance to exact draws (as a multiple of what two sets of
exact draws have, 95 % of the time), and for solvers of the probability-flow ODE the slope of the error against the
step. Samplers that draw no noise on their way start from the same noise. The predictor-corrector also samples a
Gaussian in 64 dimensions. SDEdit starts from exact draws and RePaint knows the first number of each, so both must leave
the distribution as it is; DDIM inversion must turn exact draws to noise. The likelihoods are compared with the density
itself, and the variational bound with its expectation in closed form, in bits per dimension.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import log_ndtr

from ddpm_jax import (
    ancestral_step,
    continuous,
    cosine_betas,
    ddim_step,
    example_keys,
    linear_betas,
    make_process,
    respace,
    sample,
)
from ddpm_jax.diffusion.likelihood import ode_log_likelihood, ode_sample, variational_bound
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.samplers import (
    analytic_moments,
    analytic_step,
    dpm_solver_step,
    euler_maruyama_step,
    heun_step,
    invert,
    plms_step,
    predictor_corrector_step,
    repaint_step,
    reverse_diffusion_step,
    sdedit,
    unipc_step,
)
from ddpm_jax.types import Denoiser, Step

N = 2000
WEIGHTS = np.array([0.3, 0.45, 0.25])
MEANS = np.array([[-0.6, -0.3], [0.5, 0.4], [0.4, -0.7]])
COVARIANCES = np.array([[[0.02, 0.01], [0.01, 0.03]], [[0.05, -0.02], [-0.02, 0.03]], [[0.02, 0.0], [0.0, 0.06]]])
MANY = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0] * np.sqrt(np.geomspace(0.05, 0.5, 64))
ONE = np.ones(1)
DATA = {
    "Gaussian": (ONE, np.array([[0.3, -0.2]]), np.array([[[0.25, 0.12], [0.12, 0.16]]])),
    "mixture": (WEIGHTS, MEANS, COVARIANCES),
    "Gaussian, 64 numbers": (ONE, np.linspace(-0.4, 0.4, 64)[None], (MANY @ MANY.T)[None]),
    "noise": (ONE, np.zeros((1, 2)), np.eye(2)[None]),
}
PLANE = ("Gaussian", "mixture")
VP, VE, EDM = continuous.vp_linear(t_min=1e-3), continuous.ve(0.01, 20.0), continuous.edm(0.005, 20.0)


def exact_eps(data: str, xt: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return -sigma times the score of a mixture noised to (alpha, sigma), each [B, 1]."""
    weights, means, covariances = DATA[data]
    values, bases = np.linalg.eigh(covariances)  # the noise is isotropic: it adds to the eigenvalues
    values, means, bases, log_weights = (jnp.asarray(a, xt.dtype) for a in (values, means, bases, np.log(weights)))
    total = alpha[:, :, None] ** 2 * values[None] + sigma[:, :, None] ** 2
    turned = jnp.einsum("kij,bki->bkj", bases, xt[:, None, :] - alpha[:, :, None] * means[None])
    log_share = log_weights[None] - 0.5 * jnp.sum(turned**2 / total + jnp.log(total), axis=-1)
    share = jax.nn.softmax(log_share, axis=-1)
    return sigma * jnp.einsum("bk,kij,bkj->bi", share, bases, turned / total)


def log_density(data: str, x: np.ndarray, alpha: float = 1.0, sigma: float = 0.0) -> np.ndarray:
    """Return the log density of the data, noised to (alpha, sigma)."""
    total = 0.0
    for weight, mean, covariance in zip(*DATA[data], strict=True):
        covariance = alpha**2 * covariance + sigma**2 * np.eye(2)
        from_mean = x - alpha * mean
        square = np.einsum("bi,ij,bj->b", from_mean, np.linalg.inv(covariance), from_mean)
        total = total + weight * np.exp(-0.5 * square) / (2 * np.pi * math.sqrt(np.linalg.det(covariance)))
    return np.log(total)


def draws(data: str, n: int, seed: int) -> np.ndarray:
    """Return exact draws."""
    weights, means, covariances = DATA[data]
    rng = np.random.default_rng(seed)
    which = rng.choice(len(weights), n, p=weights)
    roots = np.linalg.cholesky(covariances)
    return means[which] + np.einsum("bij,bj->bi", roots[which], rng.standard_normal((n, means.shape[1])))


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared energy distance 2 E|A - B| - E|A - A'| - E|B - B'| (Szekely & Rizzo 2013)."""
    return 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()


def moments(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of the data."""
    weights, means, covariances = DATA[data]
    mean = weights @ means
    centred = means - mean
    return mean, np.einsum("k,kij->ij", weights, covariances) + np.einsum("k,ki,kj->ij", weights, centred, centred)


def discrete(betas: np.ndarray, spec: str) -> tuple:
    """Return a respaced process and the exact denoiser of its long form, for any data."""
    long = make_process(betas, dtype=jnp.float64)

    def denoiser(data: str) -> Callable:
        at = lambda table, t: table[t][:, None]
        return lambda xt, t: exact_eps(data, xt, at(long.alpha, t), at(long.sigma, t))

    return respace(long, spec), denoiser


def in_time(schedule: continuous.Schedule, times: np.ndarray) -> tuple:
    """Return a discretised schedule and its exact denoiser."""

    def denoiser(data: str) -> Callable:
        return lambda xt, t: exact_eps(data, xt, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None])

    return continuous.discretize(schedule, times, dtype=jnp.float64), denoiser


def samplers() -> dict[str, tuple[Step | Callable, tuple, int]]:
    """Return name -> (step, (process, denoiser), network calls)."""
    cosine = lambda spec: discrete(cosine_betas(1000), spec)
    vp, ve = in_time(VP, continuous.uniform_times(VP, 500)), in_time(VE, continuous.uniform_times(VE, 500))
    edm = in_time(EDM, continuous.karras_times(EDM, 60))
    return {
        "ancestral": (ancestral_step(), cosine("1000"), 1000),
        "ancestral, Analytic-DPM's variance": (None, cosine("250"), 250),
        "DDIM, eta 1": (ddim_step(1.0), cosine("1000"), 1000),
        "DDIM": (ddim_step(), cosine("250"), 250),
        "DPM-Solver++ 2M": (dpm_solver_step(2), cosine("50"), 50),
        "DPM-Solver++ 3M": (dpm_solver_step(3), cosine("50"), 51),
        "SDE-DPM-Solver++ 2M": (dpm_solver_step(2, sde=True), cosine("250"), 250),
        "UniPC 2": (unipc_step(2), cosine("50"), 50),
        "PLMS": (plms_step(), discrete(linear_betas(1000), "100"), 101),
        "Heun": (heun_step(), cosine("50"), 99),
        "Heun with churn, EDM": (heun_step(0.2), edm, 119),
        "reverse diffusion, VP": (reverse_diffusion_step(), vp, 500),
        "reverse SDE, Euler-Maruyama, VP": (euler_maruyama_step(VP), vp, 500),
        "reverse SDE, Euler-Maruyama, VE": (euler_maruyama_step(VE), ve, 500),
    }


ODE = {
    "DDIM": (ddim_step(), 1),
    "DPM-Solver++ 2M": (dpm_solver_step(2), 2),
    "DPM-Solver++ 3M": (dpm_solver_step(3), 3),
    "UniPC 2": (unipc_step(2), 3),
    "PLMS": (plms_step(), 2),
    "Heun": (heun_step(), 2),
}


def slope(step: Step) -> float:
    """Return the slope of log error against log step, on the mixture's probability-flow ODE, short of the data.

    The linear schedule with T = 8001, from its end to step 2400; the reference is DPM-Solver++ 3M at a stride of 2.
    """
    process = make_process(linear_betas(8001), dtype=jnp.float64)
    at = lambda table, t: table[t][:, None]
    denoise = lambda xt, t: exact_eps("mixture", xt, at(process.alpha, t), at(process.sigma, t))
    start = jnp.asarray(np.random.default_rng(0).standard_normal((16, 2)))

    def end(stride: int, step: Step) -> np.ndarray:
        short = respace(process, list(range(2400, 8001, stride)))
        run = jax.jit(
            lambda x: sample(
                short, denoise, example_keys(jax.random.key(0), 16), (2,), step=step, x_init=x, trajectory=True
            )[1][-2]
        )
        return np.asarray(run(start))

    reference, strides = end(2, dpm_solver_step(3)), [40, 20, 10]
    errors = [np.abs(end(stride, step) - reference).max() for stride in strides]
    return float(np.polyfit(np.log(strides), np.log(errors), 1)[0])


def main() -> None:
    """Print the table."""
    print(
        "| sampler | network calls | data | error of the mean | of the covariance | energy distance | order (slope) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (step, (process, denoiser), calls) in samplers().items():
        order = f"{ODE[name][1]} ({slope(ODE[name][0]):.2f})" if name in ODE else ""
        for data in PLANE:
            row(name, calls, data, draw(process, denoiser(data), step, data), order)
    for data in PLANE:
        x0, used = draw_adaptively(in_time(VP, np.array([1.0]))[1](data))
        row("probability flow, adaptive", round(used), data, x0)
    process, denoiser = in_time(VE, continuous.uniform_times(VE, 500))
    for data in (*PLANE, "Gaussian, 64 numbers"):
        row("predictor-corrector, VE", 1000, data, draw(process, denoiser(data), predictor_corrector_step(), data))
    editing()
    print()
    likelihoods()


def editing() -> None:
    """Print the rows of what starts from data."""
    for data in PLANE:
        given, keys = jnp.asarray(draws(data, N, 5)), example_keys(jax.random.key(1), N)
        process, denoiser = discrete(cosine_betas(1000), "1000")
        denoise = denoiser(data)
        x0 = jax.jit(lambda x: sdedit(process, denoise, keys, x, strength=0.5))(given)  # noqa: B023
        row("SDEdit of draws, strength 0.5", 500, data, np.asarray(x0))
        short = respace(process, "250")
        step = repaint_step(given, jnp.asarray([[True, False]]))
        x0 = jax.jit(lambda keys: sample(short, denoise, keys, (2,), step=step))(keys)  # noqa: B023
        row("RePaint of draws, one number known", 2491, data, np.asarray(x0))
        xt = jax.jit(lambda x: invert(short, denoise, x))(given)  # noqa: B023
        row(f"DDIM inversion of draws, {data}", 250, "noise", np.asarray(xt))


def draw(process: GaussianProcess, denoise: Denoiser, step: Step | None, data: str) -> np.ndarray:
    """Return N draws; without a step by Analytic-DPM, its variance estimated from exact data."""
    if step is None:
        keys = example_keys(jax.random.key(7), 2000)
        step = analytic_step(analytic_moments(process, denoise, keys, jnp.asarray(draws(data, 2000, 99))))
    shape = DATA[data][1].shape[1:]
    run = jax.jit(lambda keys: sample(process, denoise, keys, shape, step=step))
    return np.asarray(run(example_keys(jax.random.key(0), N)))


def draw_adaptively(denoise: Denoiser) -> tuple[np.ndarray, float]:
    """Return N draws of the adaptive solver and the mean number of network calls."""
    x0, used = jax.jit(lambda keys: ode_sample(VP, denoise, keys, (2,)))(example_keys(jax.random.key(0), N))
    return np.asarray(x0), float(used.mean())


@functools.cache
def usual(data: str) -> float:
    """Return the energy distance that 95 % of pairs of exact sets of draws stay below."""
    return float(
        np.quantile([energy_distance(draws(data, N, 2 * i), draws(data, N, 2 * i + 1)) for i in range(10)], 0.95)
    )


def row(name: str, calls: int, data: str, x0: np.ndarray, order: str = "") -> None:
    """Print one line."""
    mean, covariance = moments(data)
    errors = np.abs(x0.mean(0) - mean).max(), np.abs(np.cov(x0.T) - covariance).max()
    distance = energy_distance(x0, draws(data, N, 1000)) / usual(data)
    print(f"| {name} | {calls} | {data} | {errors[0]:.4f} | {errors[1]:.4f} | {distance:.2f} | {order} |", flush=True)


def likelihoods() -> None:
    """Print the second table."""
    print("| likelihood | data | bits/dim, exact | found | difference | its standard error |")
    print("| --- | --- | --- | --- | --- | --- |")
    b = 1e-3 * 0.1 + 0.5 * 1e-6 * 19.9
    for data in PLANE:
        x = draws(data, 256, 5)
        denoise = in_time(VP, np.array([1.0]))[1](data)
        exact = -log_density(data, x, math.exp(-b / 2), math.sqrt(-math.expm1(-b))) / (2 * math.log(2))
        keys = example_keys(jax.random.key(0), 256)
        for probe in ("exact", "rademacher", "gaussian"):
            run = jax.jit(lambda x: ode_log_likelihood(VP, denoise, keys, x, probe=probe)[0])  # noqa: B023
            found = -np.asarray(run(jnp.asarray(x))) / (2 * math.log(2))
            likelihood_row(f"probability flow, {probe}", data, exact, found)
    bound_row()


def likelihood_row(name: str, data: str, exact: np.ndarray, found: np.ndarray) -> None:
    """Print one line of the second table."""
    error = (found - exact).std() / len(found) ** 0.5
    numbers = f"{exact.mean():.5f} | {found.mean():.5f} | {(found - exact).mean():+.5f} | {error:.5f}"
    print(f"| {name} | {data} | {numbers} |", flush=True)


def bound_row(levels: int = 64, n: int = 2**14) -> None:
    """Print the line of the variational bound, of pixels in 8 bits and the exact denoiser of N(0.1, 0.5^2)."""
    betas, mean, std = cosine_betas(100), 0.1, 0.5
    process = make_process(betas, dtype=jnp.float64)
    x0 = 2 * np.linspace(64, 192, levels).round() / 255 - 1

    def denoise(xt: jax.Array, t: jax.Array) -> jax.Array:
        alpha_bar = process.alpha_bar[t][:, None]
        total = alpha_bar * std**2 + 1 - alpha_bar
        return mean + jnp.sqrt(alpha_bar) * std**2 * (xt - jnp.sqrt(alpha_bar) * mean) / total

    data = jnp.broadcast_to(jnp.asarray(x0), (n, levels))
    run = jax.jit(lambda keys: variational_bound(process, denoise, keys, data, prediction="x0")["total"])
    exact = bound_expected(betas, x0, mean, std).mean()
    likelihood_row("variational bound, T = 100", "pixels", exact, np.asarray(run(example_keys(jax.random.key(0), n))))


def bound_expected(betas: np.ndarray, x0: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Return the expectation over the noise of the bound of pixels x0, in bits: every term is a Gaussian's moment."""
    alpha_bar = np.cumprod(1 - betas)
    previous = np.append(1.0, alpha_bar[:-1])
    variance, share = betas * (1 - previous) / (1 - alpha_bar), betas * np.sqrt(previous) / (1 - alpha_bar)
    slope = np.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)  # of the estimate of x0 in x_t
    bias = (x0[:, None] - mean) * (1 - slope * np.sqrt(alpha_bar))
    square = bias**2 + slope**2 * (1 - alpha_bar)
    prior = 0.5 * (alpha_bar[-1] * x0**2 - alpha_bar[-1] - np.log1p(-alpha_bar[-1]))
    # L_0 has no closed form but a smooth integrand: Gauss-Hermite quadrature.
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    away = np.abs(bias[:, :1] - slope[0] * np.sqrt(1 - alpha_bar[0]) * nodes)  # by symmetry: the lower tail is exact
    upper, lower = (log_ndtr((edge / 255 - away) / math.sqrt(variance[1])) for edge in (1, -1))
    last = -(upper + np.log1p(-np.exp(lower - upper))) @ weights / weights.sum()
    terms = 0.5 * share[1:] ** 2 * square[:, 1:] / variance[1:]
    return (prior + last + terms.sum(1)) / math.log(2)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
