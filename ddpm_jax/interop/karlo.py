"""Karlo, the one released unCLIP (kakaobrain 2022), in the layout of diffusers: prior, decoder, both upsamplers.

Its networks are `DiffusionPrior`, `Decoder` and `Upsampler`. What differs there:

- CLIP's embeddings come as the projections give them, not of unit length, and are not scaled before a layer: divide
  them by sqrt(embed_dim), by which our networks multiply.
- A caption is dropped by giving the empty one, so there are no learned vectors of dropped text; ours are zeros.
- The decoder's conditioning is a separate file there (text_proj).
- The prior's file holds the mean and the standard deviation of image embeddings, by which its samples are turned back.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop import config_fields
from ddpm_jax.interop.clip import LoadedCLIP, load_clip
from ddpm_jax.interop.config_fields import (
    check_blocks,
    check_fields,
    check_sizes,
    check_width,
    head_width,
    side_of,
    tower_sizes,
)
from ddpm_jax.interop.diffusers_layout import block_name, outer, read_config, read_weights, res
from ddpm_jax.interop.table import (
    IDENTITY,
    TRANSPOSED,
    ConvertError,
    Entry,
    Layout,
    by_head,
    concatenated,
    count,
    dense,
    norm,
    to_ours,
    to_reference,
)
from ddpm_jax.interop.unet import walk
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.transformer import gelu
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.storage.model_directory import Converted
from ddpm_jax.storage.tensor_file import ReadError

STATISTICS = ("clip_mean", "clip_std")

_TOWER = ("hidden_size", "num_attention_heads", "hidden_act")
_UNET = ("block_out_channels", "layers_per_block", "down_block_types", "sample_size", "out_channels")
FIELDS = {
    "prior": ("num_attention_heads",),
    "text_encoder": _TOWER,
    "image_encoder": _TOWER,
    "decoder": (*_UNET, "attention_head_dim"),
    "super_res_first": (*_UNET, "add_attention"),
    "super_res_last": (*_UNET, "add_attention"),
    "text_proj": (),
}
KNOWN = {
    "prior": config_fields.KARLO_PRIOR,
    "text_encoder": config_fields.TEXT_TOWER,
    "image_encoder": config_fields.VISION_TOWER,
    "decoder": config_fields.KARLO_DECODER,
    "super_res_first": config_fields.KARLO_UPSAMPLER,
    "super_res_last": config_fields.KARLO_UPSAMPLER,
    "text_proj": config_fields.KARLO_TEXT_PROJ,
}
_PLAIN = {"ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D"}


def read_karlo(directory: str | Path, *, dtype: Any = jnp.float32) -> Converted:
    """Read a directory in diffusers' layout, such as a copy of kakaobrain/karlo-v1-alpha.

    `pipelines.karlo.open_karlo` makes a pipeline of it.

    Args:
        directory: with the parts prior (captions) or image_encoder (variations), and text_encoder, text_proj, decoder,
            super_res_first and super_res_last; each has a config.json and its weights, safetensors or PyTorch's.
        dtype: in which the networks compute; parameters are float32.

    Returns:
        the networks and their parameters: "text", "decoder", "first" and "last" (the upsamplers), and what the
        directory has of "image" and "prior", with "statistics" of image embeddings. Its prior_clip is
        clip_sample_range of prior_scheduler, or 5 in a directory without one.

    Raises:
        ReadError: if a part is missing or cannot be read.
        ConvertError: if a part's tensors are not those of its network, or its config has a field, or a value of one,
            that is not supported.
    """
    directory = Path(directory)
    part = functools.partial(_part, directory)
    has = {name: (directory / name).is_dir() for name in ("prior", "image_encoder")}
    if not any(has.values()):
        raise ReadError(f"{directory} is not a directory of Karlo: it has neither prior nor image_encoder")
    prior_clip = _check_schedulers(directory)
    text = _tower(*part("text_encoder"), dtype)
    models, params = {"text": text.model}, {"text": text.params}
    if has["prior"]:
        prior = _prior_of(*part("prior"), dtype)
        models["prior"], params["prior"] = prior.model, prior.params
        params["statistics"] = {"mean": prior.mean, "std": prior.std}
    if has["image_encoder"]:
        image = _tower(*part("image_encoder"), dtype)
        models["image"], params["image"] = image.model, image.params
        _check_processor(directory, image.model.vision.image_size)
    (config, unet), (projections, text_proj) = part("decoder"), part("text_proj")
    models["decoder"] = _decoder_of(config, projections, text_proj, dtype)
    small = side_of(config, "decoder is not one of Karlo")
    params["decoder"] = load_decoder(unet, text_proj, models["decoder"], image_size=small)
    upsamplers = []
    for name in ("first", "last"):
        config, tensors = part(f"super_res_{name}")
        large = side_of(config, f"super_res_{name} is not one of Karlo")
        upsamplers.append((_upsampler_of(config, dtype), large))
        if upsamplers[0] != upsamplers[-1]:
            raise ConvertError("super_res_first and super_res_last are not of one Karlo: their configs differ")
        models[name] = upsamplers[0][0]
        params[name] = load_upsampler(tensors, models[name], image_size=large)
    metadata = {"layout": "diffusers", "sizes": [small, large], "prior_clip": prior_clip}
    return Converted("karlo", models, params, metadata | {"tokenizer": {"kind": "clip", "pad": "eot"}})


def _part(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the config and the tensors of a part, whose fields are all known."""
    config = read_config(directory, name, FIELDS[name], family="Karlo")
    check_fields(config, KNOWN[name], f"{name} is not one of Karlo")
    return config, read_weights(directory, name)


