"""Stable Diffusion 1 and 2 in the layout of diffusers: autoencoder, U-Net and text encoder.

The text encoder is CLIP's text tower without its projection, `models.text_encoder.TextEncoder`. What the files do not
say, their config.json does: how many heads attention has (called attention_head_dim there), what the network predicts,
and the schedule.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import GaussianProcess, make_process
from ddpm_jax.diffusion.schedules import SPACINGS, linear_betas, quadratic_betas, zero_terminal_snr
from ddpm_jax.interop import config_fields
from ddpm_jax.interop.clip import ACTIVATIONS, NAMES, Dialect, clip_table
from ddpm_jax.interop.config_fields import (
    check_blocks,
    check_fields,
    check_sizes,
    check_width,
    head_width,
    side_of,
    tower_sizes,
)
from ddpm_jax.interop.diffusers_layout import (
    attention,
    block_name,
    outer,
    read_config,
    read_weights,
    res,
    with_new_names,
)
from ddpm_jax.interop.table import (
    IDENTITY,
    TRANSPOSED,
    ConvertError,
    Entry,
    Layout,
    conv,
    count,
    dense,
    norm,
    to_ours,
    to_reference,
)
from ddpm_jax.interop.unet import walk
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.storage.json_file import read_json
from ddpm_jax.storage.model_directory import Converted
from ddpm_jax.storage.tensor_file import ReadError

POINTWISE = Layout(lambda x: x.reshape(x.shape[:2]).T, lambda x: (x.T[..., None, None],))
FIELDS = {
    "vae": ("block_out_channels", "layers_per_block", "latent_channels"),
    "unet": (
        *("block_out_channels", "layers_per_block", "down_block_types", "in_channels", "out_channels"),
        *("sample_size", "attention_head_dim", "cross_attention_dim"),
    ),
    "text_encoder": ("hidden_size", "num_attention_heads", "hidden_act"),
    "scheduler": ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
}
_NOT_UNET = "the U-Net is not one of Stable Diffusion 1 or 2"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"scaled_linear": quadratic_betas, "linear": linear_betas}


def read_stable_diffusion(directory: str | Path, *, dtype: Any = jnp.float32) -> Converted:
    """Read a directory in diffusers' layout, such as a copy of stable-diffusion-v1-5.

    `pipelines.stable_diffusion.open_stable_diffusion` makes a pipeline of it.

    Args:
        directory: with the parts vae, unet, text_encoder and scheduler, each with its config.json
            (scheduler_config.json) and its weights, safetensors or PyTorch's. Captions are padded as its tokenizer
            says: with the end token, or with id 0 ("!").
        dtype: in which the networks compute; parameters are float32.

    Returns:
        the networks and their parameters: "text", "unet" and "autoencoder".

    Raises:
        ReadError: if a part is missing or cannot be read.
        ConvertError: if a part's tensors are not those of its network, or its config has what is not supported.
    """
    directory = Path(directory)
    config_of = lambda part, **name: read_config(  # noqa: E731
        directory, part, FIELDS[part], family="Stable Diffusion", **name
    )
    config, whose = config_of("text_encoder"), "the text encoder is not one of Stable Diffusion 1 or 2"
    check_fields(config, config_fields.TEXT_TOWER, whose)
    head, autoencoder = head_width(config, whose), autoencoder_of(config_of("vae"), dtype)
    unet_config = config_of("unet")
    unet, latent_size = unet_of(unet_config, dtype), side_of(unet_config, _NOT_UNET)
    schedule = config_of("scheduler", name="scheduler_config.json")
    process_of(schedule), sampling_of(schedule)
    # Every config is checked before the first weights are read, which takes long.
    tensors = read_weights(directory, "text_encoder")
    check_width(config, tensors, whose)
    text, text_params = load_text_encoder(tensors, head_width=head, activation=config["hidden_act"], dtype=dtype)
    check_sizes(config, tower_sizes(text), whose)
    check_sizes(unet_config, {"cross_attention_dim": text.width}, f"{_NOT_UNET} with this text encoder")
    autoencoder_params = load_autoencoder(read_weights(directory, "vae"), autoencoder)
    tensors = read_weights(directory, "unet")
    check_channels(channels_of(tensors.get("conv_in.weight")), autoencoder.latent_channels)
    linear = {array.ndim == 2 for name, array in tensors.items() if name.endswith(".proj_in.weight")}
    check_sizes(unet_config, {"use_linear_projection": linear == {True}} if linear else {}, _NOT_UNET)
    unet_params = load_unet(tensors, unet, context_width=text.width)
    return Converted(
        "stable-diffusion",
        {"text": text, "unet": unet, "autoencoder": autoencoder},
        {"text": text_params, "unet": unet_params, "autoencoder": autoencoder_params},
        {
            "layout": "diffusers",
            "prediction": PREDICTIONS[schedule.get("prediction_type", "epsilon")],
            "latent_size": latent_size,
            "schedule": schedule,
            "linear_projection": bool(unet_config.get("use_linear_projection", False)),
            "tokenizer": {"kind": "clip", "pad": _padding(directory)},
        },
    )


def _padding(directory: Path) -> int | str:
    """Return the id that captions are padded with: 0 where the tokenizer's padding is "!", as in version 2."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # transformers 5 writes the second only
        path = directory / "tokenizer" / name
        if not path.is_file():
            continue
        try:
            token = read_json(path).get("pad_token")
            token = token["content"] if isinstance(token, dict) else token
        except (OSError, ValueError, AttributeError, LookupError) as error:
            raise ReadError(f"{path} cannot be read: {error}") from None
        if token is not None:
            return 0 if token == "!" else "eot"
    return "eot"


