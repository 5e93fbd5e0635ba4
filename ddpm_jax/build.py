"""From a config to objects: the only module that reads a ConfigDict.

Everything it makes takes plain keyword arguments; a field that cannot work is a ValueError that names it.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import jax.numpy as jnp

from ddpm_jax.data.shapes import captions
from ddpm_jax.data.shapes import scenes as shapes
from ddpm_jax.data.tokenizer import ClipTokenizer, CompactTokenizer, Tokenizer
from ddpm_jax.diffusion.importance import Timesteps
from ddpm_jax.diffusion.losses import Objective, check_objective, snr_power
from ddpm_jax.diffusion.process import GaussianProcess, make_process, respace
from ddpm_jax.diffusion.schedules import cosine_betas, linear_betas
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.decoder import Decoder, check_layout
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import RecurrentTextEncoder, TextEncoder
from ddpm_jax.models.transformer import gelu, quick_gelu
from ddpm_jax.models.unet import UNet, check_image_size, levels_of_resolutions
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.stages import Sampling
from ddpm_jax.types import Kind, Source, Variance

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh

Config = Mapping[str, Any]
STAGES = ("clip", "prior", "decoder", "upsampler")
# What a stage's result depends on besides its own part; the rest of the config may change between runs.
DEPENDS = {
    "clip": ("data", "text"),
    "prior": ("data", "text", "clip"),
    "decoder": ("data", "text", "clip"),
    "upsampler": ("data",),
}


def _choose(config: Config, field: str, options: Mapping[str, Any]) -> Any:
    if config[field] not in options:
        raise ValueError(f"{field}={config[field]!r} must be one of {', '.join(map(repr, options))}")
    return options[config[field]]


def _dtype(config: Config) -> Any:
    return _choose(config, "dtype", {"float32": jnp.float32, "bfloat16": jnp.bfloat16})


def _activation(config: Config) -> Any:
    return _choose(config, "activation", {"gelu": gelu, "quick_gelu": quick_gelu})


def make_tokenizer(config: Config) -> Tokenizer:
    """Make the tokenizer that `config.text.tokenizer` names."""
    makers = {"clip": ClipTokenizer, "compact": lambda: CompactTokenizer(captions.VOCABULARY)}
    return _choose(config["text"], "tokenizer", makers)()


def make_source(config: Config, *, resolution: int, split: str = "train", seed: int | None = None) -> Source:
    """Make a split of the data set that `config.data` names, at a resolution."""
    data = config["data"]
    if data["name"] != "shapes":
        raise ValueError(f"data.name={data['name']!r} must be 'shapes'")
    return shapes.ShapesSource(
        data["seed"] if seed is None else seed,
        resolution,
        split,
        length=data["num_examples"],
        two_fraction=data["two_fraction"],
    )


def make_stage_process(config: Config) -> GaussianProcess:
    """Make the noise process of a stage."""
    schedule = _choose(config, "schedule", {"linear": linear_betas, "cosine": cosine_betas})
    return make_process(schedule(config["diffusion_steps"]))


def _text_encoder(config: Config, text: Config, vocab_size: int) -> TextEncoder | RecurrentTextEncoder | None:
    own = config["text_encoder"]
    if own is None:
        return None
    with _naming("text_encoder"):
        for field in ("width", "layers"):
            _check_least(own, field, 1)
        if _choose(own, "kind", {"transformer": False, "gru": True}):
            if own["causal"]:
                raise ValueError("causal=True must be False with kind='gru', which reads both ways")
            return RecurrentTextEncoder(vocab_size, own["width"], own["layers"], _dtype(config), name="text_encoder")
    return TextEncoder(
        vocab_size,
        text["length"],
        own["width"],
        own["layers"],
        own["heads"],
        causal=own["causal"],
        remat=config["remat"],
        dtype=_dtype(config),
        name="text_encoder",
    )


def make_clip(config: Config, vocab_size: int) -> CLIP:
    """Make CLIP from `config.clip`."""
    clip = config["clip"]
    shared = {"activation": _activation(clip), "remat": clip["remat"], "dtype": _dtype(clip)}
    vision, text = clip["vision"], clip["text"]
    return CLIP(
        VisionTransformer(
            clip["image_size"],
            clip["patch"],
            vision["width"],
            vision["layers"],
            vision["heads"],
            tuple(vision["stem"]),
            **shared,
        ),
        TextEncoder(vocab_size, config["text"]["length"], text["width"], text["layers"], text["heads"], **shared),
        clip["embed_dim"],
    )


def make_prior(config: Config, vocab_size: int) -> DiffusionPrior:
    """Make the diffusion prior from `config.prior`."""
    prior = config["prior"]
    return DiffusionPrior(
        config["clip"]["embed_dim"],
        config["text"]["length"],
        prior["width"],
        prior["layers"],
        prior["heads"],
        text_encoder=_text_encoder(prior, config["text"], vocab_size),
        activation=_activation(prior),
        remat=prior["remat"],
        dtype=_dtype(prior),
    )


def _unet(config: Config, out_channels: int, **overrides) -> UNet:
    return UNet(
        **{
            "channels": config["channels"],
            "out_channels": out_channels,
            "channel_mult": tuple(config["channel_mult"]),
            "num_res_blocks": config["num_res_blocks"],
            "patch": config["patch"],
            "dropout": config["dropout"],
            "remat": config["remat"],
            "dtype": _dtype(config),
        }
        | overrides
    )


def make_decoder(config: Config, vocab_size: int) -> Decoder:
    """Make the decoder from `config.decoder`."""
    decoder = config["decoder"]
    check_image_size(decoder["image_size"], decoder["patch"], len(decoder["channel_mult"]))
    unet = _unet(
        decoder,
        6 if decoder["variance"] == "learned_range" else 3,
        attention_resolutions=(),
        attention_levels=levels_of_resolutions(
            decoder["attention_resolutions"], decoder["image_size"] // decoder["patch"], len(decoder["channel_mult"])
        ),
        head_channels=decoder["head_channels"],
        modulate=decoder["modulate"],
    )
    if decoder["modulate"] and not decoder["layout_channels"]:
        raise ValueError("modulate=True needs layout_channels, got layout_channels=0")
    check_layout(decoder["layout_heads"], decoder["layout_channels"], decoder["word_vectors"])
    if decoder["word_vectors"] and decoder["text_encoder"] is None:
        raise ValueError("word_vectors=True needs a text_encoder of the decoder's own, got text_encoder=None")
    return Decoder(
        unet,
        config["clip"]["embed_dim"],
        decoder["context_width"],
        decoder["image_tokens"],
        text_embedding=decoder["text_embedding"],
        word_vectors=vocab_size if decoder["word_vectors"] else 0,
        layout_channels=decoder["layout_channels"],
        layout_heads=decoder["layout_heads"],
        text_encoder=_text_encoder(decoder, config["text"], vocab_size),
        dtype=_dtype(decoder),
    )


def make_upsampler(config: Config) -> Upsampler:
    """Make the super-resolution network from `config.upsampler`."""
    up = config["upsampler"]
    if up["image_size"] % up["low_size"] or (up["image_size"] // up["low_size"]).bit_count() != 1:
        raise ValueError(
            f"upsampler.image_size={up['image_size']} must be upsampler.low_size={up['low_size']} times a power of two"
        )
    if up["crop"] > up["image_size"]:
        raise ValueError(f"upsampler.crop={up['crop']} must be at most upsampler.image_size={up['image_size']}")
    if up["crop"] % (up["image_size"] // up["low_size"]):
        raise ValueError(
            f"upsampler.crop={up['crop']} must be a multiple of {up['image_size'] // up['low_size']}, by which "
            "upsampler.image_size exceeds upsampler.low_size"
        )
    for size in (up["image_size"], up["crop"]):
        check_image_size(size, up["patch"], len(up["channel_mult"]))
    return Upsampler(_unet(up, 3, attention_resolutions=(), attention_levels=(), mid_attention=False))


def make_weighting(config: Config) -> Any:
    """Return the loss weighting of a stage, or None."""
    how = config["weighting"]
    return None if how is None else snr_power(how["power"], how["bound"], config["kind"])


def make_sampling(config: Config, stage: str) -> Sampling:
    """Return how a stage is sampled, from `config.sample`."""
    how = config["sample"][stage]
    return Sampling(str(how["steps"]), how["eta"], how["scale"])


def make_stage_optimizer(
    config: Config, mesh: "Mesh | None" = None
) -> "tuple[optax.GradientTransformation, optax.Schedule]":
    """Make a stage's optimizer, whose work the devices of a mesh share, and learning-rate schedule."""
    from ddpm_jax.training.optimizer import make_optimizer

    names = ("learning_rate", "warmup_steps", "decay", "final_fraction", "b1", "b2", "eps", "weight_decay", "clip_norm")
    names += ("optimizer", "muon_learning_rate")
    return make_optimizer(total_steps=config["num_steps"], mesh=mesh, **{name: config[name] for name in names})


