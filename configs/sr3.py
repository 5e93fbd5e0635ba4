"""SR3 (Saharia et al. 2021): super-resolution by a diffusion model that is given the level of the noise, gamma.

    python -m ddpm_jax.train --config configs/sr3.py:small --config.data.path=my_images --workdir runs/sr3
    python -m ddpm_jax.sweep --workdir runs/sr3/upsampler --data my_images --sampler ddim --steps 20 --out sweep
    python -m ddpm_jax.evaluate --workdir runs/sr3 --reference my_images --size 64 --sampler ddim --steps 20
    python -m ddpm_jax.evaluate --workdir runs/sr3 --reference my_images --size 64 --metrics bits --layers 200

`data.path` is images in any of the forms of docs/data.md; the low-resolution images are averages, half of them blurred
with --config.blur_rate=0.5. The network is a U-Net of BigGAN's residual blocks with skip connections over sqrt(2); its
input is the noised image and the low-resolution image, enlarged bicubically. Training samples gamma = alpha_bar
uniformly between the levels of neighbouring steps of T = 2000 (section 2.4), so that any number of steps can be
sampled: the paper takes at most 100. `ddpm_jax.sweep` measures PSNR on held-out images, `ddpm_jax.evaluate` FID and the
like of images that were averaged down and enlarged; in a cascade the model is an upsampler like others
(docs/upsamplers.md).

Variants, with the parameters of the network (held to them by tests/recipes/test_score_sde.py) and of the paper's table
A.1:

    configs/sr3.py          64 -> 256: 625.7M (paper: 625M); ImageNet
    configs/sr3.py:512      64 -> 512: 622.6M (paper: 625M); faces
    configs/sr3.py:128      16 -> 128: 551.9M (paper: 550M); faces
    configs/sr3.py:1024     256 -> 1024: 151.3M (paper: 150M); faces
    configs/sr3.py:small    16 -> 64: 0.3M: half an hour on a CPU, docs/laptop.md
    configs/sr3.py:smoke    two steps of a tiny network on generated shapes

The paper does not say where its attention is. With attention at 16 alone, as in DDPM and NCSN++, its channels and
multipliers give 608.9, 601.6, 551.9 and 148.1M; at the resolutions here all are within 1 % of what it reports. Nor does
it give the betas: they are DDPM's, from 5e-5 to 0.01 for 2000 steps. Batch 256, 1M steps, learning rate 1e-4 after
10,000 steps of warm-up and dropout of 0.2 for 16 -> 128 alone are the paper's (section 4). Here the error is squared;
in the paper that had FID 11.8 in a cascade, and the absolute error 11.3. Published results: ImageNet 64 -> 256 FID 5.2,
IS 180.1, PSNR 26.4, SSIM 0.762; faces 16 -> 128 PSNR 23.04, SSIM 0.65. The paper does not report its hardware.
On a TPU v5p-64 64 -> 256 is planned for 0.156 s a step, 1.8 days, 1,390 chip-hours for 1M steps by `python -m
ddpm_jax.plan --config configs/sr3.py --topology v5p:2x4x4 --method blocks --fast` (docs/performance.md says what these
seconds are).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.split import split_source
from ddpm_jax.data.transforms import CenterCrop, RandomFlip, Select
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.models.ncsnpp import NCSNpp
from ddpm_jax.models.unet import attention_levels
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.training import DiffusionTask, Images, LowResolution, Stage, Training
from ddpm_jax.types import network_dtype

# (image size, low resolution, channels, multipliers, blocks, attention, dropout)
PUBLISHED = {
    "": (256, 64, 128, (1, 2, 4, 4, 8, 8), 3, (16, 8), 0.0),
    "512": (512, 64, 64, (1, 2, 4, 8, 8, 16, 16), 3, (32, 16, 8), 0.0),
    "128": (128, 16, 128, (1, 2, 4, 8, 8), 3, (16,), 0.2),
    "1024": (1024, 256, 16, (1, 2, 4, 8, 16, 32, 32, 32), 2, (16, 8), 0.0),
}
VARIANTS = (*PUBLISHED, "small", "smoke")


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    size, low, channels, mult, blocks, attention, dropout = PUBLISHED.get(variant, PUBLISHED[""])
    config = ConfigDict()
    config.data = {"path": "", "held_out": 0.05, "held_out_path": "", "flip": True}
    config.image_size, config.low_size = size, low
    config.network = {
        "channels": channels,
        "channel_mult": mult,
        "num_res_blocks": blocks,
        "dropout": dropout,
        "fir_taps": (),
        "skip_rescale": True,
        "time_scale": 1000.0,
        "remat": True,
    }
    config.attention_resolutions = attention
    config.dtype = "bfloat16"
    config.diffusion = {
        "schedule": "linear",
        "num_steps": 2000,
        "prediction": "eps",
        "variance": "fixed_large",
        "time": "alpha_bar",
    }
    config.blur_rate = 0.0
    config.timesteps = "uniform"
    config.sample = {"sampler": "ancestral", "steps": "100", "threshold": 1.0}
    config.training = {
        "seed": 0,
        "batch_size": 256,
        "num_steps": 1_000_000,
        "learning_rate": 1e-4,
        "warmup_steps": 10_000,
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
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant in ("small", "smoke"):
        small(config)
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the one stage."""
    factor, rest = divmod(config.image_size, config.low_size)
    if rest:
        raise ValueError(f"low_size={config.low_size} must divide image_size={config.image_size}")
    train, held_out = sources(config)
    levels = len(config.network.channel_mult)
    unet = NCSNpp(
        attention_levels=attention_levels(config.attention_resolutions, config.image_size, levels),
        dtype=network_dtype(config.dtype),
        **config.network,
    )
    flip = (RandomFlip(),) if config.data.flip else ()
    return (
        Stage(
            name="upsampler",
            task=DiffusionTask(
                model=Upsampler(unet),
                diffusion=Diffusion(**config.diffusion),
                x0=Images(config.image_size),
                conditions=(LowResolution(config.low_size, factor, blur_rate=config.blur_rate),),
                timesteps=config.timesteps,
                sampling=sampling_from(config.sample, name="sample"),
            ),
            source=train,
            transforms=(Select(("image",)), CenterCrop(config.image_size), *flip),
            training=Training(**config.training),
            eval_source=held_out,
        ),
    )


def sources(config: ConfigDict) -> tuple:
    """Return training and held-out records."""
    data = config.data
    if data.path == "shapes":
        return tuple(ShapesSource(seed, max(config.image_size, 16), length=80_000) for seed in (0, 1))
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
    """Use a network that a CPU trains, which predicts v, times that are spread over each batch, and Muon.

    From eps the clean image is (x_t - sigma eps) / alpha, so that a small network's error grows where alpha is small;
    after 1000 steps on emoji its samples are 3 to 8 dB worse than those of one that predicts v (docs/laptop.md).
    """
    config.image_size, config.low_size, config.dtype = 64, 16, "float32"
    config.network.update(channels=8, channel_mult=(1, 2, 4, 4), num_res_blocks=1, dropout=0.0, remat=False)
    config.attention_resolutions = (8,)
    config.diffusion.prediction = "v"
    config.timesteps = "stratified"
    config.sample.update(sampler="ddim", steps="20")
    config.training.update(
        batch_size=8,
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
    config.image_size, config.low_size = 16, 4
    config.network.update(channels=16, channel_mult=(1, 1), num_res_blocks=1)
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
