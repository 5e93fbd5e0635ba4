"""unCLIP on captioned shapes: a data set that is computed, four small networks, one CPU.

    python -m ddpm_jax.train --config configs/shapes.py --workdir /tmp/shapes

trains CLIP, the diffusion prior, a 16 x 16 decoder and a 16 -> 64 upsampler, and measures how faithful images are to
captions. The weights that the package carries are a run of it; docs/shapes.md has its duration, its results and the
hardware. Variants: `configs/shapes.py:quick` trains for
a few minutes and shows the path, not good images; `configs/shapes.py:smoke` makes a few steps of each stage with tiny
networks.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.data.shapes.captions import VOCABULARY
from ddpm_jax.data.shapes.hard_negatives import HardNegatives
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.data.transforms import AverageDown, RandomCrop, Select, Tokenize
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.losses import snr_power
from ddpm_jax.diffusion.sampling import sampling_from
from ddpm_jax.diffusion.tokens import token_sampling_from
from ddpm_jax.evaluation import report
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.models.embedding_norm import EmbeddingStatistics
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import RecurrentTextEncoder, TextEncoder
from ddpm_jax.models.transformer import quick_gelu
from ddpm_jax.models.unet import UNet, attention_levels
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.description import PipelineDescription
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
from ddpm_jax.training.embeddings import Embedded

VARIANTS = ("", "quick", "smoke")


def training(batch_size: int, num_steps: int, learning_rate: float, **overrides) -> dict:
    """Return the part that every stage has: the fields of `Training`."""
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
        "optimizer": "muon",
        "muon_learning_rate": placeholder(float),
        "ema_decay": 0.998,
        "accumulate": 1,
        "checkpoint_every": 500,
        "log_every": 50,
        "preview_every": 500,
        "eval_every": 0,
        "moment_examples": 0,
        "max_to_keep": 2,
    } | overrides


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.seed = 0
    config.data = {"seed": 0, "num_examples": 80_000, "num_held_out": 512, "two_fraction": 0.4, "open_fraction": 0.5}
    config.text = {"length": 24}
    config.clip = {
        "image_size": 32,
        "group": 8,  # scenes that differ in one thing, in every batch
        "patch": 8,
        "embed_dim": 128,
        "vision": {"width": 128, "layers": 2, "heads": 4, "stem": (32, 64, 128)},
        "text": {"width": 96, "layers": 1, "heads": 3},
        "training": training(256, 1200, 2e-3, muon_learning_rate=4e-3, weight_decay=0.1),
    }
    config.prior = {
        "width": 96,
        "layers": 3,
        "heads": 2,
        "embed_norm": "scale",  # or "standardize", by the stage "statistics"
        "embed_scale": 6.1,  # 0.54 sqrt(embed_dim)
        "diffusion": {"schedule": "cosine", "num_steps": 1000},
        "drop_text": 0.1,
        "training": training(128, 1500, 2e-3, muon_learning_rate=4e-3, eval_every=500, moment_examples=512),
    }
    config.statistics = {"training": training(512, 40, 0.0, warmup_steps=0)}
    config.priors = "diffusion"  # or "autoregressive", or "both", of which the pipeline then has the diffusion prior
    config.codes = {"dims": 64, "buckets": 64, "dot_buckets": 32, "training": training(512, 40, 0.0, warmup_steps=0)}
    config.ar_prior = {
        "width": 96,
        "layers": 3,
        "heads": 2,
        "drop_text": 0.1,
        "training": training(128, 1500, 2e-3, muon_learning_rate=4e-3, eval_every=500),
    }
    config.decoder = {
        "image_size": 16,
        "supersample": 4,
        "unet": {"channels": 64, "channel_mult": (1, 1), "num_res_blocks": 1, "patch": 2, "head_channels": 64},
        "attention_resolutions": (4,),
        "context_width": 128,
        "image_tokens": 4,
        "cond_map_channels": 64,
        "cond_map_heads": 8,
        "text_encoder": {"kind": "gru", "width": 128, "layers": 1, "heads": 2},  # heads: of kind "transformer"
        "diffusion": {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"},
        "timesteps": "stratified",
        "weighting": {"power": 0.5, "bound": 4.0},
        "drop_image": 0.1,
        "drop_text": 0.5,
        "training": training(32, 16_000, 2e-3, muon_learning_rate=6e-3, checkpoint_every=1000, preview_every=2000),
    }
    config.upsampler = {
        "image_size": 64,
        "crop": 64,
        "unet": {"channels": 64, "channel_mult": (1,), "num_res_blocks": 1, "patch": 4},
        "diffusion": {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"},
        "blur_sigma": 0.6,
        "blur_rate": 0.25,
        "noise": 0.05,
        "mix_colours": True,
        "training": training(16, 6000, 2e-3, muon_learning_rate=6e-3),
    }
    config.sample = {
        "prior": {"sampler": "ancestral", "steps": "25", "threshold": placeholder(float), "l2_clamp": False},
        "ar_prior": {"scale": 1.0, "temperature": 1.0, "top_p": 1.0},
        "candidates": 2,
        "decoder": {"sampler": "ddim", "steps": "25", "scale": 1.5, "threshold": 1.0},
        "upsampler": {"sampler": "ddim", "steps": "4", "threshold": 1.0},
        "batch_size": 64,
    }
    config.evaluation = {"num_captions": 512, "seed": 1}
    config.tensorboard = False
    config.progress = True
    config.cpu_devices = 2
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if variant == "quick":
        quick(config)
    if variant == "smoke":
        smoke(config)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the four stages."""
    c, tokenizer = config, CompactTokenizer(VOCABULARY)
    text, vocab_size = Tokenize(tokenizer, c.text.length), tokenizer.vocab_size

    def source(size: int, *, held_out: bool = False) -> ShapesSource:
        fractions = {"two_fraction": c.data.two_fraction, "open_fraction": c.data.open_fraction}
        seed, length = c.data.seed + held_out, c.data.num_held_out if held_out else c.data.num_examples
        return ShapesSource(seed, size, length=length, **fractions)

    def embedded(size: int, **options) -> Embedded:
        return Embedded(source(size, **options), (text,), read=source(c.clip.image_size, **options))

    def trained(part: ConfigDict) -> Training:
        return Training(seed=c.seed, tensorboard=c.tensorboard, progress=c.progress, **part.training)

    clip = CLIP(
        VisionTransformer(c.clip.image_size, c.clip.patch, activation=quick_gelu, **c.clip.vision),
        TextEncoder(vocab_size, c.text.length, activation=quick_gelu, **c.clip.text),
        c.clip.embed_dim,
    )
    rendered = c.decoder.image_size * c.decoder.supersample
    return (
        Stage(
            name="clip",
            task=ContrastiveTask(clip, tokenizer),
            source=HardNegatives(source(c.clip.image_size), c.clip.group),
            transforms=(text, Select(("image", "tokens", "mask"))),
            training=trained(c.clip),
            examples_per_record=c.clip.group,
        ),
        *priors(c, embedded, text, trained),
        Stage(
            name="decoder",
            task=DiffusionTask(
                model=decoder(c, vocab_size),
                diffusion=Diffusion(**c.decoder.diffusion),
                x0=Images(c.decoder.image_size),
                conditions=(
                    ImageEmbedding(drop=c.decoder.drop_image),
                    Captions(c.text.length, drop=c.decoder.drop_text, own_tokens=True),
                ),
                weighting=snr_power(
                    c.decoder.weighting.power, c.decoder.weighting.bound, c.decoder.diffusion.prediction
                ),
                timesteps=c.decoder.timesteps,
                sampling=sampling_from(c.sample.decoder, name="sample.decoder"),
            ),
            # Rendered larger and averaged down, like the small copies that the upsampler is trained on.
            source=embedded(rendered),
            transforms=(
                text,
                Select(("image", "tokens", "mask", "z_image", "z_text")),
                *([AverageDown(c.decoder.supersample)] if c.decoder.supersample > 1 else []),
            ),
            training=trained(c.decoder),
            needs={"clip": "clip"},
        ),
        Stage(
            name="upsampler",
            task=upsampler_task(c),
            source=source(c.upsampler.image_size),
            transforms=(
                Select(("image",)),
                *([RandomCrop(c.upsampler.crop)] if c.upsampler.crop != c.upsampler.image_size else []),
            ),
            training=trained(c.upsampler),
        ),
    )


