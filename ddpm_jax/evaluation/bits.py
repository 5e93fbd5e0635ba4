"""Bits per dimension of images under a diffusion model: the variational bound, step by step, and the exact likelihood.

A model with T steps is a variational autoencoder of T layers (Ho et al. 2020, section 4.3): x_T costs L_T, and x_{t-1}
costs L_{t-1} where x_t is known. The bits so far are the rate, and the error of the clean image that the network
predicts from x_t is the distortion; both together say what the bits are spent on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.continuous import Schedule, from_log_snr
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.guidance import static_threshold
from ddpm_jax.diffusion.likelihood import bits_per_dimension, dequantize, ode_log_likelihood, variational_bound
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.schedules import respaced_timesteps
from ddpm_jax.errors import counted
from ddpm_jax.evaluation.compare import Measure
from ddpm_jax.evaluation.conditions import averages, check_size, is_upsampler, labels_of
from ddpm_jax.evaluation.images import ImageSet, share_of
from ddpm_jax.evaluation.summary import gather_arrays
from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel import hosts
from ddpm_jax.parallel.mesh import data_sharding, make_local_mesh, replicated
from ddpm_jax.pipelines.request import image_keys
from ddpm_jax.pipelines.upsampling import denoiser
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import to_float

_LEVELS = 127.5  # of 8-bit images in a unit of [-1, 1]


@dataclasses.dataclass(frozen=True)
class Bound:
    """The variational bound of a set of images, in bits per dimension.

    Attributes:
        timesteps: int[K], those of the K layers.
        totals: float64[N], of each image, with one noise sample a layer.
        prior: L_T, the mean over images.
        terms: float64[K], L_0 .. L_{K-1}, means.
        rate: float64[K], the bits that are known with x_t: L_T and the terms of the layers above.
        distortion: float64[K], the root mean squared error of the predicted clean image, in levels of [0, 255].
    """

    timesteps: np.ndarray
    totals: np.ndarray
    prior: float
    terms: np.ndarray
    rate: np.ndarray
    distortion: np.ndarray

    def measure(self, *, replicates: int, seed: int) -> Measure:
        """Return the mean over images with its interval."""
        note = f"variational bound of {len(self.timesteps)} layers, {counted(len(self.totals), 'image')}"
        how = {"replicates": replicates, "seed": seed, "note": note}
        return Measure.of_means("bits per dimension (bound)", self.totals, **how)

    def as_json(self) -> dict[str, Any]:
        """Return all numbers as plain data."""
        arrays = {name: getattr(self, name).tolist() for name in ("timesteps", "terms", "rate", "distortion")}
        return {"total": float(self.totals.mean()), "prior": self.prior, "images": len(self.totals), **arrays}


def measure_bound(
    model: Model,
    images: ImageSet,
    *,
    layers: str | int | Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    update: Callable[[int], Any] = lambda count: None,
) -> Bound:
    """Measure the variational bound of images; all devices and hosts share them.

    Args:
        model: a diffusion model of images; x0 is clipped, as in the published numbers. Of an upsampler the bits are
            those of an image whose averages are known, log p(x | low resolution), without noise on them.
        images: of the model's size, with labels if it is class-conditional and has no null class.
        layers: timesteps of a shorter model (`schedules.respaced_timesteps`); None takes all.
        seed: of the noise; image i depends on it and i alone.
        batch_size: images at a time.
        update: called with the number of images each time some are done.

    Raises:
        ValueError: if the images do not fit the model, or it has no such layers.
        FloatingPointError: if the network returns NaN or infinity.
    """
    diffusion = model.diffusion
    check_layers(diffusion, layers)
    process = diffusion.process if layers is None else diffusion.respaced(layers)
    how = {"prediction": diffusion.prediction, "variance": diffusion.variance, "x0_transform": static_threshold(1.0)}

    def bound(model: Model, x: jax.Array, inputs: dict[str, jax.Array], keys: jax.Array) -> dict[str, jax.Array]:
        return variational_bound(process, denoiser(model, **inputs), keys, to_float(x), **how)

    found = _of_all_images(jax.jit(bound), model, images, seed, batch_size, update)
    _check_finite(found["total"])
    terms, prior = found["terms"].mean(0), float(found["prior"].mean())
    noise = np.asarray(process.sigma, np.float64) / np.asarray(process.alpha, np.float64)
    above = np.concatenate([np.cumsum(terms[::-1])[::-1][1:], [0.0]])
    distortion = _LEVELS * noise * np.sqrt(found["mse"].mean(0))
    return Bound(np.asarray(process.timestep_map), found["total"], prior, terms, prior + above, distortion)


def check_layers(diffusion: Diffusion, layers: str | int | Sequence[int] | None, *, name: str = "layers") -> None:
    """Raise ValueError, with the name of the argument, if a process has no such timesteps; None is all of them."""
    try:
        if layers is not None:
            respaced_timesteps(diffusion.num_steps, layers)
    except ValueError as error:
        raise ValueError(str(error).replace("spec=", f"{name}=", 1)) from None


def measure_exact(
    model: Model,
    images: ImageSet,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    tolerance: float = 1e-5,
    update: Callable[[int], Any] = lambda count: None,
) -> tuple[np.ndarray, float]:
    """Measure the likelihood of dequantised images by the probability-flow ODE (`diffusion.likelihood`).

    Arguments as in `measure_bound`; tolerance: absolute and relative, of the solver, in (0, 1e-4], because it must
    resolve the noise of dequantisation, 0.002 in [-1, 1]. The process is continued between its steps by
    `between_steps`; x at the first step counts as the image.

    Returns:
        Bits per dimension of each image, float64[N], and the mean number of network calls.

    Raises:
        ValueError: if the tolerance is out of range, or the images do not fit the model.
        FloatingPointError: if the network returns NaN or infinity.
    """
    if not 0.0 < tolerance <= 1e-4:
        raise ValueError(f"{tolerance=} must be in (0, 1e-4], far below the noise of dequantisation")
    diffusion = model.diffusion
    schedule, network_time = _continuous(diffusion)

    def exact(model: Model, x: jax.Array, inputs: dict[str, jax.Array], keys: jax.Array) -> dict[str, jax.Array]:
        noise, probes = (jax.vmap(jax.random.fold_in, (0, None))(keys, n) for n in (0, 1))
        channels = x.shape[-1]
        predict = lambda x, t, given=None: denoiser(model, **(given or {}))(x, network_time(t))[..., :channels]
        options = {"prediction": diffusion.prediction, "rtol": tolerance, "atol": tolerance, "cond": inputs or None}
        log_p, calls = ode_log_likelihood(schedule, predict, probes, dequantize(noise, x), **options)
        return {"bits": bits_per_dimension(log_p, x[0].size), "calls": calls}

    found = _of_all_images(jax.jit(exact), model, images, seed, batch_size, update)
    _check_finite(found["bits"])
    return found["bits"], float(found["calls"].mean())


def _continuous(diffusion: Diffusion) -> tuple[Schedule, Callable[[jax.Array], jax.Array]]:
    """Return the process in continuous time, and what the network receives at its times."""
    own = diffusion.continuous  # where training is in continuous time
    if own is not None and float(own.sigma(jnp.float32(own.t_min))) > 0.0:
        return own, diffusion.network_time
    process = diffusion.process
    steps = jnp.arange(process.num_steps, dtype=jnp.float32)
    received = jnp.asarray(process.timestep_map, jnp.float32)
    return between_steps(process), lambda t: jnp.interp(t, steps, received)


def between_steps(process: GaussianProcess) -> Schedule:
    """Return a process in continuous time, t in [0, T - 1], that equals a discrete one at its steps.

    The log-SNR is a monotone cubic between them (Fritsch and Butland 1984), so that the ODE's field is continuous.

    Raises:
        ValueError: if the process does not preserve variance, has one step, or ends without signal.
    """
    if not process.variance_preserving or process.num_steps < 2 or process.zero_terminal:
        raise ValueError("the exact likelihood needs a process with alpha^2 + sigma^2 = 1 and a signal at each step")
    values = 2.0 * (np.log(np.asarray(process.alpha, np.float64)) - np.log(np.asarray(process.sigma, np.float64)))
    steps = np.diff(values)
    inner = 2.0 * steps[1:] * steps[:-1] / (steps[1:] + steps[:-1])
    slopes = np.concatenate([steps[:1], inner, steps[-1:]])
    y, m = jnp.asarray(values, jnp.float32), jnp.asarray(slopes, jnp.float32)

    def log_snr(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t)
        i = jnp.clip(jnp.floor(t).astype(jnp.int32), 0, len(values) - 2)
        s = t - i
        rise = s * s * (3.0 - 2.0 * s)
        return y[i] + (y[i + 1] - y[i]) * rise + m[i] * s * (1.0 - s) ** 2 - m[i + 1] * s * s * (1.0 - s)

    return from_log_snr(log_snr, t_min=0.0, t_max=float(process.num_steps - 1))


def _of_all_images(
    program: Callable[..., dict[str, jax.Array]],
    model: Model,
    images: ImageSet,
    seed: int,
    batch_size: int | None,
    update: Callable[[int], Any],
) -> dict[str, np.ndarray]:
    """Return what a program computes of every image, float64[N, ...], on every host."""
    mesh = make_local_mesh(at_most=batch_size or images.batch_size)
    size = -(-min(batch_size or images.batch_size, len(images)) // mesh.size) * mesh.size
    model, parts, own = jax.device_put(model, replicated(mesh)), [], share_of(len(images))
    for begin in range(own.start, own.stop, size):
        end = min(begin + size, own.stop)
        hosts.current().busy(f"bits per dimension of image {begin}")
        batch = images.read(begin, end)
        rows = np.minimum(np.arange(size), end - begin - 1)
        index = (begin + rows).astype(np.int32)
        x, inputs = _inputs(model, batch, images, begin)
        x, inputs, index = jax.device_put(
            (x[rows], {k: v[rows] for k, v in inputs.items()}, index), data_sharding(mesh)
        )
        found = program(model, x, inputs, image_keys(jnp.uint32(seed), index))
        parts.append({name: np.asarray(values, np.float64)[: end - begin] for name, values in found.items()})
        update(end - begin)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    gathered = [joined] if jax.process_count() == 1 else gather_arrays(joined)
    return {name: np.concatenate([part[name] for part in gathered]) for name in joined}


def _inputs(
    model: Model, batch: dict[str, Any], images: ImageSet, begin: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the images and the conditions of a batch, as the network takes them."""
    image, inputs = batch["image"][..., : model.metadata.get("channels", 3)], {}
    check_size(model, batch, images)
    known = {"labels", "low_resolution"} if is_upsampler(model) else {"labels"}
    odd = set(model.metadata.get("conditions", ())) - known
    if odd:
        raise ValueError(
            f"the model is conditioned on {min(odd)}; bits per dimension are of images, given their labels or averages"
        )
    labels = labels_of(model, batch, images, begin)
    if labels is not None:
        inputs["y"] = labels
    if is_upsampler(model):
        inputs["low_res"] = np.asarray(to_float(averages(model, image)))
        if model.metadata["low_resolution"].get("noise_level_input", False):
            inputs["noise_level"] = np.zeros(len(image), np.float32)
    return image, inputs


