"""Stable Diffusion 1 and 2 in one file, as the original code saves it (CompVis, Stability AI).

The networks are those of `interop.stable_diffusion`; here are the names that their tensors have in such a file, from
those of diffusers, in both directions. What the file does not say, the prediction and the size of the images, is an
argument: version 2 has models of 512 ("eps") and of 768 pixels ("v").
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop import stable_diffusion as sd
from ddpm_jax.interop.clip import NAMES
from ddpm_jax.interop.diffusers_layout import block_name
from ddpm_jax.interop.guided import block_name as original_name
from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import ConvertError, to_ours, to_reference
from ddpm_jax.interop.unet import walk
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.transformer import gelu
from ddpm_jax.models.unet import UNet
from ddpm_jax.storage.model_directory import Converted
from ddpm_jax.storage.tensor_file import read_tensors
from ddpm_jax.storage.tensors import Tensors, below, renamed

UNET, AUTOENCODER, TEXT, OPEN_CLIP = (
    *("model.diffusion_model.", "first_stage_model."),
    *("cond_stage_model.transformer.", "cond_stage_model.model."),
)
# Of the original code, whose DDIM ends at the first alpha_bar and not at the predicted x0.
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
_OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
}  # fmt: skip
_RES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def read_stable_diffusion_file(
    path: str | Path,
    *,
    prediction: str = "eps",
    image_size: int = 512,
    unet: UNet | None = None,
    autoencoder: Autoencoder | None = None,
    head_width: int = 64,
    part: str | None = None,
    dtype: Any = jnp.float32,
) -> Converted:
    """Read a file such as v1-5-pruned-emaonly.safetensors or v2-1_768-ema-pruned.ckpt.

    `pipelines.stable_diffusion.open_stable_diffusion_file` makes a pipeline of it. Captions are padded with the end
    token (version 1) or with 0 (version 2).

    Args:
        path: the file. That it is of version 2, its text encoder (open_clip's) says.
        prediction: what the U-Net predicts: "eps", or "v" for version 2 at 768 pixels.
        image_size: of the images that it was trained on.
        unet, autoencoder: the networks; by default the published ones of the version.
        head_width: of the text encoder's attention.
        part: of the file, as `read_tensors` takes it; "model_ema" for the averages of the U-Net's parameters.
        dtype: in which the networks compute; parameters are float32.

    Returns:
        the networks and their parameters, by the names of `interop.stable_diffusion.read_stable_diffusion`.

    Raises:
        ReadError: if the file cannot be read.
        ConvertError: if its tensors are not those of the networks.
        ValueError: for an unknown prediction type, or an image_size that the networks cannot halve.
    """
    if prediction not in ("eps", "v"):
        raise ValueError(f'{prediction=} must be "eps" or "v"')
    tensors = state_dict(read_tensors(path, part=part))
    second = f"{OPEN_CLIP}token_embedding.weight" in tensors
    autoencoder = sd.AUTOENCODER(dtype=dtype) if autoencoder is None else autoencoder
    heads = {"heads": None} if second else {}
    unet = sd.UNET(dtype=dtype, **heads) if unet is None else unet
    if image_size % (autoencoder.factor * 2 ** (len(unet.channel_mult) - 1)):
        raise ValueError(
            f"{image_size=} must be a multiple of {autoencoder.factor * 2 ** (len(unet.channel_mult) - 1)}"
        )
    parts = _split(tensors)
    channels = sd.channels_of(parts[UNET].get("input_blocks.0.0.weight"))
    sd.check_channels(channels, autoencoder.latent_channels)
    load_text = load_open_clip if second else sd.load_text_encoder
    text, text_params = load_text(parts[OPEN_CLIP if second else TEXT], head_width=head_width, dtype=dtype)
    params = {
        "text": text_params,
        "unet": sd.load_unet(_renamed(parts[UNET], unet_names(unet)), unet, context_width=text.width),
        "autoencoder": sd.load_autoencoder(
            _renamed(parts[AUTOENCODER], autoencoder_names(autoencoder)), autoencoder
        ),
    }  # fmt: skip
    metadata = {
        "layout": "original",
        "prediction": prediction,
        "latent_size": image_size // autoencoder.factor,
        "schedule": SCHEDULE,
        "tokenizer": {"kind": "clip", "pad": 0 if second else "eot"},
    }
    return Converted("stable-diffusion", {"text": text, "unet": unet, "autoencoder": autoencoder}, params, metadata)


def export_stable_diffusion_file(converted: Converted) -> dict[str, np.ndarray]:
    """Return the tensors of such a file, float32; of version 2 without the last layer and the projection of open_clip.

    A text encoder with quick_gelu is written as version 1 has it, another one as version 2 has it.
    """
    models, params = converted.models, converted.params
    second = models["text"].activation is gelu
    unet = sd.export_unet(params["unet"], models["unet"], linear_projection=second)
    names = unet_names(models["unet"])
    found = {UNET + names[name]: array for name, array in unet.items()}
    names = autoencoder_names(models["autoencoder"])
    for name, array in sd.export_autoencoder(params["autoencoder"], models["autoencoder"]).items():
        flat = ".attn_1." in names[name] and array.ndim == 2  # convolutions of width one there
        found[AUTOENCODER + names[name]] = array[..., None, None] if flat else array
    if second:
        table = sd.text_encoder_table(models["text"].layers, "openai")
        return found | {OPEN_CLIP + name: array for name, array in to_reference(table, params["text"]).items()}
    text = sd.export_text_encoder(params["text"], models["text"])
    return found | {TEXT + name: array for name, array in text.items()}


def state_dict(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Return the tensors of the networks, without what a trainer stored beside them."""
    return select(tensors, (f"{UNET}time_embed.0.weight", f"{AUTOENCODER}decoder.conv_in.weight"))


def _split(tensors: Tensors) -> dict[str, Tensors]:
    """Return the tensors of every network. Averages (model_ema) and the buffers of the schedule are left out.

    Raises:
        ConvertError: if there are others, or none of a network.
    """
    parts = {prefix: below(tensors, prefix) for prefix in (UNET, AUTOENCODER, TEXT, OPEN_CLIP)}
    known = (*parts, "model_ema.")
    unknown = [name for name in tensors if "." in name and not name.startswith(known)]
    missing = [prefix for prefix in (UNET, AUTOENCODER) if not parts[prefix]]
    missing += [] if parts[TEXT] or parts[OPEN_CLIP] else ["cond_stage_model."]
    if unknown or missing:
        what = f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(sorted(unknown)[:8])}"
        raise ConvertError(f"the file is not of Stable Diffusion 1 or 2: {what}")
    return parts


