"""Classifier-free guidance (Ho and Salimans 2022): class-conditional models in continuous time, guided by themselves.

    python -m ddpm_jax.train --config configs/cfg.py:small --config.data.path=my_images --workdir runs/cfg
    python -m ddpm_jax.sample --workdir runs/cfg --label cat --num_images 16 --scale 1.3 --out cats.png

The source needs labels (docs/data.md). The network is trained at log-SNRs lambda = -2 log tan(a u + b) for uniform u,
with lambda in [-20, 20] (section 2 of the paper), and its label is dropped at the rate drop_label. `--scale` is 1 + w
of the paper. Ancestral sampling takes `sample.steps` steps that are even in u; `sample.variance_share` is v of the
paper, by which the logarithm of the variance lies between its bounds.

Variants, with the parameters of the network (held to them by tests/recipes/test_sizes.py):

    configs/cfg.py                ImageNet 64 x 64: 296M, v = 0.3
    configs/cfg.py:imagenet128    ImageNet 128 x 128: 422M, v = 0.2
    configs/cfg.py:small          32 x 32: 5.0M: trains on a laptop's CPU
    configs/cfg.py:digits         16 x 16: 0.3M: minutes on a CPU, docs/laptop.md
    configs/cfg.py:smoke          two steps of a tiny network on generated arrays

Architectures and optimization are those of ADM (Dhariwal and Nichol 2021), without learned variances; the lengths of
training are the paper's, 400K and 2.7M steps. Published FID and Inception Score:

    64 x 64      w = 0: 1.80, 53.71; w = 0.1: 1.55, 66.11; w = 4: Inception Score 260.2
    128 x 128    w = 0.3: 2.43, 158.47 in 256 steps; w = 4: Inception Score 421

Hardware and time: 64 x 64 on a TPU v5p-128 is planned for 0.079 s a step, 0.4 days, 560 chip-hours for 400K steps by
`python -m ddpm_jax.plan --config configs/cfg.py --topology v5p:4x4x4 --method blocks --fast` (docs/performance.md says
what these seconds are). `small` takes most of an hour on two cores.
"""

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.split import split_source
from ddpm_jax.data.transforms import CenterCrop, RandomFlip, Select
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.evaluation import report
from ddpm_jax.evaluation.during_training import evaluate_fields, measured
from ddpm_jax.models.adm import ClassUNet
from ddpm_jax.models.unet import UNet, attention_levels
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.training import DiffusionTask, Images, Labels, Stage, Training
from ddpm_jax.types import network_dtype

