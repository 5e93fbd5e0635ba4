"""The U-Nets and classifiers of guided diffusion (ADM) and improved diffusion, in OpenAI's layout.

A file holds names and shapes, which do not say where a level ends, how wide a head is, or in which order attention
keeps queries, keys and values: head by head (all published networks but one) or all queries first (the 64 x 64 model
of ADM). The wrong order gives a network that runs and returns noise. So the network is an argument, and `PUBLISHED` has
those that OpenAI released; every tensor of the file must then find its place.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import (
    IDENTITY,
    TRANSPOSED,
    ConvertError,
    Entry,
    Layout,
    by_head,
    conv,
    dense,
    norm,
    to_ours,
    to_reference,
)
from ddpm_jax.interop.unet import Block, attends_at, walk
from ddpm_jax.models.adm import Classifier, ClassUNet, SuperUNet
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.unet import UNet, levels_of_resolutions

POINTWISE = Layout(lambda x: x[..., 0].T, lambda x: (x.T[..., None],))  # a convolution of width one: [O, I, 1]
MARKS = ("time_embed.0.weight",)  # by which a network is found in a training checkpoint
_MULT = {
    32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4),
}  # fmt: skip


class Published(NamedTuple):
    """Released network, with what its file does not contain.

    All diffusion networks predict eps and learn the variance ("learned_range").

    Attributes:
        model: makes the network.
        image_size: height and width of its images.
        new_attention_order: see `load_guided`.
        schedule: "linear" or "cosine", of num_steps steps.
        low_size: height and width of an upsampler's input.
        num_steps: T.
        rescale_timesteps: True gives the network t * 1000 / num_steps in place of t.
    """

    model: Callable[[], nn.Module]
    image_size: int
    new_attention_order: bool = False
    schedule: str = "linear"
    low_size: int | None = None
    num_steps: int = 1000
    rescale_timesteps: bool = False


def _unet(size: int, channels: int = 256, blocks: int = 2, resolutions: tuple = (32, 16, 8), **options) -> UNet:
    levels = levels_of_resolutions(resolutions, size, len(_MULT[size]))
    return UNet(channels, 6, _MULT[size], blocks, (), attention_levels=levels, **options)


def _improved(size: int, channels: int, blocks: int = 3, resolutions: tuple = (16, 8), **options) -> UNet:
    return _unet(size, channels, blocks, resolutions, conv_resample=True, **({"heads": 4} | options))


def _bedroom() -> UNet:
    return _improved(256, 128, 2, (16,), heads=1, scale_shift=False)


def _large_upsampler() -> UNet:
    return UNet(192, 6, _MULT[256], 2, (), attention_levels=levels_of_resolutions((32, 16), 512, 6))


def _classifier(size: int, blocks: int = 2) -> Classifier:
    return Classifier(128, 1000, size, _MULT[size], blocks)


_COSINE = {"schedule": "cosine", "num_steps": 4000, "rescale_timesteps": True}
PUBLISHED = {
    "64x64_diffusion": Published(lambda: ClassUNet(_unet(64, 192, 3, dropout=0.1), 1000), 64, True, "cosine"),
    "128x128_diffusion": Published(lambda: ClassUNet(_unet(128, heads=4), 1000), 128),
    "256x256_diffusion": Published(lambda: ClassUNet(_unet(256), 1000), 256),
    "256x256_diffusion_uncond": Published(lambda: _unet(256), 256),
    "512x512_diffusion": Published(lambda: ClassUNet(_unet(512), 1000), 512),
    "64_256_upsampler": Published(lambda: SuperUNet(_unet(256, 192, heads=4), 1000), 256, low_size=64),
    "128_512_upsampler": Published(lambda: SuperUNet(_large_upsampler(), 1000), 512, low_size=128),
    "lsun": Published(lambda: _unet(256, dropout=0.1), 256),
    "64x64_classifier": Published(lambda: _classifier(64, 4), 64, schedule="cosine"),
    "128x128_classifier": Published(lambda: _classifier(128), 128),
    "256x256_classifier": Published(lambda: _classifier(256), 256),
    "512x512_classifier": Published(lambda: _classifier(512), 512),
    # Improved diffusion, by the names of its files.
    "imagenet64_uncond_100M_1500K": Published(lambda: _improved(64, 128), 64, **_COSINE),
    "imagenet64_uncond_vlb_100M_1500K": Published(lambda: _improved(64, 128), 64, **_COSINE),
    "cifar10_uncond_50M_500K": Published(lambda: _improved(32, 128, dropout=0.3), 32, **_COSINE),
    "cifar10_uncond_vlb_50M_500K": Published(lambda: _improved(32, 128, dropout=0.3), 32, **_COSINE),
    "imagenet64_cond_270M_250K": Published(
        lambda: ClassUNet(_improved(64, 192), 1000), 64, schedule="cosine", num_steps=4000
    ),
    "upsample_cond_500K": Published(lambda: SuperUNet(_improved(256, 192, 2), 1000), 256, low_size=64, num_steps=4000),
    "lsun_uncond_100M_1200K_bs128": Published(_bedroom, 256),
    "lsun_uncond_100M_2400K_bs64": Published(_bedroom, 256),
}


def metadata_of(published: Published, model: nn.Module) -> dict[str, Any]:
    """Return what a pipeline has to know of a released network, as `storage.model_directory` stores it."""
    found: dict[str, Any] = {
        "diffusion": {
            "schedule": published.schedule,
            "num_steps": published.num_steps,
            "prediction": "eps",
            "variance": "learned_range",
        },
        "image_size": published.image_size,
        "channels": 3,
        "timestep_scale": 1000 / published.num_steps if published.rescale_timesteps else 1.0,
    }
    if (classes := getattr(model, "num_classes", None)) is not None:
        found["labels"] = {"num_classes": classes, "null": None, "names": None}
    conditions = ["labels"] if classes is not None and not isinstance(model, Classifier) else []
    if published.low_size is not None:
        conditions.append("low_resolution")
        found["low_resolution"] = {"size": published.low_size}
    return found | {"conditions": conditions}


def load_guided(
    tensors: Mapping[str, np.ndarray], model: nn.Module, *, image_size: int, new_attention_order: bool = False
) -> dict[str, Any]:
    """Return the parameters of a network, float32. The number of its input channels is read from the file.

    A file does not say how many heads attention has, so the model must have the numbers it was trained with: num_heads
    is `UNet.heads`, num_heads_upsample is `heads_up`, num_head_channels is `head_channels` (with heads=None).

    Args:
        tensors: as `read_tensors` gives them; of a training checkpoint its part is taken by `interop.parts.select`.
        model: a `UNet`, `ClassUNet`, `SuperUNet` or `Classifier`, built as the published one was; with
            conv_resample=True for improved diffusion, and for guided diffusion without resblock_updown; with
            pool_resample=True for either without both resblock_updown and conv_resample.
        image_size: of the images, in pixels.
        new_attention_order: the flag of that name (use_new_attention_order).

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    tensors = select(tensors, MARKS)
    kernel = tensors.get("input_blocks.0.0.weight")
    channels = 3 if kernel is None or kernel.ndim != 4 else kernel.shape[1]
    if isinstance(model, SuperUNet) and channels % 2:
        raise ConvertError(f"the file's network sees {channels} channels, where an upsampler sees two images")
    shapes = guided_shapes(model, image_size, max(channels, 1))
    try:
        return to_ours(guided_table(model, image_size, new_attention_order), tensors, shapes)
    except ConvertError as error:
        reason = _other_resampling(tensors, _network(model))
        raise ConvertError(f"{error}{reason}") from None