def process_of(config: Mapping[str, Any]) -> GaussianProcess:
    """Return the process of a scheduler's config; with trained_betas and rescale_betas_zero_snr as diffusers has them.

    Raises:
        ConvertError: if its schedule or its prediction is not supported, or it has a field that is not.
    """
    check_fields(config, config_fields.SCHEDULER, "the scheduler is not supported")
    schedule, prediction = config["beta_schedule"], config.get("prediction_type", "epsilon")
    if schedule not in BETAS or prediction not in PREDICTIONS:
        raise ConvertError(
            f"the scheduler has beta_schedule={schedule!r} and prediction_type={prediction!r}; known are "
            f"{', '.join(BETAS)} and {', '.join(PREDICTIONS)}"
        )
    steps = config["num_train_timesteps"]
    scale = steps / 1000  # ours are scaled to the number of steps, theirs are not
    try:
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"], np.float64)
            if betas.shape != (steps,):
                raise ValueError(f"trained_betas has shape {betas.shape} for num_train_timesteps={steps}")
        else:
            betas = BETAS[schedule](steps, scale * config["beta_start"], scale * config["beta_end"])
        return make_process(zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"the scheduler's betas do not fit: {error}") from None


def sampling_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a scheduler's config says of the steps of DDIM, as fields of `StableDiffusion`.

    Where a field is missing it is what diffusers' pipeline takes with the scheduler's class: timesteps from 1 that are
    "leading" or "linspace", and a last step that ends at the predicted x0, or, of PNDMScheduler, at the noise of t = 0.

    Raises:
        ConvertError: if a field is out of its range.
    """
    config = config_fields.SCHEDULER_DEFAULTS.get(config.get("_class_name"), {}) | config
    spacing, offset = config.get("timestep_spacing", "leading"), config.get("steps_offset", 1)
    if spacing not in SPACINGS:
        raise ConvertError(f"the scheduler has timestep_spacing={spacing!r}; known are {', '.join(SPACINGS)}")
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < config["num_train_timesteps"]:
        raise ConvertError(f"the scheduler has steps_offset={offset!r}, which must be a timestep")
    whole = config.get("set_alpha_to_one", True)
    if not isinstance(whole, bool):
        raise ConvertError(f"the scheduler has set_alpha_to_one={whole!r}, which must be true or false")
    return {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": whole}


# ---- The text encoder ------------------------------------------------------------------------------------------------


def TEXT(**options: Any) -> TextEncoder:  # noqa: N802
    """Return the text encoder of Stable Diffusion 1, that of CLIP ViT-L/14."""
    return TextEncoder(49408, 77, 768, 12, 12, ACTIVATIONS["quick_gelu"], **options)


def load_text_encoder(
    tensors: Mapping[str, np.ndarray], *, head_width: int = 64, activation: str = "quick_gelu", dtype: Any = jnp.float32
) -> tuple[TextEncoder, dict[str, Any]]:
    """Make the text encoder of transformers' CLIPTextModel, with the names of transformers 5 or those before.

    Returns:
        the network and its parameters; its output is the last hidden state, after the final norm.

    Raises:
        ConvertError: if the tensors are not those of such a network; it lists which.
        ValueError: for an unknown activation, or a head_width that does not divide the width.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{activation=} must be one of {', '.join(ACTIVATIONS)}")
    if "embeddings.token_embedding.weight" in tensors:
        tensors = {f"text_model.{name}": array for name, array in tensors.items()}
    model = text_encoder_of(tensors, "hf", head_width, ACTIVATIONS[activation], dtype)
    ignored = ["text_model.embeddings.position_ids"]
    return model, to_ours(text_encoder_table(model.layers), tensors, text_encoder_shapes(model), ignored=ignored)


