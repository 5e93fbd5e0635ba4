"""GLIDE's noised CLIP in OpenAI's layout: a file for each tower, clip_image_enc.pt and clip_text_enc.pt.

The scale of the similarity and the means and deviations of the channels are in neither of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import (
    IDENTITY,
    KERNEL,
    TRANSPOSED,
    ConvertError,
    Entry,
    Layout,
    concatenated,
    to_ours,
    to_reference,
)
from ddpm_jax.models.noised_clip import NoisedCLIP, NoisedVisionTransformer
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.text_encoder import TextEncoder

_NO_KEY_BIAS = Layout(lambda q, v: np.stack([q, np.zeros_like(q), v]).reshape(-1), lambda x: tuple(np.split(x, 3)[::2]))
MARKS = {"image": ("blocks.input.patch_proj",), "text": ("blocks.input.w_voc",)}
_IMAGE, _TEXT = ("vision", "image_projection"), ("text", "text_projection")


def NOISED_CLIP(**options: Any) -> NoisedCLIP:  # noqa: N802
    """Return the released network: images of 64 x 64, the cosine schedule of 1000 steps, captions of 77 tokens.

    The options go to both towers.
    """
    vision = NoisedVisionTransformer(64, 4, 768, 12, 12, 1000, **options)
    return NoisedCLIP(vision, TextEncoder(65536, 77, 512, 12, 8, **options), 512)


def load_noised_clip(
    image: Mapping[str, np.ndarray], text: Mapping[str, np.ndarray], model: NoisedCLIP
) -> dict[str, Any]:
    """Return the parameters of both towers, float32.

    Args:
        image: the image tower's tensors, as `read_tensors` gives them.
        text: the text tower's.
        model: the network; `NOISED_CLIP()` is the released one.

    Raises:
        ConvertError: if the tensors are not those of the network; it says in which file, and lists which.
    """
    shapes = noised_clip_shapes(model)
    files = {"image": (image_table(model), image, _IMAGE), "text": (text_table(model), text, _TEXT)}
    params = {}
    for name, (table, tensors, parts) in files.items():
        try:
            params |= to_ours(table, select(tensors, MARKS[name]), {part: shapes[part] for part in parts})
        except ConvertError as error:
            raise ConvertError(f"the {name} tower of a noised CLIP: {error}") from None
    return params


def export_noised_clip(
    params: Mapping[str, Any], model: NoisedCLIP
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return OpenAI's tensors of the (image, text) tower, float32: the inverse of `load_noised_clip`, bit for bit.

    Their keys have no bias. Ours, zero when loaded, is left out: it adds the same to all that a query sees, which the
    softmax takes away again.
    """
    parts = lambda names: {name: params[name] for name in names}  # noqa: E731
    return to_reference(image_table(model), parts(_IMAGE)), to_reference(text_table(model), parts(_TEXT))


def image_table(model: NoisedCLIP) -> list[Entry]:
    """Return the table of the image tower."""
    return [
        Entry("vision/time/embedding", ("blocks.input.w_t",), IDENTITY),
        Entry("vision/patch/kernel", ("blocks.input.patch_proj",), KERNEL),
        Entry("vision/position", ("blocks.input.w_pos",), IDENTITY),
        *_norm("vision/ln_pre", "blocks.input.ln"),
        *_blocks("vision", model.vision.layers),
        *_norm("vision/ln_post", "blocks.output.ln"),
        Entry("image_projection/kernel", ("blocks.output.f.w",), TRANSPOSED),
    ]


def text_table(model: NoisedCLIP) -> list[Entry]:
    """Return the table of the text tower."""
    return [
        Entry("text/token/embedding", ("blocks.input.w_voc",), IDENTITY),
        Entry("text/position", ("blocks.input.w_pos",), IDENTITY),
        *_blocks("text", model.text.layers),
        *_norm("text/ln_final", "blocks.output.ln"),
        Entry("text_projection/kernel", ("blocks.output.f.w",), TRANSPOSED),
    ]


def noised_clip_shapes(model: NoisedCLIP) -> Any:
    """Return the shapes of the parameters."""
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    images, t = spec(1, model.vision.image_size, model.vision.image_size, 3), spec(1, dtype=jnp.int32)
    text = spec(1, model.text.context, dtype=jnp.int32), spec(1, model.text.context, dtype=jnp.bool_)
    return parameter_shapes(model, images, t, *text)["params"]


def _blocks(tower: str, layers: int) -> list[Entry]:
    table = []
    for i in range(layers):
        ours, theirs = f"{tower}/transformer/block_{i}", f"blocks.block_{i}"
        attention, mlp = f"{theirs}.f_attn", f"{theirs}.f_mlp"
        table += [
            *_norm(f"{ours}/ln_1", f"{attention}.ln"),
            Entry(
                f"{ours}/qkv/kernel", tuple(f"{attention}.f_{part}.w" for part in "qkv"), concatenated(TRANSPOSED, 3)
            ),
            Entry(f"{ours}/qkv/bias", (f"{attention}.f_q.b", f"{attention}.f_v.b"), _NO_KEY_BIAS),
            *_dense(f"{ours}/out", f"{attention}.f_c"),
            *_norm(f"{ours}/ln_2", f"{mlp}.ln"),
            *_dense(f"{ours}/mlp_1", f"{mlp}.f_1"),
            *_dense(f"{ours}/mlp_2", f"{mlp}.f_2"),
        ]
    return table


def _norm(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}/scale", (f"{theirs}.g",), IDENTITY), Entry(f"{ours}/bias", (f"{theirs}.b",), IDENTITY)]


def _dense(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}/kernel", (f"{theirs}.w",), TRANSPOSED), Entry(f"{ours}/bias", (f"{theirs}.b",), IDENTITY)]
