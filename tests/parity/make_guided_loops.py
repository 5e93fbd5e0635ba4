"""Write tests/data/guided_loops.npz: what guided diffusion's loops draw with tiny networks, for test_guided_loops.py.

    pip install torch guided-diffusion-sdk
    python tests/parity/make_guided_loops.py

Noise is recorded, every weight is random (tests/random_weights.py). eps is xt plus a fifth of the network's output:
x0 of a random eps would be clipped to black and white everywhere. The classifier guides as scripts/classifier_sample.py
of openai/guided-diffusion has it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from guided_diffusion import gaussian_diffusion
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.unet import EncoderUNetModel, UNetModel

sys.path.append(str(Path(__file__).parent.parent))
from random_weights import random_weights

OUT = Path(__file__).parent.parent / "data" / "guided_loops.npz"
COMMON = {
    "image_size": 16, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": (2,),
    "channel_mult": (1, 2), "use_scale_shift_norm": True,
}  # fmt: skip
GUIDED = COMMON | {"num_head_channels": 16, "resblock_updown": True}
NETWORKS = {
    "adm": (UNetModel, GUIDED | {"out_channels": 6, "num_classes": 10}),
    "classifier": (EncoderUNetModel, GUIDED | {"out_channels": 10, "pool": "attention"}),
    "improved": (UNetModel, COMMON | {"out_channels": 6, "num_heads": 4}),
}
SCALE, SHAPE, STEPS = 30.0, (2, 3, 16, 16), 6


def diffusion(spec: str, schedule: str = "linear", steps: int = 1000, rescale: bool = False) -> SpacedDiffusion:
    """Return the process of the scripts, with learned variances; rescale stands for both flags of that name."""
    losses = gaussian_diffusion.LossType
    return SpacedDiffusion(
        space_timesteps(steps, spec),
        betas=gaussian_diffusion.get_named_beta_schedule(schedule, steps),
        model_mean_type=gaussian_diffusion.ModelMeanType.EPSILON,
        model_var_type=gaussian_diffusion.ModelVarType.LEARNED_RANGE,
        loss_type=losses.RESCALED_MSE if rescale else losses.MSE,
        rescale_timesteps=rescale,
    )


def main() -> None:
    """Write the file."""
    noises = torch.randn(STEPS + 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    y, arrays, models = torch.tensor([3, 8]), {}, {}
    for name, (kind, options) in NETWORKS.items():
        models[name] = kind(**options).eval()
        shapes = {key: tuple(array.shape) for key, array in models[name].state_dict().items()}
        models[name].load_state_dict({key: torch.from_numpy(x) for key, x in random_weights(shapes).items()})
        arrays[f"{name}/shapes"] = json.dumps(shapes)

    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_probs = models["classifier"](x, t).log_softmax(dim=-1)
            return torch.autograd.grad(log_probs[range(len(y)), y].sum(), x)[0] * SCALE

    def draw(kind: str, model: str, process: SpacedDiffusion, **options) -> np.ndarray:
        drawn, original = iter(noises[1:]), torch.randn_like
        torch.randn_like = lambda x: next(drawn)
        loop = process.ddim_sample_loop if kind == "ddim" else process.p_sample_loop
        given = {"y": y} if model == "adm" else {}

        def network(x: torch.Tensor, t: torch.Tensor, **given) -> torch.Tensor:
            return torch.cat([x, 0 * x], dim=1) + 0.2 * models[model](x, t, **given)

        options = {"clip_denoised": True, "device": "cpu"} | options
        found = loop(network, SHAPE, noise=noises[0].clone(), model_kwargs=given, **options)
        torch.randn_like = original
        return found.detach().numpy()

    improved = diffusion("6", "cosine", 4000, rescale=True)
    arrays |= {
        "ancestral": draw("ancestral", "adm", diffusion("6")),
        "ddim": draw("ddim", "adm", diffusion("ddim6")),
        "ancestral_guided": draw("ancestral", "adm", diffusion("6"), cond_fn=cond_fn),
        "ddim_guided": draw("ddim", "adm", diffusion("ddim6"), cond_fn=cond_fn),
        "ddim_guided_unclipped": draw("ddim", "adm", diffusion("ddim6"), cond_fn=cond_fn, clip_denoised=False),
        "improved": draw("ancestral", "improved", improved),
        "improved_ddim": draw("ddim", "improved", diffusion("ddim6", "cosine", 4000, rescale=True)),
    }
    for name, array in arrays.items():
        if not name.endswith("shapes"):
            print(name, array.std(), (np.abs(array) > 0.999).mean(), np.abs(array - arrays["ancestral"]).mean())
    np.savez_compressed(OUT, noises=noises.numpy(), y=y.numpy(), **arrays)
    print(OUT.name, OUT.stat().st_size)


if __name__ == "__main__":
    main()
