"""Write tests/data/glide.npz: what tiny networks of GLIDE return, and what its loop draws, for test_interop_glide.py.

    pip install torch ftfy regex attrs
    python tests/parity/make_glide_files.py CHECKOUT

CHECKOUT is a copy of github.com/openai/glide-text2im, which is on no package registry. Every weight is random
(tests/random_weights.py).
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(sys.argv[1])
for name in ("requests", "filelock"):  # for downloads, which are not made
    sys.modules.setdefault(name, types.ModuleType(name))
sys.modules["filelock"].FileLock = None
# isort: split
from glide_text2im.gaussian_diffusion import get_named_beta_schedule  # noqa: E402
from glide_text2im.respace import SpacedDiffusion, space_timesteps  # noqa: E402
from glide_text2im.text2im_model import (  # noqa: E402
    InpaintText2ImUNet,
    SuperResInpaintText2ImUnet,
    SuperResText2ImUNet,
    Text2ImUNet,
)
from random_weights import random_weights  # noqa: E402

OUT = Path(__file__).parent.parent / "data" / "glide.npz"
CONTEXT, VOCAB = 12, 64
OPTIONS = {
    "text_ctx": CONTEXT, "xf_width": 32, "xf_layers": 2, "xf_heads": 2, "xf_final_ln": True, "xf_padding": True,
    "tokenizer": types.SimpleNamespace(n_vocab=VOCAB), "in_channels": 3, "model_channels": 32, "out_channels": 6,
    "num_res_blocks": 1, "attention_resolutions": (2,), "dropout": 0.0, "channel_mult": (1, 2),
    "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
KINDS = {
    "base": Text2ImUNet,
    "upsampler": SuperResText2ImUNet,
    "inpaint": InpaintText2ImUNet,
    "upsampler_inpaint": SuperResInpaintText2ImUnet,
}


@torch.no_grad()
def main() -> None:
    """Write the file."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, low, picture = normal(2, 3, 16, 16), normal(2, 3, 4, 4), normal(2, 3, 16, 16)
    known = (normal(2, 1, 16, 16) > 0).float()
    t = torch.tensor([7.0, 640.0])
    tokens = torch.randint(0, VOCAB - 1, (2, CONTEXT), generator=generator)
    mask = torch.tensor([[1] * 5 + [0] * 7, [1] * 12]).bool()
    tokens[~mask] = VOCAB - 1
    out = {"x": x, "low": low, "picture": picture, "known": known, "t": t, "tokens": tokens, "mask": mask}
    extra = {"upsampler": {"low_res": low}, "inpaint": {"inpaint_image": picture, "inpaint_mask": known}}
    extra["upsampler_inpaint"] = extra["upsampler"] | extra["inpaint"]
    arrays = {name: value.numpy() for name, value in out.items()}
    for name, kind in KINDS.items():
        model = kind(**OPTIONS).eval()
        shapes = {key: tuple(array.shape) for key, array in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(array) for key, array in random_weights(shapes).items()})
        arrays[f"{name}/out"] = model(x, t, tokens=tokens, mask=mask, **extra.get(name, {})).numpy()
        arrays[f"{name}/shapes"] = json.dumps(shapes)
        print(name, arrays[f"{name}/out"].std())
        if name == "base":
            loop(model, tokens, mask, arrays)
    np.savez_compressed(OUT, **arrays)
    print(OUT.name, OUT.stat().st_size)


def loop(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor, arrays: dict) -> None:
    """Add what the loop of GLIDE's notebook draws with guidance of 3, in float32, from noise that is recorded."""
    both = torch.cat([tokens, torch.full_like(tokens, VOCAB - 1)]), torch.cat([mask, torch.zeros_like(mask)])

    def guided(x: torch.Tensor, t: torch.Tensor, **_) -> torch.Tensor:
        half = x[: len(x) // 2]
        found = model(torch.cat([half, half]), t, tokens=both[0], mask=both[1])
        eps, rest = found[:, :3], found[:, 3:]
        given, free = torch.split(eps, len(eps) // 2)
        eps = free + 3.0 * (given - free)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    diffusion = SpacedDiffusion(space_timesteps(1000, "5"), betas=get_named_beta_schedule("squaredcos_cap_v2", 1000))
    generator = torch.Generator().manual_seed(1)
    noises = torch.randn(6, 2, 3, 16, 16, generator=generator)
    drawn, original = iter(noises[1:]), torch.randn_like
    torch.randn_like = lambda x: torch.cat([next(drawn)] * 2)
    found = diffusion.p_sample_loop(
        guided, (4, 3, 16, 16), noise=torch.cat([noises[0]] * 2), device="cpu", clip_denoised=True
    )
    torch.randn_like = original
    arrays["loop/out"], arrays["loop/noises"] = found[:2].numpy(), noises.numpy()


if __name__ == "__main__":
    main()
