"""Guided diffusion (ADM, Dhariwal and Nichol 2021): a class-conditional U-Net, and a classifier of noised images.

    python -m ddpm_jax.train --config configs/adm.py:small --config.data.path=my_images --workdir runs/adm
    python -m ddpm_jax.sample --workdir runs/adm --label cat --classifier_scale 4 --num_images 16 --out cats.png

The source needs labels (docs/data.md), such as class subfolders. Two stages: "base", the class-conditional model, and
"classifier", the encoder half of its U-Net with one of the paper's pooling layers (classifier.pool: "attention",
"adaptive", "spatial" or "spatial_v2"), trained on noised images. `sample` guides by the classifier's gradient with
--classifier_scale, by its variance in ancestral sampling and without noise by --sampler=ddim; the base is trained
without a null class, as in the paper, unless drop_label > 0. `--stage classifier` trains the classifier alone, which
`sample --classifier=DIR` combines with the model of any recipe that has the same image size and noise process.

With upsampler.enabled a third stage, "upsampler", enlarges the images of the base by upsampler.factor, given their
class (the paper's ADM-U). It is trained on whole images, whose small copies are blurred and noised only if
upsampler.blur_rate and upsampler.noise are positive. The classifier guides the base alone.

Variants, with the parameters of their networks (held to them by tests/recipes/test_sizes.py):

    configs/adm.py                ImageNet 64 x 64: 296M, classifier 65M
    configs/adm.py:imagenet128    ImageNet 128 x 128: 422M, classifier 43M
    configs/adm.py:imagenet256    ImageNet 256 x 256: 554M, classifier 54M
    configs/adm.py:imagenet512    ImageNet 512 x 512: 559M, classifier 54M
    configs/adm.py:lsun           a category of LSUN, 256 x 256, unconditional: 552M
    configs/adm.py:256            the networks for 64 x 64, and the upsampler to 256 x 256: 312M
    configs/adm.py:512            the networks for 128 x 128, and the upsampler to 512 x 512: 309M
    configs/adm.py:small          32 x 32: 5.0M and 0.6M: trains on a laptop's CPU
    configs/adm.py:digits         16 x 16: 0.3M and 0.1M: minutes on a CPU, docs/laptop.md
    configs/adm.py:smoke          two steps of tiny networks on generated arrays

The full-size numbers are those of tables 11 and 12 of the paper; the upsampler to 512 x 512 is the released one, which
has no attention at 8 x 8. Published FID, sFID, precision and recall, 250 steps:

    64 x 64      2.07  4.29  0.74  0.63     without guidance
    128 x 128    2.97  5.09  0.78  0.59     --classifier_scale 0.5; 5.91 without
    256 x 256    4.59  5.25  0.82  0.52     --classifier_scale 1; 10.94 without; 3.94 by the variant 256
    512 x 512    7.72  6.57  0.87  0.42     --classifier_scale 4; 23.24 without; 3.85 by the variant 512
    LSUN         bedroom 1.90, horse 2.57, cat 5.57, 1000 steps

Hardware and time, planned and not run (`python -m ddpm_jax.plan --config configs/adm.py:imagenet256 --topology v5p-64
--method blocks --fast`): on v5p-64 the bases for 64, 128, 256 and 512 pixels take 1.0, 2.8, 4.4 and 8.1 days, LSUN 1.1,
the classifiers 0.05, 0.02, 0.09 and 0.23, the upsamplers to 256 and 512 pixels 0.7 and 5.7. docs/performance.md has
v4, v5e and v6e. `small` takes about an hour on two cores.
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
from ddpm_jax.models.adm import POOLS, Classifier, ClassUNet, SuperUNet
from ddpm_jax.models.unet import UNet, attention_levels
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.training import ClassifierTask, DiffusionTask, Images, Labels, LowResolution, Stage, Training
from ddpm_jax.types import network_dtype

VARIANTS = ("", "imagenet128", "imagenet256", "imagenet512", "lsun", "256", "512", "small", "digits", "smoke")
MULTIPLIERS = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def training(batch_size: int, num_steps: int, learning_rate: float, **overrides) -> dict:
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
    } | overrides


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.data = {"path": "", "held_out": 0.05, "flip": True}
    config.image_size = 64
    config.class_conditional = True
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "variance": "learned_range"}
    config.base = {
        "unet": {
            "channels": 192,
            "channel_mult": (1, 2, 3, 4),
            "num_res_blocks": 3,
            "heads": placeholder(int),
            "head_channels": 64,
            "dropout": 0.1,
            "patch": 1,
            "groups": 32,
            "remat": True,
        },
        "attention_resolutions": (32, 16, 8),
        "dtype": "bfloat16",
        "objective": "hybrid",
        "drop_label": 0.0,
        "training": training(2048, 540_000, 3e-4),
    }
    config.classifier = {
        "enabled": True,
        "channels": 128,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 4,
        "head_channels": 64,
        "attention_resolutions": (32, 16, 8),
        "pool": "attention",
        "noised": True,  # False: a classifier of clean images, to judge samples
        "dropout": 0.0,
        "groups": 32,
        "remat": True,
        "dtype": "bfloat16",
        "training": training(
            1024, 300_000, 6e-4, weight_decay=0.2, decay="linear", final_fraction=0.0, preview_every=0
        ),
    }
    config.upsampler = published_upsampler() | {"enabled": variant in ("256", "512")}
    config.sample = {
        "sampler": "ancestral",
        "steps": "250",
        "threshold": 1.0,
        "classifier_scale": placeholder(float),
    }
    config.tensorboard = False
    config.progress = True
    config.evaluate = evaluate_fields()
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant == "512":
        larger(config, 128)
        config.upsampler.unet.update(heads=placeholder(int), head_channels=64)
        config.upsampler.attention_resolutions = (32, 16)
        config.upsampler.training.num_steps = 1_050_000
    elif variant == "lsun":
        lsun(config)
    elif variant.startswith("imagenet"):
        larger(config, int(variant.removeprefix("imagenet")))
    if variant in ("small", "digits", "smoke"):
        small(config)
    if variant == "digits":
        digits(config)
    if variant == "smoke":
        smoke(config)
    return config


def larger(config: ConfigDict, size: int) -> None:
    """Use the networks of ImageNet 128 x 128, 256 x 256 or 512 x 512."""
    config.image_size = size
    config.diffusion.schedule = "linear"
    config.base.unet.update(channels=256, channel_mult=MULTIPLIERS[size], num_res_blocks=2, dropout=0.0)
    config.base.unet.update({"heads": 4} if size == 128 else {})
    steps = {128: 4_360_000, 256: 1_980_000, 512: 1_940_000}[size]
    config.base.training.update(batch_size=256, num_steps=steps, learning_rate=1e-4)
    config.classifier.update(channel_mult=MULTIPLIERS[size], num_res_blocks=2)
    steps = 300_000 if size == 128 else 500_000
    config.classifier.training.update(batch_size=256, num_steps=steps, learning_rate=3e-4, weight_decay=0.05)


def lsun(config: ConfigDict) -> None:
    """Use the unconditional network of LSUN, 500K steps as for bedrooms; 200K for cats and 250K for horses."""
    larger(config, 256)
    config.class_conditional = config.classifier.enabled = False
    config.base.unet.dropout = 0.1
    config.base.training.num_steps = 500_000
    config.sample.steps = "1000"


def published_upsampler() -> dict:
    """Return the fields of the upsampler from 64 to 256."""
    return {
        "factor": 4,
        "unet": {
            "channels": 192,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "num_res_blocks": 2,
            "heads": 4,
            "head_channels": 64,
            "dropout": 0.0,
            "groups": 32,
            "remat": True,
        },
        "attention_resolutions": (32, 16, 8),
        "dtype": "bfloat16",
        "diffusion": {"schedule": "linear", "num_steps": 1000, "prediction": "eps", "variance": "learned_range"},
        "objective": "hybrid",
        "blur_rate": 0.0,
        "noise": 0.0,
        "drop_label": 0.0,
        "sample": {"sampler": "ancestral", "steps": "250", "threshold": 1.0},
        "training": training(256, 500_000, 1e-4),
    }


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the base, the classifier and the upsampler, those that there are."""
    train, held_out = sources(config)
    names = tuple(getattr(train, "class_names", None) or ())
    if (config.class_conditional or config.classifier.enabled) and not names:
        raise ValueError(f"data.path={config.data.path!r} has no labels, which a class-conditional model needs")
    data = {"source": train, "eval_source": held_out}
    shared = data | {"transforms": transforms(config, config.image_size)}
    first = Stage(name="base", task=base(config, names), training=trained(config, config.base), **shared)
    found = [measured(first, config.evaluate)]
    if config.classifier.enabled:
        task, own = classifier(config, names), trained(config, config.classifier)
        found.append(Stage(name="classifier", task=task, training=own, **shared))
    return (*found, *((upsampler(config, names, data),) if config.upsampler.enabled else ()))


