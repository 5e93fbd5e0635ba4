"""Conventions of diffusers: where a directory has its parts, and the names of blocks."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.interop.table import IDENTITY, Entry, Layout, by_head, concatenated, conv, dense, norm
from ddpm_jax.interop.unet import Block
from ddpm_jax.storage.json_file import read_json
from ddpm_jax.storage.tensor_file import ReadError, read_tensors
from ddpm_jax.storage.tensors import Tensors, renamed
from ddpm_jax.storage.weight_files import weights_of_part

# The names that attention over pixels had before diffusers 0.17.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(?<=attentions\.)(\d+)\.({'|'.join(OLD_NAMES)})(?=\.)")


def read_config(
    directory: Path, part: str, fields: Iterable[str], *, family: str, name: str = "config.json"
) -> dict[str, Any]:
    """Return the config of a part of a pipeline.

    Raises:
        ReadError: if it is missing, not JSON, lacks one of the fields, or has null or an impossible number in one.
    """
    path = directory / part / name
    try:
        config = read_json(path)
        missing = [field for field in fields if field not in config]
    except (OSError, ValueError, TypeError) as error:
        raise ReadError(f"{directory / part} cannot be read as a part of {family}: {error}") from None
    if missing:
        raise ReadError(f"{path} is not of {family}: it lacks {', '.join(missing)}")
    for field in fields:
        most = 64 if field == "layers_per_block" else 2**14
        values = config[field] if isinstance(config[field], list) else [config[field]]
        whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
        if not values or None in values:
            raise ReadError(f"{path} has {field}={config[field]!r}, which must have a value that is not null")
        if not all(0 < value <= most for value in whole):
            raise ReadError(f"{path} has {field}={config[field]!r}, where whole numbers are between 1 and {most}")
    return config


def weights_file(directory: Path, part: str) -> Path:
    """Return the file with a part's weights.

    Raises:
        ReadError: if there is none, or only several variants (fp16).
    """
    return weights_of_part(directory / part)


def read_weights(directory: Path, part: str) -> dict[str, np.ndarray]:
    """Return the tensors of a part.

    Raises:
        ReadError: if there are none, or they cannot be read.
    """
    return read_tensors(weights_file(directory, part))


def block_name(block: Block, last: int) -> str:
    """Return diffusers' name of a block; last: the number of the last level."""
    if block.side == "mid":
        return f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[block.number]}"
    down = block.side == "down"
    level = f"down_blocks.{block.level}" if down else f"up_blocks.{last - block.level}"
    if block.kind == "resample":
        return f"{level}.{'downsamplers' if down else 'upsamplers'}.0"
    return f"{level}.{'attentions' if block.kind == 'attention' else 'resnets'}.{block.number}"


def res(ours: str, theirs: str, has_skip: bool, *, emb: bool = True) -> list[Entry]:
    """Return the entries of a residual block; emb: it is conditioned on an embedding."""
    return [
        *norm(f"{ours}/norm_1", f"{theirs}.norm1"),
        *conv(f"{ours}/conv_1", f"{theirs}.conv1"),
        *(dense(f"{ours}/emb", f"{theirs}.time_emb_proj") if emb else ()),
        *norm(f"{ours}/norm_2", f"{theirs}.norm2"),
        *conv(f"{ours}/conv_2", f"{theirs}.conv2"),
        *(conv(f"{ours}/skip", f"{theirs}.conv_shortcut") if has_skip else ()),
    ]


def outer(ours: str, theirs: str) -> list[Entry]:
    """Return the entries of a U-Net's first and last layers and of its time embedding."""
    return [
        *dense(f"{ours}time/dense_0", f"{theirs}time_embedding.linear_1"),
        *dense(f"{ours}time/dense_1", f"{theirs}time_embedding.linear_2"),
        *conv(f"{ours}in_conv", f"{theirs}conv_in"),
        *norm(f"{ours}out_norm", f"{theirs}conv_norm_out"),
        *conv(f"{ours}out_conv", f"{theirs}conv_out"),
    ]


def attention(ours: str, theirs: str, heads: int = 1) -> list[Entry]:
    """Return the entries of attention over pixels, whose layers may be convolutions of width one in old files."""
    turned = Layout(lambda x: x.reshape(x.shape[:2]).T, lambda x: (x.T,))
    qkv = [f"{theirs}.to_{part}" for part in "qkv"]
    return [
        *norm(f"{ours}/norm", f"{theirs}.group_norm"),
        Entry(f"{ours}/qkv/kernel", tuple(f"{name}.weight" for name in qkv), by_head(concatenated(turned, 3), heads)),
        Entry(f"{ours}/qkv/bias", tuple(f"{name}.bias" for name in qkv), by_head(concatenated(IDENTITY, 3), heads)),
        Entry(f"{ours}/out/kernel", (f"{theirs}.to_out.0.weight",), turned),
        Entry(f"{ours}/out/bias", (f"{theirs}.to_out.0.bias",), IDENTITY),
    ]


def with_new_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Return the tensors with the names that attention over pixels has since diffusers 0.17."""
    return renamed(tensors, lambda name: _OLD_NAME.sub(lambda match: f"{match[1]}.{OLD_NAMES[match[2]]}", name))
