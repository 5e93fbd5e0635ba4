"""Time 1000 ancestral steps of a trivial network: our loop, diffusers' and guided-diffusion's, in one run.

    pip install torch guided-diffusion-sdk diffusers
    python tests/parity/loop_overhead.py

The network, x -> 0.1 x, costs next to nothing, so what is timed is the loop: tables, posterior and noise. Each loop
draws every size several times, in turn, and the fastest of its times counts. The other loops are as their own
pipelines write them (diffusers) or their own function (`p_sample_loop`), in float32, without gradients and with all
threads. Nothing else should run beside it.
"""

import time
from collections.abc import Callable

import jax
import torch
from diffusers import DDPMScheduler
from guided_diffusion import gaussian_diffusion as published
from guided_diffusion.respace import SpacedDiffusion

from ddpm_jax.diffusion.process import make_process
from ddpm_jax.diffusion.samplers import example_keys, sample
from ddpm_jax.diffusion.schedules import linear_betas

STEPS, REPEATS = 1000, 5
SIZES = {"batch 1 of 16 x 16": (1, 16), "batch 16 of 32 x 32": (16, 32)}


def ours(batch: int, size: int) -> tuple[Callable[[], object], float]:
    """Return our loop, and the seconds that its compilation took."""
    keys, process = example_keys(jax.random.key(0), batch), make_process(linear_betas(STEPS))
    draw = jax.jit(lambda process, keys: sample(process, lambda x, t: 0.1 * x, keys, (size, size, 3)))
    start = time.perf_counter()
    compiled = draw.lower(process, keys).compile()
    return lambda: compiled(process, keys).block_until_ready(), time.perf_counter() - start


@torch.no_grad()
def diffusers_loop(batch: int, size: int) -> torch.Tensor:
    """The loop of diffusers' DDPMPipeline."""
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    image = torch.randn(batch, 3, size, size)
    for t in scheduler.timesteps:
        image = scheduler.step(0.1 * image, t, image).prev_sample
    return image


def guided_diffusion_loop(batch: int, size: int) -> Callable[[], torch.Tensor]:
    """Return guided-diffusion's p_sample_loop."""
    diffusion = SpacedDiffusion(
        use_timesteps=range(STEPS),
        betas=published.get_named_beta_schedule("linear", STEPS),
        model_mean_type=published.ModelMeanType.EPSILON,
        model_var_type=published.ModelVarType.FIXED_SMALL,
        loss_type=published.LossType.MSE,
        rescale_timesteps=False,
    )
    network = lambda x, t, **_: 0.1 * x  # noqa: E731
    return lambda: diffusion.p_sample_loop(network, (batch, 3, size, size), clip_denoised=False, device="cpu")


def main() -> None:
    """Print a table of seconds."""
    print("| 1000 ancestral steps | ddpm_jax | (compiled in) | diffusers | guided-diffusion | times faster |")
    print("|---|---|---|---|---|---|")
    for name, (batch, size) in SIZES.items():
        loop, compiled = ours(batch, size)
        loops = [loop, lambda b=batch, s=size: diffusers_loop(b, s), guided_diffusion_loop(batch, size)]
        best = [float("inf")] * 3
        for _ in range(REPEATS):
            for i, run in enumerate(loops):
                start = time.perf_counter()
                run()
                best[i] = min(best[i], time.perf_counter() - start)
        times = " and ".join(f"{b / best[0]:.1f}" for b in best[1:])
        print(
            f"| {name} | {best[0]:.3f} s | {compiled:.2f} s | {best[1]:.3f} s | {best[2]:.3f} s | {times} |", flush=True
        )


if __name__ == "__main__":
    main()
