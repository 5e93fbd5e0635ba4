"""Length of a Langevin step of ``predictor_corrector_step``: three rules on data whose score is known.

    python examples/langevin_step.py

prints the table of docs/samplers.md. The step is x <- x + c score + sqrt(2 c) z with c = 2 (r |z| / |score|)^2 and
r = 0.16, on the VE process of 500 steps, one corrector step at each. The rules differ in the norms:

    of one example   |z| and |score| of the example that is moved
    batch means      |z| and |score| averaged over the batch (the published code)
    expected         sqrt(D) and sqrt(D) / sigma (``predictor_corrector_step``)

The data are Gaussians in D dimensions whose variances are all 1, or spaced geometrically from 1e-4 to 1, and in 3
dimensions two modes, the second with a probability of 0.001. Printed are the mean ratio of the variance of the samples
to that of the data, that of the tenth of the dimensions with the smallest variances, and the share of the second mode.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import example_keys, sample
from ddpm_jax.diffusion import continuous
from ddpm_jax.diffusion.samplers import Point, predictor_corrector_step, reverse_diffusion_step
from ddpm_jax.diffusion.samplers.noise import per_example_normal, transition_keys
from ddpm_jax.types import PredictFn, Step

SNR = 0.16
SCHEDULE = continuous.ve(0.002, 20.0)
SAMPLES = {1: 16384, 3: 8192, 16: 4096, 64: 1024, 3072: 128}
MODES, RARE = 131072, 0.001


def norms_rule(over_batch: bool) -> Step:
    """Return the predictor-corrector step whose norms are measured, in one example or over the batch."""
    predictor = reverse_diffusion_step()

    def norm(x: jax.Array) -> jax.Array:
        each = jnp.sqrt(jnp.sum(jnp.square(x), axis=1, keepdims=True))
        return jnp.mean(each, keepdims=True) if over_batch else each

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        score = -predict_fn(xt, here).eps / here.sigma
        z = per_example_normal(transition_keys(keys, 1), xt)
        c = 2.0 * jnp.square(here.alpha / there.alpha * SNR * norm(z) / norm(score))
        xt = xt + c * score + jnp.sqrt(2.0 * c) * z
        return predictor.update(predict_fn, transition_keys(keys, 0), xt, here, there, carry)

    return Step(update, predictor.init)


RULES = {
    "no corrector": reverse_diffusion_step(),
    "norms of one example": norms_rule(over_batch=False),
    "batch means (published)": norms_rule(over_batch=True),
    "expected norms (here)": predictor_corrector_step(snr=SNR),
}


def draw(step: Step, eps: Callable[[jax.Array, jax.Array], jax.Array], n: int, dimensions: int) -> np.ndarray:
    """Return n samples."""
    process = continuous.discretize(SCHEDULE, continuous.uniform_times(SCHEDULE, 500))
    denoise = lambda xt, t: eps(xt, SCHEDULE.sigma(t)[:, None])
    run = jax.jit(lambda keys: sample(process, denoise, keys, (dimensions,), step=step))
    return np.asarray(run(example_keys(jax.random.key(0), n)), np.float64)


def variance_ratios(step: Step, dimensions: int, condition: float) -> tuple[float, float]:
    """Return the mean ratio of variances over all dimensions and over the tenth with the smallest ones."""
    variances = np.geomspace(1.0 / condition, 1.0, dimensions)
    table = jnp.asarray(variances, jnp.float32)[None]
    x0 = draw(step, lambda xt, sigma: sigma * xt / (table + sigma**2), SAMPLES[dimensions], dimensions)
    ratios = np.mean(x0**2, axis=0) / variances
    return float(ratios.mean()), float(ratios[: math.ceil(dimensions / 10)].mean())


def rare_share(step: Step) -> float:
    """Return the share of samples in a mode of probability RARE, three away from the other, of deviation 0.3."""
    means = jnp.asarray([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    log_weights = jnp.log(jnp.asarray([[1.0 - RARE, RARE]]))

    def eps(xt: jax.Array, sigma: jax.Array) -> jax.Array:
        total = 0.3**2 + sigma**2
        away = xt[:, None] - means[None]
        share = jax.nn.softmax(log_weights - 0.5 * jnp.sum(away**2, axis=-1) / total, axis=-1)
        return sigma * jnp.sum(share[..., None] * away, axis=1) / total

    return float((draw(step, eps, MODES, 3)[:, 0] > 1.5).mean())


def main() -> None:
    """Print the table."""
    columns = [(dimensions, condition) for condition in (1.0, 1e4) for dimensions in SAMPLES]
    columns.remove((1, 1e4))
    names = [f"D = {dimensions}" + (", 1e4" if condition > 1.0 else "") for dimensions, condition in columns]
    print("| norms | " + " | ".join(names) + f" | mode of {RARE:g} |")
    print("| --- |" + " --- |" * (len(columns) + 1))
    for name, step in RULES.items():
        cells = []
        for dimensions, condition in columns:
            mean, smallest = variance_ratios(step, dimensions, condition)
            cells.append(f"{mean:.3g}" + (f" ({smallest:.3g})" if condition > 1.0 else ""))
        print(f"| {name} | " + " | ".join(cells) + f" | {rare_share(step):.5f} |", flush=True)


if __name__ == "__main__":
    main()
