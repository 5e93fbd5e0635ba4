"""Karlo as kakaobrain released it: three checkpoints, statistics, and OpenAI's CLIP.

The networks, and what the pipeline does with them, are those of `interop.karlo`, which reads diffusers' copy of the
same weights. What differs in the original release (github.com/kakaobrain/karlo):

- The U-Nets have OpenAI's names and orders (`interop.guided`), with the decoder's conditioning in the same file.
- The prior's queries, keys and values are one layer, head by head.
- The statistics of image embeddings are a separate file, a pair of tensors.
- Both upsamplers are one file.
- The prior's predictions are clipped to +- 10, and captions are filled up with zeros.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.clip import LoadedCLIP, load_clip
from ddpm_jax.interop.guided import unet_table
from ddpm_jax.interop.karlo import LoadedPrior, absent
from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import (
    IDENTITY,
    TRANSPOSED,
    ConvertError,
    Entry,
    Layout,
    by_head,
    count,
    dense,
    norm,
    to_ours,
    to_reference,
)
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.transformer import gelu
from ddpm_jax.models.unet import UNet, check_image_size
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.storage.model_directory import Converted
from ddpm_jax.storage.tensor_file import ReadError, read_tensors

FILES = {
    "prior": "prior-ckpt*",
    "decoder": "decoder-ckpt*",
    "upsamplers": "improved-sr-ckpt*",
    "statistics": "ViT-L-14_stats.*",
    "clip": "ViT-L-14.*",
}
UPSAMPLERS = {"first": "model_first_steps.", "last": "model_last_step."}
# Names that identify the networks in a training checkpoint.
MARKS = {
    "prior": ("model.clip_img_proj.weight",),
    "decoder": ("model.clip_tok_proj.weight",),
    "upsamplers": (f"{UPSAMPLERS['first']}time_embed.0.weight",),
}
# Axes of length one in front, which a parameter of ours does not have; reshape refuses any other length.
_POSITION = Layout(lambda x: x.reshape(x.shape[1:]), lambda x: (x[None],))
_QUERY = Layout(lambda x: x.reshape(x.shape[2:]), lambda x: (x[None, None],))


class Loaded(NamedTuple):
    """Network from a file.

    Attributes:
        model: the network.
        params: its parameters; of the upsamplers those of "first" and of "last".
    """

    model: nn.Module
    params: dict[str, Any]


def read_karlo_original(
    directory: str | Path,
    *,
    heads: int = 32,
    head_channels: int = 64,
    head_width: int | tuple[int, int] = 64,
    image_sizes: tuple[int, int] = (64, 256),
    prior_clip: float = 10.0,
    dtype: Any = jnp.float32,
) -> Converted:
    """Read a directory with the five files of Karlo's original release, version 1.0.0 alpha.

    `pipelines.karlo.open_karlo_original` makes a pipeline of it.

    Args:
        directory: with the files that Karlo's setup.sh fetches: prior-ckpt*.ckpt, decoder-ckpt*.ckpt,
            improved-sr-ckpt*.ckpt, ViT-L-14_stats.th and ViT-L-14.pt. Sizes are read from the tensors.
        heads: of the prior's attention.
        head_channels: the width of a head in the decoder.
        head_width: the width of a head in CLIP; a pair is of the text and of the vision transformer.
        image_sizes: of the decoder's and of the upsamplers' images, in pixels.
        prior_clip: what the prior predicts is clipped to +- this.
        dtype: in which the networks compute; parameters are float32.

    Returns:
        the networks and their parameters, by the names of `interop.karlo.read_karlo`.

    Raises:
        ReadError: if a file is missing, there twice, or cannot be read.
        ConvertError: if a file's tensors are not those of its network, or the networks do not fit each other.
        ValueError: if a number of heads, or the width of one, does not divide a layer's width.
    """
    files = find_files(Path(directory))
    clip = load_clip(read_tensors(files["clip"]), head_width=head_width, dtype=dtype)
    statistics = read_tensors(files["statistics"])
    prior = load_prior(read_tensors(files["prior"]), statistics, heads=heads, dtype=dtype)
    small, large = image_sizes
    decoder = load_decoder(read_tensors(files["decoder"]), image_size=small, head_channels=head_channels, dtype=dtype)
    upsamplers = load_upsamplers(read_tensors(files["upsamplers"]), image_size=large, dtype=dtype)
    _check_fit(clip.model, prior.model, decoder.model)
    loaded = dict(zip(("text", "image"), _towers(clip), strict=True)) | {"prior": prior, "decoder": decoder}
    loaded |= {name: Loaded(upsamplers.model, params) for name, params in upsamplers.params.items()}
    return Converted(
        "karlo",
        {name: network.model for name, network in loaded.items()},
        {name: network.params for name, network in loaded.items()}
        | {"statistics": {"mean": prior.mean, "std": prior.std}},
        {
            "layout": "original",
            "sizes": [small, large],
            "prior_clip": prior_clip,
            # Filled up with 0 as Karlo's: no network sees what stands behind the end of a caption.
            "tokenizer": {"kind": "clip", "pad": 0},
        },
    )


def find_files(directory: Path) -> dict[str, Path]:
    """Return the path of each file."""
    found = {name: sorted(directory.glob(pattern)) for name, pattern in FILES.items()}
    missing = [FILES[name] for name, paths in found.items() if not paths]
    if missing:
        raise ReadError(f"{directory} is not a directory of Karlo's original release: it lacks {', '.join(missing)}")
    for name, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise ReadError(f"{directory} must hold one file called {FILES[name]}, and holds {names}")
    return {name: paths[0] for name, paths in found.items()}


def _check_fit(clip: CLIP, prior: DiffusionPrior, decoder: Decoder) -> None:
    ours = (clip.embed_dim, clip.text.context)
    if (prior.embed_dim, prior.context) != ours or decoder.embed_dim != clip.embed_dim:
        raise ConvertError(
            f"the files are not of one Karlo: CLIP has embeddings of {ours[0]} numbers and captions of {ours[1]} "
            f"tokens, the prior of {prior.embed_dim} and {prior.context}, and the decoder embeddings of "
            f"{decoder.embed_dim}"
        )


def _towers(clip: LoadedCLIP) -> tuple[Loaded, Loaded]:
    """Return both towers, each as a separate CLIP, so that neither has the other's parameters."""
    part = lambda *names: {name: clip.params[name] for name in ("log_scale", *names)}  # noqa: E731
    text, image = CLIP(None, clip.model.text, clip.model.embed_dim), CLIP(clip.model.vision, None, clip.model.embed_dim)
    return Loaded(text, part("text", "text_projection")), Loaded(image, part("vision", "image_projection"))


