"""Cascaded diffusion (Ho et al. 2022): class-conditional images from 64 x 64, enlarged twice, with augmentation.

    python -m ddpm_jax.train --config configs/cascade.py:small --config.data.path=my_images --workdir runs/cascade
    python -m ddpm_jax.sample --workdir runs/cascade --label cat --num_images 16 --out cats.png --up_32_noise_level=0.1

The source needs labels (docs/data.md). Every stage is class-conditional. Each upsampler is trained with conditioning
augmentation: its low-resolution images get noise of a random level, which the network is given, or are blurred. Then

    --up_128_noise_level=0.1                       adds noise of this level to the finished images of the base
                                                   (non-truncated augmentation, section 4.2 of the paper)
    --up_128_noise_level=0.1 --up_128_truncated    stops the base where its noise has this level (truncated)
    --scale=1.5 --up_128_scale=1.5                 classifier-free guidance; labels are dropped at the rate drop_label

The levels are found after training, by the quality of samples: `evaluate` writes a grid for each of
`sweep.noise_levels` of the first upsampler that is at most `augmentation.noise`; `sample.noise_levels`, in the same
range, and `sample.truncated` are the pipeline's defaults.

Variants, with the parameters of their networks (held to them by tests/recipes/test_sizes.py):

    configs/cascade.py          ImageNet, 64 -> 128 -> 256: 296M, 238M and 313M
    configs/cascade.py:small    16 -> 32: 5.0M and 4.6M: trains on a laptop's CPU
    configs/cascade.py:digits   12 -> 24: 0.3M and 0.5M: minutes on a CPU, docs/laptop.md
    configs/cascade.py:smoke    two steps of tiny networks on generated arrays

Published: FID 1.48 (64 x 64), 3.52 (128 x 128) and 4.88 (256 x 256), Inception Score 67.95 and 128.8, classification
accuracy score 63.02 %. What differs from the paper:

- The networks and the lengths of training are those of ADM at these sizes (Dhariwal and Nichol 2021), the upsamplers
  with an input for the level; the layers of the paper's appendix were not at hand when this was written.
- The level of the noise is uniform in [0, noise] as a standard deviation; in the paper its timestep is uniform.
- Half of the examples of both upsamplers are blurred by a kernel of 3 pixels with sigma 0.6, in the paper sigma is
  uniform in [0.4, 0.6] and both augmentations are separate models.

Hardware and time: on a TPU v5p-64 the stages are planned for 0.154, 0.034 and 0.121 s a step, 1.0, 0.2 and 0.7 days,
1,430 chip-hours in all by `python -m ddpm_jax.plan --config configs/cascade.py --topology v5p:2x4x4 --method blocks
--fast` (docs/performance.md says what these seconds are). `small` takes about an hour on two cores.
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

VARIANTS = ("", "small", "digits", "smoke")


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


def part(size: int, channel_mult: tuple[int, ...], num_res_blocks: int, steps: dict, **fields) -> dict:
    """Return the part that every stage has."""
    return {
        "image_size": size,
        "unet": {
            "channels": 192,
            "channel_mult": channel_mult,
            "num_res_blocks": num_res_blocks,
            "head_channels": 64,
            "dropout": 0.0,
            "patch": 1,
            "groups": 32,
            "remat": True,
        },
        "attention_resolutions": (32, 16, 8),
        "diffusion": {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "variance": "learned_range"},
        "sample": {"sampler": "ancestral", "steps": "250", "threshold": 1.0, "scale": 1.0},
        "training": steps,
    } | fields


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.data = {"path": "", "held_out": 0.05, "flip": True}
    config.dtype = "bfloat16"
    config.objective = "hybrid"
    config.drop_label = 0.1  # 0 trains without a null class
    config.augmentation = {"noise": 1.0, "blur_rate": 0.5}
    config.base = part(64, (1, 2, 3, 4), 3, training(2048, 540_000, 3e-4))
    config.base.unet.dropout = 0.1
    config.upsamplers = ("up_128", "up_256")
    config.up_128 = part(128, (1, 1, 2, 3, 4), 2, training(256, 500_000, 1e-4))
    config.up_256 = part(256, (1, 1, 2, 2, 4, 4), 2, training(256, 500_000, 1e-4))
    config.sample = {"noise_levels": (0.1, 0.1), "truncated": False}
    config.sweep = {"noise_levels": (0.0, 0.05, 0.1, 0.2, 0.3)}
    config.tensorboard = False
    config.progress = True
    config.evaluate = evaluate_fields()
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant in ("small", "digits", "smoke"):
        small(config)
    if variant == "digits":
        digits(config)
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the base and the upsamplers."""
    source = sources(config)
    names = tuple(getattr(source[0], "class_names", None) or ())
    if not names:
        raise ValueError(f"data.path={config.data.path!r} has no labels, which class-conditional models need")
    found, low = [], None
    for name in ("base", *config.upsamplers):
        found.append(stage(config, name, low, names, source))
        low = config[name].image_size
    return (measured(found[0], config.evaluate), *found[1:])


