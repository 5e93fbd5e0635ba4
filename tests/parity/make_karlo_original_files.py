"""Write tests/data/karlo_original.npz: tiny networks of Karlo's own code, for test_interop_karlo_original.py.

    pip install torch ftfy regex && pip install --no-deps clip-anytorch
    python tests/parity/make_karlo_original_files.py CHECKOUT

CHECKOUT is a copy of github.com/kakaobrain/karlo, which is on no package registry. Every weight is random
(tests/random_weights.py). The three stages are wired as Karlo's T2ISampler does, which wants CUDA; they run with three
steps each, from noise that is recorded. Inputs and noise are float16's numbers, so that the file may hold them as such.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(sys.argv[1])
# clip/__init__.py wants torchvision, for images from files.
package = types.ModuleType("clip")
package.__path__ = importlib.util.find_spec("clip").submodule_search_locations
sys.modules["clip"] = package
# isort: split
from karlo.models.clip import CustomizedCLIP, CustomizedTokenizer  # noqa: E402
from karlo.models.decoder_model import Text2ImProgressiveModel  # noqa: E402
from karlo.models.prior_model import PriorDiffusionModel  # noqa: E402
from karlo.models.sr_64_256 import ImprovedSupRes64to256ProgressiveModel  # noqa: E402
from random_weights import random_weights  # noqa: E402

OUT = Path(__file__).parent.parent / "data" / "karlo_original.npz"
D, L = 32, 12
DIFFUSION = {"steps": 1000, "noise_schedule": "squaredcos_cap_v2", "use_kl": False, "timestep_respacing": ""}
HOW = {  # configs/*.yaml
    "prior": {"learn_sigma": False, "sigma_small": True, "predict_xstart": True, "rescale_learned_sigmas": False},
    "decoder": {"learn_sigma": True, "sigma_small": False, "predict_xstart": False, "rescale_learned_sigmas": True},
    "sr": {"learn_sigma": False, "sigma_small": True, "predict_xstart": False, "rescale_learned_sigmas": True},
}
_DECODER = {
    "num_heads": -1, "num_heads_upsample": -1, "use_scale_shift_norm": True, "dropout": 0.1, "clip_emb_mult": 4,
    "resblock_updown": True, "learn_sigma": True, "clip_emb_type": "image", "clip_emb_drop": 0.1,
}  # fmt: skip
TINY = {
    "prior": {"text_ctx": L, "xf_width": 32, "xf_layers": 2, "xf_heads": 2, "xf_final_ln": True, "clip_dim": D},
    "decoder": _DECODER | {
        "image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8",
        "num_head_channels": 16, "clip_dim": D, "text_ctx": L, "xf_width": 40,
    },
    "sr": {"channels": 32, "depth": 1, "channels_multiple": [1, 2], "dropout": 0.0},
}  # fmt: skip
PUBLISHED = {
    "prior": {"text_ctx": 77, "xf_width": 2048, "xf_layers": 20, "xf_heads": 32, "xf_final_ln": True, "clip_dim": 768},
    "decoder": _DECODER | {
        "image_size": 64, "num_channels": 320, "num_res_blocks": 3, "channel_mult": "",
        "attention_resolutions": "32,16,8", "num_head_channels": 64, "clip_dim": 768, "text_ctx": 77, "xf_width": 1536,
    },
    "sr": {"channels": 320, "depth": 3, "channels_multiple": [1, 2, 3, 4], "dropout": 0.0},
}  # fmt: skip


class Bytes(CustomizedTokenizer):
    """Bytes as tokens, padded as Karlo pads."""

    sot_token, eot_token = 298, 299

    def __init__(self):
        pass

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        return list(text.encode())


def networks(sizes: dict[str, dict]) -> dict[str, torch.nn.Module]:
    """Return Karlo's three models, with the parameters that torch gives them."""
    space = types.SimpleNamespace
    config = {
        name: space(model=space(hparams=space(**hparams)), diffusion=space(**DIFFUSION, **HOW[name]))
        for name, hparams in sizes.items()
    }
    mean, std = statistics() if sizes is TINY else (torch.zeros(768), torch.ones(768))
    return {
        "prior": PriorDiffusionModel(config["prior"], Bytes(), mean, std),
        "decoder": Text2ImProgressiveModel(config["decoder"], Bytes()),
        "sr": ImprovedSupRes64to256ProgressiveModel(config["sr"]),
    }


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the deviation of image embeddings."""
    found = random_weights({"mean": (D,), "std.weight": (D,)})
    return torch.from_numpy(found["mean"]), torch.from_numpy(found["std.weight"])


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter the value that the test gives it too."""
    model.load_state_dict({name: torch.from_numpy(array) for name, array in random_weights(shapes(model)).items()})
    return model.eval()


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape."""
    return {name: tuple(array.shape) for name, array in model.state_dict().items()}


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Return noise that float16 holds exactly."""
    return torch.empty(shape).normal_(generator=generator).half().float()


def record_noise(seed: int) -> list[torch.Tensor]:
    """Have torch.randn and randn_like draw from a generator of ours, and return the list that draws are added to."""
    drawn, generator = [], torch.Generator().manual_seed(seed)

    def randn(*shape: int, **_: Any) -> torch.Tensor:
        drawn.append(normal(generator, *shape))
        return drawn[-1].clone()

    torch.randn, torch.randn_like = randn, lambda like: randn(*like.shape)
    return drawn


