"""DALL-E 2 at its published size (Ramesh et al. 2022, appendix C, table 3), and other sizes of it.

    python -m ddpm_jax.train --config configs/unclip.py --config.data.path=/mnt/disk/pairs --workdir /mnt/disk/unclip

`data.path` is images with captions (docs/data.md); CLIP embeddings are computed while training, or read from the
records if `ddpm_jax.prepare --embed` put them there. With `data.held_out_path`, other such records, the priors are
evaluated as they train (docs/prior.md). `--config.priors` is "diffusion", "autoregressive" or "both".

Variants, whose parameters are in docs/unclip.md with their sources (held to them by tests/recipes/test_unclip.py):

    configs/unclip.py           the paper's, for a TPU pod: the state of the decoder's training alone is 57 GB, and the
                                batches are the paper's; docs/performance.md has planned days
    configs/unclip.py:l14       the same with OpenAI's CLIP ViT-L/14 (Radford et al. 2021) in place of ViT-H/16,
                                planned for 8.8 days on a v5p-64
    configs/unclip.py:karlo     Karlo v1-alpha (Lee et al. 2022): ViT-L/14, a prior of 20 layers on standardized
                                embeddings, a decoder that reads CLIP's text tower, one upsampler; planned for 19 days
                                on a v5p-64
    configs/unclip.py:medium    a tenth to a third of the paper's, for a v4-32 (16 chips of 32 GB): 8.5 days in all
    configs/unclip.py:smoke     every option as at full size, tiny networks, two steps a stage, on generated shapes

None of the first four has been run, so no result of ours is given. What differs from the paper:

- Priors: they read the hidden states of the frozen CLIP text tower, as Karlo's does. The paper does not say what
  encodes their text; `prior.text_encoder.layers=24` trains an encoder of 24 x 2048 with the prior (docs/unclip.md).
- Decoder: the CLIP text embedding is added to the time embedding, as Karlo does.
- Text: 77 tokens everywhere. The paper's own text encoders read 256, its CLIP 77.
- Sampling: the prior has the fixed small variance, the paper an analytic one (Bao et al. 2022), which
  `sample.prior.sampler=analytic` with `prior.training.moment_examples=512` gives.
- CLIP: sharpness-aware minimization moves the parameters once for a batch, the paper once for the 64 examples of a
  replica. Batch size, length and schedule are ours, the optimiser is that of Radford et al. 2021. In all stages warm-up
  and gradient clipping are ours.
- up_256: its 27 steps are GLIDE's "fast27", and half of its training examples are blurred, as in SR3; the paper says
  neither which nor how many.
- up_1024: its low-resolution images are degraded by BSR (random blur, resizing, noise and JPEG) with the numbers of
  latent diffusion's milder variant (`data.degradation.DegradeBSR`); the paper names latent diffusion and no numbers.
- Sampling of up_1024 runs on tiles of 256 x 256, the size of its training crops, so that memory is bounded
  (docs/upsamplers.md); the paper does not say how it was run.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.degradation import DegradeBSR
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.tokenizer import ClipTokenizer
from ddpm_jax.data.transforms import CenterCrop, Copy, RandomCrop, Resize, Select, Tokenize
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.diffusion.tokens import token_sampling_from
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.models.embedding_norm import EmbeddingStatistics
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.transformer import gelu, quick_gelu
from ddpm_jax.models.unet import UNet, attention_levels
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.pipelines.enlarging import Enlarging, check_tile
from ddpm_jax.training import (
    AutoregressiveTask,
    Captions,
    CodesTask,
    ContrastiveTask,
    DiffusionTask,
    Embeddings,
    ImageEmbedding,
    Images,
    LowResolution,
    Stage,
    StatisticsTask,
    Training,
)
from ddpm_jax.types import network_dtype

VARIANTS = ("", "l14", "karlo", "medium", "smoke")
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
        "sam_rho": placeholder(float),
        "checkpoint_every": 5_000,
        "log_every": 100,
        "preview_every": 10_000,
        "eval_every": 0,
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
    config.data = {"path": "", "held_out_path": ""}
    config.text = {"length": 77}
    config.dtype, config.remat = "bfloat16", True
    config.clip = {
        "image_size": 256,
        "patch": 16,
        "embed_dim": 1024,
        "vision": {"width": 1280, "layers": 32, "heads": 16},
        "text": {"width": 1024, "layers": 24, "heads": 16},
        "quick_gelu": False,
        "chunk_size": 8192,  # rows of the 32,768 x 32,768 logits that are computed at a time
        "training": training(
            32_768, 600_000, 3e-4, decay="cosine", final_fraction=0.0, weight_decay=0.2, b2=0.98, eps=1e-6
        ),
    }
    config.clip.training.sam_rho = 0.1
    published_priors(config)
    published_decoder(config)
    config.sample = published_sampling()
    config.tensorboard, config.progress, config.cpu_devices = False, True, 1
    config.mesh = {"data": -1, "fsdp": 8, "tensor": 1}
    change = {"l14": l14, "karlo": karlo, "medium": medium, "smoke": smoke}.get(variant)
    if change is not None:
        change(config)
    return config


def published_priors(config: ConfigDict) -> None:
    """Add both priors, of the columns "AR prior" and "Diffusion prior" of the paper's table."""
    fitted = training(4096, 256, 0.0, warmup_steps=0)
    encoder = {"width": 2048, "layers": 0, "heads": 32}  # without layers priors read the hidden states of CLIP's tower
    config.priors = "diffusion"  # or "autoregressive", or "both", of which the pipeline then has the diffusion prior
    config.prior = {"width": 2048, "layers": 24, "heads": 32} | {
        "text_encoder": encoder,
        "embed_norm": "scale",  # or "standardize", by the stage "statistics"
        "embed_scale": 17.2,
        "diffusion": {"schedule": "cosine", "num_steps": 1000},
        "drop_text": 0.1,
        "training": training(4096, 600_000, 1.1e-4, weight_decay=6e-2, b2=0.96, eps=1e-6, eval_every=5_000),
    }
    config.statistics = {"training": fitted}
    config.codes = {"dims": 319, "buckets": 1024, "dot_buckets": 256, "training": fitted}
    own = {"weight_decay": 4e-2, "b2": 0.91, "eps": 1e-10, "ema_decay": 0.999}
    config.ar_prior = {"width": 1664, "layers": 24, "heads": 26} | {
        "text_encoder": encoder,
        "drop_text": 0.1,
        "training": training(4096, 1_000_000, 1.6e-4, eval_every=5_000, **own),
    }