def _check_schedulers(directory: Path) -> float:
    """Return the bound of what the prior predicts; 5 if the directory has no prior_scheduler."""
    bound, file = 5.0, "scheduler_config.json"
    for name, fields in config_fields.KARLO_SCHEDULERS.items():
        if not (directory / name / file).is_file():
            continue
        config = config_fields.UNCLIP_DEFAULTS | read_config(directory, name, (), family="Karlo", name=file)
        check_fields(config, fields, f"{name} is not one of Karlo")
        if name == "prior_scheduler":
            bound = config["clip_sample_range"]
    return float(bound)


def _check_processor(directory: Path, image_size: int) -> None:
    name = "preprocessor_config.json"
    if (directory / "feature_extractor" / name).is_file():
        config = read_config(directory, "feature_extractor", (), family="Karlo", name=name)
        config_fields.check_processor(config, image_size)


def _tower(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any) -> LoadedCLIP:
    whose = "the tower is not one of Karlo"
    head = head_width(config, whose)
    check_width(config, tensors, whose)
    loaded = load_clip(tensors, head_width=head, activation=config["hidden_act"], dtype=dtype)
    for tower in (loaded.model.text, loaded.model.vision):
        if tower is not None:
            check_sizes(config, tower_sizes(tower, loaded.model.embed_dim), whose)
    return loaded