def pipeline(models: dict[str, torch.nn.Module], clip: CustomizedCLIP, arrays: dict[str, Any]) -> None:
    """Add what the stages draw from captions, and the noise that they do it from."""
    captions = ["a cat", "a tall dog and"]  # the second fills its row, and is cut
    rows, size = len(captions), TINY["decoder"]["image_size"]
    tokens, mask = (torch.cat(pair) for pair in zip(*(
        Bytes().padded_tokens_and_mask(texts, L) for texts in (captions, [""] * rows)), strict=True))  # fmt: skip
    z_text, hidden = clip.encode_text(tokens)
    drawn = record_noise(12)
    scale = lambda value: torch.tensor([value] * rows)  # noqa: E731
    # 4 in Karlo; more of it takes predictions beyond the +- 10 that they are clipped to.
    z_image = models["prior"](z_text, hidden, mask, scale(16.0), timestep_respacing="3")
    steps = models["decoder"](z_text, hidden, tokens, mask, z_image, scale(8.0), timestep_respacing="3")
    small = list(steps)[-1].clamp(-1, 1)
    low = torch.nn.functional.interpolate(
        small, size=[2 * size, 2 * size], mode="bicubic", align_corners=False, antialias=True
    )
    draw, sr = models["sr"].get_sample_fn("3"), models["sr"]
    outputs = draw(
        sr.model_first_steps, sr.model_last_step, shape=low.shape, clip_denoised=True, model_kwargs={"low_res": low}
    )
    images = list(outputs)[-1]["sample"]
    arrays["pipeline/tokens"], arrays["pipeline/mask"] = tokens.numpy(), mask.numpy()
    arrays["pipeline/z_text"], arrays["pipeline/hidden"] = z_text.numpy(), hidden.numpy()
    arrays["pipeline/z_image"], arrays["pipeline/images"] = z_image.numpy(), (images * 0.5 + 0.5).clamp(0, 1).numpy()
    # Guidance draws twice as many rows, of which the second half is not used; nor is the draw of the last step.
    for stage, name in enumerate(("prior", "decoder", "sr")):
        noise = [array[:rows] for array in drawn[4 * stage : 4 * stage + 3]]
        arrays[f"noise/{name}"] = torch.stack(noise).numpy().astype(np.float16)


@torch.no_grad()
def main() -> None:
    """Write the file."""
    generator = torch.Generator().manual_seed(7)
    t, mask = torch.tensor([7, 500]), torch.tensor([[1] * 5 + [0] * 7, [1] * 12]).bool()
    vectors, pictures = {"zt": (2, D), "z_text": (2, D), "z_image": (2, D), "hidden": (2, L, D)}, {
        "xt": (2, 3, 16, 16), "large": (2, 3, 32, 32), "small": (2, 3, 8, 8), "picture": (2, 3, 16, 16)}  # fmt: skip
    given = {name: normal(generator, *shape) for name, shape in (vectors | pictures).items()}
    given["z_text"], given["z_image"] = 4 * given["z_text"], 4 * given["z_image"]
    models = {name: randomize(model) for name, model in networks(TINY).items()}
    clip = randomize(CustomizedCLIP(D, 16, 1, 64, 8, L, 300, 32, 4, 2))
    prior, decoder, sr = models["prior"], models["decoder"].model, models["sr"]
    text = {"mask": mask, "causal_mask": prior.causal_mask}
    out = {"prior": prior.model(given["zt"], t, given["z_text"], given["hidden"], **text)}
    for name, image in (("with", given["z_image"]), ("without", decoder.cf_param.expand(2, D))):
        out[f"decoder/{name}"] = decoder(given["xt"], t, given["z_text"], given["hidden"], mask, image)
    low = torch.nn.functional.interpolate(given["small"], size=[32, 32], mode="bicubic", antialias=True)
    out["first"] = sr.model_first_steps(given["large"], t, low_res=low)
    out["last"] = sr.model_last_step(given["large"], t, low_res=low)
    out["image"] = clip.encode_image(given["picture"])
    arrays = {f"out/{name}": value.numpy() for name, value in out.items()}
    arrays |= {name: value.numpy().astype(np.float16) for name, value in given.items()}
    arrays |= {"t": t.numpy(), "mask": mask.numpy()}
    for name, model in {**models, "clip": clip}.items():
        arrays[f"shapes/{name}"] = json.dumps(shapes(model))
    with torch.device("meta"):
        published = networks(PUBLISHED)
    arrays |= {f"published/{name}": json.dumps(shapes(model)) for name, model in published.items()}
    pipeline(models, clip, arrays)
    np.savez_compressed(OUT, **arrays)
    reached = (arrays["pipeline/z_image"] - statistics()[0].numpy()) / statistics()[1].numpy()
    print(f"the prior reaches {np.abs(reached).max()}, clipped {(np.abs(reached) > 9.999).mean()}")
    print(OUT.name, OUT.stat().st_size, {name: float(value.std()) for name, value in out.items()})


if __name__ == "__main__":
    main()
