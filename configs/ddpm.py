"""DDPM (Ho et al. 2020): an unconditional or class-conditional diffusion model of any image source.

    python -m ddpm_jax.train --config configs/ddpm.py:small --config.data.path=my_images --workdir runs/ddpm
    python -m ddpm_jax.sample --workdir runs/ddpm --num_images 16 --out samples.png

`data.path` is a folder of images, a directory that `ddpm_jax.prepare` wrote, tar files, or "tfds:NAME" (docs/data.md);
images are resized and cropped to `image_size`. With --config.class_conditional the labels of the source (class
subfolders, for example) are a condition, and `sample` takes --label and --scale.

Variants, with the parameters of the network (held to them by tests/recipes/test_sizes.py):

    configs/ddpm.py           32 x 32, 35.7M: the published network for CIFAR-10
    configs/ddpm.py:256       256 x 256, 114M: the published network for LSUN and CelebA-HQ
    configs/ddpm.py:small     32 x 32, 4.7M: trains on a laptop's CPU; cosine schedule, v-prediction, Muon
    configs/ddpm.py:smoke     two steps of a tiny network on generated shapes

Betas, batch size, learning rate, warm-up, gradient clipping, average and dropout of the published variants are those of
section 4 and appendix B of the paper. It trained with plain Adam, as here without weight decay. Samples come from
ancestral sampling of all 1000 steps with the variance of the posterior ("fixed_small").
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.shapes.scenes import ShapesSource
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

VARIANTS = ("", "256", "small", "smoke")


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.data = {"path": "", "held_out": 0.05, "flip": True}
    config.image_size = 32
    config.class_conditional = False
    config.drop_label = 0.1  # for classifier-free guidance; 0 trains without a null class
    config.unet = {
        "channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "heads": 1,
        "head_channels": 64,
        "dropout": 0.1,
        "patch": 1,
        "groups": 32,
        "conv_resample": True,
        "scale_shift": False,
        "norm_eps": 1e-6,
        "frequency_shift": 1,
        "pad_after": True,
        "remat": False,
    }
    config.attention_resolutions = (16,)
    config.dtype = "float32"
    config.diffusion = {"schedule": "linear", "num_steps": 1000, "prediction": "eps", "variance": "fixed_small"}
    config.objective = "simple"
    config.sample = {"sampler": "ancestral", "steps": "1000", "threshold": 1.0}
    config.preview_steps = "50"
    config.training = {
        "seed": 0,
        "batch_size": 128,
        "num_steps": 800_000,
        "learning_rate": 2e-4,
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
        "moment_examples": 0,
        "max_to_keep": 2,
        "num_workers": 0,
        "tensorboard": False,
        "progress": True,
    }
    config.evaluate = evaluate_fields()
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant == "256":
        config.image_size = 256
        config.unet.update(channel_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
        config.training.update(batch_size=64, learning_rate=2e-5, num_steps=1_200_000)
    if variant in ("small", "smoke"):
        small(config)
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the one stage."""
    train, held_out = sources(config)
    conditions, network = (), unet(config)
    if config.class_conditional:
        names = getattr(train, "class_names", None)
        if not names:
            raise ValueError(f"class_conditional=True needs labels, which {config.data.path} has not")
        conditions = (Labels(len(names), drop=config.drop_label, names=tuple(names)),)
        network = ClassUNet(network, len(names) + (config.drop_label > 0))
    stage = Stage(
        name="base",
        task=DiffusionTask(
            model=network,
            diffusion=Diffusion(**config.diffusion),
            x0=Images(config.image_size),
            conditions=conditions,
            objective=config.objective,
            sampling=sampling_from(config.sample, name="sample").with_options(steps=config.preview_steps),
        ),
        source=train,
        transforms=transforms(config),
        training=Training(**config.training),
        eval_source=held_out,
    )
    return (measured(stage, config.evaluate),)


def sources(config: ConfigDict) -> tuple:
    """Return training and held-out records."""
    if config.data.path == "shapes":
        return tuple(ShapesSource(seed, max(config.image_size, 16), length=256) for seed in (0, 1))
    if not config.data.path:
        raise ValueError(
            "data.path is needed: a folder of images, prepared data, .tar files or tfds:NAME, as in "
            "--config.data.path=my_images"
        )
    source = open_source(config.data.path)
    if config.training.eval_every == 0:
        return source, None
    return split_source(source, config.data.held_out)


def transforms(config: ConfigDict) -> tuple:
    """Return what brings a record to an image of the size of the network, and its label."""
    names = ("image", "label") if config.class_conditional else ("image",)
    flip = (RandomFlip(),) if config.data.flip else ()
    return (Select(names), CenterCrop(config.image_size), *flip)


def unet(config: ConfigDict) -> UNet:
    """Return the U-Net of the config."""
    diffusion = Diffusion(**config.diffusion)
    levels = len(config.unet.channel_mult)
    return UNet(
        out_channels=diffusion.channels(3),
        attention_resolutions=(),
        attention_levels=attention_levels(config.attention_resolutions, config.image_size // config.unet.patch, levels),
        dtype=network_dtype(config.dtype),
        **config.unet,
    )


def pipeline(config: ConfigDict) -> PipelineDescription:
    """Return how the network is sampled."""
    return PipelineDescription(
        "Cascade", models={"base": "base"}, sampling={"base": sampling_from(config.sample, name="sample")}
    )


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Write a grid of samples, when the stage is trained."""
    report.write_samples(pipeline, workdir, show=show, progress=config.training.progress)


def small(config: ConfigDict) -> None:
    """Use a network that a CPU trains: a space-to-depth stem, few channels, the cosine schedule."""
    config.unet.update(
        channels=96, channel_mult=(1, 1), heads=placeholder(int), conv_resample=False, scale_shift=True, dropout=0.0
    )
    config.unet.update(patch=4, head_channels=32, norm_eps=1e-5, frequency_shift=0, pad_after=False)
    config.attention_resolutions = (8, 4)
    config.diffusion.update(schedule="cosine", prediction="v")
    config.sample.update(sampler="dpm_solver", steps="25")
    config.preview_steps = "25"
    config.training.update(
        batch_size=32,
        num_steps=6_000,
        learning_rate=2e-3,
        warmup_steps=100,
        decay="cosine",
        final_fraction=0.02,
        optimizer="muon",
        muon_learning_rate=6e-3,
        ema_decay=0.998,
        checkpoint_every=500,
        log_every=50,
        preview_every=1_000,
        eval_every=500,
    )


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.data.path = "shapes"
    config.image_size = 16
    config.unet.update(channels=32, num_res_blocks=1, head_channels=16)
    config.attention_resolutions = (2,)
    config.sample.steps = config.preview_steps = "2"
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