def _prior_of(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any) -> "LoadedPrior":
    heads = config["num_attention_heads"]
    prior = load_prior(tensors, heads=heads, dtype=dtype)
    if config.get("attention_head_dim", prior.model.width // heads) * heads != prior.model.width:
        raise ConvertError(
            f"prior is not one of Karlo: {heads} heads of attention_head_dim={config['attention_head_dim']} are not "
            f"its width, {prior.model.width}"
        )
    model, inside = prior.model, prior.params["time"]["dense_0"]["kernel"].shape[1]
    sizes = {
        "embedding_dim": model.embed_dim, "embedding_proj_dim": model.embed_dim, "clip_embed_dim": model.embed_dim,
        "num_embeddings": len(tensors["positional_embedding"][0]) - 4, "num_layers": model.layers,
        "time_embed_dim": inside,
    }  # fmt: skip
    check_sizes(config, sizes, "prior is not one of Karlo")
    return prior


def _unet_of(config: Mapping[str, Any], dtype: Any, kinds: Mapping[str, str], **options: Any) -> UNet:
    check_blocks(config, kinds, "the U-Net is not one of Karlo")
    widths, depths = config["block_out_channels"], config["layers_per_block"]
    attends = ["Attn" in block for block in config["down_block_types"]]
    return UNet(
        widths[0],
        config["out_channels"],
        tuple(width / widths[0] for width in widths),
        depths,
        (),
        dtype=dtype,
        attention_levels=tuple(level for level, wanted in enumerate(attends) if wanted),
        **options,
    )


def _decoder_of(
    config: Mapping[str, Any], projections: Mapping[str, Any], text_proj: Mapping[str, np.ndarray], dtype: Any
) -> Decoder:
    null, theirs = "learned_classifier_free_guidance_embeddings", "encoder_hidden_states_proj.weight"
    for name in (null, theirs, "clip_extra_context_tokens_proj.bias"):
        if name not in text_proj:
            raise ConvertError(f"text_proj is not of Karlo: it lacks {name}")
    width = len(text_proj[theirs])
    tokens = len(text_proj["clip_extra_context_tokens_proj.bias"]) // width
    sizes = {"clip_embeddings_dim": len(text_proj[null]), "clip_extra_context_tokens": tokens}
    sizes |= {"cross_attention_dim": width, "time_embed_dim": 4 * config["block_out_channels"][0]}
    check_sizes(projections, sizes, "text_proj is not one of Karlo")
    check_sizes(config, {"cross_attention_dim": width}, "decoder is not one of Karlo")
    kinds = _PLAIN | {"SimpleCrossAttnDownBlock2D": "SimpleCrossAttnUpBlock2D"}
    network = _unet_of(config, dtype, kinds, head_channels=config["attention_head_dim"])
    return Decoder(network, len(text_proj[null]), width, tokens, dtype=dtype)


def _upsampler_of(config: Mapping[str, Any], dtype: Any) -> Upsampler:
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    return Upsampler(_unet_of(config, dtype, _PLAIN, scale_shift=scale_shift, mid_attention=False))


class LoadedPrior(NamedTuple):
    """Prior from a file.

    Attributes:
        model: the network.
        params: its parameters.
        mean, std: statistics of image embeddings, float32[D] each.
    """

    model: DiffusionPrior
    params: dict[str, Any]
    mean: np.ndarray
    std: np.ndarray


def absent(*shape: int) -> Layout:
    """Return the layout of a parameter that the reference implementation lacks: zeros, and nothing to write."""
    return Layout(lambda: np.zeros(shape, np.float32), lambda x: ())


def _flat(shape: tuple[int, ...]) -> Layout:
    """Return the layout of a tensor that has axes of length one there."""
    ours = tuple(size for size in shape if size != 1)
    return Layout(lambda x: x.reshape(ours), lambda x: (x.reshape(shape),))


# ---- The prior -------------------------------------------------------------------------------------------------------


def load_prior(tensors: Mapping[str, np.ndarray], *, heads: int = 32, dtype: Any = jnp.float32) -> LoadedPrior:
    """Make the prior of diffusers' `PriorTransformer`; heads is 32 in Karlo.

    The network takes CLIP embeddings at these scales, where z is an embedding as CLIP's projection gives it (not of
    unit length) and D is `embed_dim`:

    - z_text: z / sqrt(D). The network multiplies by sqrt(D), which our priors need since they take unit vectors.
    - zt and the prediction: (z - mean) / std with the statistics that are returned, noised in the case of zt. A sample
      x0 is the embedding x0 * std + mean.

    Raises:
        ConvertError: if the tensors are not those of such a network; it lists which.
    """
    for name in ("positional_embedding", "proj_in.weight", "encoder_hidden_states_proj.weight", *STATISTICS):
        if name not in tensors:
            raise ConvertError(f"the file is not of a PriorTransformer: it lacks {name}")
    _, length, width = tensors["positional_embedding"].shape
    embed_dim, layers = tensors["proj_in.weight"].shape[1], count(tensors, "transformer_blocks.#")
    model = DiffusionPrior(embed_dim, length - 4, width, layers, heads, activation=gelu, dtype=dtype)
    spec = jax.ShapeDtypeStruct
    text = tensors["encoder_hidden_states_proj.weight"].shape[1]
    inputs = (
        spec((1, embed_dim), jnp.float32), spec((1,), jnp.float32), spec((1, embed_dim), jnp.float32),
        spec((1, length - 4, text), jnp.float32), spec((1, length - 4), jnp.bool_),
    )  # fmt: skip
    shapes = parameter_shapes(model, *inputs)["params"]
    params = to_ours(prior_table(length, width, layers), tensors, shapes, ignored=STATISTICS)
    mean, std = (np.asarray(tensors[name], np.float32).reshape(-1) for name in STATISTICS)
    return LoadedPrior(model, params, mean, std)


def export_prior(prior: LoadedPrior) -> dict[str, np.ndarray]:
    """Return the tensors of diffusers' `PriorTransformer`, float32."""
    length, width = prior.params["position"].shape
    tensors = to_reference(prior_table(length, width, prior.model.layers), prior.params)
    return tensors | {"clip_mean": prior.mean[None], "clip_std": prior.std[None]}


def prior_table(length: int, width: int, layers: int) -> list[Entry]:
    """Return the table of a prior with this number of positions and layers."""
    table = [
        Entry("position", ("positional_embedding",), _flat((1, length, width))),
        Entry("query", ("prd_embedding",), _flat((1, 1, width))),
        Entry("null_text", (), absent(width)),
        *dense("time/dense_0", "time_embedding.linear_1"),
        *dense("time/dense_1", "time_embedding.linear_2"),
        *dense("zt_in", "proj_in"),
        *dense("z_text_in", "embedding_proj"),
        *dense("text_in", "encoder_hidden_states_proj"),
        *norm("ln_final", "norm_out"),
        *dense("out", "proj_to_clip_embeddings"),
    ]
    for i in range(layers):
        ours, theirs = f"transformer/block_{i}", f"transformer_blocks.{i}"
        table += [
            *norm(f"{ours}/ln_1", f"{theirs}.norm1"),
            *dense(f"{ours}/qkv", *(f"{theirs}.attn1.to_{part}" for part in "qkv")),
            *dense(f"{ours}/out", f"{theirs}.attn1.to_out.0"),
            *norm(f"{ours}/ln_2", f"{theirs}.norm3"),
            *dense(f"{ours}/mlp_1", f"{theirs}.ff.net.0.proj"),
            *dense(f"{ours}/mlp_2", f"{theirs}.ff.net.2"),
        ]
    return table


# ---- The decoder and its conditions ----------------------------------------------------------------------------------


def load_decoder(
    unet: Mapping[str, np.ndarray], text_proj: Mapping[str, np.ndarray], model: Decoder, *, image_size: int = 64
) -> dict[str, Any]:
    """Return the parameters of a decoder.

    The network takes z_image and z_text as z / sqrt(D), where z is an embedding as CLIP's projection gives it (not of
    unit length; of the prior, x0 * std + mean) and D is `embed_dim`. It multiplies by sqrt(D), which our decoders need
    since they take unit vectors.

    Args:
        unet, text_proj: the tensors of diffusers' UNet2DConditionModel and UnCLIPTextProjModel.
        model: the network; `DECODER()` is Karlo's.
        image_size: of its images.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    tensors = {f"unet.{name}": array for name, array in unet.items()}
    tensors |= {f"text_proj.{name}": array for name, array in text_proj.items()}
    return to_ours(decoder_table(model, image_size), tensors, _decoder_shapes(model, text_proj, image_size))


def export_decoder(
    params: Mapping[str, Any], model: Decoder, *, image_size: int = 64
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return diffusers' tensors of the U-Net and of text_proj: the inverse of `load_decoder`, bit for bit."""
    tensors = to_reference(decoder_table(model, image_size), params)
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    return part("unet."), part("text_proj.")


def decoder_table(model: Decoder, image_size: int) -> list[Entry]:
    """Return the table of a decoder."""
    tokens = by_head(TRANSPOSED, model.image_tokens, parts=model.context_width)  # the token is the fastest axis there
    bias = by_head(IDENTITY, model.image_tokens, parts=model.context_width)
    theirs = "text_proj.clip_extra_context_tokens_proj"
    return [
        Entry("null_image", ("text_proj.learned_classifier_free_guidance_embeddings",), IDENTITY),
        Entry("null_text", (), absent(4 * model.unet.channels)),
        *dense("text_emb", "text_proj.embedding_proj"),
        *dense("image_emb", "text_proj.clip_image_embeddings_project_to_time_embeddings"),
        Entry("image_tokens_in/kernel", (f"{theirs}.weight",), tokens),
        Entry("image_tokens_in/bias", (f"{theirs}.bias",), bias),
        *dense("text_in", "text_proj.encoder_hidden_states_proj"),
        *norm("text_ln", "text_proj.text_encoder_hidden_states_norm"),
        *unet_table(model.unet, image_size, "unet/", "unet.", context=True),
    ]


def DECODER(**options: Any) -> Decoder:  # noqa: N802
    """Return Karlo's decoder, 64 x 64."""
    unet = UNet(320, 6, (1, 2, 3, 4), 3, (), 64, attention_levels=(1, 2, 3), **options)
    return Decoder(unet, 768, 1536, dtype=unet.dtype)


def _decoder_shapes(model: Decoder, text_proj: Mapping[str, np.ndarray], size: int) -> Any:
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    width = text_proj["encoder_hidden_states_proj.weight"].shape[1]
    inputs = (
        spec(1, size, size, 3), spec(1), spec(1, model.embed_dim), spec(1, model.embed_dim),
        spec(1, 5, width), spec(1, 5, dtype=jnp.bool_),
    )  # fmt: skip
    return parameter_shapes(model, *inputs)["params"]


# ---- The upsamplers --------------------------------------------------------------------------------------------------


def load_upsampler(tensors: Mapping[str, np.ndarray], model: Upsampler, *, image_size: int = 256) -> dict[str, Any]:
    """Return the parameters of one of the two upsamplers (UNet2DModel); `UPSAMPLER()` is the network of both.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    inputs = spec(1, image_size, image_size, 3), spec(1), spec(1, image_size // 4, image_size // 4, 3)
    shapes = parameter_shapes(model, *inputs)["params"]
    return to_ours(unet_table(model.unet, image_size, "unet/", ""), tensors, shapes)


def export_upsampler(params: Mapping[str, Any], model: Upsampler, *, image_size: int = 256) -> dict[str, np.ndarray]:
    """Return diffusers' tensors: the inverse of `load_upsampler`, bit for bit."""
    return to_reference(unet_table(model.unet, image_size, "unet/", ""), params)


def UPSAMPLER(**options: Any) -> Upsampler:  # noqa: N802
    """Return Karlo's upsampler, 64 to 256, whose time embedding is added and not a scale and a shift."""
    options = {"scale_shift": False, "mid_attention": False, "attention_levels": ()} | options
    return Upsampler(UNet(320, 3, (1, 2, 3, 4), 3, (), **options))


# ---- The U-Net -------------------------------------------------------------------------------------------------------


def unet_table(net: UNet, image_size: int, ours: str, theirs: str, *, context: bool = False) -> list[Entry]:
    """Return the table of a U-Net in diffusers' names; with context, its attention also reads one."""
    table = outer(ours, theirs)
    for block in walk(net, image_size):
        here, there = f"{ours}{block.ours}", f"{theirs}{block_name(block, len(net.channel_mult) - 1)}"
        if block.kind == "attention":
            table += _attention(here, there, block.widths[0] // net.head_channels, context)
        else:
            table += res(here, there, block.widths[0] != block.widths[1])
    return table


def _attention(ours: str, theirs: str, heads: int, context: bool) -> list[Entry]:
    """Return the entries of attention whose queries, keys and values are separate layers there."""

    def fused(name: str, parts: list[str]) -> list[Entry]:
        def entry(here: str, there: str, layout: Layout) -> Entry:
            layout = by_head(concatenated(layout, len(parts)), heads, parts=len(parts))
            return Entry(f"{ours}/{name}/{here}", tuple(f"{theirs}.{part}.{there}" for part in parts), layout)

        return [entry("kernel", "weight", TRANSPOSED), entry("bias", "bias", IDENTITY)]

    return [
        *norm(f"{ours}/norm", f"{theirs}.group_norm"),
        *fused("qkv", ["to_q", "to_k", "to_v"]),
        *(fused("context_kv", ["add_k_proj", "add_v_proj"]) if context else ()),
        *dense(f"{ours}/out", f"{theirs}.to_out.0"),
    ]