def text_encoder_of(
    tensors: Mapping[str, np.ndarray], dialect: Dialect, head_width: int, activation: Callable, dtype: Any
) -> TextEncoder:
    """Return the text encoder whose sizes the tensors have.

    Raises:
        ConvertError: if they lack what the sizes are read from.
        ValueError: if head_width does not divide the width.
    """
    names = NAMES[dialect]
    for name in (names.token, names.text_position):
        if name not in tensors or tensors[name].ndim != 2:
            raise ConvertError(f"the file is not of CLIP's text encoder: it lacks {name}")
    (vocab_size, width), context = tensors[names.token].shape, len(tensors[names.text_position])
    if width % head_width:
        raise ValueError(f"{head_width=} must divide the width, which is {width}")
    layers = count(tensors, names.text_block)
    return TextEncoder(vocab_size, context, width, layers, width // head_width, activation, dtype=dtype)


def export_text_encoder(params: Mapping[str, Any], model: TextEncoder) -> dict[str, np.ndarray]:
    """Return the tensors of a CLIPTextModel, with the prefix text_model that published files have, float32."""
    return to_reference(text_encoder_table(model.layers), params)


def text_encoder_table(layers: int, dialect: Dialect = "hf") -> list[Entry]:
    """Return the table of a text encoder with this number of layers."""
    whole = clip_table(dialect, layers, None)
    return [entry._replace(ours=entry.ours.removeprefix("text/")) for entry in whole if entry.ours.startswith("text/")]


def text_encoder_shapes(model: TextEncoder) -> Any:
    """Return the shapes of the parameters."""
    tokens = jax.ShapeDtypeStruct((1, model.context), jnp.int32)
    return parameter_shapes(model, tokens)["params"]


# ---- The autoencoder -------------------------------------------------------------------------------------------------


def AUTOENCODER(**options: Any) -> Autoencoder:  # noqa: N802
    """Return the autoencoder of Stable Diffusion 1 and 2: eight times smaller, four channels."""
    return Autoencoder(**options)


def autoencoder_of(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Autoencoder:
    """Return the network that the config of diffusers' AutoencoderKL describes.

    Raises:
        ConvertError: if the config has a field, or a value of one, that is not supported.
    """
    check_fields(config, config_fields.AUTOENCODER, "the autoencoder is not one of Stable Diffusion 1 or 2")
    widths = config["block_out_channels"]
    return Autoencoder(
        widths[0],
        tuple(width / widths[0] for width in widths),
        config["layers_per_block"],
        config["latent_channels"],
        scale=config.get("scaling_factor", 0.18215),
        dtype=dtype,
    )


def load_autoencoder(tensors: Mapping[str, np.ndarray], model: Autoencoder) -> dict[str, Any]:
    """Return the parameters of an autoencoder; the names of attention before diffusers 0.17 are read too.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    return to_ours(autoencoder_table(model), with_new_names(tensors), autoencoder_shapes(model))


def export_autoencoder(params: Mapping[str, Any], model: Autoencoder) -> dict[str, np.ndarray]:
    """Return diffusers' tensors, float32: the inverse of `load_autoencoder`, bit for bit."""
    return to_reference(autoencoder_table(model), params)


def autoencoder_table(model: Autoencoder) -> list[Entry]:
    """Return the table of an autoencoder."""
    last, table = len(model.channel_mult) - 1, []
    width = [int(model.channels * mult) for mult in model.channel_mult]
    for side in ("encoder", "decoder"):
        table += [
            *conv(f"{side}/in_conv", f"{side}.conv_in"),
            *res(f"{side}/mid_0", f"{side}.mid_block.resnets.0", False, emb=False),
            *attention(f"{side}/mid_attn", f"{side}.mid_block.attentions.0"),
            *res(f"{side}/mid_1", f"{side}.mid_block.resnets.1", False, emb=False),
            *norm(f"{side}/out_norm", f"{side}.conv_norm_out"),
            *conv(f"{side}/out_conv", f"{side}.conv_out"),
        ]
    for side, word, blocks in (("encoder", "down", model.num_res_blocks), ("decoder", "up", model.num_res_blocks + 1)):
        here = width[0 if word == "down" else -1]
        for number in range(last + 1):
            level = number if word == "down" else last - number
            theirs = f"{side}.{word}_blocks.{number}"
            for i in range(blocks):
                table += res(f"{side}/{word}_{level}_{i}", f"{theirs}.resnets.{i}", here != width[level], emb=False)
                here = width[level]
            if number != last:
                table += conv(f"{side}/{word}_{level}_sample", f"{theirs}.{word}samplers.0.conv")
    return table + conv("moments", "quant_conv") + conv("latents", "post_quant_conv")


def autoencoder_shapes(model: Autoencoder) -> Any:
    """Return the shapes of the parameters."""
    image = jax.ShapeDtypeStruct((1, 2 * model.factor, 2 * model.factor, model.out_channels), jnp.float32)
    return parameter_shapes(model, image)["params"]


# ---- The U-Net -------------------------------------------------------------------------------------------------------


def UNET(**options: Any) -> UNet:  # noqa: N802
    """Return the U-Net of Stable Diffusion 1: eight heads at every level. Version 2 has heads of 64 (heads=None)."""
    options = {"heads": 8} | options
    return UNet(320, 4, (1, 2, 4, 4), 2, (), conv_resample=True, scale_shift=False, attention_levels=(0, 1, 2),
                spatial_transformer=True, **options)  # fmt: skip


def unet_of(config: Mapping[str, Any], dtype: Any = jnp.float32) -> UNet:
    """Return the network that the config of diffusers' UNet2DConditionModel describes.

    Raises:
        ConvertError: if the config has what Stable Diffusion 1 and 2 do not have.
    """
    whose = _NOT_UNET
    check_fields(config, config_fields.STABLE_DIFFUSION_UNET, whose)
    check_blocks(config, {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}, whose)
    check_channels(config.get("in_channels", 4), 4)
    widths, heads = config["block_out_channels"], config["attention_head_dim"]
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if len(heads) != len(widths) or any(width % count for width, count in zip(widths, heads, strict=True)):
        raise ConvertError(f"{whose}: attention_head_dim={heads} must be numbers of heads that divide {widths=}")
    wide = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(wide) > 1:
        raise ConvertError(f"attention_head_dim={heads} gives neither equal heads nor heads of equal width")
    return UNet(
        widths[0],
        config["out_channels"],
        tuple(width / widths[0] for width in widths),
        config["layers_per_block"],
        (),
        head_channels=min(wide),
        heads=heads[0] if len(set(heads)) == 1 else None,
        conv_resample=True,
        scale_shift=False,
        dtype=dtype,
        attention_levels=tuple(i for i, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn")),
        spatial_transformer=True,
    )


def check_channels(channels: int, latent_channels: int) -> None:
    """Check that a U-Net sees latents and nothing else.

    Raises:
        ConvertError: if it sees another number of channels, as U-Nets for inpainting do.
    """
    if channels != latent_channels:
        known = {2 * latent_channels + 1: "inpainting", 2 * latent_channels: "editing", latent_channels + 1: "depth"}
        use = f", as U-Nets for {known[channels]} do" if channels in known else ""
        raise ConvertError(
            f"the U-Net is not one of captions alone: it sees in_channels={channels} channels{use}, and "
            f"supported are the {latent_channels} of the latents"
        )


def load_unet(tensors: Mapping[str, np.ndarray], model: UNet, *, context_width: int = 768) -> dict[str, Any]:
    """Return the parameters of a U-Net.

    Args:
        tensors: of diffusers' UNet2DConditionModel.
        model: the network; `UNET()` is that of version 1.
        context_width: of the text encoder's states; 768 in version 1, 1024 in version 2.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    channels = channels_of(tensors.get("conv_in.weight"))
    return to_ours(unet_table(model), tensors, unet_shapes(model, context_width, channels))


def channels_of(kernel: np.ndarray | None) -> int:
    """Return how many channels a U-Net sees by its first convolution [O, I, 3, 3]; 4 if that is missing."""
    return 4 if kernel is None or kernel.ndim != 4 else kernel.shape[1]


def export_unet(params: Mapping[str, Any], model: UNet, *, linear_projection: bool = False) -> dict[str, np.ndarray]:
    """Return diffusers' tensors, float32: the inverse of `load_unet`, bit for bit.

    linear_projection: what goes into and out of attention is a dense layer, as in version 2, and not a convolution of
    width one (use_linear_projection).
    """
    return to_reference(unet_table(model, linear_projection=linear_projection), params)


def unet_table(model: UNet, *, linear_projection: bool = False) -> list[Entry]:
    """Return the table of a U-Net."""
    table = outer("", "")
    for block in walk(model, 0):
        here, there = block.ours, block_name(block, len(model.channel_mult) - 1)
        if block.kind == "attention":
            table += _spatial_transformer(here, there, linear_projection)
        elif block.kind == "resample":
            table += conv(f"{here}/conv", f"{there}.conv")
        else:
            table += res(here, there, block.widths[0] != block.widths[1])
    return table


def unet_shapes(model: UNet, context_width: int, channels: int = 4) -> Any:
    """Return the shapes of the parameters; channels: of what the network sees."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    size = 2 ** (len(model.channel_mult) - 1)
    inputs = spec(1, size, size, channels), spec(1)
    return parameter_shapes(model, *inputs, context=spec(1, 3, context_width))["params"]


def _spatial_transformer(ours: str, theirs: str, linear: bool) -> list[Entry]:
    projection = Layout(POINTWISE.read, TRANSPOSED.write) if linear else POINTWISE
    block = f"{theirs}.transformer_blocks.0"
    table = norm(f"{ours}/norm", f"{theirs}.norm")
    for name in ("in", "out"):
        table += [
            Entry(f"{ours}/{name}/kernel", (f"{theirs}.proj_{name}.weight",), projection),
            Entry(f"{ours}/{name}/bias", (f"{theirs}.proj_{name}.bias",), IDENTITY),
        ]
    return [
        *table,
        *norm(f"{ours}/ln_1", f"{block}.norm1"),
        *dense(f"{ours}/qkv", *(f"{block}.attn1.to_{part}" for part in "qkv"), bias=False),
        *dense(f"{ours}/attn_out", f"{block}.attn1.to_out.0"),
        *norm(f"{ours}/ln_2", f"{block}.norm2"),
        *dense(f"{ours}/cross_q", f"{block}.attn2.to_q", bias=False),
        *dense(f"{ours}/cross_kv", f"{block}.attn2.to_k", f"{block}.attn2.to_v", bias=False),
        *dense(f"{ours}/cross_out", f"{block}.attn2.to_out.0"),
        *norm(f"{ours}/ln_3", f"{block}.norm3"),
        *dense(f"{ours}/mlp_1", f"{block}.ff.net.0.proj"),
        *dense(f"{ours}/mlp_2", f"{block}.ff.net.2"),
    ]