def base(config: ConfigDict, names: tuple[str, ...]) -> DiffusionTask:
    """Return the task of the model of small images, class-conditional or not."""
    fields, diffusion = config.base, Diffusion(**config.diffusion)
    network = unet(fields, config.image_size, diffusion, "base.dtype")
    conditions = ()
    if config.class_conditional:
        network = ClassUNet(network, len(names) + (fields.drop_label > 0))
        conditions = (Labels(len(names), drop=fields.drop_label, names=names),)
    return DiffusionTask(
        model=network,
        diffusion=diffusion,
        x0=Images(config.image_size),
        conditions=conditions,
        objective=fields.objective,
        sampling=sampling_from(config.sample, name="sample").with_options(classifier_scale=0.0),
    )


def classifier(config: ConfigDict, names: tuple[str, ...]) -> ClassifierTask:
    """Return the task of the classifier of noised images."""
    fields = dict(config.classifier)
    if fields["pool"] not in POOLS:
        raise ValueError(f"classifier.pool={fields['pool']!r} must be one of {', '.join(map(repr, POOLS))}")
    noised, _, _ = (fields.pop(name) for name in ("noised", "enabled", "training"))
    fields["dtype"] = network_dtype(fields["dtype"], name="classifier.dtype")
    return ClassifierTask(
        model=Classifier(num_classes=len(names), image_size=config.image_size, **fields),
        diffusion=Diffusion(**config.diffusion),
        x0=Images(config.image_size),
        noised=noised,
        names=names,
    )