VARIANTS = ("", "imagenet128", "small", "digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.data = {"path": "", "held_out": 0.05, "flip": True}
    config.image_size = 64
    config.drop_label = 0.1
    config.unet = {
        "channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "heads": placeholder(int),
        "head_channels": 64,
        "dropout": 0.1,
        "patch": 1,
        "groups": 32,
        "remat": True,
    }
    config.attention_resolutions = (32, 16, 8)
    config.dtype = "bfloat16"
    config.diffusion = {"schedule": "cosine_log_snr", "span": (-20.0, 20.0), "num_steps": 1024, "prediction": "eps"}
    config.sample = {"sampler": "ancestral", "steps": "256", "threshold": 1.0, "scale": 1.1, "variance_share": 0.3}
    config.training = {
        "seed": 0,
        "batch_size": 2048,
        "num_steps": 400_000,
        "learning_rate": 3e-4,
        "warmup_steps": 0,
        "decay": "constant",
        "final_fraction": 1.0,
        "weight_decay": 0.0,
        "clip_norm": placeholder(float),
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
    config.evaluate = evaluate_fields()
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant == "imagenet128":
        config.image_size = 128
        config.unet.update(channels=256, channel_mult=(1, 1, 2, 3, 4), num_res_blocks=2, heads=4, dropout=0.0)
        config.sample.update(scale=1.3, variance_share=0.2)
        config.training.update(batch_size=256, num_steps=2_700_000, learning_rate=1e-4)
    if variant in ("small", "digits", "smoke"):
        small(config)
    if variant == "digits":
        digits(config)
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the one stage."""
    train, held_out = sources(config)
    names = tuple(getattr(train, "class_names", None) or ())
    if not names:
        raise ValueError(f"data.path={config.data.path!r} has no labels, which a class-conditional model needs")
    levels = attention_levels(
        config.attention_resolutions, config.image_size // config.unet.patch, len(config.unet.channel_mult)
    )
    unet = UNet(
        out_channels=3,
        attention_resolutions=(),
        attention_levels=levels,
        dtype=network_dtype(config.dtype),
        **config.unet,
    )
    flip = (RandomFlip(),) if config.data.flip else ()
    stage = Stage(
        name="base",
        task=DiffusionTask(
            model=ClassUNet(unet, len(names) + (config.drop_label > 0)),
            diffusion=Diffusion(**config.diffusion),
            x0=Images(config.image_size),
            conditions=(Labels(len(names), drop=config.drop_label, names=names),),
            sampling=sampling_from(config.sample, name="sample"),
            timestep_scale=1000.0,  # u is in [0, 1], and the network's sinusoids are for timesteps in [0, 1000)
        ),
        source=train,
        eval_source=held_out,
        transforms=(Select(("image", "label")), CenterCrop(config.image_size), *flip),
        training=Training(**config.training),
    )
    return (measured(stage, config.evaluate),)


def sources(config: ConfigDict) -> tuple:
    """Return training and held-out records."""
    if config.data.path == "noise":  # for the variant smoke
        size = config.image_size
        images = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
        source = ArraySource(images, labels=np.arange(64) % 3, class_names=("a", "b", "c"))
    elif not config.data.path:
        raise ValueError(
            "data.path is needed: images with labels (class subfolders, prepared data, .tar files or tfds:NAME), as in "
            "--config.data.path=my_images"
        )
    else:
        source = open_source(config.data.path)
    return split_source(source, config.data.held_out)


def pipeline(config: ConfigDict) -> PipelineDescription:
    """Return how the network is sampled."""
    return PipelineDescription(
        "Cascade", models={"base": "base"}, sampling={"base": sampling_from(config.sample, name="sample")}
    )


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Write a grid of samples, when the stage is trained."""
    report.write_samples(pipeline, workdir, show=show, progress=config.training.progress)


def small(config: ConfigDict) -> None:
    """Use a network that a CPU trains, predicting v."""
    config.image_size, config.dtype, config.attention_resolutions = 32, "float32", (8, 4)
    config.unet.update(channels=96, channel_mult=(1, 1), num_res_blocks=2, head_channels=32, patch=4)
    config.unet.update(dropout=0.0, remat=False)
    config.diffusion.prediction = "v"
    config.sample.steps = "64"
    config.training.update(batch_size=32, num_steps=6_000, learning_rate=2e-3, warmup_steps=100, decay="cosine")
    config.training.update(final_fraction=0.02, optimizer="muon", muon_learning_rate=6e-3, ema_decay=0.998)
    config.training.update(clip_norm=1.0, checkpoint_every=500, log_every=50, preview_every=1_000, eval_every=500)


def digits(config: ConfigDict) -> None:
    """Use a smaller network for images of 16 x 16, which are not mirrored, and fewer steps."""
    config.data.flip, config.image_size, config.attention_resolutions, config.cpu_devices = False, 16, (8,), 1
    config.unet.update(channels=16, channel_mult=(1, 2), num_res_blocks=1, head_channels=16, patch=1, groups=8)
    config.sample.scale = 1.0
    config.training.update(num_steps=1_000, ema_decay=0.99, preview_every=0)


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.data.update(path="noise", held_out=0.25)
    config.image_size, config.attention_resolutions = 16, ()
    config.unet.update(channels=32, channel_mult=(1,), num_res_blocks=1, head_channels=16)
    config.diffusion.num_steps, config.sample.steps = 16, "2"
    config.training.update(batch_size=8, num_steps=2, warmup_steps=1, log_every=1, checkpoint_every=1, eval_every=2)
    config.training.update(preview_every=0, optimizer="adamw")
