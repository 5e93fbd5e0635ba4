"""Improved DDPM (Nichol and Dhariwal 2021): learned variances, the cosine schedule, and the variational bound as loss.

    python -m ddpm_jax.train --config configs/iddpm.py:small --config.data.path=my_images --workdir runs/iddpm
    python -m ddpm_jax.sample --workdir runs/iddpm --num_images 16 --steps 100 --out samples.png

`data.path` is a folder of images, a directory that `ddpm_jax.prepare` wrote, "cifar10:PATH" and so on (docs/data.md).
The rows of the paper's tables 1 and 2 are two options:

    --config.diffusion.schedule     "linear" or "cosine"
    --config.objective              "simple" (fixed variances), "hybrid", or "vlb": the bound alone, with timesteps by
                                    importance sampling (loss-second-moment)

Variants, with the parameters of their networks (held to them by tests/recipes/test_sizes.py):

    configs/iddpm.py                    CIFAR-10, 32 x 32: 52.5M
    configs/iddpm.py:imagenet64         ImageNet 64 x 64: 121M (the paper rounds to "100M")
    configs/iddpm.py:imagenet64_cond    ImageNet 64 x 64, class-conditional: 273M ("270M")
    configs/iddpm.py:256                the same, and the upsampler to 256 x 256: 280M
    configs/iddpm.py:small              32 x 32: 4.7M: trains on a laptop's CPU
    configs/iddpm.py:digits             16 x 16: 0.2M: minutes on a CPU, docs/laptop.md
    configs/iddpm.py:smoke              two steps of tiny networks on generated shapes

Bits per dimension and FID of the paper, after 500K steps on CIFAR-10 and 200K on ImageNet 64 x 64 (its tables 1, 2):

    T     schedule  objective   CIFAR-10        ImageNet 64 x 64
    1000  linear    simple      3.73   3.29     3.99  32.5
    4000  linear    simple      3.37   2.90     3.77  31.3
    4000  linear    hybrid      3.26   3.07     3.66  32.2
    4000  cosine    simple      3.26   3.05     3.68  27.0
    4000  cosine    hybrid      3.17   3.19     3.62  28.0
    4000  cosine    vlb         2.94  11.47     3.57  56.7

After 1.5M steps ImageNet has 3.57 and 19.2 (hybrid), 3.53 and 40.1 (vlb). imagenet64_cond has an FID of 2.92. The first
row is `--config.diffusion.num_steps=1000`. Batch sizes, learning rates and dropout are those of the published flags.

Hardware and time: imagenet64 on a TPU v5e-8 is planned for 0.065 s a step, 1.1 days, 216 chip-hours for 1.5M steps by
`python -m ddpm_jax.plan --config configs/iddpm.py:imagenet64 --stage base --topology v5e:2x4 --method blocks --fast`
(docs/performance.md says what these seconds are). `small` takes 6000 steps of 32 images, most of an hour on two cores.
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
from ddpm_jax.models.adm import ClassUNet, SuperUNet
from ddpm_jax.models.unet import UNet, attention_levels
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.training import DiffusionTask, Images, Labels, LowResolution, Stage, Training
from ddpm_jax.types import network_dtype

VARIANTS = ("", "imagenet64", "imagenet64_cond", "256", "small", "digits", "smoke")


def training(batch_size: int, num_steps: int, learning_rate: float) -> dict:
    """Return the fields of `Training` of a stage."""
    return {
        "batch_size": batch_size,
        "num_steps": num_steps,
        "learning_rate": learning_rate,
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
        "moment_examples": 0,
        "max_to_keep": 2,
        "num_workers": 0,
    }


def network(channels: int, channel_mult: tuple[int, ...], num_res_blocks: int, dropout: float = 0.0) -> dict:
    """Return the fields of a U-Net of the paper: convolutions between levels, four heads of attention at 16 and 8."""
    return {
        "channels": channels,
        "channel_mult": channel_mult,
        "num_res_blocks": num_res_blocks,
        "heads": 4,
        "head_channels": 64,
        "dropout": dropout,
        "patch": 1,
        "groups": 32,
        "conv_resample": True,
        "remat": False,
    }


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.data = {"path": "", "held_out": 0.05, "flip": True}
    config.image_size = 32
    config.class_conditional = False
    config.drop_label = 0.0  # for classifier-free guidance; 0 trains without a null class, as the paper
    config.unet = network(128, (1, 2, 2, 2), 3, dropout=0.3)
    config.attention_resolutions = (16, 8)
    config.dtype = "float32"
    config.diffusion = {"schedule": "cosine", "num_steps": 4000, "prediction": "eps"}
    config.objective = "hybrid"
    config.vlb_weight = 1e-3
    config.timestep_scale = 0.25  # the published networks receive timesteps in [0, 1000)
    config.training = training(128, 500_000, 1e-4)
    config.upsampler = {
        "enabled": False,
        "factor": 4,
        "unet": network(192, (1, 1, 2, 2, 4, 4), 2),
        "attention_resolutions": (16, 8),
        "diffusion": {"schedule": "linear", "num_steps": 4000, "prediction": "eps"},
        "vlb_weight": 1 / 4000,
        "timestep_scale": 1.0,
        "sample": {"sampler": "ancestral", "steps": "250", "threshold": 1.0},
        "training": training(256, 500_000, 3e-4),
    }
    config.sample = {"sampler": "ancestral", "steps": "250", "threshold": 1.0}
    config.tensorboard = False
    config.progress = True
    config.evaluate = evaluate_fields()
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant in ("imagenet64", "imagenet64_cond", "256"):
        config.image_size = 64
        config.unet.update(channel_mult=(1, 2, 3, 4), dropout=0.0, remat=True)
        config.training.num_steps = 1_500_000
    if variant in ("imagenet64_cond", "256"):
        config.class_conditional = True
        config.unet.channels = 192
        config.training.update(batch_size=2048, num_steps=250_000, learning_rate=3e-4)
        config.update(vlb_weight=1 / 4000, timestep_scale=1.0)
        config.upsampler.enabled = variant == "256"
        config.upsampler.unet.remat = True
    if variant in ("small", "digits", "smoke"):
        small(config)
    if variant == "digits":
        digits(config)
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the base, and the upsampler if there is one."""
    c, source = config, sources(config)
    names = tuple(getattr(source[0], "class_names", None) or ()) if c.class_conditional else None
    if c.class_conditional and not names:
        raise ValueError(f"class_conditional=True needs labels, which {c.data.path} has not")
    classes = names and len(names) + (c.drop_label > 0)
    labels = (Labels(len(names), drop=c.drop_label, names=names),) if names else ()
    process = diffusion(c, c.diffusion)
    net = unet(c, c, c.image_size, process)
    base = Stage(
        name="base",
        task=DiffusionTask(
            model=ClassUNet(net, classes) if names else net,
            diffusion=process,
            x0=Images(c.image_size),
            conditions=labels,
            sampling=sampling_from(c.sample, name="sample"),
            **objective(c, c),
        ),
        transforms=transforms(c, c.image_size),
        **data(c, c, source),
    )
    base = measured(base, c.evaluate)
    if not c.upsampler.enabled:
        return (base,)
    size, process = c.image_size * c.upsampler.factor, diffusion(c, c.upsampler.diffusion)
    upsampler = Stage(
        name="upsampler",
        task=DiffusionTask(
            model=SuperUNet(unet(c, c.upsampler, size, process), classes),
            diffusion=process,
            x0=Images(size),
            conditions=(LowResolution(c.image_size, c.upsampler.factor, blur_rate=0.0), *labels),
            sampling=sampling_from(c.upsampler.sample, name="upsampler.sample"),
            **objective(c, c.upsampler),
        ),
        transforms=transforms(c, size),
        **data(c, c.upsampler, source),
    )
    return base, upsampler