def _check_finite(values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise FloatingPointError(
            f"bits per dimension of image {bad[0]} are not finite: the network returns NaN or infinity"
        )


# ---- The table and the plot ------------------------------------------------------------------------------------------


def table(bound: Bound, rows: int = 12) -> str:
    """Return rate and distortion of some layers as a Markdown table, the noisiest first; the rest is in the JSON."""
    count = len(bound.timesteps)
    numbers = range(1, count + 1) if count <= rows else (round(i) for i in np.geomspace(1, count, rows))
    chosen = sorted(set(numbers), reverse=True)
    lines = ["| t | rate (bits/dim) | L_t (bits/dim) | distortion (RMSE of 255) |", "| ---: | ---: | ---: | ---: |"]
    for i in (number - 1 for number in chosen):
        numbers = (f"{bound.rate[i]:.5f}", f"{bound.terms[i]:.6f}", f"{bound.distortion[i]:.3f}")
        lines.append(f"| {bound.timesteps[i]:.6g} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def save_plot(path: Path, bound: Bound) -> None:
    """Draw distortion against rate, and both against the timestep, as figures 5 and 10 of Ho et al. 2020 do.

    Raises:
        ImportError: without matplotlib.
    """
    with needs_extra("examples"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(bound.timesteps, bound.distortion)
    left.set(xlabel="t, as the network is given it", ylabel="distortion (RMSE of 255)")
    middle.plot(bound.timesteps, bound.rate)
    middle.set(xlabel="t, as the network is given it", ylabel="rate (bits/dim)")
    right.plot(bound.rate, bound.distortion)
    right.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE of 255)")
    figure.savefig(path, dpi=120)