def unet(fields: ConfigDict, size: int, diffusion: Diffusion, dtype_name: str) -> UNet:
    """Return the U-Net of a part of the config."""
    levels = len(fields.unet.channel_mult)
    return UNet(
        out_channels=diffusion.channels(3),
        attention_resolutions=(),
        attention_levels=attention_levels(fields.attention_resolutions, size // fields.unet.get("patch", 1), levels),
        dtype=network_dtype(fields.dtype, name=dtype_name),
        **fields.unet,
    )


def upsampler(config: ConfigDict, names: tuple[str, ...], data: dict) -> Stage:
    """Return the stage that enlarges the images of the base."""
    up, size = config.upsampler, config.image_size * config.upsampler.factor
    diffusion, labels, classes = Diffusion(**up.diffusion), (), None
    if config.class_conditional:
        labels, classes = (Labels(len(names), drop=up.drop_label, names=names),), len(names) + (up.drop_label > 0)
    low_resolution = LowResolution(config.image_size, up.factor, blur_rate=up.blur_rate, noise=up.noise)
    return Stage(
        name="upsampler",
        task=DiffusionTask(
            model=SuperUNet(unet(up, size, diffusion, "upsampler.dtype"), classes),
            diffusion=diffusion,
            x0=Images(size),
            conditions=(low_resolution, *labels),
            objective=up.objective,
            sampling=sampling_from(up.sample, name="upsampler.sample"),
        ),
        training=trained(config, up),
        transforms=transforms(config, size),
        **data,
    )


def transforms(config: ConfigDict, size: int) -> tuple:
    """Return what brings a record to an image of a size, and its label."""
    flip = (RandomFlip(),) if config.data.flip else ()
    labels = ("label",) if config.class_conditional or config.classifier.enabled else ()
    return (Select(("image", *labels)), CenterCrop(size), *flip)


def trained(config: ConfigDict, part: ConfigDict) -> Training:
    """Return how a stage is optimized."""
    return Training(seed=config.seed, tensorboard=config.tensorboard, progress=config.progress, **part.training)


def sources(config: ConfigDict) -> tuple:
    """Return training and held-out records."""
    if config.data.path == "noise":  # for the variant smoke
        rng, size = np.random.default_rng(0), config.image_size
        images = rng.integers(0, 256, (64, size, size, 3), np.uint8)
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
    models = {"base": "base"} | ({"classifier": "classifier"} if config.classifier.enabled else {})
    sampling = {"base": sampling_from(config.sample, name="sample")}
    if config.upsampler.enabled:
        models["upsamplers"] = ["upsampler"]
        sampling["upsampler"] = sampling_from(config.upsampler.sample, name="upsampler.sample")
    return PipelineDescription("Cascade", models=models, sampling=sampling)


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Write a grid of samples, when all are trained."""
    report.write_samples(pipeline, workdir, show=show, progress=config.progress)


def small(config: ConfigDict) -> None:
    """Use networks that a CPU trains."""
    config.image_size = 32
    config.diffusion.update(prediction="v", variance="fixed_small")
    config.base.update(objective="simple", dtype="float32", attention_resolutions=(8, 4))
    config.base.unet.update(
        channels=96, channel_mult=(1, 1), num_res_blocks=2, head_channels=32, dropout=0.0, patch=4, remat=False
    )
    faster = {"warmup_steps": 100, "decay": "cosine", "final_fraction": 0.02, "optimizer": "muon", "clip_norm": 1.0}
    faster |= {"muon_learning_rate": 6e-3, "ema_decay": 0.998, "learning_rate": 2e-3, "log_every": 50}
    faster |= {"checkpoint_every": 500, "eval_every": 500}
    config.base.training.update(batch_size=32, num_steps=6_000, preview_every=1_000, **faster)
    config.classifier.update(
        channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(8,), head_channels=32
    )
    config.classifier.update(dtype="float32", remat=False)
    config.classifier.training.update(batch_size=64, num_steps=3_000, **faster)
    config.upsampler.update(factor=2, dtype="float32", objective="simple", attention_resolutions=())
    config.upsampler.unet.update(channels=64, channel_mult=(1, 2), num_res_blocks=1, remat=False)
    config.upsampler.diffusion.update(schedule="cosine", prediction="v", variance="fixed_small")
    config.upsampler.training.update(batch_size=32, num_steps=6_000, preview_every=1_000, **faster)
    config.sample.update(sampler="ddim", steps="50")
    config.upsampler.sample.update(sampler="ddim", steps="25")


def digits(config: ConfigDict) -> None:
    """Use smaller networks for images of 16 x 16, which are not mirrored, and fewer steps."""
    config.data.flip, config.image_size, config.cpu_devices = False, 16, 1
    config.base.attention_resolutions = (8,)
    config.base.unet.update(channels=16, channel_mult=(1, 2), num_res_blocks=1, head_channels=16, patch=1, groups=8)
    config.base.training.update(num_steps=1_000, ema_decay=0.99, preview_every=0)
    config.classifier.update(channels=16, channel_mult=(1, 2), head_channels=16, groups=8)
    config.classifier.training.update(batch_size=32, num_steps=500, ema_decay=0.99)


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.data.update(path="noise", held_out=0.25)
    config.image_size = 16
    config.base.unet.update(channels=32, channel_mult=(1,), num_res_blocks=1, head_channels=16)
    config.base.attention_resolutions = config.classifier.attention_resolutions = ()
    config.classifier.update(channel_mult=(1,), head_channels=16)
    config.upsampler.enabled = True
    config.upsampler.unet.update(channels=32, channel_mult=(1,))
    config.sample.steps = config.upsampler.sample.steps = "2"
    quick = {"batch_size": 8, "num_steps": 2, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 1, "eval_every": 2}
    config.base.training.update(preview_every=2, optimizer="adamw", **quick)
    config.classifier.training.update(optimizer="adamw", **quick)
    config.upsampler.training.update(preview_every=2, optimizer="adamw", **quick)