def stage(config: ConfigDict, name: str, low: int | None, names: tuple[str, ...], source: tuple) -> Stage:
    """Return a stage; low: the size of the images that it enlarges, None for the base."""
    c, own, diffusion = config, config[name], Diffusion(**config[name].diffusion)
    unet = UNet(
        out_channels=diffusion.channels(3),
        attention_resolutions=(),
        attention_levels=attention_levels(
            own.attention_resolutions, own.image_size // own.unet.patch, len(own.unet.channel_mult)
        ),
        dtype=network_dtype(c.dtype),
        **own.unet,
    )
    conditions = (Labels(len(names), drop=c.drop_label, names=names),)
    classes = len(names) + (c.drop_label > 0)
    model = ClassUNet(unet, classes)
    if low is not None:
        if own.image_size % low:
            raise ValueError(f"{name}.image_size={own.image_size} must be a multiple of {low}, the size before it")
        level = {"noise": c.augmentation.noise, "variance_preserving": True, "noise_level_input": True}
        blur = c.augmentation.blur_rate
        conditions = (LowResolution(low, own.image_size // low, blur_rate=blur, **level), *conditions)
        model = SuperUNet(unet, classes, noise_level_input=True)
    return Stage(
        name=name,
        task=DiffusionTask(
            model=model,
            diffusion=diffusion,
            x0=Images(own.image_size),
            conditions=conditions,
            objective=c.objective,
            sampling=sampling_from(own.sample, name=f"{name}.sample"),
        ),
        source=source[0],
        eval_source=source[1],
        transforms=(
            Select(("image", "label")),
            CenterCrop(own.image_size),
            *((RandomFlip(),) if c.data.flip else ()),
        ),
        training=Training(seed=c.seed, tensorboard=c.tensorboard, progress=c.progress, **own.training),
    )


def sources(config: ConfigDict) -> tuple:
    """Return training and held-out records."""
    if config.data.path == "noise":  # for the variant smoke
        size = config[config.upsamplers[-1]].image_size
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
    """Return how the stages are sampled together."""
    names, levels = config.upsamplers, config.sample.noise_levels
    if len(levels) != len(names):
        raise ValueError(f"sample.noise_levels={levels} must have a level for each of {', '.join(names)}")
    most = config.augmentation.noise
    if not all(0.0 <= level <= most for level in levels):
        raise ValueError(f"sample.noise_levels={levels} must be in [0, {most}], up to augmentation.noise")
    if config.sample.truncated and not all(levels):
        raise ValueError(f"sample.truncated=True needs sample.noise_levels above 0, got {levels}")
    options = {"noise_levels": dict(zip(names, levels))}
    if config.sample.truncated:
        options["enlarging"] = {name: {"truncated": True} for name in names}
    return PipelineDescription(
        "Cascade",
        models={"base": "base", "upsamplers": list(names)},
        sampling={name: sampling_from(config[name].sample, name=f"{name}.sample") for name in ("base", *names)},
        options=options,
    )


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Write grids of samples: with the pipeline's noise levels, and one for each level of the first upsampler."""
    report.write_samples(pipeline, workdir, show=show, progress=config.progress)
    first = config.upsamplers[0]
    for level in [level for level in config.sweep.noise_levels if level <= config.augmentation.noise]:
        place = workdir / "sweep" / f"{first}_noise_level={level:g}"
        place.mkdir(parents=True, exist_ok=True)
        own = {first: {"truncated": config.sample.truncated and level > 0}}
        enlarging = tuple((dict(pipeline.enlarging) | own).items())
        one = pipeline.replace(noise_levels={**pipeline.noise_levels, first: level}, enlarging=enlarging)
        report.write_samples(one, place, show=show, progress=config.progress)


def small(config: ConfigDict) -> None:
    """Use networks that a CPU trains, from 16 x 16 to 32 x 32."""
    config.dtype, config.objective, config.upsamplers = "float32", "simple", ("up_32",)
    config.up_32 = config.up_128
    del config.up_128, config.up_256
    config.base.update(image_size=16, attention_resolutions=(8, 4))
    config.base.unet.update(channels=96, channel_mult=(1, 1), num_res_blocks=2, patch=2)
    config.up_32.update(image_size=32, attention_resolutions=())
    config.up_32.unet.update(channels=64, channel_mult=(1, 2), num_res_blocks=2, patch=2)
    config.sample.noise_levels = (0.1,)
    for own in (config.base, config.up_32):
        own.unet.update(head_channels=32, dropout=0.0, remat=False)
        own.diffusion.update(prediction="v", variance="fixed_small")
        own.sample.update(sampler="dpm_solver", steps="25")
        own.training.update(batch_size=32, num_steps=6_000, learning_rate=2e-3, warmup_steps=100, decay="cosine")
        own.training.update(final_fraction=0.02, optimizer="muon", muon_learning_rate=6e-3, ema_decay=0.998)
        own.training.update(clip_norm=1.0, checkpoint_every=500, log_every=50, preview_every=1_000, eval_every=500)


def digits(config: ConfigDict) -> None:
    """Use smaller networks from 12 x 12 to 24 x 24 pixels, which are not mirrored, and fewer steps."""
    config.data.flip, config.cpu_devices, config.upsamplers = False, 1, ("up_24",)
    config.up_24 = config.up_32
    del config.up_32
    config.base.update(image_size=12, attention_resolutions=(6,))
    config.up_24.image_size = 24
    for own in (config.base, config.up_24):
        own.unet.update(channels=16, channel_mult=(1, 2), num_res_blocks=1, head_channels=16, patch=1, groups=8)
        own.training.update(num_steps=1_000, ema_decay=0.99, preview_every=0)
    config.up_24.unet.update(channels=24, patch=2)


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.data.update(path="noise", held_out=0.25)
    config.base.image_size, config.up_32.image_size = 8, 16
    config.sweep.noise_levels = (0.1,)
    for own in (config.base, config.up_32):
        own.unet.update(channels=32, channel_mult=(1,), num_res_blocks=1, head_channels=16)
        own.attention_resolutions = ()
        own.diffusion.num_steps = 8
        own.sample.steps = "2"
        own.training.update(batch_size=8, num_steps=2, warmup_steps=1, log_every=1, checkpoint_every=1, eval_every=2)
        own.training.update(optimizer="adamw", preview_every=0)
