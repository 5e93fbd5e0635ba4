"""DALL-E 2 at its published size (Ramesh et al. 2022, appendix C, table 3).

    python -m ddpm_jax.train --config configs/unclip.py --workdir /mnt/disk/unclip

Hardware: a TPU pod; parameters, average and Adam moments of the decoder alone are 57 GB and the batches are those of
the paper. It has not been run, so no result of ours is given. The variant `configs/unclip.py:smoke` runs on a laptop:
every option as at full size, tiny networks, two steps a stage.

Parameters in millions, by `jax.eval_shape` (held to it by tests/test_configs.py):

    network                             here   paper
    CLIP                               986.3   -      the paper gives its shape only: ViT-H/16, text 24 x 1024
    diffusion prior                   1225.6   1B     24 x 2048; the paper rounds to one digit
    decoder, 64 x 64                  3564.9   3.5B   with a text encoder (24 x 2048) of 1309.9
    upsampler, 64 -> 256               729.7   700M
    upsampler, 256 -> 1024             282.1   300M   described by `upsampler_1024`

What differs from the paper:

- Data: captioned shapes stand in for its 250 million pictures with captions. They come at any size up to 256, so all
  stages here have their true sizes; another source is one more name in `build.make_source`.
- Prior: it reads the hidden states of the frozen CLIP text tower, as Karlo's does. The paper does not say what encodes
  its text; with an encoder of 24 x 2048 of its own beside it, it would have 2.5B parameters, not 1B.
- Decoder: the CLIP text embedding is added to the time embedding, as Karlo does.
- Text: 77 tokens everywhere. The paper's own text encoders read 256, its CLIP 77.
- Sampling: the prior has the fixed small variance, the paper an analytic one (Bao et al. 2022).
- CLIP: no sharpness-aware minimisation. Batch size, length and schedule are ours, the optimiser is that of Radford et
  al. 2021. In all stages warm-up and gradient clipping are ours.
- Upsampler: its 27 steps are GLIDE's "fast27"; the paper does not say which. Half of its training examples are blurred,
  as SR3 and its followers do; the paper does not say how many.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

VARIANTS = ("", "smoke")


def training(batch_size: int, num_steps: int, learning_rate: float, **overrides) -> dict:
    """Return the part that every stage has."""
    return {
        "batch_size": batch_size,
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "warmup_steps": 2_000,
        "decay": "constant",
        "final_fraction": 1.0,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "optimizer": "adamw",
        "muon_learning_rate": placeholder(float),
        "ema_decay": 0.9999,
        "accumulate": 1,
        "checkpoint_every": 5_000,
        "log_every": 100,
        "preview_every": 10_000,
        "keep": 3,
        "dtype": "bfloat16",
        "remat": True,
    } | overrides


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.stages = ("clip", "prior", "decoder", "upsampler")
    config.data = {"name": "shapes", "seed": 0, "num_examples": 1_000_000, "two_fraction": 0.4}
    config.text = {"tokenizer": "clip", "length": 77}
    config.clip = training(32_768, 600_000, 3e-4, decay="cosine", final_fraction=0.0) | {
        "image_size": 256,
        "family": 1,
        "patch": 16,
        "embed_dim": 1024,
        "vision": {"width": 1280, "layers": 32, "heads": 16, "stem": ()},
        "text": {"width": 1024, "layers": 24, "heads": 16},
        "activation": "gelu",
        "weight_decay": 0.2,
        "b2": 0.98,
        "eps": 1e-6,
    }
    config.prior = training(4096, 600_000, 1.1e-4, weight_decay=6e-2, b2=0.96, eps=1e-6) | {
        "width": 2048,
        "layers": 24,
        "heads": 32,
        "text_encoder": None,
        "embed_scale": 17.2,
        "schedule": "cosine",
        "diffusion_steps": 1000,
        "drop_text": 0.1,
        "activation": "gelu",
    }
    config.decoder = training(2048, 800_000, 1.2e-4) | {
        "image_size": 64,
        "supersample": 1,
        "channels": 512,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "attention_resolutions": (32, 16, 8),
        "head_channels": 64,
        "patch": 1,
        "dropout": 0.1,
        "context_width": 2048,
        "image_tokens": 4,
        "text_embedding": True,
        "word_vectors": False,
        "layout_channels": 0,
        "layout_heads": 0,
        "modulate": False,
        "text_encoder": {"kind": "transformer", "width": 2048, "layers": 24, "heads": 32, "causal": True},
        "schedule": "cosine",
        "diffusion_steps": 1000,
        "kind": "eps",
        "objective": "hybrid",
        "variance": "learned_range",
        "timesteps": "uniform",
        "weighting": None,
        "vlb_weight": 1e-3,
        "drop_image": 0.1,
        "drop_text": 0.5,
    }
    config.upsampler = training(1024, 1_000_000, 1.2e-4) | {
        "image_size": 256,
        "low_size": 64,
        "crop": 64,
        "channels": 320,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "patch": 1,
        "dropout": 0.1,
        "schedule": "cosine",
        "diffusion_steps": 1000,
        "kind": "eps",
        "weighting": None,
        "blur_sigma": 0.6,
        "blur_rate": 0.5,
        "noise": 0.0,
        "mix_colours": False,
    }
    config.sample = {
        "prior": {"steps": "64", "eta": placeholder(float), "scale": 1.0, "candidates": 2},
        "decoder": {"steps": "250", "eta": placeholder(float), "scale": 1.25},
        "upsampler": {"steps": "fast27", "eta": 0.0, "scale": 1.0},
        "batch_size": 64,
    }
    config.evaluation = {"num_captions": 512, "seed": 1}
    config.tensorboard = False
    config.progress = True
    config.cpu_devices = 1
    if variant == "smoke":
        smoke(config)
    return config


def upsampler_1024() -> dict:
    """Return the fields of the second upsampler, 256 -> 1024, for `build.make_upsampler({"upsampler": ...})`.

    A pipeline has one upsampler today, so no stage trains this one. The paper degrades its low-resolution pictures by
    BSR (random blur, resizing, noise and JPEG), which is not here either; the blur of the first stands in its place.
    The paper samples it in 15 DDIM steps.
    """
    return training(512, 1_000_000, 1.0e-4) | {
        "image_size": 1024,
        "low_size": 256,
        "crop": 256,
        "channels": 192,
        "channel_mult": (1, 1, 2, 2, 4, 4),
        "num_res_blocks": 2,
        "patch": 1,
        "dropout": 0.0,
        "schedule": "linear",
        "diffusion_steps": 1000,
        "kind": "eps",
        "weighting": None,
        "blur_sigma": 0.6,
        "blur_rate": 0.5,
        "noise": 0.0,
        "mix_colours": False,
    }


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that all stages take seconds; every option stays as it is at full size."""
    config.data.num_examples = 64
    for stage in config.stages:
        config[stage].update(
            num_steps=2, batch_size=8, warmup_steps=1, log_every=1, checkpoint_every=1, preview_every=2
        )
    config.clip.update(image_size=32, embed_dim=16, vision={"width": 16, "layers": 1, "heads": 2, "stem": ()})
    config.clip.update(text={"width": 16, "layers": 1, "heads": 2})
    config.prior.update(width=16, layers=1, heads=2)
    config.decoder.update(
        image_size=16, channels=32, channel_mult=(1, 1), num_res_blocks=1, head_channels=16, context_width=16
    )
    config.decoder.update(
        attention_resolutions=(8,),
        text_encoder={"kind": "transformer", "width": 16, "layers": 1, "heads": 2, "causal": True},
    )
    config.upsampler.update(image_size=64, low_size=16, crop=16, channels=32, channel_mult=(1,), num_res_blocks=1)
    config.sample.prior.update(steps="2")
    config.sample.decoder.update(steps="2")
    config.sample.upsampler.update(steps="2")
    config.sample.batch_size = 8
    config.evaluation.num_captions = 8