def published_decoder(config: ConfigDict) -> None:
    """Add the decoder and the upsamplers."""
    unet = {"channels": 320, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "dropout": 0.1}
    config.decoder = {
        "image_size": 64,
        "unet": unet | {"channels": 512, "head_channels": 64},
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
    config.upsamplers = UPSAMPLERS
    config.up_256 = upsampler(256, 64, unet=unet, training=training(1024, 1_000_000, 1.2e-4))
    unet = {"channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "dropout": 0.0}
    config.up_1024 = upsampler(1024, 256, unet=unet, training=training(512, 1_000_000, 1.0e-4))
    config.up_1024.diffusion.schedule = "linear"
    config.up_1024.degradation = "bsr"


def published_sampling() -> dict:
    """Return how the paper samples each stage."""
    options = {"scale": placeholder(float), "threshold": placeholder(float), "l2_clamp": False}
    return {
        "prior": {"sampler": "ancestral", "steps": "64", **options},
        "ar_prior": {"scale": 1.0, "temperature": 1.0, "top_p": 1.0},
        "candidates": 2,
        "decoder": {"sampler": "ancestral", "steps": "250", "scale": 1.25, "threshold": 1.0},
        "up_256": {"sampler": "ddim", "steps": "fast27", "threshold": 1.0},
        "up_1024": {"sampler": "ddim", "steps": "15", "threshold": 1.0},
        "tile": 256,  # of up_1024; 0 runs on whole images
        "batch_size": 64,
    }


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the stages."""
    c, tokenizer = config, ClipTokenizer()
    if any(name not in UPSAMPLERS for name in c.upsamplers):
        raise ValueError(f"upsamplers={tuple(c.upsamplers)} must be some of {', '.join(map(repr, UPSAMPLERS))}")
    text, vocab_size, shared = Tokenize(tokenizer, c.text.length), tokenizer.vocab_size, precision(c)

    def trained(part: ConfigDict) -> Training:
        return Training(seed=c.seed, tensorboard=c.tensorboard, progress=c.progress, **part.training)

    activation = quick_gelu if c.clip.quick_gelu else gelu
    clip = CLIP(
        VisionTransformer(c.clip.image_size, c.clip.patch, activation=activation, **c.clip.vision, **shared),
        TextEncoder(vocab_size, c.text.length, activation=activation, **c.clip.text, **shared),
        c.clip.embed_dim,
    )
    pairs, square = source(c, c.clip.image_size), CenterCrop(c.clip.image_size)
    return (
        Stage(
            name="clip",
            task=ContrastiveTask(clip, tokenizer, c.clip.chunk_size),
            source=pairs,
            transforms=(text, square, Select(("image", "tokens", "mask"))),
            training=trained(c.clip),
        ),
        *priors(c, vocab_size, {"source": pairs, "transforms": (text, square)}, trained),
        Stage(
            name="decoder",
            task=DiffusionTask(
                model=decoder(c, vocab_size),
                diffusion=Diffusion(variance="learned_range", **c.decoder.diffusion),
                x0=Images(c.decoder.image_size),
                conditions=(
                    ImageEmbedding(drop=c.decoder.drop_image),
                    Captions(c.text.length, drop=c.decoder.drop_text, own_tokens=c.decoder.text_encoder.layers > 0),
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
            for name in c.upsamplers
        ),
    )


def crops(config: ConfigDict, name: str) -> tuple:
    """Return the transforms of an upsampler: crops, and their degraded copies if they are not made on the device."""
    c = config[name]
    if c.degradation not in ("blur", "bsr"):
        raise ValueError(f"{name}.degradation={c.degradation!r} must be 'blur' or 'bsr'")
    degraded = (DegradeBSR(c.image_size // c.low_size),) if c.degradation == "bsr" else ()
    return (Select(("image",)), CenterCrop(c.image_size), RandomCrop(c.crop), *degraded)


def priors(config: ConfigDict, vocab_size: int, pairs: dict, trained) -> tuple[Stage, ...]:
    """Return the stages of the priors: of embeddings by diffusion, and of their codes one by one."""
    c, shared, dim = config, precision(config), config.clip.embed_dim
    if c.priors not in ("diffusion", "autoregressive", "both"):
        raise ValueError(f"priors={c.priors!r} must be 'diffusion', 'autoregressive' or 'both'")
    if c.prior.embed_norm not in ("scale", "standardize"):
        raise ValueError(f"prior.embed_norm={c.prior.embed_norm!r} must be 'scale' or 'standardize'")
    standardize = c.prior.embed_norm == "standardize"
    size = lambda part: (c.text.length, part.width, part.layers, part.heads, text_encoder(c, part, vocab_size))  # noqa: E731
    captions = lambda part: Captions(c.text.length, part.drop_text, part.text_encoder.layers > 0)  # noqa: E731
    common = {"needs": {"clip": "clip"}, **pairs}
    fit = lambda name, task: Stage(name=name, task=task, training=trained(c[name]), **common)  # noqa: E731
    statistics = fit("statistics", StatisticsTask(EmbeddingStatistics(dim)))
    scaled = Embeddings(dim, statistics="statistics") if standardize else Embeddings(dim, c.prior.embed_scale)
    by_diffusion = Stage(
        name="prior",
        task=DiffusionTask(
            model=DiffusionPrior(dim, *size(c.prior), **shared),
            diffusion=Diffusion(prediction="x0", **c.prior.diffusion),
            x0=scaled,
            conditions=(captions(c.prior),),
            sampling=sampling_from(c.sample.prior, name="sample.prior"),
        ),
        **evaluated(c, c.prior, trained),
        **common | {"needs": {"clip": "clip"} | ({"statistics": "statistics"} if standardize else {})},
    )
    quantized = (dim, c.codes.dims, c.codes.buckets, c.codes.dot_buckets)
    codes = fit("codes", CodesTask(EmbeddingCodes(*quantized)))
    by_codes = Stage(
        name="ar_prior",
        task=AutoregressiveTask(
            model=AutoregressivePrior(*quantized, *size(c.ar_prior), **shared),
            captions=captions(c.ar_prior),
            sampling=token_sampling_from(c.sample.ar_prior, name="sample.ar_prior"),
        ),
        **evaluated(c, c.ar_prior, trained),
        **common | {"needs": {"clip": "clip", "codes": "codes"}},
    )
    diffusion = (statistics, by_diffusion) if standardize else (by_diffusion,)
    found = {"diffusion": diffusion, "autoregressive": (codes, by_codes)}
    return found.get(c.priors, (*diffusion, codes, by_codes))


def evaluated(config: ConfigDict, part: ConfigDict, trained) -> dict:
    """Return the training of a prior, with evaluations if there are held-out records."""
    if not config.data.held_out_path:
        return {"training": dataclasses.replace(trained(part), eval_every=0)}
    return {"training": trained(part), "eval_source": source(config, config.clip.image_size, held_out=True)}


def text_encoder(config: ConfigDict, part: ConfigDict, vocab_size: int) -> TextEncoder | None:
    """Return the text encoder that a network is trained with, or None if it reads CLIP's hidden states."""
    if part.text_encoder.layers == 0:
        return None
    return TextEncoder(vocab_size, config.text.length, **part.text_encoder, **precision(config), name="text_encoder")


def source(config: ConfigDict, size: int, *, held_out: bool = False):
    """Return the images with captions; generated shapes are rendered at a size."""
    if held_out and config.data.held_out_path != "shapes":
        return open_source(config.data.held_out_path)
    if config.data.path == "shapes":
        return ShapesSource(int(held_out), size, length=64)
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
    """Return the decoder network, which may include a text encoder."""
    c, shared = config.decoder, precision(config)
    levels = attention_levels(c.attention_resolutions, c.image_size, len(c.unet.channel_mult))
    return Decoder(
        UNet(out_channels=6, attention_resolutions=(), attention_levels=levels, **c.unet, **shared),
        config.clip.embed_dim,
        c.context_width,
        c.image_tokens,
        text_embedding=True,
        text_encoder=text_encoder(config, c, vocab_size),
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
    sample, upsamplers = config.sample, list(config.upsamplers)
    by_codes = token_sampling_from(sample.ar_prior, name="sample.ar_prior")
    by_diffusion = sampling_from(sample.prior, name="sample.prior")
    if config.priors == "autoregressive":
        prior, models = by_codes, {"prior": "ar_prior", "codes": "codes"}
    else:
        statistics = {"statistics": "statistics"} if config.prior.embed_norm == "standardize" else {}
        prior, models = by_diffusion, {"prior": "prior", **statistics}
    tiled = sample.tile and "up_1024" in upsamplers
    enlarging = {"enlarging": {"up_1024": {"tile": sample.tile}}} if tiled else {}
    if tiled:
        c, network = config.up_1024, upsampler_task(config, "up_1024").model
        check_tile("sample.", Enlarging(tile=sample.tile), network, c.image_size // c.low_size)
    others = {name: sampling_from(sample[name], name=f"sample.{name}") for name in ("decoder", *upsamplers)}
    return PipelineDescription(
        "UnCLIP",
        models={"clip": "clip", **models, "decoder": "decoder", "upsamplers": upsamplers},
        sampling={"prior": prior} | others,
        options={"candidates": sample.candidates, "batch_size": sample.batch_size, **enlarging},
    )


def l14(config: ConfigDict) -> None:
    """Take OpenAI's CLIP ViT-L/14: 32 epochs of 400M pairs, without sharpness-aware minimization."""
    config.clip.update(image_size=224, patch=14, embed_dim=768, quick_gelu=True)
    config.clip.vision.update(width=1024, layers=24)
    config.clip.text.update(width=768, layers=12, heads=12)
    config.clip.training.update(num_steps=390_625, learning_rate=4e-4, sam_rho=None)
    config.prior.embed_scale = 14.9  # 17.2 sqrt(768 / 1024)


def karlo(config: ConfigDict) -> None:
    """Take the networks, drop rates and sampling of Karlo v1-alpha; what it does not say stays as in the paper."""
    l14(config)
    config.prior.update(layers=20, drop_text=0.2, embed_norm="standardize")
    config.prior.training.num_steps = 1_000_000
    # It reads the hidden states of CLIP's text tower.
    config.decoder.update(context_width=1536, drop_text=0.3, unet={"channels": 320}, text_encoder={"layers": 0})
    config.decoder.training.num_steps = 1_000_000
    config.upsamplers = ("up_256",)
    config.sample.prior.update(steps="25", scale=4.0, threshold=10.0)
    config.sample.decoder.update(steps="50", scale=8.0)
    config.sample.up_256.update(sampler="ancestral", steps="7")
    config.sample.candidates = 1


def medium(config: ConfigDict) -> None:
    """Shrink the networks and batches to what a v4-32 trains: CLIP ViT-B/16, half of the channels and of the depth."""
    config.clip.update(image_size=224, embed_dim=512, chunk_size=4096)
    config.clip.vision.update(width=768, layers=12, heads=12)
    config.clip.text.update(width=512, layers=12, heads=8)
    config.clip.training.update(batch_size=8192, num_steps=400_000, learning_rate=5e-4)
    config.prior.update(width=1024, layers=12, heads=16, embed_scale=12.2)  # 17.2 sqrt(512 / 1024)
    config.prior.training.update(batch_size=2048, num_steps=400_000)
    config.codes.dims = 256
    config.ar_prior.update(width=832, layers=12, heads=13)
    config.ar_prior.training.update(batch_size=2048, num_steps=400_000)
    config.decoder.update(context_width=1024, text_encoder={"width": 1024, "layers": 12, "heads": 16})
    for stage, channels, batch_size in (("decoder", 256, 1024), ("up_256", 192, 512), ("up_1024", 128, 256)):
        config[stage].unet.channels = channels
        config[stage].training.update(batch_size=batch_size, num_steps=500_000)


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that all stages take seconds; every option stays as it is at full size."""
    config.data.update(path="shapes", held_out_path="shapes")
    config.mesh.fsdp = 1
    for stage in ("clip", "statistics", "prior", "codes", "ar_prior", "decoder", *UPSAMPLERS):
        config[stage].training.update(
            num_steps=2, batch_size=8, warmup_steps=1, log_every=1, checkpoint_every=1, preview_every=2
        )
    config.prior.training.eval_every = config.ar_prior.training.eval_every = 2
    tower = {"width": 16, "layers": 1, "heads": 2}
    config.clip.update(image_size=32, embed_dim=16, chunk_size=4, vision=tower, text=tower)
    config.prior.update(tower)
    config.codes.update(dims=4, buckets=8, dot_buckets=4)
    config.ar_prior.update(tower)
    config.decoder.update(image_size=16, context_width=16, attention_resolutions=(8,))
    config.decoder.unet.update(channels=32, channel_mult=(1, 1), num_res_blocks=1, head_channels=16)
    config.decoder.text_encoder.update(tower)
    for stage, low in zip(UPSAMPLERS, (16, 32), strict=False):
        config[stage].update(low_size=low, image_size=2 * low, crop=low)
        config[stage].unet.update(channels=32, channel_mult=(1,), num_res_blocks=1)
        config.sample[stage].steps = "2"
    config.sample.prior.steps = config.sample.decoder.steps = "2"
    config.sample.update(tile=32, batch_size=8)
