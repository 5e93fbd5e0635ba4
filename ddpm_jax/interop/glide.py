"""GLIDE's U-Nets in OpenAI's layout: base, upsampler, and their inpainting forms."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.guided import MARKS, unet_table
from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import IDENTITY, TRANSPOSED, Entry, by_head, dense, norm, to_ours, to_reference
from ddpm_jax.models.glide import Glide
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.unet import UNet


def BASE(**options: Any) -> Glide:  # noqa: N802
    """Return the released 64 x 64 network; cosine schedule, 1000 steps."""
    return Glide(UNet(192, 6, (1, 2, 3, 4), 3, (), dropout=0.1, attention_levels=(1, 2, 3), **options))


def UPSAMPLER(**options: Any) -> Glide:  # noqa: N802
    """Return the released 64 -> 256 network; linear schedule, 1000 steps."""
    return Glide(UNet(192, 6, (1, 1, 2, 2, 4, 4), 2, (), dropout=0.1, attention_levels=(3, 4, 5), **options))


def load_glide(tensors: Mapping[str, np.ndarray], model: Glide, *, image_size: int) -> dict[str, Any]:
    """Return the parameters of a network, float32; that it enlarges, or inpaints, its first convolution says.

    Args:
        tensors: as `read_tensors` gives them; of a training checkpoint its part is taken by `interop.parts.select`.
        model: the network; `BASE()` and `UPSAMPLER()` are the released ones.
        image_size: of its images.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    tensors = select(tensors, MARKS)
    kernel = tensors.get("input_blocks.0.0.weight")
    channels = 3 if kernel is None or kernel.ndim != 4 else kernel.shape[1]
    return to_ours(glide_table(model, image_size), tensors, glide_shapes(model, image_size, channels))


def export_glide(params: Mapping[str, Any], model: Glide, *, image_size: int) -> dict[str, np.ndarray]:
    """Return OpenAI's tensors, float32: the inverse of `load_glide`, bit for bit."""
    return to_reference(glide_table(model, image_size), params)


def glide_table(model: Glide, image_size: int) -> list[Entry]:
    """Return the table of a network."""
    table = [
        Entry("token/embedding", ("token_embedding.weight",), IDENTITY),
        Entry("position", ("positional_embedding",), IDENTITY),
        Entry("padding", ("padding_embedding",), IDENTITY),
        *norm("ln_final", "final_ln"),
        *dense("text_emb", "transformer_proj"),
        *unet_table(model.unet, image_size, "unet/", context=True),
    ]
    for i in range(model.layers):
        ours, theirs = f"transformer/block_{i}", f"transformer.resblocks.{i}"
        # Head by head there, all queries first here.
        qkv = [by_head(layout, 3, parts=model.heads) for layout in (TRANSPOSED, IDENTITY)]
        table += [
            *norm(f"{ours}/ln_1", f"{theirs}.ln_1"),
            Entry(f"{ours}/qkv/kernel", (f"{theirs}.attn.c_qkv.weight",), qkv[0]),
            Entry(f"{ours}/qkv/bias", (f"{theirs}.attn.c_qkv.bias",), qkv[1]),
            *dense(f"{ours}/out", f"{theirs}.attn.c_proj"),
            *norm(f"{ours}/ln_2", f"{theirs}.ln_2"),
            *dense(f"{ours}/mlp_1", f"{theirs}.mlp.c_fc"),
            *dense(f"{ours}/mlp_2", f"{theirs}.mlp.c_proj"),
        ]
    return table


def glide_shapes(model: Glide, image_size: int, channels: int = 3) -> Any:
    """Return the shapes of the parameters; channels: what the first convolution sees, 3, 6, 7 or 10."""
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    image = spec(1, image_size, image_size, 3)
    text = spec(1, model.context, dtype=jnp.int32), spec(1, model.context, dtype=jnp.bool_)
    extra = {}
    if channels in (6, 10):
        extra["low_res"] = spec(1, 2, 2, 3)
    if channels in (7, 10):
        extra |= {"image": image, "known": spec(1, image_size, image_size, 1)}
    return parameter_shapes(model, image, spec(1), *text, **extra)["params"]
