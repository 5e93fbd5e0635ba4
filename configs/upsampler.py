"""An upsampler of any images (SR3; DALL-E 2, section 2.1): convolutions only, trained on crops, degraded input.

    python -m ddpm_jax.train --config configs/upsampler.py:small --config.data.path=my_images --workdir runs/up
    python -m ddpm_jax.sweep --workdir runs/up/upsampler --data my_images --degradation bsr --out sweep

`data.path` is images in any of the forms of docs/data.md, of which the share `data.held_out` is held out, or
`data.held_out_path` holds other ones. `degradation` is how the low-resolution images are made: "bsr"
(`data.degradation.DegradeBSR`), "blur" (half of the averages are blurred: k 3, sigma 0.6) or "none" (averages).
Noise of a random level up to `noise` is added to them, and the network is given the level (conditioning augmentation:
Ho et al. 2022, cascaded diffusion, section 4.2), so that one can be chosen for sampling; `ddpm_jax.sweep` compares
levels. docs/upsamplers.md has results of the small variants.

Variants, with the parameters of the network (held to them by tests/test_upsampler_recipe.py):

    configs/upsampler.py          64 -> 256: 91.4M
    configs/upsampler.py:small    32 -> 128: 1.1M: trains on a laptop's CPU
    configs/upsampler.py:shapes   16 -> 64, on generated shapes: 1.1M: trains on a laptop's CPU
    configs/upsampler.py:smoke    two steps of a tiny network on generated shapes
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.degradation import DegradeBSR
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.split import split_source
from ddpm_jax.data.transforms import CenterCrop, RandomCrop, RandomFlip, Select
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.training import DiffusionTask, Images, LowResolution, Stage, Training
from ddpm_jax.types import network_dtype

VARIANTS = ("", "small", "shapes", "smoke")
DEGRADATIONS = ("none", "blur", "bsr")


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.data = {"path": "", "held_out": 0.05, "held_out_path": "", "flip": True}
    config.image_size = 256
    config.factor = 4
    config.crop = 64
    config.unet = {
        "channels": 128,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 2,
        "dropout": 0.1,
        "patch": 1,
        "groups": 32,
        "remat": True,
    }
    config.residual = False  # adds the enlarged image to the output; for prediction "x0"
    config.dtype = "bfloat16"
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps"}
    config.degradation = "bsr"
    config.noise = 0.5
    config.sample = {"sampler": "ddim", "steps": "fast27", "threshold": 1.0}
    config.training = {
        "seed": 0,
        "batch_size": 256,
        "num_steps": 500_000,
        "learning_rate": 1e-4,
        "warmup_steps": 5_000,
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
        "preview_every": 10_000,
        "eval_every": 10_000,
        "max_to_keep": 2,
        "num_workers": 0,
        "tensorboard": False,
        "progress": True,
    }
    config.cpu_devices = 1
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant:
        small(config)
    if variant in ("shapes", "smoke"):
        config.data.path = "shapes"
        config.image_size = config.crop = 64
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the one stage."""
    c = config
    if c.degradation not in DEGRADATIONS:
        raise ValueError(f"degradation={c.degradation!r} must be one of {', '.join(map(repr, DEGRADATIONS))}")
    if c.factor < 2 or c.image_size % c.factor or c.crop % c.factor:
        raise ValueError(f"factor={c.factor} must be at least 2 and divide image_size={c.image_size} and crop={c.crop}")
    if c.residual and c.diffusion.prediction != "x0":
        raise ValueError(f"residual=True needs diffusion.prediction='x0', got {c.diffusion.prediction!r}")
    train, held_out = sources(c)
    diffusion, bsr = Diffusion(**c.diffusion), c.degradation == "bsr"
    unet = UNet(
        out_channels=diffusion.channels(3),
        attention_resolutions=(),
        attention_levels=(),
        mid_attention=False,
        dtype=network_dtype(c.dtype),
        **c.unet,
    )
    low_resolution = LowResolution(
        c.image_size // c.factor,
        c.factor,
        blur_rate=0.5 if c.degradation == "blur" else 0.0,
        noise=c.noise,
        variance_preserving=True,
        noise_level_input=True,
        entry="low_res" if bsr else None,
    )
    return (
        Stage(
            name="upsampler",
            task=DiffusionTask(
                model=Upsampler(unet, noise_level_input=True, residual=c.residual),
                diffusion=diffusion,
                x0=Images(c.image_size),
                conditions=(low_resolution,),
                sampling=sampling_from(c.sample, name="sample"),
            ),
            source=train,
            transforms=(
                Select(("image",)),
                CenterCrop(c.image_size),
                *([RandomFlip()] if c.data.flip else []),
                *([RandomCrop(c.crop)] if c.crop != c.image_size else []),
                *([DegradeBSR(c.factor)] if bsr else []),
            ),
            training=Training(**c.training),
            eval_source=held_out,
        ),
    )


def sources(config: ConfigDict) -> tuple:
    """Return training and held-out records."""
    data = config.data
    if data.path == "shapes":
        return tuple(ShapesSource(seed, config.image_size, length=80_000) for seed in (0, 1))
    if not data.path:
        raise ValueError(
            "data.path is needed: a folder of images, prepared data, .tar files or tfds:NAME, as in "
            "--config.data.path=my_images"
        )
    source = open_source(data.path)
    if data.held_out_path:
        return source, open_source(data.held_out_path)
    return split_source(source, data.held_out)


def small(config: ConfigDict) -> None:
    """Use a network that a CPU trains: a space-to-depth stem, few channels, x0-prediction, Muon."""
    config.image_size, config.crop, config.dtype, config.noise = 128, 64, "float32", 0.3
    config.unet.update(channels=64, channel_mult=(1,), num_res_blocks=2, dropout=0.0, patch=4, remat=False)
    config.diffusion.prediction, config.residual = "x0", True
    config.sample.steps = "15"
    config.training.update(
        batch_size=16,
        num_steps=1_500,
        learning_rate=2e-3,
        warmup_steps=100,
        decay="cosine",
        final_fraction=0.02,
        weight_decay=0.01,
        optimizer="muon",
        muon_learning_rate=6e-3,
        ema_decay=0.998,
        checkpoint_every=250,
        log_every=50,
        preview_every=500,
        eval_every=500,
    )


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.image_size, config.crop = 32, 16
    config.unet.update(channels=32, num_res_blocks=1)
    config.sample.steps = "2"
    config.training.update(
        batch_size=8,
        num_steps=2,
        warmup_steps=1,
        log_every=1,
        checkpoint_every=1,
        preview_every=2,
        eval_every=2,
        optimizer="adamw",
    )
