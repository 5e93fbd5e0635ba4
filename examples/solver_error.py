"""Distance of each sampler from the exact answer against its network calls: the figure of docs/samplers.md.

    pip install -e '.[examples]'
    python examples/solver_error.py [--out DIR]

The data are the mixture of exact_answers.py, whose network is known in closed form; everything runs in float64 on the
linear schedule of 1000 steps, respaced. Left, samplers without noise: the distance of a sample from where the
probability flow leads from the same noise, averaged over 256 of them. Right, samplers that draw noise: the energy
distance of 2000 samples to as many exact draws, as a multiple of what two sets of exact draws have, 95 % of the time.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from exact_answers import N, discrete, draw, draws, energy_distance, exact_eps, usual
from scipy.integrate import solve_ivp

from ddpm_jax import ancestral_step, ddim_step, example_keys, linear_betas, make_process, sample
from ddpm_jax.diffusion.samplers import dpm_solver_step, heun_step, plms_step, unipc_step
from ddpm_jax.types import Step

STEPS = (4, 6, 8, 12, 18, 27, 40, 60, 100, 200)
ODE = {  # the step, and the network calls of n steps
    "DDIM": (ddim_step(), lambda n: n),
    "Heun": (heun_step(), lambda n: 2 * n - 1),
    "PLMS": (plms_step(), lambda n: n + 1),
    "DPM-Solver++ 2M": (dpm_solver_step(2), lambda n: n),
    "DPM-Solver++ 3M": (dpm_solver_step(3), lambda n: n + 1),
    "UniPC 2": (unipc_step(2), lambda n: n),
}
SDE = {
    "ancestral": ancestral_step(),
    "ancestral, Analytic-DPM's variance": None,
    "DDIM, eta 1": ddim_step(1.0),
    "SDE-DPM-Solver++ 2M": dpm_solver_step(2, sde=True),
}


def flow(start: np.ndarray) -> np.ndarray:
    """Return where the probability flow dy/ds = eps, y = x / alpha, s = sigma / alpha, leads from x_T, at s = 0."""
    process = make_process(linear_betas(1000), dtype=jnp.float64)
    alpha = float(process.alpha[-1])
    high, low = float(process.sigma[-1]) / alpha, 1e-6

    @jax.jit
    def velocity(log_s: jax.Array, y: jax.Array) -> jax.Array:
        s = jnp.broadcast_to(jnp.exp(log_s), (len(start), 1))
        alpha = 1 / jnp.sqrt(1 + s**2)
        return (s * exact_eps("mixture", alpha * y.reshape(start.shape), alpha, alpha * s)).ravel()

    solved = solve_ivp(
        velocity, (np.log(high), np.log(low)), (start / alpha).ravel(), method="DOP853", rtol=1e-9, atol=1e-9
    )
    return solved.y[:, -1].reshape(start.shape)


def distance(step: Step, num_steps: int, start: np.ndarray, end: np.ndarray) -> float:
    """Return the mean distance between what a solver without noise draws and the end of the flow."""
    process, denoiser = discrete(linear_betas(1000), str(num_steps))
    keys = example_keys(jax.random.key(0), len(start))
    run = jax.jit(lambda x: sample(process, denoiser("mixture"), keys, (2,), step=step, x_init=x))
    return float(np.linalg.norm(np.asarray(run(start)) - end, axis=1).mean())


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="directory of the figure")
    out = parser.parse_args().out
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    start = np.random.default_rng(0).standard_normal((256, 2))
    end = flow(start)
    for name, (step, calls) in ODE.items():
        errors = [distance(step, n, start, end) for n in STEPS]
        left.loglog([calls(n) for n in STEPS], errors, "o-", ms=4, label=name)
        print(f"{name}: " + ", ".join(f"{calls(n)}: {error:.2g}" for n, error in zip(STEPS, errors, strict=True)))
    exact = draws("mixture", N, 1000)
    for name, step in SDE.items():
        drawn = (draw(*with_data(n), step, "mixture") for n in STEPS)
        ratios = [energy_distance(x0, exact) / usual("mixture") for x0 in drawn]
        right.loglog(STEPS, ratios, "o-", ms=4, label=name)
        print(f"{name}: " + ", ".join(f"{n}: {ratio:.2g}" for n, ratio in zip(STEPS, ratios, strict=True)))
    right.axhline(1.0, color="grey", lw=0.8, ls="--")
    left.set(xlabel="network calls", ylabel="distance from the probability flow's end", title="Without noise")
    right.set(xlabel="network calls", ylabel="energy distance, of exact draws = 1", title="With noise")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3, which="both")
    plt.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    plt.savefig(out / "samplers.png", dpi=110)
    print(f"wrote {out / 'samplers.png'}")


def with_data(num_steps: int) -> tuple:
    """Return a respaced process and the exact denoiser of the mixture."""
    process, denoiser = discrete(linear_betas(1000), str(num_steps))
    return process, denoiser("mixture")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
