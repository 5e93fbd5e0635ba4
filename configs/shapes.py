"""unCLIP on captioned shapes: a data set that is computed, four small networks, one CPU.

    python -m ddpm_jax.train --config configs/shapes.py --workdir /tmp/shapes

trains CLIP, the diffusion prior, a 16 x 16 decoder and a 16 -> 64 upsampler, and measures how faithful pictures are to
captions. The weights that the package carries are a run of it, with more steps of decoder and upsampler;
docs/shapes.md has the duration of both, their results and the hardware. Variants: `configs/shapes.py:quick` trains for
a few minutes and shows the path, not good pictures; `configs/shapes.py:smoke` makes a few steps of each stage with tiny
networks.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

VARIANTS = ("", "quick", "smoke")


def training(batch_size: int, num_steps: int, learning_rate: float, **overrides) -> dict:
    """Return the part that every stage has."""
    return {
        "batch_size": batch_size,
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "warmup_steps": min(100, num_steps // 10),
        "decay": "cosine",
        "final_fraction": 0.02,
        "weight_decay": 0.01,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "optimizer": "adamw",
        "muon_learning_rate": placeholder(float),
        "ema_decay": 0.998,
        "accumulate": 1,
        "checkpoint_every": 500,
        "log_every": 50,
        "preview_every": 500,
        "keep": 2,
        "dtype": "float32",
        "remat": False,
    } | overrides


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.stages = ("clip", "prior", "decoder", "upsampler")
    config.data = {"name": "shapes", "seed": 0, "num_examples": 80_000, "two_fraction": 0.4}
    config.text = {"tokenizer": "compact", "length": 24}
    config.clip = training(256, 400, 2e-3, optimizer="muon", muon_learning_rate=4e-3) | {
        "image_size": 32,
        "family": 8,
        "patch": 8,
        "embed_dim": 64,
        "vision": {"width": 96, "layers": 1, "heads": 3, "stem": (32, 64, 128)},
        "text": {"width": 96, "layers": 1, "heads": 3},
        "activation": "quick_gelu",
        "weight_decay": 0.1,
    }
    config.prior = training(128, 400, 2e-3, optimizer="muon", muon_learning_rate=4e-3) | {
        "width": 96,
        "layers": 3,
        "heads": 2,
        "text_encoder": None,
        "embed_scale": 4.3,
        "schedule": "cosine",
        "diffusion_steps": 1000,
        "drop_text": 0.1,
        "activation": "quick_gelu",
    }
    config.decoder = training(
        32, 7500, 2e-3, optimizer="muon", muon_learning_rate=6e-3, checkpoint_every=1000, preview_every=2000
    ) | {
        "image_size": 16,
        "channels": 64,
        "supersample": 4,
        "channel_mult": (1, 1),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 64,
        "patch": 2,
        "dropout": 0.0,
        "context_width": 128,
        "image_tokens": 4,
        "text_embedding": False,
        "word_vectors": True,
        "layout_channels": 64,
        "layout_heads": 8,
        "modulate": True,
        "text_encoder": {"kind": "gru", "width": 128, "layers": 1, "heads": 2, "causal": False},  # heads: transformer's
        "schedule": "cosine",
        "diffusion_steps": 1000,
        "kind": "x0",
        "objective": "simple",
        "variance": "fixed_small",
        "timesteps": "stratified",
        "weighting": {"power": 0.5, "bound": 4.0},
        "vlb_weight": 1e-3,
        "drop_image": 0.5,
        "drop_text": 0.1,
    }
    config.upsampler = training(16, 1300, 2e-3, optimizer="muon", muon_learning_rate=6e-3) | {
        "image_size": 64,
        "low_size": 16,
        "crop": 64,
        "channels": 64,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "patch": 4,
        "dropout": 0.0,
        "schedule": "cosine",
        "diffusion_steps": 1000,
        "kind": "x0",
        "weighting": None,
        "blur_sigma": 0.6,
        "blur_rate": 0.25,
        "noise": 0.05,
        "mix_colours": True,
    }
    config.sample = {
        "prior": {"steps": "25", "eta": placeholder(float), "scale": 1.0, "candidates": 2},
        "decoder": {"steps": "25", "eta": 0.0, "scale": 1.5},
        "upsampler": {"steps": "4", "eta": 0.0, "scale": 1.0},
        "batch_size": 64,
    }
    config.evaluation = {"num_captions": 512, "seed": 1}
    config.tensorboard = False
    config.progress = True
    config.cpu_devices = 2
    if variant == "quick":
        quick(config)
    if variant == "smoke":
        smoke(config)
    return config


def quick(config: ConfigDict) -> None:
    """Cut the stages to a few minutes in all on two cores; the networks stay."""
    config.data.num_examples = 4_000
    for stage, num_steps in {"clip": 80, "prior": 100, "decoder": 150, "upsampler": 40}.items():
        config[stage].update(num_steps=num_steps, warmup_steps=num_steps // 10, preview_every=num_steps)
    config.evaluation.num_captions = 64


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that all stages take seconds."""
    config.data.num_examples = 64
    for stage in config.stages:
        config[stage].update(
            num_steps=2, batch_size=8, warmup_steps=1, log_every=1, checkpoint_every=1, preview_every=2
        )
    config.clip.update(patch=16, embed_dim=16, vision={"width": 16, "layers": 1, "heads": 2, "stem": (16,)})
    config.clip.update(batch_size=16, family=2)  # so that 1, 2, 4 and 8 devices can share it
    config.clip.update(text={"width": 16, "layers": 1, "heads": 2})
    config.prior.update(width=16, layers=1, heads=2)
    config.decoder.update(
        channels=32, channel_mult=(1, 1), num_res_blocks=1, head_channels=16, patch=4, context_width=16
    )
    config.decoder.update(attention_resolutions=(2,), layout_channels=4)
    # Its recurrent networks are one piece for every token, and take long to compile.
    config.decoder.text_encoder.update(kind="transformer", width=16, layers=1, heads=2)
    config.upsampler.update(channels=32, channel_mult=(1, 1), patch=8)
    config.sample.prior.update(steps="2", candidates=1)
    config.sample.decoder.update(steps="2")
    config.sample.upsampler.update(steps="2")
    config.sample.batch_size = 8
    config.evaluation.num_captions = 8