def diffusion(config: ConfigDict, fields: ConfigDict) -> Diffusion:
    """Return the process; the variance is learned unless the loss does not train it."""
    return Diffusion(**fields, variance="fixed_large" if config.objective == "simple" else "learned_range")


def objective(config: ConfigDict, part: ConfigDict) -> dict:
    """Return how a stage's loss is computed: the bound alone needs importance sampling of timesteps."""
    return {
        "objective": config.objective,
        "vlb_weight": part.vlb_weight,
        "timesteps": "importance" if config.objective == "vlb" else "uniform",
        "timestep_scale": part.timestep_scale,
    }


def unet(config: ConfigDict, part: ConfigDict, size: int, process: Diffusion) -> UNet:
    """Return the U-Net of a stage."""
    levels = len(part.unet.channel_mult)
    return UNet(
        out_channels=process.channels(3),
        attention_resolutions=(),
        attention_levels=attention_levels(part.attention_resolutions, size // part.unet.patch, levels),
        dtype=network_dtype(config.dtype),
        **part.unet,
    )


def transforms(config: ConfigDict, size: int) -> tuple:
    """Return what brings a record to an image of a size, and its label."""
    names = ("image", "label") if config.class_conditional else ("image",)
    return (Select(names), CenterCrop(size), *((RandomFlip(),) if config.data.flip else ()))


def data(config: ConfigDict, part: ConfigDict, source: tuple) -> dict:
    """Return the records of a stage and how it is optimized."""
    more = {"seed": config.seed, "tensorboard": config.tensorboard, "progress": config.progress}
    return {"source": source[0], "eval_source": source[1], "training": Training(**more, **part.training)}


def sources(config: ConfigDict) -> tuple:
    """Return training and held-out records."""
    if config.data.path == "noise":  # for the variant smoke
        size = config.image_size * config.upsampler.factor
        images = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
        source = ArraySource(images, labels=np.arange(64) % 3, class_names=("a", "b", "c"))
    elif not config.data.path:
        raise ValueError(
            "data.path is needed: a folder of images, prepared data, .tar files or tfds:NAME, as in "
            "--config.data.path=my_images"
        )
    else:
        source = open_source(config.data.path)
    return split_source(source, config.data.held_out)


def pipeline(config: ConfigDict) -> PipelineDescription:
    """Return how the stages are sampled together."""
    models, sampling = {"base": "base"}, {"base": sampling_from(config.sample, name="sample")}
    if config.upsampler.enabled:
        models["upsamplers"] = ["upsampler"]
        sampling["upsampler"] = sampling_from(config.upsampler.sample, name="upsampler.sample")
    return PipelineDescription("Cascade", models=models, sampling=sampling)


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Write a grid of samples, when all stages are trained."""
    report.write_samples(pipeline, workdir, show=show, progress=config.progress)


def small(config: ConfigDict) -> None:
    """Use a network that a CPU trains, with a quarter of the steps of the process."""
    config.unet.update(channels=96, channel_mult=(1, 1), num_res_blocks=2, patch=4, conv_resample=False)
    config.unet.update(heads=placeholder(int), head_channels=32, dropout=0.0)
    config.attention_resolutions = (8, 4)
    config.diffusion.num_steps = 1000
    config.timestep_scale = 1.0
    config.sample.steps = "100"
    faster = {"warmup_steps": 100, "decay": "cosine", "final_fraction": 0.02, "optimizer": "muon", "clip_norm": 1.0}
    faster |= {"muon_learning_rate": 6e-3, "learning_rate": 2e-3, "ema_decay": 0.998, "batch_size": 32}
    faster |= {"num_steps": 6_000, "log_every": 50, "checkpoint_every": 500, "eval_every": 500, "preview_every": 1_000}
    config.training.update(**faster)
    config.upsampler.update(factor=2, attention_resolutions=(), vlb_weight=1e-3)
    config.upsampler.unet.update(channels=64, channel_mult=(1, 2), num_res_blocks=1)
    config.upsampler.diffusion.num_steps = 1000
    config.upsampler.training.update(**faster)
    config.upsampler.sample.steps = "50"


def digits(config: ConfigDict) -> None:
    """Use a smaller network for images of 16 x 16, which are not mirrored, and fewer steps."""
    config.data.flip, config.image_size, config.attention_resolutions, config.cpu_devices = False, 16, (8,), 1
    config.unet.update(channels=16, channel_mult=(1, 2), num_res_blocks=1, head_channels=16, patch=1, groups=8)
    config.training.update(num_steps=1_500, ema_decay=0.99, preview_every=0)


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.data.update(path="noise", held_out=0.25)
    config.image_size, config.class_conditional = 16, True
    config.unet.update(channels=32, channel_mult=(1,), num_res_blocks=1, head_channels=16)
    config.attention_resolutions = ()
    config.objective = "vlb"  # with importance sampling, whose history is a part of the state
    config.diffusion.num_steps = config.upsampler.diffusion.num_steps = 32
    config.upsampler.enabled = True
    config.upsampler.unet.update(channels=32, channel_mult=(1,))
    config.sample.steps = config.upsampler.sample.steps = "2"
    quick = {"batch_size": 8, "num_steps": 2, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 1}
    quick |= {"eval_every": 2, "preview_every": 0, "optimizer": "adamw"}
    config.training.update(**quick)
    config.upsampler.training.update(**quick)