def check_config(config: Config) -> None:
    """Raise ValueError, naming the field, for what no stage could work with; builds every network's description."""
    unknown = [stage for stage in config["stages"] if stage not in STAGES]
    if unknown or not config["stages"]:
        found = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"stages contains {found}; a stage is one of {', '.join(STAGES)}")
    _check_numbers(config)
    for stage in STAGES:
        for field in ("num_steps", "batch_size", "log_every", "checkpoint_every", "keep", "accumulate"):
            _check_least(config[stage], f"{stage}.{field}", 1)
        leasts = dict.fromkeys(("preview_every", "layout_channels", "layout_heads"), 0)
        leasts |= dict.fromkeys(("patch", "family", "low_size", "crop", "supersample"), 1)
        for field in leasts.keys() & config[stage].keys():
            _check_least(config[stage], f"{stage}.{field}", leasts[field])
        if config[stage]["ema_decay"] == 1:
            raise ValueError(f"{stage}.ema_decay=1 must be below 1, or the average never leaves the first parameters")
        for field in ("drop_image", "drop_text", "blur_rate", "ema_decay", "dropout"):
            if field in config[stage]:
                _check_fraction(config[stage], f"{stage}.{field}")
    _check_least(config, "cpu_devices", 0)
    _check_least(config["sample"], "sample.batch_size", 1)
    _check_least(config["sample"]["prior"], "sample.prior.candidates", 1)
    _check_least(config["evaluation"], "evaluation.num_captions", 1)
    vocab_size = make_tokenizer(config).vocab_size
    make_clip(config, vocab_size)
    for stage, make in {"prior": make_prior, "decoder": make_decoder}.items():
        with _naming(stage):
            make(config, vocab_size)
    _check_resolutions(config["decoder"])
    with _naming("upsampler"):
        make_upsampler(config)
    if config["decoder"]["image_size"] != config["upsampler"]["low_size"]:
        raise ValueError(
            f"upsampler.low_size={config['upsampler']['low_size']} must be "
            f"decoder.image_size={config['decoder']['image_size']}"
        )
    for stage in STAGES[1:]:
        with _naming(stage):
            process = make_stage_process(config[stage])
        with _naming(f"sample.{stage}"):
            sampling = make_sampling(config, stage)
            respace(process, sampling.steps)
            sampling.step()
    _check_objectives(config)
    rendered = config["decoder"]["image_size"] * config["decoder"]["supersample"]
    for size in {config["clip"]["image_size"], rendered, config["upsampler"]["image_size"]}:
        with _naming("data"):
            make_source(config, resolution=size)


