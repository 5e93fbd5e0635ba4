"""GLIDE (Nichol et al. 2022): images of captions, by classifier-free guidance or by the gradient of a noised CLIP.

    python -m ddpm_jax.train --config configs/glide.py:small --workdir runs/glide
    python -m ddpm_jax.sample --workdir runs/glide --prompt "a red star" --count 16 --clip_scale 2 --out clip.png
    python -m ddpm_jax.sample --workdir runs/glide --prompt "a red star" --count 16 --scale 3 --out cfg.png

Stages: "base", a U-Net that attends to the caption; "noised_clip", a CLIP of noised images and their timesteps; and the
upsamplers, which read the caption too. CLIP guidance adds the gradient of the similarity of image and caption: weighted
by the variance of the step in ancestral sampling, by the noise level with --sampler=ddim (section 2.4). The noised CLIP
guides models of other recipes with `sample --noised_clip=DIR`, if size and noise process are the same.

`data.path` is images with captions (docs/data.md), "shapes" for generated ones (the default of `small`).

Variants, with the parameters of their networks (held to them by tests/recipes/test_sizes.py):

    configs/glide.py          64 x 64 and 64 -> 256 at the paper's sizes: 3.5B, noised CLIP 0.4B, upsampler 1.5B
    configs/glide.py:small    16 x 16, captioned shapes: 5.1M and 0.6M: trains on a laptop's CPU
    configs/glide.py:smoke    two steps of tiny networks on generated shapes

Published (MS-COCO, 256 x 256, zero shot): FID 12.24 by classifier-free guidance, 12.89 of the filtered model. Human
raters prefer classifier-free guidance: Elo of photorealism 82.7, CLIP guidance -73.2, none -88.6.

What differs from the paper: captions are tokens of CLIP's tokenizer, 77 of them, in all networks (GLIDE: 128 of its own
in the diffusion models); the noised CLIP has a fixed temperature of 1 / 100, as its published code; its batch size and
length of training are ours, since the paper has none.

Hardware and time: `python -m ddpm_jax.plan --config configs/glide.py --topology v5p:4x4x8` prints what a run takes.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.shapes.captions import VOCABULARY
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.split import split_source
from ddpm_jax.data.tokenizer import ClipTokenizer, CompactTokenizer, Tokenizer
from ddpm_jax.data.transforms import CenterCrop, Select, Tokenize
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.evaluation import report
from ddpm_jax.models.glide import Glide
from ddpm_jax.models.noised_clip import NoisedCLIP, NoisedVisionTransformer
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.unet import UNet, attention_levels
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.training import DiffusionTask, Images, LowResolution, NoisedContrastiveTask, Stage, Tokens, Training
from ddpm_jax.types import network_dtype

VARIANTS = ("", "small", "smoke")


def training(batch_size: int, num_steps: int, learning_rate: float) -> dict:
    """Return the fields of `Training` of a stage."""
    return {
        "batch_size": batch_size,
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "warmup_steps": 1_000,
        "decay": "constant",
        "final_fraction": 1.0,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "optimizer": "adamw",
        "muon_learning_rate": placeholder(float),
        "ema_decay": 0.9999,
        "accumulate": 1,
        "checkpoint_every": 5_000,
        "log_every": 100,
        "preview_every": 0,
        "eval_every": 10_000,
        "max_to_keep": 2,
        "num_workers": 0,
    }


def part(size: int, channels: int, channel_mult: tuple, blocks: int, text: tuple, schedule: str, steps: dict) -> dict:
    """Return the part of a diffusion model; text: width, layers and heads of its transformer."""
    return {
        "image_size": size,
        "unet": {
            "channels": channels,
            "channel_mult": channel_mult,
            "num_res_blocks": blocks,
            "head_channels": 64,
            "dropout": 0.1,
            "patch": 1,
            "groups": 32,
            "remat": True,
        },
        "attention_resolutions": (32, 16, 8),
        "text": dict(zip(("width", "layers", "heads"), text)),
        "diffusion": {"schedule": schedule, "num_steps": 1000, "prediction": "eps", "variance": "learned_range"},
        "training": steps,
    }


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.data = {"path": "", "held_out": 0.01}
    config.text = {"length": 77}
    config.dtype = "bfloat16"
    config.objective = "hybrid"
    config.drop_text = 0.2
    config.base = part(64, 512, (1, 2, 3, 4), 3, (2048, 24, 32), "cosine", training(2048, 2_500_000, 1e-4))
    config.base.sample = {"sampler": "ancestral", "steps": "150", "threshold": 1.0, "scale": 3.0}
    config.upsamplers = ("up_256",)
    config.up_256 = part(256, 384, (1, 1, 2, 2, 4, 4), 2, (1024, 16, 16), "linear", training(512, 1_600_000, 1e-4))
    config.up_256.sample = {"sampler": "ddim", "steps": "fast27", "threshold": 1.0}
    config.noised_clip = {
        "embed_dim": 768,
        "scale": 100.0,
        "vision": {"patch": 4, "width": 1024, "layers": 24, "heads": 16, "remat": True},
        "text": {"width": 768, "layers": 12, "heads": 12, "remat": True},
        "training": training(32_768, 390_000, 3e-4),
    }
    config.tensorboard = False
    config.progress = True
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant in ("small", "smoke"):
        small(config)
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the base, the noised CLIP and the upsamplers."""
    tokenizer, found, low = read_by(config), [], None
    for name in ("base", *config.upsamplers):
        found.append(diffusion_stage(config, name, low, tokenizer))
        low = config[name].image_size
    own, dtype = config.noised_clip, network_dtype(config.dtype)
    process = Diffusion(**config.base.diffusion)
    vision = NoisedVisionTransformer(config.base.image_size, num_steps=process.num_steps, dtype=dtype, **own.vision)
    text = TextEncoder(tokenizer.vocab_size, config.text.length, dtype=dtype, **own.text)
    clip = NoisedCLIP(vision, text, own.embed_dim, own.scale)
    found.insert(
        1,
        Stage(
            name="noised_clip",
            task=NoisedContrastiveTask(model=clip, diffusion=process, tokenizer=tokenizer),
            **data(config, config.base.image_size, tokenizer, own.training),
        ),
    )
    return tuple(found)


