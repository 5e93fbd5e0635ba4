"""Write tests/data/published_sizes.json: names and shapes of published networks, for test_published_sizes.py.

    pip install torch jax flax diffusers transformers guided-diffusion-sdk ftfy regex attrs pyyaml
    pip install --no-deps clip-anytorch
    python tests/parity/make_published_sizes.py GLIDE IMPROVED

GLIDE and IMPROVED are copies of github.com/openai/glide-text2im and github.com/openai/improved-diffusion, which are on
no package registry. Every network is built by the class that its weights belong to, at the published size, on torch's
meta device, that is without numbers. The file says how many tensors and numbers a state_dict has, and the SHA-256 of
its names and shapes, one a line, in order of the names; of guided and improved diffusion, whose U-Nets are built from
the flags in their READMEs, also what their processes are.
"""

import hashlib
import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from guided_diffusion import script_util as guided

sys.path[:0] = [sys.argv[1], sys.argv[2]]
np.bool = bool  # a name that GLIDE's code still uses
for name in ("requests", "filelock"):  # for downloads, which are not made
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].FileLock = None
# isort: split
from glide_text2im import model_creation as glide  # noqa: E402
from glide_text2im.clip.model_creation import create_clip_model  # noqa: E402
from improved_diffusion import script_util as improved  # noqa: E402
from make_clip_resnet_files import openai_model  # noqa: E402

OUT = Path(__file__).parent.parent / "data" / "published_sizes.json"
OPENAI = openai_model()