def _shape(tensors: Mapping[str, np.ndarray], name: str, axes: int, whose: str) -> tuple[int, ...]:
    """Return a tensor's shape, after checking that it exists and has this number of axes."""
    if name not in tensors:
        raise ConvertError(f"the file is not of {whose}: it lacks {name}")
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise ConvertError(f"the file is not of {whose}: {name} has the shape {list(shape)}, and needs {axes} axes")
    return shape


def _spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _params_of(model: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Return the shapes of a network's parameters."""
    return parameter_shapes(model, *inputs)["params"]


def _under(table: list[Entry], ours: str, theirs: str) -> list[Entry]:
    """Return a table whose names begin with these."""
    named = lambda entry: tuple(f"{theirs}{name}" for name in entry.theirs)  # noqa: E731
    return [Entry(f"{ours}{entry.ours}", named(entry), entry.layout) for entry in table]


# ---- The prior -------------------------------------------------------------------------------------------------------


def load_prior(
    tensors: Mapping[str, np.ndarray],
    statistics: Mapping[str, np.ndarray],
    *,
    heads: int = 32,
    dtype: Any = jnp.float32,
) -> LoadedPrior:
    """Make the prior of the checkpoint and the statistics.

    Embeddings are scaled as for `interop.karlo.load_prior`: z_text / sqrt(D), and (z_image - mean) / std.

    Args:
        tensors: of prior-ckpt*.ckpt, as `read_tensors` gives them, or the state_dict alone.
        statistics: of ViT-L-14_stats.th: "0" is the mean of image embeddings and "1" their deviation, float[D] each.
        heads: of attention; 32 in Karlo.
        dtype: in which the network computes; parameters are float32.

    Raises:
        ConvertError: if the tensors are not those of the prior, or the statistics not two finite vectors of its size.
        ValueError: if heads does not divide the width.
    """
    tensors = select(tensors, MARKS["prior"])
    model, shapes = prior_of(tensors, heads=heads, dtype=dtype)
    params = to_ours(prior_table(model.width, model.layers, heads), tensors, shapes)
    return LoadedPrior(model, params, *_statistics(statistics, model.embed_dim))


def prior_of(
    tensors: Mapping[str, np.ndarray], *, heads: int = 32, dtype: Any = jnp.float32
) -> tuple[DiffusionPrior, dict[str, Any]]:
    """Return the network that a state_dict is of and its parameters' shapes; arguments are those of `load_prior`."""
    whose = "Karlo's prior"
    _, length, width = _shape(tensors, "model.positional_embedding", 3, whose)
    _, embed_dim = _shape(tensors, "model.clip_img_proj.weight", 2, whose)
    _, text = _shape(tensors, "model.text_enc_proj.weight", 2, whose)
    if width % heads:
        raise ValueError(f"{heads=} must divide the prior's width, which is {width}")
    layers = count(tensors, "model.transformer.resblocks.#")
    model = DiffusionPrior(embed_dim, length - 4, width, layers, heads, activation=gelu, dtype=dtype)
    seen = _spec(1, length - 4, text), _spec(1, length - 4, dtype=jnp.bool_)
    return model, _params_of(model, _spec(1, embed_dim), _spec(1), _spec(1, embed_dim), *seen)


def _statistics(tensors: Mapping[str, np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    shapes = {name: list(array.shape) for name, array in tensors.items()}
    if shapes != {"0": [size], "1": [size]}:
        raise ConvertError(f"the statistics must be a pair of vectors of {size} numbers, got {shapes}")
    mean, std = (np.array(tensors[name], np.float32) for name in "01")
    if not np.isfinite([mean, std]).all():
        raise ConvertError("the statistics must be finite numbers, and hold others")
    return mean, std


def export_prior(prior: LoadedPrior) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the state_dict and the statistics, float32: the inverse of `load_prior`, bit for bit."""
    model = prior.model
    tensors = to_reference(prior_table(model.width, model.layers, model.heads), prior.params)
    return tensors, {"0": prior.mean, "1": prior.std}


def prior_table(width: int, layers: int, heads: int) -> list[Entry]:
    """Return the table of a prior with this number of layers and heads."""
    # Head by head there, all queries first here.
    kernel, bias = (by_head(layout, 3, parts=heads) for layout in (TRANSPOSED, IDENTITY))
    table = [
        Entry("position", ("positional_embedding",), _POSITION),
        Entry("query", ("prd_emb",), _QUERY),
        Entry("null_text", (), absent(width)),
        *dense("time/dense_0", "time_embed.0"),
        *dense("time/dense_1", "time_embed.2"),
        *dense("zt_in", "clip_img_proj"),
        *dense("z_text_in", "text_emb_proj"),
        *dense("text_in", "text_enc_proj"),
        *norm("ln_final", "final_ln"),
        *dense("out", "out_proj"),
    ]
    for i in range(layers):
        ours, theirs = f"transformer/block_{i}", f"transformer.resblocks.{i}"
        table += [
            *norm(f"{ours}/ln_1", f"{theirs}.ln_1"),
            Entry(f"{ours}/qkv/kernel", (f"{theirs}.attn.c_qkv.weight",), kernel),
            Entry(f"{ours}/qkv/bias", (f"{theirs}.attn.c_qkv.bias",), bias),
            *dense(f"{ours}/out", f"{theirs}.attn.c_proj"),
            *norm(f"{ours}/ln_2", f"{theirs}.ln_2"),
            *dense(f"{ours}/mlp_1", f"{theirs}.mlp.c_fc"),
            *dense(f"{ours}/mlp_2", f"{theirs}.mlp.c_proj"),
        ]
    return _under(table, "", "model.")


# ---- The decoder -----------------------------------------------------------------------------------------------------


def load_decoder(
    tensors: Mapping[str, np.ndarray], *, image_size: int = 64, head_channels: int = 64, dtype: Any = jnp.float32
) -> Loaded:
    """Make the decoder of its checkpoint.

    Embeddings are scaled as for `interop.karlo.load_decoder`: z_image / sqrt(D) and z_text / sqrt(D).

    Args:
        tensors: of decoder-ckpt*.ckpt, as `read_tensors` gives them, or the state_dict alone.
        image_size: of its images, in pixels.
        head_channels: the width of a head; 64 in Karlo.
        dtype: in which the network computes; parameters are float32.

    Raises:
        ConvertError: if the tensors are not those of the decoder; it lists which.
        ValueError: if head_channels does not divide a width.
    """
    tensors = select(tensors, MARKS["decoder"])
    model = decoder_of(tensors, image_size=image_size, head_channels=head_channels, dtype=dtype)
    return Loaded(model, to_ours(decoder_table(model, image_size), tensors, decoder_shapes(model, image_size)))


def export_decoder(decoder: Loaded, *, image_size: int = 64) -> dict[str, np.ndarray]:
    """Return the decoder's state_dict, float32: the inverse of `load_decoder`, bit for bit."""
    return to_reference(decoder_table(decoder.model, image_size), decoder.params)


def decoder_of(
    tensors: Mapping[str, np.ndarray], *, image_size: int = 64, head_channels: int = 64, dtype: Any = jnp.float32
) -> Decoder:
    """Return the network that a state_dict is of; the arguments are those of `load_decoder`."""
    whose = "Karlo's decoder"
    network = _unet_of(tensors, "model.", whose, image_size, head_channels, dtype)
    width, _ = _shape(tensors, "model.text_seq_proj.0.weight", 2, whose)
    tokens, embed_dim = _shape(tensors, "model.clip_tok_proj.weight", 2, whose)
    return Decoder(network, embed_dim, width, tokens // width, dtype=dtype)


def decoder_table(model: Decoder, image_size: int) -> list[Entry]:
    """Return the table of a decoder."""
    # The token is the fastest axis there.
    tokens, bias = (by_head(layout, model.image_tokens, parts=model.context_width) for layout in (TRANSPOSED, IDENTITY))
    table = [
        Entry("null_image", ("cf_param",), IDENTITY),
        Entry("null_text", (), absent(4 * model.unet.channels)),
        *dense("image_emb", "clip_emb"),
        *dense("text_emb", "text_feat_proj"),
        Entry("image_tokens_in/kernel", ("clip_tok_proj.weight",), tokens),
        Entry("image_tokens_in/bias", ("clip_tok_proj.bias",), bias),
        *dense("text_in", "text_seq_proj.0"),
        *norm("text_ln", "text_seq_proj.1"),
        *unet_table(model.unet, image_size, "unet/", context=True),
    ]
    return _under(table, "", "model.")


def decoder_shapes(model: Decoder, image_size: int) -> dict[str, Any]:
    """Return the shapes of a decoder's parameters; its text is as wide as its embeddings."""
    z, text = _spec(1, model.embed_dim), _spec(1, 5, model.embed_dim)
    return _params_of(model, _spec(1, image_size, image_size, 3), _spec(1), z, z, text, _spec(1, 5, dtype=jnp.bool_))


# ---- The upsamplers --------------------------------------------------------------------------------------------------


def load_upsamplers(tensors: Mapping[str, np.ndarray], *, image_size: int = 256, dtype: Any = jnp.float32) -> Loaded:
    """Make both upsamplers of their checkpoint; params are of "first" and of "last", which takes the last step.

    Args:
        tensors: of improved-sr-ckpt*.ckpt, as `read_tensors` gives them, or the state_dict alone.
        image_size: of their images, in pixels.
        dtype: in which the network computes; parameters are float32.

    Raises:
        ConvertError: if the tensors are not those of two upsamplers of one kind; it lists which.
    """
    tensors = select(tensors, MARKS["upsamplers"])
    model = upsampler_of(tensors, image_size=image_size, dtype=dtype)
    shapes = dict.fromkeys(UPSAMPLERS, upsampler_shapes(model, image_size))
    return Loaded(model, to_ours(upsampler_table(model, image_size), tensors, shapes))


def export_upsamplers(upsamplers: Loaded, *, image_size: int = 256) -> dict[str, np.ndarray]:
    """Return the state_dict of both, float32: the inverse of `load_upsamplers`, bit for bit."""
    return to_reference(upsampler_table(upsamplers.model, image_size), upsamplers.params)


def upsampler_of(tensors: Mapping[str, np.ndarray], *, image_size: int = 256, dtype: Any = jnp.float32) -> Upsampler:
    """Return the network that a state_dict is of; the arguments are those of `load_upsamplers`."""
    return Upsampler(_unet_of(tensors, UPSAMPLERS["first"], "Karlo's upsamplers", image_size, 64, dtype))


def upsampler_table(model: Upsampler, image_size: int) -> list[Entry]:
    """Return the table of both upsamplers."""
    table = unet_table(model.unet, image_size, "unet/")
    return [entry for ours, theirs in UPSAMPLERS.items() for entry in _under(table, f"{ours}/", theirs)]


def upsampler_shapes(model: Upsampler, image_size: int) -> dict[str, Any]:
    """Return the shapes of one upsampler's parameters."""
    small = image_size // 4
    return _params_of(model, _spec(1, image_size, image_size, 3), _spec(1), _spec(1, small, small, 3))


# ---- The U-Net -------------------------------------------------------------------------------------------------------


def _unet_of(
    tensors: Mapping[str, np.ndarray], theirs: str, whose: str, image_size: int, head_channels: int, dtype: Any
) -> UNet:
    """Return the U-Net that the tensors with such a prefix are of.

    In the decoder every level but the last ends with an additional residual block that doubles the image, after the
    other parts of its entry; so the names show where a level ends.
    """
    blocks = f"{theirs}output_blocks"
    total = count(tensors, f"{blocks}.#")
    doubles = lambda n: any(f"{blocks}.{n}.{part}.in_layers.2.weight" in tensors for part in (1, 2))  # noqa: E731
    ends = [n for n in range(total) if doubles(n)]
    begins = [0, *(n + 1 for n in ends)][::-1]  # of every level, the one of the image's size first
    _, channels = _shape(tensors, f"{theirs}time_embed.0.weight", 2, whose)
    widths = [_shape(tensors, f"{blocks}.{n}.0.in_layers.2.weight", 4, whose)[0] for n in begins]
    attends = [f"{blocks}.{n}.1.qkv.weight" in tensors for n in begins]
    emb, _ = _shape(tensors, f"{blocks}.0.0.emb_layers.1.weight", 2, whose)
    for width, wanted in zip(widths, attends, strict=True):
        if wanted and width % head_channels:
            raise ValueError(f"{head_channels=} must divide the widths of attention, one of which is {width}")
    check_image_size(image_size, 1, len(widths))
    return UNet(
        channels,
        _shape(tensors, f"{theirs}out.2.weight", 4, whose)[0],
        tuple(width / channels for width in widths),
        ends[0] if ends else max(total - 1, 1),
        (),
        head_channels,
        attention_levels=tuple(level for level, wanted in enumerate(attends) if wanted),
        scale_shift=emb == 2 * widths[-1],
        mid_attention=f"{theirs}middle_block.1.qkv.weight" in tensors,
        dtype=dtype,
    )