def _network(model: nn.Module) -> UNet | Classifier:
    return model.unet if isinstance(model, (ClassUNet, SuperUNet)) else model


def _other_resampling(tensors: Mapping[str, np.ndarray], net: UNet | Classifier) -> str:
    """Return how the file's network changes the resolution, if it is another way than the model's, or ""."""
    names = [name.split(".") for name in tensors if re.fullmatch(r"input_blocks\.[0-9]{1,6}\.\d+\..*", name)]
    numbers = {int(name[1]) for name in names}
    if not numbers:
        return ""
    if any(name[3] == "op" for name in names):
        how, found = "convolutions, which need conv_resample=True", (True, False)
    elif len(numbers) <= max(numbers):  # pooling has a number there, and no tensor
        how, found = "pooling (trained with conv_resample=False), which needs pool_resample=True", (False, True)
    else:
        how, found = "residual blocks, which need conv_resample=False and pool_resample=False", (False, False)
    return "" if found == (net.conv_resample, net.pool_resample) else f"; its levels are joined by {how} of the model"


def export_guided(
    params: Mapping[str, Any], model: nn.Module, *, image_size: int, new_attention_order: bool = False
) -> dict[str, np.ndarray]:
    """Return OpenAI's tensors, float32: the inverse of `load_guided`, bit for bit."""
    return to_reference(guided_table(model, image_size, new_attention_order), params)


def guided_table(model: nn.Module, image_size: int, new_attention_order: bool = False) -> list[Entry]:
    """Return the table of a network."""
    net, table = _network(model), []
    if getattr(model, "num_classes", None) is not None and not isinstance(model, Classifier):
        table.append(Entry("label/embedding", ("label_emb.weight",), IDENTITY))
    return table + unet_table(net, image_size, "" if net is model else "unet/", new_attention_order)


