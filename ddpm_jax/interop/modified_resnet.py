"""The ResNet image tower of CLIP, in OpenAI's layout, which is open_clip's too.

`interop.clip.load_clip` calls what is here; Hugging Face's transformers has no such tower.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.table import IDENTITY, KERNEL, ConvertError, Entry, count, dense, norm
from ddpm_jax.models.modified_resnet import ModifiedResNet

STAGES = (1, 2, 3, 4)
POSITION = "visual.attnpool.positional_embedding"


def is_resnet(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether a CLIP's file has a ResNet, or a part of one."""
    return any(name.startswith(("visual.layer1.", "visual.attnpool.")) for name in tensors)


def resnet_of(
    tensors: Mapping[str, np.ndarray], features: int, head_width: int, dtype: Any = jnp.float32
) -> ModifiedResNet:
    """Return the network whose weights a file holds, by its names and shapes.

    Args:
        tensors: as `read_tensors` gives them.
        features: of CLIP's embedding.
        head_width: of the attention at the end, 64 in OpenAI's and open_clip's networks.
        dtype: in which the network computes.

    Raises:
        ConvertError: if the file lacks a tensor that the sizes are read from, or it has another rank.
        ValueError: if `head_width` does not divide the channels that the attention sees.
    """
    firsts = [f"visual.layer{stage}.0.conv1.weight" for stage in STAGES]
    missing = [name for name in (*firsts, POSITION) if name not in tensors]
    if missing:
        raise ConvertError(f"the file is not of a CLIP with a ResNet: it lacks {', '.join(missing)}")
    for name, axes in ((firsts[0], 4), (POSITION, 2)):
        if tensors[name].ndim != axes:
            raise ConvertError(f"the file does not fit: {name} {list(tensors[name].shape)} must have {axes} axes")
    width, side = tensors[firsts[0]].shape[0], round(max(tensors[POSITION].shape[0] - 1, 1) ** 0.5)
    if 32 * width % head_width:
        raise ValueError(f"{head_width=} must divide the ResNet's width times 32, which is {32 * width}")
    layers = tuple(count(tensors, f"visual.layer{stage}.#") for stage in STAGES)
    return ModifiedResNet(32 * side, width, layers, features, head_width, dtype)


def layers_of(params: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return how many blocks the stages of our parameters have; None if they are not a ResNet's."""
    if "attnpool" not in params:
        return None
    return tuple(sum(name.startswith(f"layer{stage}_") for name in params) for stage in STAGES)


def resnet_table(layers: Sequence[int]) -> list[Entry]:
    """Return the table of a ResNet with these numbers of blocks per stage; our names are under "vision"."""
    table = [entry for i in (1, 2, 3) for entry in _pair("vision", "visual", f"conv{i}", f"bn{i}")]
    for stage, blocks in zip(STAGES, layers, strict=True):
        for i in range(blocks):
            ours, theirs = f"vision/layer{stage}_{i}", f"visual.layer{stage}.{i}"
            for j in (1, 2, 3):
                table += _pair(ours, theirs, f"conv{j}", f"bn{j}")
            if not i:
                table += _pair(ours, theirs, "downsample.0", "downsample.1", ("downsample_conv", "downsample_bn"))
    projections = [f"visual.attnpool.{name}_proj" for name in "qkv"]
    return [
        *table,
        Entry("vision/attnpool/position", (POSITION,), IDENTITY),
        *dense("vision/attnpool/qkv", *projections),
        *dense("vision/attnpool/out", "visual.attnpool.c_proj"),
    ]


def _pair(ours: str, theirs: str, conv: str, bn: str, names: tuple[str, str] | None = None) -> list[Entry]:
    """Return the entries of a convolution without bias and of the batch norm after it."""
    our_conv, our_bn = names or (conv, bn)
    return [
        Entry(f"{ours}/{our_conv}/kernel", (f"{theirs}.{conv}.weight",), KERNEL),
        *norm(f"{ours}/{our_bn}", f"{theirs}.{bn}"),
        Entry(f"{ours}/{our_bn}/mean", (f"{theirs}.{bn}.running_mean",), IDENTITY),
        Entry(f"{ours}/{our_bn}/var", (f"{theirs}.{bn}.running_var",), IDENTITY),
    ]


def counters(table: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Return PyTorch's counters of training batches, one for each batch norm, at zero: int64[].

    Nothing depends on them once the statistics are no longer updated, but PyTorch's files have them.
    """
    means = [name for entry in table for name in entry.theirs if name.endswith(".running_mean")]
    return {name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64) for name in means}
