"""Score SDEs (Song et al. 2021): NCSN++ and DDPM++ trained in continuous time, with the VE-, VP- and sub-VP-SDE.

    python -m ddpm_jax.train --config configs/score_sde.py:small --config.data.path=my_images --workdir runs/sde
    python -m ddpm_jax.sample --workdir runs/sde --num_images 16 --out samples.png
    python -m ddpm_jax.sample --workdir runs/sde --num_images 16 --sampler heun --steps 50 --out ode.png

`data.path` is images in any of the forms of docs/data.md. Samplers of the paper by name: predictor_corrector (its
default here for the VE-SDE, with --snr and --corrector_steps), reverse_diffusion (its predictor alone), euler_maruyama
(the default for the others), ancestral; ddim, heun and dpm_solver follow the probability-flow ODE. All choose their
`steps` from 1000 evenly spaced times. Training minimises the error of the noise at uniform times (eq. 7 with lambda =
sigma^2); with --config.objective=vlb the likelihood weighting of Song et al. (2021b).

Variants, with the parameters of the network (held to them by tests/recipes/test_score_sde.py), and for CIFAR-10 the
FID, Inception Score, FID of the ODE sampler and bits per dimension that the authors' repository lists:

    configs/score_sde.py                  VE, NCSN++, 4 blocks: 62.8M; 2.38, 9.83
    configs/score_sde.py:ve_deep          VE, NCSN++, 8 blocks: 107.6M; 2.20, 9.89
    configs/score_sde.py:vp               VP, DDPM++, 4 blocks: 61.8M; 2.55, 9.58, 3.93, 3.16
    configs/score_sde.py:vp_deep          VP, DDPM++, 8 blocks: 106.6M; 2.41, 9.68, 3.08, 3.13
    configs/score_sde.py:vp_ncsnpp        VP, NCSN++, 4 blocks: 62.7M
    configs/score_sde.py:sub_vp           sub-VP, DDPM++, 4 blocks: 61.8M; 2.61, 9.56, 3.16, 3.02
    configs/score_sde.py:sub_vp_deep      sub-VP, DDPM++, 8 blocks: 106.6M; 2.41, 9.57, 2.92, 2.99
    configs/score_sde.py:sub_vp_ncsnpp    sub-VP, NCSN++, 4 blocks: 62.7M
    configs/score_sde.py:small            VE, NCSN++: 1.7M: trains on a laptop's CPU
    configs/score_sde.py:small_vp         VP, DDPM++: 1.7M: trains on a laptop's CPU
    configs/score_sde.py:small_sub_vp     sub-VP, DDPM++: 1.7M: trains on a laptop's CPU
    configs/score_sde.py:digits           VE, NCSN++, 16 x 16: 0.2M: minutes on a CPU, docs/laptop.md
    configs/score_sde.py:digits_vp        VP, DDPM++, 16 x 16: 0.2M
    configs/score_sde.py:digits_sub_vp    sub-VP, DDPM++, 16 x 16: 0.2M
    configs/score_sde.py:smoke            two steps of a tiny network on generated shapes

Numbers of the published variants are those of the authors' configs (score_sde_pytorch, configs/): batch 128, Adam,
learning rate 2e-4 after 5,000 steps of warm-up, gradients clipped to 1 (of the VE-SDE their loss is half the sum over
all numbers, here it is their mean), dropout 0.1, averages of decay 0.999 (VE) or 0.9999, 1.3M steps, of the deep
networks 950,000. They train images of the VE-SDE in [0, 1], here they are in [-1, 1]: sigma in [0.02, 100] is theirs in
[0.01, 50]. The authors measured 0.2 to 0.56 s a step of NCSN++ on 4 V100, which is 3 to 8.4 days for 1.3M steps.
Planned for a TPU v5e-8, 0.020 s a step, 0.3 days, 57 chip-hours for 1.3M steps: `python -m ddpm_jax.plan --config
configs/score_sde.py --stage base --topology v5e:2x4 --method blocks --fast` (docs/performance.md says what
these seconds are).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.split import split_source
from ddpm_jax.data.transforms import CenterCrop, RandomFlip, Select
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.losses import inverse_snr, sub_vp_variance, vp_variance
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.evaluation import report
from ddpm_jax.evaluation.during_training import evaluate_fields, measured
from ddpm_jax.models.ncsnpp import NCSNpp
from ddpm_jax.models.unet import attention_levels
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.training import DiffusionTask, Images, Stage, Training
from ddpm_jax.types import network_dtype

PUBLISHED = ("", "ve_deep", "vp", "vp_deep", "vp_ncsnpp", "sub_vp", "sub_vp_deep", "sub_vp_ncsnpp")
SMALL = ("small", "small_vp", "small_sub_vp", "digits", "digits_vp", "digits_sub_vp")
SIGMA_SQUARED = {"ve": inverse_snr, "sub_vp": sub_vp_variance}  # by the SDE; lambda of eq. 7
VARIANTS = (*PUBLISHED, *SMALL, "smoke")


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.data = {"path": "", "held_out": 0.05, "flip": True}
    config.image_size = 32
    config.network = {
        "channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "num_res_blocks": 8 if "deep" in variant else 4,
        "dropout": 0.1,
        "biggan": True,
        "conv_resample": True,
        "fir_taps": (1.0, 3.0, 3.0, 1.0),
        "skip_rescale": True,
        "input_pyramid": "residual",
        "output_pyramid": "none",
        "combine": "sum",
        "embedding": "fourier",
        "fourier_scale": 16.0,
        "time_scale": 999.0,
        "sigma_unit": 2.0,
        "scale_by_sigma": True,
        "remat": False,
    }
    config.attention_resolutions = (16,)
    config.dtype = "float32"
    config.diffusion = {
        "schedule": "ve",
        "num_steps": 1000,
        "prediction": "score",
        "span": (0.02, 100.0),
        "time": "sigma",
    }
    config.objective = "simple"
    config.timesteps = "uniform"
    config.sample = {
        "sampler": "predictor_corrector",
        "steps": "1000",
        "snr": 0.16,
        "threshold": placeholder(float),
    }
    config.preview = {"sampler": "dpm_solver", "steps": "25"}
    config.training = {
        "seed": 0,
        "batch_size": 128,
        "num_steps": 950_000 if "deep" in variant else 1_300_000,
        "learning_rate": 2e-4,
        "warmup_steps": 5_000,
        "decay": "constant",
        "final_fraction": 1.0,
        "weight_decay": 0.0,
        "clip_norm": 1.0 / 1536.0,  # 1 where the loss is half the sum over 3072 numbers, as theirs of the VE-SDE is
        "optimizer": "adamw",
        "muon_learning_rate": placeholder(float),
        "ema_decay": 0.999,
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
    if "vp" in variant:
        preserving(config, variant)
    if variant in (*SMALL, "smoke"):
        small(config)
    if variant.startswith("digits"):
        digits(config)
    if variant == "smoke":
        smoke(config)
    return config


def preserving(config: ConfigDict, variant: str) -> None:
    """Use the VP- or sub-VP-SDE, whose networks predict the noise and are given the time."""
    schedule = "sub_vp" if "sub_vp" in variant else "vp"
    config.diffusion = {"schedule": schedule, "num_steps": 1000, "prediction": "eps", "span": (0.1, 20.0), "time": "t"}
    config.network.update(embedding="positional", sigma_unit=1.0, scale_by_sigma=False)
    if "ncsnpp" not in variant:
        config.network.update(fir_taps=(), input_pyramid="none")
    config.sample = {"sampler": "euler_maruyama", "steps": "1000", "threshold": placeholder(float)}
    config.training.update(ema_decay=0.9999, clip_norm=1.0)


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the one stage."""
    schedule, time = config.diffusion.schedule, config.diffusion.time
    if (schedule == "ve") != (time == "sigma"):
        raise ValueError(
            f"diffusion.schedule={schedule!r} with diffusion.time={time!r}: time='sigma', and the span and network of "
            "the VE-SDE, go with schedule='ve' alone; for another SDE use its variant, such as configs/score_sde.py:vp"
        )
    train, held_out = sources(config)
    diffusion, levels = Diffusion(**config.diffusion), len(config.network.channel_mult)
    network = NCSNpp(
        attention_levels=attention_levels(config.attention_resolutions, config.image_size, levels),
        dtype=network_dtype(config.dtype),
        **config.network,
    )
    flip = (RandomFlip(),) if config.data.flip else ()
    score = diffusion.prediction == "score" and config.objective == "simple"
    stage = Stage(
        name="base",
        task=DiffusionTask(
            model=network,
            diffusion=diffusion,
            x0=Images(config.image_size),
            objective=config.objective,
            weighting=SIGMA_SQUARED.get(diffusion.schedule, vp_variance) if score else None,
            timesteps=config.timesteps,
            sampling=sampling_from(config.preview, name="preview"),
        ),
        source=train,
        transforms=(Select(("image",)), CenterCrop(config.image_size), *flip),
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


def pipeline(config: ConfigDict) -> PipelineDescription:
    """Return how the network is sampled."""
    return PipelineDescription(
        "Cascade", models={"base": "base"}, sampling={"base": sampling_from(config.sample, name="sample")}
    )


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Write a grid of samples, when the stage is trained."""
    report.write_samples(pipeline, workdir, show=show, progress=config.training.progress)


def small(config: ConfigDict) -> None:
    """Use a network that a CPU trains, times that are spread over each batch, Muon, and fewer steps of the samplers."""
    config.network.update(channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    config.attention_resolutions = (8,)
    config.timesteps = "stratified"
    config.sample.steps = "200"
    config.training.update(
        batch_size=32,
        num_steps=6_000,
        learning_rate=2e-3,
        warmup_steps=100,
        decay="cosine",
        final_fraction=0.02,
        clip_norm=1.0,
        optimizer="muon",
        muon_learning_rate=6e-3,
        ema_decay=0.998,
        checkpoint_every=500,
        log_every=50,
        preview_every=1_000,
        eval_every=500,
    )


def digits(config: ConfigDict) -> None:
    """Use a smaller network for images of 16 x 16, which are not mirrored, and fewer steps."""
    config.data.flip, config.image_size, config.cpu_devices = False, 16, 1
    config.network.update(channel_mult=(1, 2), num_res_blocks=1)
    config.training.update(num_steps=1_000, ema_decay=0.99, preview_every=0)


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that training takes seconds."""
    config.data.path = "shapes"
    config.image_size = 16
    config.network.update(channels=16, channel_mult=(1, 1), num_res_blocks=1)
    config.attention_resolutions = (8,)
    config.sample.steps = config.preview.steps = "2"
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