def unet_table(
    net: UNet | Classifier, image_size: int, ours: str, new_attention_order: bool = False, *, context: bool = False
) -> list[Entry]:
    """Return the table of a U-Net or a classifier; ours: where its parameters lie; context: its attention reads one."""
    table = [*dense(f"{ours}time/dense_0", "time_embed.0"), *dense(f"{ours}time/dense_1", "time_embed.2")]
    table += conv(f"{ours}in_conv", "input_blocks.0.0")
    for block in walk(net, image_size):
        here, theirs = f"{ours}{block.ours}", block_name(block, net, image_size)
        if block.kind == "attention":
            heads = net.heads or block.widths[0] // net.head_channels
            heads = (getattr(net, "heads_up", None) or heads) if block.side == "up" else heads
            table += _attention(here, theirs, heads, new_attention_order)
            table += _pointwise(f"{here}/context_kv", f"{theirs}.encoder_kv") if context else []
        elif block.kind == "resample" and net.pool_resample:
            continue
        elif block.kind == "resample" and net.conv_resample:
            table += conv(f"{here}/conv", f"{theirs}.{'op' if block.side == 'down' else 'conv'}")
        else:
            table += _res(here, theirs, block.widths[0] != block.widths[1])
    return table + (_head(net) if isinstance(net, Classifier) else _out(ours))


def block_name(block: Block, net: UNet | Classifier, image_size: int) -> str:
    """Return OpenAI's name of a block: they are numbered from the image to the middle, and from 0 again after it."""
    side, level, blocks = block.side, block.level, net.num_res_blocks
    if side == "mid":
        attends = isinstance(net, Classifier) or net.mid_attention
        return f"middle_block.{block.number if attends else min(block.number, 1)}"
    part = int(block.kind == "attention")
    if side == "down":
        return f"input_blocks.{1 + level * (blocks + 1) + block.number}.{part}"
    # The upsampling is the last part of the level's last entry, after its attention.
    number, last = block.number, len(net.channel_mult) - 1
    if block.kind == "resample":
        number, part = blocks, 1 + attends_at(net, image_size, level)
    return f"output_blocks.{(last - level) * (blocks + 1) + number}.{part}"


def _pointwise(ours: str, theirs: str, layout: Layout = POINTWISE, bias: Layout = IDENTITY) -> list[Entry]:
    return [Entry(f"{ours}/kernel", (f"{theirs}.weight",), layout), Entry(f"{ours}/bias", (f"{theirs}.bias",), bias)]


def _res(ours: str, theirs: str, has_skip: bool) -> list[Entry]:
    return [
        *norm(f"{ours}/norm_1", f"{theirs}.in_layers.0"),
        *conv(f"{ours}/conv_1", f"{theirs}.in_layers.2"),
        *dense(f"{ours}/emb", f"{theirs}.emb_layers.1"),
        *norm(f"{ours}/norm_2", f"{theirs}.out_layers.0"),
        *conv(f"{ours}/conv_2", f"{theirs}.out_layers.3"),
        *(conv(f"{ours}/skip", f"{theirs}.skip_connection") if has_skip else ()),
    ]


def _attention(ours: str, theirs: str, heads: int, new_order: bool) -> list[Entry]:
    layout, bias = (POINTWISE, IDENTITY) if not new_order else (by_head(POINTWISE, heads), by_head(IDENTITY, heads))
    return [
        *norm(f"{ours}/norm", f"{theirs}.norm"),
        *_pointwise(f"{ours}/qkv", f"{theirs}.qkv", layout, bias),
        *_pointwise(f"{ours}/out", f"{theirs}.proj_out"),
    ]


def _out(ours: str) -> list[Entry]:
    return [*norm(f"{ours}out_norm", "out.0"), *conv(f"{ours}out_conv", "out.2")]


def _head(net: Classifier) -> list[Entry]:
    flat = Layout(lambda x: x[..., 0, 0].T, lambda x: (x.T[..., None, None],))
    return {
        "attention": [
            *norm("out_norm", "out.0"),
            Entry("pool/position", ("out.2.positional_embedding",), TRANSPOSED),
            *_pointwise("pool/qkv", "out.2.qkv_proj"),
            *_pointwise("pool/out", "out.2.c_proj"),
        ],
        "adaptive": [*norm("out_norm", "out.0"), *_pointwise("out", "out.3", flat)],
        "spatial": [*dense("hidden", "out.0"), *dense("out", "out.2")],
        "spatial_v2": [*dense("hidden", "out.0"), *norm("out_norm", "out.1"), *dense("out", "out.3")],
    }[net.pool]


def guided_shapes(model: nn.Module, image_size: int, channels: int | None = None) -> Any:
    """Return the shapes of a network's parameters, made without any numbers.

    channels: of the first convolution's input; 3 by default, and 6 of an upsampler, which sees two images.
    """
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    two = isinstance(model, SuperUNet)
    colors = 3 if channels is None else channels // (1 + two)
    inputs = [spec(1, image_size, image_size, colors), spec(1)]
    if two:
        inputs.append(spec(1, image_size // 4, image_size // 4, colors))
    if isinstance(model, ClassUNet) or (two and model.num_classes is not None):
        inputs.append(spec(1, dtype=jnp.int32))
    return parameter_shapes(model, *inputs)["params"]