def diffusion_stage(config: ConfigDict, name: str, low: int | None, tokenizer: Tokenizer) -> Stage:
    """Return a diffusion model; low: the size of the images that it enlarges, None for the base."""
    own, diffusion, dtype = config[name], Diffusion(**config[name].diffusion), network_dtype(config.dtype)
    levels = attention_levels(own.attention_resolutions, own.image_size // own.unet.patch, len(own.unet.channel_mult))
    unet = UNet(
        out_channels=diffusion.channels(3), attention_resolutions=(), attention_levels=levels, dtype=dtype, **own.unet
    )
    conditions = (Tokens(tokenizer, config.text.length, drop=config.drop_text),)
    if low is not None:
        conditions = (LowResolution(low, own.image_size // low, blur_rate=0.0), *conditions)
    return Stage(
        name=name,
        task=DiffusionTask(
            model=Glide(unet, tokenizer.vocab_size, config.text.length, dtype=dtype, **own.text),
            diffusion=diffusion,
            x0=Images(own.image_size),
            conditions=conditions,
            objective=config.objective,
            sampling=sampling_from(own.sample, name=f"{name}.sample"),
        ),
        **data(config, own.image_size, tokenizer, own.training),
    )


def read_by(config: ConfigDict) -> Tokenizer:
    """Return the tokenizer of the captions."""
    return CompactTokenizer(VOCABULARY) if config.data.path == "shapes" else ClipTokenizer()


def data(config: ConfigDict, size: int, tokenizer: Tokenizer, steps: ConfigDict) -> dict:
    """Return the records of a stage and how it is optimized."""
    if config.data.path == "shapes":
        train, held_out = (ShapesSource(seed, size, length=65_536) for seed in (0, 1))
    elif not config.data.path:
        raise ValueError(
            "data.path is needed: images with captions (docs/data.md), or 'shapes', as in --config.data.path=my_images"
        )
    else:
        train, held_out = split_source(open_source(config.data.path), config.data.held_out)
    more = {"seed": config.seed, "tensorboard": config.tensorboard, "progress": config.progress}
    return {
        "source": train,
        "eval_source": held_out,
        "transforms": (Select(("image", "caption")), CenterCrop(size), Tokenize(tokenizer, config.text.length)),
        "training": Training(**more, **steps),
    }


def pipeline(config: ConfigDict) -> PipelineDescription:
    """Return how the stages are sampled together."""
    names = ("base", *config.upsamplers)
    models = {"base": "base", "noised_clip": "noised_clip", "upsamplers": list(config.upsamplers)}
    sampling = {name: sampling_from(config[name].sample, name=f"{name}.sample") for name in names}
    return PipelineDescription("Cascade", models=models, sampling=sampling)


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Write a grid of samples without captions, when all stages are trained."""
    report.write_samples(pipeline, workdir, show=show, progress=config.progress)


def small(config: ConfigDict) -> None:
    """Use networks that a CPU trains, on captioned shapes of 16 x 16."""
    config.data.path, config.text.length = "shapes", 24
    config.dtype, config.objective, config.upsamplers = "float32", "simple", ()
    own = config.base
    own.update(image_size=16, attention_resolutions=(8, 4))
    own.unet.update(channels=96, channel_mult=(1, 1), num_res_blocks=2, head_channels=32, patch=2)
    own.unet.update(dropout=0.0, remat=False)
    own.text.update(width=96, layers=2, heads=3)
    own.diffusion.update(prediction="v", variance="fixed_small")
    own.sample.update(sampler="ancestral", steps="50", scale=1.0)
    config.noised_clip.update(embed_dim=64, scale=20.0)
    config.noised_clip.vision.update(patch=4, width=96, layers=3, heads=3, remat=False)
    config.noised_clip.text.update(width=64, layers=2, heads=2, remat=False)
    faster = {"learning_rate": 2e-3, "warmup_steps": 100, "decay": "cosine", "final_fraction": 0.02}
    faster |= {"optimizer": "muon", "muon_learning_rate": 6e-3, "ema_decay": 0.998}
    faster |= {"checkpoint_every": 500, "log_every": 50, "eval_every": 500}
    own.training.update(batch_size=32, num_steps=6_000, preview_every=1_000, **faster)
    config.noised_clip.training.update(batch_size=128, num_steps=3_000, **faster)


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.base.update(image_size=16, attention_resolutions=())
    config.base.unet.update(channels=32, channel_mult=(1,), num_res_blocks=1, head_channels=16)
    config.base.text.update(width=16, layers=1, heads=1)
    config.base.diffusion.num_steps = 8
    config.base.sample.steps = "2"
    config.noised_clip.vision.update(width=16, layers=1, heads=1)
    config.noised_clip.text.update(width=16, layers=1, heads=1)
    quick = {"batch_size": 8, "num_steps": 2, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 1}
    quick |= {"eval_every": 2, "optimizer": "adamw"}
    config.base.training.update(preview_every=0, **quick)
    config.noised_clip.training.update(**quick)