def _check_resolutions(decoder: Config) -> None:
    heights = [decoder["image_size"] // decoder["patch"] >> level for level in range(len(decoder["channel_mult"]))]
    for resolution in decoder["attention_resolutions"]:
        if resolution not in heights:
            raise ValueError(
                f"decoder.attention_resolutions has {resolution}, and the levels' feature maps have heights "
                f"{', '.join(map(str, heights))}"
            )


def _check_objectives(config: Config) -> None:
    for stage in ("decoder", "upsampler"):
        with _naming(stage):
            if stage == "upsampler" and config[stage]["blur_sigma"] <= 0:
                raise ValueError(f"blur_sigma={config[stage]['blur_sigma']} must be positive; blur_rate=0 never blurs")
            _choose(config[stage], "kind", dict.fromkeys(get_args(Kind)))
            make_weighting(config[stage])
    with _naming("decoder"):
        _choose(config["decoder"], "variance", dict.fromkeys(get_args(Variance)))
        _choose(config["decoder"], "objective", dict.fromkeys(get_args(Objective)))
        _choose(config["decoder"], "timesteps", dict.fromkeys(get_args(Timesteps)))
        check_objective(
            config["decoder"]["objective"], config["decoder"]["variance"], make_weighting(config["decoder"])
        )


def _check_numbers(config: Config, prefix: str = "") -> None:
    """Refuse numbers that are not finite, which pass comparisons, and seeds of which JAX would drop the higher bits."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{name}={value} must be a finite number")
        elif name == "seed" and not 0 <= value < 2**32:
            raise ValueError(f"{prefix}{name}={value} must lie in [0, 2**32)")


def _check_least(part: Config, field: str, least: int) -> None:
    value = part[field.rpartition(".")[2]]
    if value < least:
        raise ValueError(f"{field}={value} must be at least {least}")


def _check_fraction(part: Config, field: str) -> None:
    value = part[field.rpartition(".")[2]]
    if not 0 <= value <= 1:
        raise ValueError(f"{field}={value} must lie between 0 and 1")


@contextlib.contextmanager
def _naming(part: str) -> Iterator[None]:
    """Put the part of the config that is at fault before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error
