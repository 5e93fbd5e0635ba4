"""Write tests/data/published_diffusion.npz: what OpenAI's published code and diffusers compute, for test_published.py.

    pip install torch guided-diffusion-sdk diffusers
    python tests/parity/make_published_diffusion.py

guided-diffusion-sdk is openai/guided-diffusion under another name. All of it runs in float64: the published code rounds
its tables to float32 when it reads them, which is turned off here. The "network" is a formula that both can compute.
"""

from pathlib import Path

import numpy as np
import torch
from guided_diffusion import gaussian_diffusion as published
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

OUT = Path(__file__).parent.parent / "data" / "published_diffusion.npz"
SPECS = ["10", "25", "27", "50", "100", "250", "1000", "10,10,3,2,2", "10,10,10", "ddim25", "ddim50", "ddim250"]
SHAPE = (2, 3, 4, 4)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return a prediction and a variance half in [-1, 1], as test_published.py does in numpy's terms."""
    level = t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000.0
    return torch.cat([0.8 * torch.tanh(x) + 0.1 * level, torch.sin(3.0 * x + level)], dim=1)


def prediction(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the first half of it."""
    return network(x, t)[:, :3]


def exact_extract(array: np.ndarray, timesteps: torch.Tensor, shape: tuple) -> torch.Tensor:
    """Read a table without rounding it to float32."""
    values = torch.from_numpy(np.asarray(array, np.float64))[timesteps]
    return values.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def diffusion(steps: int, schedule: str, spec: str, mean: str, var: str) -> SpacedDiffusion:
    """Return the published process."""
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, spec),
        betas=published.get_named_beta_schedule(schedule, steps),
        model_mean_type=published.ModelMeanType[mean],
        model_var_type=published.ModelVarType[var],
        loss_type=published.LossType.MSE,
        rescale_timesteps=False,
    )


def tables(out: dict) -> None:
    """Add betas, and the tables and timesteps of respaced processes."""
    for schedule in ("linear", "cosine"):
        for steps in (1000, 4000):
            out[f"betas/{schedule}/{steps}"] = published.get_named_beta_schedule(schedule, steps)
            for spec in SPECS:
                if spec == "ddim250" and steps == 1000:
                    continue
                short = diffusion(steps, schedule, spec, "EPSILON", "LEARNED_RANGE")
                key = f"{schedule}/{steps}/{spec}"
                out[f"timesteps/{key}"] = np.asarray(short.timestep_map)
                if spec not in ("25", "10,10,3,2,2", "ddim50", "250"):
                    continue
                out[f"tables/{key}"] = np.stack(
                    [
                        short.betas,
                        short.alphas_cumprod,
                        short.posterior_mean_coef1,
                        short.posterior_mean_coef2,
                        short.posterior_variance,
                        short.posterior_log_variance_clipped,
                    ]
                )


def trajectories(out: dict) -> None:
    """Add noise, and what the published loops make of it."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    noises = torch.randn((25, *SHAPE), generator=generator, dtype=torch.float64)
    out["start"], out["noises"] = start.numpy(), noises.numpy()
    ancestral = {
        "learned_range": ("LEARNED_RANGE", network),
        "fixed_small": ("FIXED_SMALL", prediction),
        "fixed_large": ("FIXED_LARGE", prediction),
    }
    original = torch.randn_like
    for schedule in ("linear", "cosine"):
        for variance, (var, model) in ancestral.items():
            for clip in (False, True):
                short = diffusion(1000, schedule, "25", "EPSILON", var)
                drawn = iter(noises)
                torch.randn_like = lambda x: next(drawn)  # noqa: B023
                states = [
                    step["sample"].numpy()
                    for step in short.p_sample_loop_progressive(
                        model, SHAPE, noise=start, clip_denoised=clip, device="cpu"
                    )
                ]
                out[f"ancestral/{schedule}/{variance}/{clip}"] = np.stack(states)
        for eta in (0.0, 0.5, 1.0):
            short = diffusion(1000, schedule, "25", "EPSILON", "FIXED_SMALL")
            drawn = iter(noises)
            torch.randn_like = lambda x: next(drawn)  # noqa: B023
            states = [
                step["sample"].numpy()
                for step in short.ddim_sample_loop_progressive(
                    prediction, SHAPE, noise=start, clip_denoised=True, device="cpu", eta=eta
                )
            ]
            out[f"ddim/{schedule}/{eta}"] = np.stack(states)
    torch.randn_like = original


def means(out: dict) -> None:
    """Add what the loops make of a network that predicts the mean, which needs all steps of its process."""
    start, noises = torch.from_numpy(out["start"]), torch.from_numpy(out["noises"])
    short = diffusion(25, "linear", "25", "PREVIOUS_X", "FIXED_SMALL")
    original = torch.randn_like
    for name, loop in {"ancestral": short.p_sample_loop, "ddim": short.ddim_sample_loop}.items():
        for clip in (False, True):
            drawn = iter(noises)
            torch.randn_like = lambda x: next(drawn)  # noqa: B023
            out[f"mean/{name}/{clip}"] = loop(prediction, SHAPE, noise=start, clip_denoised=clip, device="cpu").numpy()
    torch.randn_like = original


def bounds(out: dict) -> None:
    """Add the terms of the variational bound of images of eight bits."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, SHAPE)
    pixels[0, 0, 0, :2] = 0, 255  # the outermost bins are treated apart
    x0 = torch.from_numpy(pixels / 127.5 - 1)
    out["x0"] = x0.numpy()
    for schedule in ("linear", "cosine"):
        short = diffusion(1000, schedule, "25", "EPSILON", "LEARNED_RANGE")
        terms = []
        for t in range(25):
            at = torch.full((2,), t, dtype=torch.int64)
            noise = torch.from_numpy(out["noises"][t])
            xt = short.q_sample(x0, at, noise=noise)
            model = short._wrap_model(network)
            terms.append(short._vb_terms_bpd(model, x0, xt, at, clip_denoised=True)["output"].numpy())
        out[f"vlb/{schedule}"] = np.stack(terms)
        out[f"prior/{schedule}"] = short._prior_bpd(x0).numpy()


def diffusers_steps(out: dict) -> None:
    """Add trajectories of solvers that diffusers has, on timesteps of its own."""
    from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

    solvers = {
        "dpm": DPMSolverMultistepScheduler(
            beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2, lower_order_final=False
        ),
        "unipc": UniPCMultistepScheduler(beta_schedule="linear", solver_order=2, solver_type="bh2"),
        "plms": PNDMScheduler(beta_schedule="linear", skip_prk_steps=True, set_alpha_to_one=True),
    }
    for name, scheduler in solvers.items():
        scheduler.set_timesteps(20)
        x = torch.from_numpy(out["start"])
        states, timesteps = [], scheduler.timesteps.numpy()
        for t in scheduler.timesteps:
            x = scheduler.step(prediction(x, torch.full((2,), int(t))), t, x).prev_sample
            states.append(x.numpy())
        # PLMS makes its first step twice.
        out[f"{name}/timesteps"], out[f"{name}/states"] = np.unique(timesteps)[::-1], np.stack(states[-20:])


def main() -> None:
    """Write the file."""
    published._extract_into_tensor = exact_extract
    out: dict[str, np.ndarray] = {}
    tables(out)
    trajectories(out)
    means(out)
    bounds(out)
    diffusers_steps(out)
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {len(out)} arrays, {OUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
