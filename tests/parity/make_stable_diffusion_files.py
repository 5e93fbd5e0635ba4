"""Write tests/data/stable_diffusion.npz: tiny networks of Stable Diffusion and what diffusers' pipeline draws.

    pip install torch "diffusers==0.42.*" transformers
    python tests/parity/make_stable_diffusion_files.py

For test_interop_stable_diffusion.py. Every weight is random (tests/random_weights.py).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.append(str(Path(__file__).parent.parent))
from random_weights import random_weights

OUT = Path(__file__).parent.parent / "data" / "stable_diffusion.npz"
L, WIDTH = 12, 24
AUTOENCODER = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "scaling_factor": 0.2, "sample_size": 16,
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH,
}  # fmt: skip
UNETS = {
    "unet1": UNET | {"attention_head_dim": 4},  # four heads, as many at every level
    "unet2": UNET | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True},  # heads of sixteen
}
TEXT = {
    "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": L, "hidden_act": "quick_gelu", "bos_token_id": 298,
    "eos_token_id": 299, "pad_token_id": 299,
}  # fmt: skip
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1,
}  # fmt: skip

# As Lin et al. (2024) recommend, but for the last step, which ends at the noise of the first timestep.
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": False}


def randomize(network: torch.nn.Module, name: str, arrays: dict) -> torch.nn.Module:
    """Give a network random weights, and keep their shapes."""
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict({key: torch.from_numpy(value) for key, value in random_weights(shapes).items()})
    arrays[f"shapes/{name}"] = json.dumps(shapes)
    print(name, sum(int(np.prod(shape)) for shape in shapes.values()))
    return network.eval()


@torch.no_grad()
def main() -> None:
    """Write the file."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    picture, z, xt = normal(2, 3, 16, 16), normal(2, 4, 8, 8), normal(2, 4, 8, 8)
    t, context = torch.tensor([7.0, 640.0]), normal(2, L, WIDTH)
    tokens = torch.randint(0, 298, (2, L), generator=generator)
    tokens[:, 0], tokens[0, 5:], tokens[1, -1] = 298, 299, 299
    given = {"picture": picture, "z": z, "xt": xt, "t": t, "context": context, "tokens": tokens}
    arrays = {name: value.numpy() for name, value in given.items()}
    autoencoder = randomize(AutoencoderKL(**AUTOENCODER), "autoencoder", arrays)
    moments = autoencoder.encode(picture).latent_dist
    arrays |= {"out/mean": moments.mean.numpy(), "out/std": moments.std.numpy()}
    arrays["out/decode"] = autoencoder.decode(z).sample.numpy()
    text = CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
    # Files have a prefix that transformers 5 reads, and no longer gives its modules.
    shapes = {
        f"text_model.{key.removeprefix('text_model.')}": tuple(value.shape) for key, value in text.state_dict().items()
    }
    weights = {key: torch.from_numpy(value) for key, value in random_weights(shapes).items()}
    bare = "text_model.final_layer_norm.weight" not in text.state_dict()
    text.load_state_dict({key.removeprefix("text_model.") if bare else key: value for key, value in weights.items()})
    arrays["shapes/text"] = json.dumps(shapes)
    arrays["out/text"] = text(tokens).last_hidden_state.numpy()
    for name, options in UNETS.items():
        unet = randomize(UNet2DConditionModel(**options), name, arrays)
        arrays[f"out/{name}"] = unet(xt, t, context).sample.numpy()
        arrays[f"config/{name}"] = config(unet)
        kind = {"unet1": "epsilon", "unet2": "v_prediction"}[name]
        scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind)
        draw(unet, autoencoder, text, scheduler, tokens, arrays, f"drawn/{name}")
        if name == "unet2":
            scheduler = DDIMScheduler(**(SCHEDULE | ZERO_SNR), prediction_type=kind)
            arrays["alpha_bar/zero"] = scheduler.alphas_cumprod.numpy()
            draw(unet, autoencoder, text, scheduler, tokens, arrays, "drawn/zero")
    for spacing in ("leading", "trailing", "linspace"):
        for offset, steps in ((0, 7), (1, 50), (1, 300)):
            scheduler = DDIMScheduler(**(SCHEDULE | {"timestep_spacing": spacing, "steps_offset": offset}))
            scheduler.set_timesteps(steps)
            arrays[f"timesteps/{spacing}/{offset}/{steps}"] = scheduler.timesteps.numpy().astype(np.int16)
    arrays["config/autoencoder"] = config(autoencoder)
    arrays["config/text_encoder"] = json.dumps(TEXT)
    arrays["config/scheduler"] = json.dumps(SCHEDULE)
    for name, array in arrays.items():
        if name.startswith(("out/", "drawn/")):
            print(name, array.shape, array.std())
    np.savez_compressed(OUT, **arrays)
    print(OUT.name, OUT.stat().st_size)


def config(network: torch.nn.Module) -> str:
    """Return what diffusers writes into config.json, without its private fields."""
    return json.dumps({name: value for name, value in network.config.items() if not name.startswith("_")})


def draw(unet, autoencoder, text, scheduler, tokens, arrays, name) -> None:
    """Add what diffusers' pipeline draws in five steps of DDIM with guidance of 3, from noise that is recorded."""
    pipeline = StableDiffusionPipeline(
        autoencoder, text, None, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    empty = torch.tensor([[298] + [299] * (L - 1)]).repeat(2, 1)
    found = pipeline(
        prompt_embeds=text(tokens).last_hidden_state, negative_prompt_embeds=text(empty).last_hidden_state,
        latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="np",
    )  # fmt: skip
    arrays |= {"noise": noise.numpy(), name: found.images, "empty": empty.numpy()}


if __name__ == "__main__":
    main()