def openai(embed_dim: int, size: int, layers: int | tuple, width: int, patch: int | None, text: int) -> torch.nn.Module:
    """Return OpenAI's CLIP."""
    return OPENAI.CLIP(embed_dim, size, layers, width, patch, 77, 49408, text, text // 64, 12)


def hf(size: int, patch: int, width: int, layers: int, text: int) -> torch.nn.Module:
    """Return transformers' CLIP; a head is 64 wide, a hidden layer four times as wide as the others."""
    sizes = lambda width: {  # noqa: E731
        "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64,
    }  # fmt: skip
    vision = sizes(width) | {"num_hidden_layers": layers, "image_size": size, "patch_size": patch}
    config = transformers.CLIPConfig(
        text_config=sizes(text) | {"num_hidden_layers": 12, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config=vision | {"projection_dim": text},
        projection_dim=text,
    )
    return transformers.CLIPModel(config)


def karlo(part: str) -> torch.nn.Module:
    """Return a part of Karlo in diffusers' classes, at the sizes of kakaobrain/karlo's configs."""
    widths = {"block_out_channels": (320, 640, 960, 1280), "layers_per_block": 3}
    down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    if part == "prior":
        return PriorTransformer(32, 64, 20, 768, 77, 4)
    if part == "text_proj":
        return UnCLIPTextProjModel(
            clip_extra_context_tokens=4, clip_embeddings_dim=768, time_embed_dim=1280, cross_attention_dim=1536
        )
    if part == "decoder":
        return UNet2DConditionModel(
            sample_size=64, in_channels=3, out_channels=6, **widths,
            down_block_types=(down, *["SimpleCrossAttnDownBlock2D"] * 3),
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, up), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            cross_attention_dim=1536, class_embed_type="identity", attention_head_dim=64,
            resnet_time_scale_shift="scale_shift", time_embedding_type="positional",
        )  # fmt: skip
    return UNet2DModel(
        sample_size=256, in_channels=6, out_channels=3, **widths, down_block_types=[down] * 4, up_block_types=[up] * 4,
        add_attention=False, resnet_time_scale_shift="default",
    )  # fmt: skip


def stable_diffusion(part: str) -> torch.nn.Module:
    """Return a part of Stable Diffusion 1.5."""
    if part == "unet":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return AutoencoderKL(
        sample_size=512, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    )  # fmt: skip


def by_flags(module: types.ModuleType, flags: str, upsampler: bool = False) -> tuple[torch.nn.Module, Any]:
    """Return the network and the process that guided or improved diffusion build from the flags of a script."""
    values = module.sr_model_and_diffusion_defaults() if upsampler else module.model_and_diffusion_defaults()
    words = flags.split()
    for flag, word in zip(words[::2], words[1::2], strict=True):
        kind = type(values[flag.removeprefix("--")])
        values[flag.removeprefix("--")] = word == "True" if kind is bool else kind(word)
    create = module.sr_create_model_and_diffusion if upsampler else module.create_model_and_diffusion
    return create(**values)


def classifier(size: int, depth: int = 2) -> torch.nn.Module:
    """Return a classifier of guided diffusion."""
    values = guided.classifier_defaults() | {"image_size": size, "classifier_depth": depth}
    return guided.create_classifier(**values)


def glide_unet(upsampler: bool, inpaint: bool) -> torch.nn.Module:
    """Return a U-Net of GLIDE."""
    values = glide.model_and_diffusion_defaults_upsampler() if upsampler else glide.model_and_diffusion_defaults()
    return glide.create_model_and_diffusion(**values | {"inpaint": inpaint})[0]


def noised_clip(tower: str) -> torch.nn.Module:
    """Return a tower of GLIDE's noised CLIP, by the config.yaml of its repository."""
    return getattr(create_clip_model(device=torch.device("meta")), f"{tower}_encoder")


_ADM = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --resblock_updown True "
    "--use_scale_shift_norm True "
)
_4000, _PLAIN = "--diffusion_steps 4000 ", " --rescale_learned_sigmas False --rescale_timesteps False"
_64 = _4000 + "--noise_schedule cosine --image_size 64 --num_channels {} --num_res_blocks 3 --learn_sigma True"
_32 = (
    _4000 + "--noise_schedule cosine --image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
    "--dropout 0.3"
)
_256 = _4000 + "--noise_schedule linear --num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True"
_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear"
)
_BASE = _ADM + "--image_size {} --class_cond {} --num_channels 256 --num_head_channels 64 --num_res_blocks 2"
NETWORKS: dict[str, Callable[[], Any]] = {
    "openai/ViT-B-32": lambda: openai(512, 224, 12, 768, 32, 512),
    "openai/ViT-B-16": lambda: openai(512, 224, 12, 768, 16, 512),
    "openai/ViT-L-14": lambda: openai(768, 224, 24, 1024, 14, 768),
    "openai/ViT-L-14-336": lambda: openai(768, 336, 24, 1024, 14, 768),
    "openai/RN50": lambda: openai(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "openai/RN101": lambda: openai(512, 224, (3, 4, 23, 3), 64, None, 512),
    "openai/RN50x4": lambda: openai(640, 288, (4, 6, 10, 6), 80, None, 640),
    "openai/RN50x16": lambda: openai(768, 384, (6, 8, 18, 8), 96, None, 768),
    "openai/RN50x64": lambda: openai(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "transformers/ViT-B-32": lambda: hf(224, 32, 768, 12, 512),
    "transformers/ViT-B-16": lambda: hf(224, 16, 768, 12, 512),
    "transformers/ViT-L-14": lambda: hf(224, 14, 1024, 24, 768),
    "transformers/ViT-L-14-336": lambda: hf(336, 14, 1024, 24, 768),
    **{f"karlo/{part}": lambda part=part: karlo(part)
       for part in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")},
    "64x64_diffusion": lambda: by_flags(
        guided, _ADM + "--class_cond True --image_size 64 --num_channels 192 --num_head_channels 64 "
        "--num_res_blocks 3 --noise_schedule cosine --use_new_attention_order True"
    ),
    "128x128_diffusion": lambda: by_flags(
        guided, _ADM + "--class_cond True --image_size 128 --num_channels 256 --num_heads 4 --num_res_blocks 2"
    ),
    "256x256_diffusion": lambda: by_flags(guided, _BASE.format(256, True)),
    "256x256_diffusion_uncond": lambda: by_flags(guided, _BASE.format(256, False)),
    "512x512_diffusion": lambda: by_flags(guided, _BASE.format(512, True)),
    "64_256_upsampler": lambda: by_flags(
        guided, _ADM + "--class_cond True --large_size 256 --small_size 64 --num_channels 192 --num_heads 4 "
        "--num_res_blocks 2", True
    ),
    "128_512_upsampler": lambda: by_flags(
        guided, _ADM + "--attention_resolutions 32,16 --class_cond True --large_size 512 --small_size 128 "
        "--num_channels 192 --num_head_channels 64 --num_res_blocks 2", True
    ),
    "lsun": lambda: by_flags(guided, _BASE.format(256, False)),
    "64x64_classifier": lambda: classifier(64, 4),
    "128x128_classifier": lambda: classifier(128),
    "256x256_classifier": lambda: classifier(256),
    "512x512_classifier": lambda: classifier(512),
    "imagenet64_uncond_100M_1500K": lambda: by_flags(improved, _64.format(128)),
    "imagenet64_uncond_vlb_100M_1500K": lambda: by_flags(improved, _64.format(128)),
    "cifar10_uncond_50M_500K": lambda: by_flags(improved, _32),
    "cifar10_uncond_vlb_50M_500K": lambda: by_flags(improved, _32),
    "imagenet64_cond_270M_250K": lambda: by_flags(improved, _64.format(192) + " --class_cond True" + _PLAIN),
    "upsample_cond_500K": lambda: by_flags(improved, _256 + _PLAIN, True),
    "lsun_uncond_100M_1200K_bs128": lambda: by_flags(improved, _LSUN + _PLAIN),
    "lsun_uncond_100M_2400K_bs64": lambda: by_flags(improved, _LSUN + _PLAIN),
    "glide/base": lambda: glide_unet(False, False),
    "glide/upsample": lambda: glide_unet(True, False),
    "glide/base-inpaint": lambda: glide_unet(False, True),
    "glide/upsample-inpaint": lambda: glide_unet(True, True),
    "glide/image-enc": lambda: noised_clip("image"),
    "glide/text-enc": lambda: noised_clip("text"),
    "stable-diffusion/unet": lambda: stable_diffusion("unet"),
    "stable-diffusion/vae": lambda: stable_diffusion("vae"),
}  # fmt: skip


def main() -> None:
    """Write the file."""
    found = {}
    for name, build in NETWORKS.items():
        with torch.device("meta"):
            built = build()
        model, process = built if isinstance(built, tuple) else (built, None)
        tensors = model.state_dict()
        lines = "".join(f"{key} {list(tensors[key].shape)}\n" for key in sorted(tensors))
        found[name] = {
            "tensors": len(tensors),
            "numbers": sum(tensor.numel() for tensor in tensors.values()),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        }
        if process is not None:
            found[name] |= {
                "num_steps": process.original_num_steps,
                "rescale_timesteps": process.rescale_timesteps,
                "sum_of_betas": float(process.betas.sum()),
            }
        print(name, found[name]["tensors"], found[name]["numbers"], flush=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
