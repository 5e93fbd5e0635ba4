"""DDPM's networks (Ho et al. 2020) in the layout of diffusers, `UNet2DModel`, such as google/ddpm-cifar10-32.

The config.json says how the network is built, and the scheduler's config which noise it was trained with. The released
networks are those of the authors' code: they normalise with epsilon 1e-6, embed time as [sin, cos] (the rows of our
first dense layer are in the other order), and pad one side where they halve the resolution.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.schedules import linear_betas, quadratic_betas
from ddpm_jax.interop.config_fields import Fields, check_blocks, check_fields, side_of
from ddpm_jax.interop.diffusers_layout import (
    attention,
    block_name,
    outer,
    read_config,
    read_weights,
    res,
    with_new_names,
)
from ddpm_jax.interop.field_kinds import ANY, FLAG, NUMBER, POSITIVE, SIDE, WHOLE, WHOLES, WORD, WORDS, Kind, optional
from ddpm_jax.interop.table import SINES_FIRST, ConvertError, Entry, conv, to_ours, to_reference
from ddpm_jax.interop.unet import walk
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.unet import UNet
from ddpm_jax.storage.model_directory import Converted

_WIDTHS = Kind("a list of whole numbers", lambda value: isinstance(value, (list, tuple)) and WHOLES.holds(value))
NETWORK = Fields(
    {
        "add_attention": FLAG, "attention_head_dim": optional(WHOLE), "block_out_channels": _WIDTHS,
        "down_block_types": WORDS, "flip_sin_to_cos": FLAG, "in_channels": WHOLE, "layers_per_block": WHOLE,
        "norm_eps": POSITIVE, "norm_num_groups": WHOLE, "out_channels": WHOLE, "sample_size": SIDE,
        "up_block_types": WORDS,
    },
    {
        "_class_name": ("UNet2DModel",),
        "act_fn": ("silu", "swish"), "attn_norm_num_groups": (None,), "center_input_sample": (False,),
        "class_embed_type": (None,), "downsample_padding": (0, 1), "downsample_type": ("conv",), "freq_shift": (0, 1),
        "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2D",), "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",), "time_embedding_dim": (None,), "time_embedding_type": ("positional",),
        "upsample_type": ("conv",),
    },
    frozenset({"dropout", "num_train_timesteps"}),  # the second is for a learned time embedding
)  # fmt: skip
SCHEDULER = Fields(
    {
        "beta_end": NUMBER, "beta_schedule": WORD, "beta_start": NUMBER, "num_train_timesteps": WHOLE,
        "prediction_type": WORD, "trained_betas": ANY, "variance_type": WORD,
    },
    {
        "_class_name": ("DDPMScheduler", "DDIMScheduler"),
        "clip_sample": (True,), "clip_sample_range": (1,), "rescale_betas_zero_snr": (False, None),
        "thresholding": (False, None),
    },
    # Which timesteps are visited, which the sampler's own options say here, and bounds of what is off.
    frozenset({
        "dynamic_thresholding_ratio", "sample_max_value", "set_alpha_to_one", "steps_offset", "tensor_format",
        "timestep_spacing",
    }),
)  # fmt: skip
# Defaults in diffusers of fields that a config lacks.
_DEFAULTS = {
    "add_attention": True, "attention_head_dim": 8, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "in_channels": 3, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 3,
}  # fmt: skip
_SCHEDULE = {
    "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 1e-4, "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "trained_betas": None, "variance_type": "fixed_small",
}  # fmt: skip
BETAS = {"linear": linear_betas, "scaled_linear": quadratic_betas}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
_NOT_OURS = "the network is not one of DDPM's that is supported"
_NO_SCHEDULER = "the scheduler is not supported"


def read_ddpm(directory: str | Path) -> tuple[Converted, dict[str, Any]]:
    """Read a directory in diffusers' layout.

    Args:
        directory: a pipeline (unet/ and scheduler/), a pipeline of the first releases, which has the same files without
            those directories, or a network alone (config.json and its weights).

    Returns:
        the network "model" with its parameters and metadata, and what was assumed where the files are silent.

    Raises:
        ReadError: if a file is missing or cannot be read.
        ConvertError: if the tensors are not those of the network, or a config asks for what is not supported.
    """
    directory = Path(directory)
    part = "unet" if (directory / "unet").is_dir() else ""
    config = read_config(
        directory, part, ("block_out_channels", "layers_per_block", "down_block_types", "sample_size"), family="ddpm"
    )
    model, size, channels = ddpm_of(config), side_of(config, _NOT_OURS), config.get("in_channels", 3)
    diffusion, assumed = _diffusion(directory), {}
    if diffusion is None:
        diffusion = diffusion_of({})
        assumed["diffusion"] = "that of Ho et al. (2020), since there is no scheduler"
    if "attention_head_dim" not in config and (model.attention_levels or model.mid_attention):
        assumed["attention_head_dim"] = f"{model.head_channels}, as diffusers takes it"
    flip = config.get("flip_sin_to_cos", True)
    params = load_ddpm(read_weights(directory, part), model, flip_sin_to_cos=flip, channels=channels)
    metadata = {
        "diffusion": diffusion,
        "image_size": size,
        "channels": channels,
        "conditions": [],
        "flip_sin_to_cos": flip,
        "in_parts": bool(part),
    }
    return Converted("ddpm", {"model": model}, {"model": params}, metadata), assumed


def ddpm_of(config: Mapping[str, Any]) -> UNet:
    """Return the network that the config of diffusers' UNet2DModel describes.

    Raises:
        ConvertError: if the config has a field, or a value of one, that is not supported.
    """
    check_fields(config, NETWORK, _NOT_OURS)
    check_blocks(config, {"AttnDownBlock2D": "AttnUpBlock2D", "DownBlock2D": "UpBlock2D"}, _NOT_OURS)
    config = _DEFAULTS | config
    widths, groups, head = config["block_out_channels"], config["norm_num_groups"], config["attention_head_dim"]
    levels = tuple(i for i, kind in enumerate(config["down_block_types"]) if kind.startswith("Attn"))
    if any(width % groups for width in widths):
        raise ConvertError(f"{_NOT_OURS}: norm_num_groups={groups} must divide block_out_channels={widths}")
    attended = [widths[level] for level in levels] + widths[-1:] * config["add_attention"]
    if head is not None and any(width % head for width in attended):
        raise ConvertError(f"{_NOT_OURS}: attention_head_dim={head} must divide the widths with attention, {attended}")
    if config["in_channels"] != config["out_channels"]:
        both = f"in_channels={config['in_channels']} and out_channels={config['out_channels']}"
        raise ConvertError(f"{_NOT_OURS}: it has {both}, which must be equal")
    return UNet(
        widths[0],
        config["out_channels"],
        tuple(_factor(width, widths[0]) for width in widths),
        config["layers_per_block"],
        (),
        head_channels=64 if head is None else head,
        heads=1 if head is None else None,
        conv_resample=True,
        scale_shift=False,
        mid_attention=config["add_attention"],
        groups=groups,
        attention_levels=levels,
        norm_eps=config["norm_eps"],
        frequency_shift=int(config["freq_shift"]),
        pad_after=config["downsample_padding"] == 0,
    )


def _factor(width: int, first: int) -> float:
    """Return the number that gives the width again, rounded down, when the first width is multiplied by it."""
    factor = width / first
    return factor if int(first * factor) == width else math.nextafter(factor, math.inf)


def _diffusion(directory: Path) -> dict[str, Any] | None:
    """Return the metadata of the scheduler that a directory holds, or None if it is a network alone."""
    part, name = "scheduler" if (directory / "scheduler").is_dir() else "", "scheduler_config.json"
    if not part and not (directory / name).exists() and not (directory / "model_index.json").exists():
        return None
    return diffusion_of(read_config(directory, part, (), family="ddpm", name=name))


def diffusion_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the `Diffusion` that the config of a DDPMScheduler or DDIMScheduler describes.

    Raises:
        ConvertError: if the config has a field, or a value of one, that is not supported.
    """
    check_fields(config, SCHEDULER, _NO_SCHEDULER)
    given = _SCHEDULE | config
    known = {
        "beta_schedule": (*BETAS, "squaredcos_cap_v2"), "prediction_type": PREDICTIONS, "variance_type": VARIANCES,
    }  # fmt: skip
    for name, values in known.items():
        if given[name] not in values:
            raise ConvertError(f"{_NO_SCHEDULER}: it has {name}={given[name]!r} (supported: {', '.join(values)})")
    steps, kind, betas = given["num_train_timesteps"], given["beta_schedule"], given["trained_betas"]
    published = {name: _SCHEDULE[name] for name in ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps")}
    try:
        if betas is not None:
            schedule = betas
        elif kind == "squaredcos_cap_v2":
            schedule = "cosine"
        elif published.items() <= given.items():
            schedule = "linear"
        else:
            scale = steps / 1000  # ours are scaled to the number of steps, theirs are not
            schedule = BETAS[kind](steps, scale * given["beta_start"], scale * given["beta_end"])
        schedule = schedule if isinstance(schedule, str) else tuple(map(float, schedule))
        prediction, variance = PREDICTIONS[given["prediction_type"]], VARIANCES[given["variance_type"]]
        found = Diffusion(schedule, steps, prediction, variance)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{_NO_SCHEDULER}: its betas do not fit: {error}") from None
    schedule = found.schedule if isinstance(found.schedule, str) else list(found.schedule)
    return {"schedule": schedule, "num_steps": steps, "prediction": prediction, "variance": variance}


def load_ddpm(
    tensors: Mapping[str, np.ndarray], model: UNet, *, flip_sin_to_cos: bool = False, channels: int = 3
) -> dict[str, Any]:
    """Return the parameters of a network; the names of attention before diffusers 0.17 are read too.

    Args:
        tensors: of diffusers' UNet2DModel.
        model: the network, as `ddpm_of` makes it of a config.
        flip_sin_to_cos: the field of that name of its config: cosines come first, as they do here.
        channels: of the images.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    return to_ours(ddpm_table(model, flip_sin_to_cos), with_new_names(tensors), ddpm_shapes(model, channels))


def export_ddpm(params: Mapping[str, Any], model: UNet, *, flip_sin_to_cos: bool = False) -> dict[str, np.ndarray]:
    """Return diffusers' tensors, float32: the inverse of `load_ddpm`, bit for bit."""
    return to_reference(ddpm_table(model, flip_sin_to_cos), params)


def ddpm_table(model: UNet, flip_sin_to_cos: bool) -> list[Entry]:
    """Return the table of a network."""
    table = outer("", "")
    if not flip_sin_to_cos:
        table = [e._replace(layout=SINES_FIRST) if e.ours == "time/dense_0/kernel" else e for e in table]
    for block in walk(model, 0):
        here, there = block.ours, block_name(block, len(model.channel_mult) - 1)
        if block.kind == "attention":
            table += attention(here, there, model.heads or block.widths[0] // model.head_channels)
        elif block.kind == "resample":
            table += conv(f"{here}/conv", f"{there}.conv")
        else:
            table += res(here, there, block.widths[0] != block.widths[1])
    return table


def ddpm_shapes(model: UNet, channels: int = 3) -> Any:
    """Return the shapes of the parameters, made without any numbers."""
    size = 2 ** (len(model.channel_mult) - 1)
    image, t = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, size, size, channels), (1,)))
    return parameter_shapes(model, image, t)["params"]
