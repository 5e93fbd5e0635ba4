"""DALL-E 2 at its published size (Ramesh et al. 2022, appendix C, table 3).

    python -m ddpm_jax.train --config configs/unclip.py --config.data.path=/mnt/disk/pairs --workdir /mnt/disk/unclip

`data.path` is images with captions (docs/data.md); CLIP embeddings are computed while training, or read from the
records if `ddpm_jax.prepare --embed` put them there. Hardware: a TPU pod; parameters, average and Adam moments of the
decoder alone are 57 GB and the batches are those of the paper. It has not been run, so no result of ours is given. The
variant `configs/unclip.py:smoke` runs on a laptop: every option as at full size, tiny networks, two steps a stage, on
generated shapes.

Parameters in millions, by `jax.eval_shape` (held to it by tests/test_configs.py):

    network                             here   paper
    CLIP                               986.3   -      the paper gives its shape only: ViT-H/16, text 24 x 1024
    diffusion prior                   1225.6   1B     24 x 2048; the paper rounds to one digit
    decoder, 64 x 64                  3564.9   3.5B   with a text encoder (24 x 2048) of 1309.9
    up_256, 64 -> 256                  729.7   700M
    up_1024, 256 -> 1024               282.1   300M

What differs from the paper:

- Prior: it reads the hidden states of the frozen CLIP text tower, as Karlo's does. The paper does not say what encodes
  its text; with a second encoder of 24 x 2048, it would have 2.5B parameters, not 1B.
- Decoder: the CLIP text embedding is added to the time embedding, as Karlo does.
- Text: 77 tokens everywhere. The paper's own text encoders read 256, its CLIP 77.
- Sampling: the prior has the fixed small variance, the paper an analytic one (Bao et al. 2022).
- CLIP: no sharpness-aware minimisation. Batch size, length and schedule are ours, the optimiser is that of Radford et
  al. 2021. In all stages warm-up and gradient clipping are ours.
- up_256: its 27 steps are GLIDE's "fast27"; the paper does not say which. Half of its training examples are blurred,
  as SR3 and its followers do; the paper does not say how many.
- up_1024: its low-resolution images are degraded by BSR (random blur, resizing, noise and JPEG) with the numbers of
  latent diffusion's milder variant (`data.degradation.DegradeBSR`); the paper names latent diffusion and no numbers.
- Sampling of up_1024 runs on tiles of 256 x 256, the size of its training crops, so that memory is bounded
  (docs/upsamplers.md); the paper does not say how it was run.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.degradation import DegradeBSR
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.tokenizer import ClipTokenizer
from ddpm_jax.data.transforms import CenterCrop, Copy, RandomCrop, Resize, Select, Tokenize
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.unet import UNet, attention_levels
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.training import (
    Captions,
    ContrastiveTask,
    DiffusionTask,
    Embeddings,
    ImageEmbedding,
    Images,
    LowResolution,
    Stage,
    Training,
)
from ddpm_jax.types import network_dtype

VARIANTS = ("", "smoke")
UPSAMPLERS = ("up_256", "up_1024")


def training(batch_size: int, num_steps: int, learning_rate: float, **overrides) -> dict:
    """Return the part that every stage has: the fields of `Training`."""
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
        "moment_examples": 0,
        "max_to_keep": 3,
        "num_workers": 0,
    } | overrides


def upsampler(size: int, low: int, **fields) -> dict:
    """Return the part that every upsampler has; crops are a quarter of the image's side."""
    return {
        "image_size": size,
        "low_size": low,
        "crop": size // 4,
        "diffusion": {"schedule": "cosine", "num_steps": 1000},
        "degradation": "blur",
        "blur_sigma": 0.6,
        "blur_rate": 0.5,
        "noise": 0.0,
        "noise_level_input": False,
    } | fields


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.data = {"path": ""}
    config.text = {"length": 77}
    config.dtype = "bfloat16"
    config.remat = True
    config.clip = {
        "image_size": 256,
        "patch": 16,
        "embed_dim": 1024,
        "vision": {"width": 1280, "layers": 32, "heads": 16},
        "text": {"width": 1024, "layers": 24, "heads": 16},
        "chunk_size": 8192,  # rows of the 32,768 x 32,768 logits that are computed at a time
        "training": training(
            32_768, 600_000, 3e-4, decay="cosine", final_fraction=0.0, weight_decay=0.2, b2=0.98, eps=1e-6
        ),
    }
    config.prior = {
        "width": 2048,
        "layers": 24,
        "heads": 32,
        "embed_scale": 17.2,
        "diffusion": {"schedule": "cosine", "num_steps": 1000},
        "drop_text": 0.1,
        "training": training(4096, 600_000, 1.1e-4, weight_decay=6e-2, b2=0.96, eps=1e-6),
    }
    config.decoder = {
        "image_size": 64,
        "unet": {
            "channels": 512,
            "channel_mult": (1, 2, 3, 4),
            "num_res_blocks": 3,
            "head_channels": 64,
            "dropout": 0.1,
        },
        "attention_resolutions": (32, 16, 8),
        "context_width": 2048,
        "image_tokens": 4,
        "text_encoder": {"width": 2048, "layers": 24, "heads": 32},
        "diffusion": {"schedule": "cosine", "num_steps": 1000},
        "drop_image": 0.1,
        "drop_text": 0.5,
        "vlb_weight": 1e-3,
        "training": training(2048, 800_000, 1.2e-4),
    }
    unet = {"channels": 320, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "dropout": 0.1}
    config.up_256 = upsampler(256, 64, unet=unet, training=training(1024, 1_000_000, 1.2e-4))
    unet = {"channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "dropout": 0.0}
    config.up_1024 = upsampler(1024, 256, unet=unet, training=training(512, 1_000_000, 1.0e-4))
    config.up_1024.diffusion.schedule = "linear"
    config.up_1024.degradation = "bsr"
    config.sample = {
        "prior": {"sampler": "ancestral", "steps": "64"},
        "candidates": 2,
        "decoder": {"sampler": "ancestral", "steps": "250", "scale": 1.25, "threshold": 1.0},
        "up_256": {"sampler": "ddim", "steps": "fast27", "threshold": 1.0},
        "up_1024": {"sampler": "ddim", "steps": "15", "threshold": 1.0},
        "tile": 256,  # of up_1024; 0 runs on whole images
        "batch_size": 64,
    }
    config.tensorboard = False
    config.progress = True
    config.cpu_devices = 1
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the stages."""
    c, tokenizer = config, ClipTokenizer()
    text, vocab_size, shared = Tokenize(tokenizer, c.text.length), tokenizer.vocab_size, precision(c)

    def trained(part: ConfigDict) -> Training:
        return Training(seed=c.seed, tensorboard=c.tensorboard, progress=c.progress, **part.training)

    clip = CLIP(
        VisionTransformer(c.clip.image_size, c.clip.patch, **c.clip.vision, **shared),
        TextEncoder(vocab_size, c.text.length, **c.clip.text, **shared),
        c.clip.embed_dim,
    )
    prior = DiffusionPrior(c.clip.embed_dim, c.text.length, c.prior.width, c.prior.layers, c.prior.heads, **shared)
    pairs, square = source(c, c.clip.image_size), CenterCrop(c.clip.image_size)
    return (
        Stage(
            name="clip",
            task=ContrastiveTask(clip, tokenizer, c.clip.chunk_size),
            source=pairs,
            transforms=(text, square, Select(("image", "tokens", "mask"))),
            training=trained(c.clip),
        ),
        Stage(
            name="prior",
            task=DiffusionTask(
                model=prior,
                diffusion=Diffusion(prediction="x0", **c.prior.diffusion),
                x0=Embeddings(c.clip.embed_dim, c.prior.embed_scale),
                conditions=(Captions(c.text.length, drop=c.prior.drop_text),),
            ),
            source=pairs,
            transforms=(text, square),
            training=trained(c.prior),
            needs={"clip": "clip"},
        ),
        Stage(
            name="decoder",
            task=DiffusionTask(
                model=decoder(c, vocab_size),
                diffusion=Diffusion(variance="learned_range", **c.decoder.diffusion),
                x0=Images(c.decoder.image_size),
                conditions=(
                    ImageEmbedding(drop=c.decoder.drop_image),
                    Captions(c.text.length, drop=c.decoder.drop_text, own_tokens=True),
                ),
                objective="hybrid",
                vlb_weight=c.decoder.vlb_weight,
                sampling=sampling_from(c.sample.decoder, name="sample.decoder"),
            ),
            source=pairs,
            transforms=(text, square, Copy("image", "clip_image"), Resize(c.decoder.image_size)),
            training=trained(c.decoder),
            needs={"clip": "clip"},
        ),
        *(
            Stage(
                name=name,
                task=upsampler_task(c, name),
                source=source(c, c[name].image_size),
                transforms=crops(c, name),
                training=trained(c[name]),
            )
            for name in UPSAMPLERS
        ),
    )


def crops(config: ConfigDict, name: str) -> tuple:
    """Return the transforms of an upsampler: crops, and their degraded copies if they are not made on the device."""
    c = config[name]
    if c.degradation not in ("blur", "bsr"):
        raise ValueError(f"{name}.degradation={c.degradation!r} must be 'blur' or 'bsr'")
    degraded = (DegradeBSR(c.image_size // c.low_size),) if c.degradation == "bsr" else ()
    return (Select(("image",)), CenterCrop(c.image_size), RandomCrop(c.crop), *degraded)


def source(config: ConfigDict, size: int):
    """Return the images with captions; generated shapes are rendered at a size."""
    if config.data.path == "shapes":
        return ShapesSource(0, size, length=64)
    if not config.data.path:
        raise ValueError(
            "data.path is needed: images with captions (a folder, prepared data, .tar files or tfds:NAME), as in "
            "--config.data.path=/mnt/disk/pairs"
        )
    return open_source(config.data.path)


def precision(config: ConfigDict) -> dict:
    """Return the fields that all networks have."""
    return {"dtype": network_dtype(config.dtype), "remat": config.remat}


def decoder(config: ConfigDict, vocab_size: int) -> Decoder:
    """Return the decoder network, which includes a text encoder."""
    c, shared, own = config.decoder, precision(config), config.decoder.text_encoder
    levels = attention_levels(c.attention_resolutions, c.image_size, len(c.unet.channel_mult))
    return Decoder(
        UNet(out_channels=6, attention_resolutions=(), attention_levels=levels, **c.unet, **shared),
        config.clip.embed_dim,
        c.context_width,
        c.image_tokens,
        text_embedding=True,
        text_encoder=TextEncoder(vocab_size, config.text.length, **own, **shared, name="text_encoder"),
        dtype=shared["dtype"],
    )


def upsampler_task(config: ConfigDict, name: str) -> DiffusionTask:
    """Return the task of an upsampler: convolutions only, so that it is trained on crops."""
    c = config[name]
    if c.image_size % c.low_size:
        raise ValueError(f"{name}.image_size={c.image_size} must be a multiple of {name}.low_size={c.low_size}")
    bsr = c.degradation == "bsr"
    unet = UNet(
        out_channels=3,
        attention_resolutions=(),
        attention_levels=(),
        mid_attention=False,
        **c.unet,
        **precision(config),
    )
    return DiffusionTask(
        model=Upsampler(unet, noise_level_input=c.noise_level_input),
        diffusion=Diffusion(**c.diffusion),
        x0=Images(c.image_size),
        conditions=(
            LowResolution(
                c.low_size,
                c.image_size // c.low_size,
                blur_sigma=c.blur_sigma,
                blur_rate=0.0 if bsr else c.blur_rate,
                noise=c.noise,
                noise_level_input=c.noise_level_input,
                entry="low_res" if bsr else None,
            ),
        ),
        sampling=sampling_from(config.sample[name], name=f"sample.{name}"),
    )


def pipeline(config: ConfigDict) -> PipelineDescription:
    """Return how the stages are sampled together."""
    names = ("prior", "decoder", *UPSAMPLERS)
    return PipelineDescription(
        "UnCLIP",
        models={"clip": "clip", "prior": "prior", "decoder": "decoder", "upsamplers": list(UPSAMPLERS)},
        sampling={name: sampling_from(config.sample[name], name=f"sample.{name}") for name in names},
        options={"candidates": config.sample.candidates, "batch_size": config.sample.batch_size}
        | ({"enlarging": {"up_1024": {"tile": config.sample.tile}}} if config.sample.tile else {}),
    )


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that all stages take seconds; every option stays as it is at full size."""
    config.data.path = "shapes"
    config.mesh.fsdp = 1
    for stage in ("clip", "prior", "decoder", *UPSAMPLERS):
        config[stage].training.update(
            num_steps=2, batch_size=8, warmup_steps=1, log_every=1, checkpoint_every=1, preview_every=2
        )
    config.clip.update(image_size=32, embed_dim=16, chunk_size=4, vision={"width": 16, "layers": 1, "heads": 2})
    config.clip.update(text={"width": 16, "layers": 1, "heads": 2})
    config.prior.update(width=16, layers=1, heads=2)
    config.decoder.update(image_size=16, context_width=16, attention_resolutions=(8,))
    config.decoder.unet.update(channels=32, channel_mult=(1, 1), num_res_blocks=1, head_channels=16)
    config.decoder.text_encoder.update(width=16, layers=1, heads=2)
    for stage, low in zip(UPSAMPLERS, (16, 32), strict=False):
        config[stage].update(low_size=low, image_size=2 * low, crop=low)
        config[stage].unet.update(channels=32, channel_mult=(1,), num_res_blocks=1)
        config.sample[stage].steps = "2"
    config.sample.prior.steps = config.sample.decoder.steps = "2"
    config.sample.update(tile=32, batch_size=8)