def _renamed(tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> Tensors:
    """Return tensors by diffusers' names; one that has none keeps its own, which the table will list."""
    back = {original: name for name, original in names.items()}
    return renamed(tensors, lambda name: back.get(name, name))


def unet_names(model: UNet) -> dict[str, str]:
    """Return the original name of every tensor of a U-Net, by diffusers' name."""
    prefixes = dict(_OUTER)
    for block in walk(model, 0):
        there, here = block_name(block, len(model.channel_mult) - 1), original_name(block, model, 0)
        if block.kind == "res":
            prefixes |= {f"{there}.{part}": f"{here}.{original}" for part, original in _RES.items()}
        elif block.kind == "resample":
            prefixes[f"{there}.conv"] = f"{here}.{'op' if block.side == 'down' else 'conv'}"
        else:
            prefixes[there] = here
    found = {}
    for entry in sd.unet_table(model):
        for name in entry.theirs:
            prefix = next(prefix for prefix in prefixes if name.startswith(f"{prefix}."))
            found[name] = prefixes[prefix] + name.removeprefix(prefix)
    return found


def autoencoder_names(model: Autoencoder) -> dict[str, str]:
    """Return the original name of every tensor of an autoencoder, by diffusers' name."""
    last = len(model.channel_mult) - 1

    def original(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for part, there in _ATTENTION.items():
            name = name.replace(f"mid_block.attentions.0.{part}.", f"mid.attn_1.{there}.")
        return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

    return {name: original(name) for entry in sd.autoencoder_table(model) for name in entry.theirs}


# ---- The text encoder of version 2 -----------------------------------------------------------------------------------


def load_open_clip(
    tensors: Mapping[str, np.ndarray], *, head_width: int = 64, dtype: Any = jnp.float32
) -> tuple[TextEncoder, dict[str, Any]]:
    """Make the text encoder of version 2: open_clip's text tower (ViT-H/14) without its last layer.

    Raises:
        ConvertError: if the tensors are not those of such a tower; it lists which.
        ValueError: if head_width does not divide the width.
    """
    model = sd.text_encoder_of(tensors, "openai", head_width, gelu, dtype)
    whole = "text_projection" in tensors  # an exported file has one layer less, and no projection
    last = NAMES["openai"].text_block.replace("#", str(model.layers - 1)) + "."
    model = model.copy(layers=model.layers - 1) if whole else model
    ignored = [
        name
        for name in tensors
        if name in ("text_projection", "logit_scale", "attn_mask") or (whole and name.startswith(last))
    ]
    return model, to_ours(
        sd.text_encoder_table(model.layers, "openai"), tensors, sd.text_encoder_shapes(model), ignored=ignored
    )