def priors(config: ConfigDict, embedded, text: Tokenize, trained) -> tuple[Stage, ...]:
    """Return the stages of the priors: of embeddings by diffusion, and of their codes one by one."""
    c = config
    if c.priors not in ("diffusion", "autoregressive", "both"):
        raise ValueError(f"priors={c.priors!r} must be 'diffusion', 'autoregressive' or 'both'")
    if c.prior.embed_norm not in ("scale", "standardize"):
        raise ValueError(f"prior.embed_norm={c.prior.embed_norm!r} must be 'scale' or 'standardize'")
    standardize = c.prior.embed_norm == "standardize"
    size = (c.prior.width, c.prior.layers, c.prior.heads)
    source = embedded(c.clip.image_size)
    pairs = {"source": source, "transforms": (text, Select(("tokens", "mask", "z_image", "z_text")))}
    held_out = embedded(c.clip.image_size, held_out=True)
    evaluated = lambda part: {"eval_source": held_out if part.training.eval_every else None}  # noqa: E731
    statistics = Stage(
        name="statistics",
        task=StatisticsTask(EmbeddingStatistics(c.clip.embed_dim)),
        training=trained(c.statistics),
        needs={"clip": "clip"},
        **pairs,
    )
    by_diffusion = Stage(
        name="prior",
        task=DiffusionTask(
            model=DiffusionPrior(c.clip.embed_dim, c.text.length, *size, activation=quick_gelu),
            diffusion=Diffusion(prediction="x0", **c.prior.diffusion),
            x0=Embeddings(c.clip.embed_dim, statistics="statistics")
            if standardize
            else Embeddings(c.clip.embed_dim, c.prior.embed_scale),
            conditions=(Captions(c.text.length, drop=c.prior.drop_text),),
            sampling=sampling_from(c.sample.prior, name="sample.prior"),
        ),
        training=trained(c.prior),
        needs={"clip": "clip"} | ({"statistics": "statistics"} if standardize else {}),
        **evaluated(c.prior),
        **pairs,
    )
    quantized = (c.clip.embed_dim, c.codes.dims, c.codes.buckets, c.codes.dot_buckets)
    codes = Stage(
        name="codes",
        task=CodesTask(EmbeddingCodes(*quantized)),
        training=trained(c.codes),
        needs={"clip": "clip"},
        **pairs,
    )
    size = (c.ar_prior.width, c.ar_prior.layers, c.ar_prior.heads)
    by_codes = Stage(
        name="ar_prior",
        task=AutoregressiveTask(
            model=AutoregressivePrior(*quantized, c.text.length, *size, activation=quick_gelu),
            captions=Captions(c.text.length, drop=c.ar_prior.drop_text),
            sampling=token_sampling_from(c.sample.ar_prior, name="sample.ar_prior"),
        ),
        training=trained(c.ar_prior),
        needs={"clip": "clip", "codes": "codes"},
        **evaluated(c.ar_prior),
        **pairs,
    )
    diffusion = (statistics, by_diffusion) if standardize else (by_diffusion,)
    found = {"diffusion": diffusion, "autoregressive": (codes, by_codes)}
    return found.get(c.priors, (*diffusion, codes, by_codes))


def decoder(config: ConfigDict, vocab_size: int) -> Decoder:
    """Return the decoder network, which includes a text encoder."""
    c, own, unet = config.decoder, config.decoder.text_encoder, config.decoder.unet
    if own.kind not in ("gru", "transformer"):
        raise ValueError(f"decoder.text_encoder.kind={own.kind!r} must be 'gru' or 'transformer'")
    if own.kind == "gru":
        encoder = RecurrentTextEncoder(vocab_size, own.width, own.layers, name="text_encoder")
    else:
        sizes = (own.width, own.layers, own.heads)
        encoder = TextEncoder(vocab_size, config.text.length, *sizes, causal=False, name="text_encoder")
    levels = attention_levels(c.attention_resolutions, c.image_size // unet.patch, len(unet.channel_mult))
    return Decoder(
        UNet(out_channels=3, attention_resolutions=(), attention_levels=levels, modulate=True, **unet),
        config.clip.embed_dim,
        c.context_width,
        c.image_tokens,
        text_embedding=False,
        word_vectors=vocab_size,
        cond_map_channels=c.cond_map_channels,
        cond_map_heads=c.cond_map_heads,
        text_encoder=encoder,
    )


def upsampler_task(config: ConfigDict) -> DiffusionTask:
    """Return the task of the upsampler."""
    c, low = config.upsampler, config.decoder.image_size
    if c.image_size % low:
        raise ValueError(f"upsampler.image_size={c.image_size} must be a multiple of decoder.image_size={low}")
    unet = UNet(out_channels=3, attention_resolutions=(), attention_levels=(), mid_attention=False, **c.unet)
    return DiffusionTask(
        model=Upsampler(unet),
        diffusion=Diffusion(**c.diffusion),
        x0=Images(c.image_size, mix_colours=c.mix_colours),
        conditions=(
            LowResolution(
                low,
                c.image_size // low,
                blur_sigma=c.blur_sigma,
                blur_rate=c.blur_rate,
                noise=c.noise,
            ),
        ),
        sampling=sampling_from(config.sample.upsampler, name="sample.upsampler"),
    )


def pipeline(config: ConfigDict) -> PipelineDescription:
    """Return how the stages are sampled together."""
    sample = config.sample
    if config.evaluation.num_captions < 1:
        raise ValueError(f"evaluation.num_captions={config.evaluation.num_captions} must be at least 1")
    by_codes = token_sampling_from(sample.ar_prior, name="sample.ar_prior")
    by_diffusion = sampling_from(sample.prior, name="sample.prior")
    if config.priors == "autoregressive":
        prior, models = by_codes, {"clip": "clip", "codes": "codes", "prior": "ar_prior", "decoder": "decoder"}
    else:
        prior, models = by_diffusion, {"clip": "clip", "prior": "prior", "decoder": "decoder"}
        models |= {"statistics": "statistics"} if config.prior.embed_norm == "standardize" else {}
    others = {stage: sampling_from(sample[stage], name=f"sample.{stage}") for stage in ("decoder", "upsampler")}
    return PipelineDescription(
        "UnCLIP",
        models=models | {"upsamplers": ["upsampler"]},
        sampling={"prior": prior} | others,
        options={"candidates": sample.candidates, "batch_size": sample.batch_size},
    )


def evaluate(config: ConfigDict, pipeline, workdir, show) -> None:
    """Measure how faithful images are to captions, when all stages are trained."""
    report.write_faithfulness(pipeline, workdir, show=show, progress=config.progress, **config.evaluation)


def quick(config: ConfigDict) -> None:
    """Cut the stages to a few minutes in all on two cores; the networks stay."""
    config.data.num_examples = 4_000
    for stage, num_steps in {"clip": 80, "prior": 100, "ar_prior": 100, "decoder": 150, "upsampler": 40}.items():
        config[stage].training.update(num_steps=num_steps, warmup_steps=num_steps // 10, preview_every=num_steps)
    config.prior.training.moment_examples = 32
    config.evaluation.num_captions = 64


def smoke(config: ConfigDict) -> None:
    """Shrink everything so that all stages take seconds."""
    config.data.num_examples = 64
    config.data.num_held_out = 16
    for stage in ("clip", "statistics", "prior", "codes", "ar_prior", "decoder", "upsampler"):
        config[stage].training.update(
            num_steps=2, batch_size=8, warmup_steps=1, log_every=1, checkpoint_every=1, preview_every=2, eval_every=0
        )
    config.prior.training.moment_examples = 0
    config.clip.update(patch=16, embed_dim=16, vision={"width": 16, "layers": 1, "heads": 2, "stem": (16,)})
    config.clip.group = 2
    config.clip.training.batch_size = 16  # so that 1, 2, 4 and 8 devices can share it
    config.clip.update(text={"width": 16, "layers": 1, "heads": 2})
    config.prior.update(width=16, layers=1, heads=2)
    config.codes.update(dims=8, buckets=16, dot_buckets=4)
    config.ar_prior.update(width=16, layers=1, heads=2)
    config.decoder.unet.update(channels=32, head_channels=16, patch=4)
    config.decoder.update(context_width=16, attention_resolutions=(2,), cond_map_channels=4)
    # Its recurrent networks are one piece for every token, and take long to compile.
    config.decoder.text_encoder.update(kind="transformer", width=16, layers=1, heads=2)
    config.upsampler.unet.update(channels=32, channel_mult=(1, 1), patch=8)
    for stage in ("prior", "decoder", "upsampler"):
        config.sample[stage].steps = "2"
    config.sample.candidates = 1
    config.sample.batch_size = 8
    config.evaluation.num_captions = 8
