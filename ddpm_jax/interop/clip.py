"""CLIP with a vision transformer, in the layouts of OpenAI, open_clip and transformers, or with a ResNet, in OpenAI's.

The layouts differ in names, and hold the same network (Radford et al. 2021). What a file cannot say is an argument: the
width of a head (64 in OpenAI's networks), the activation (quick_gelu in OpenAI's, exact gelu in most of open_clip's),
and by which rule the end of a caption is found (`end_mask`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.modified_resnet import counters, is_resnet, layers_of, resnet_of, resnet_table
from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import (
    IDENTITY,
    KERNEL,
    TRANSPOSED,
    ConvertError,
    Entry,
    Layout,
    concatenated,
    count,
    dense,
    norm,
    to_ours,
    to_reference,
)
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.transformer import gelu, quick_gelu
from ddpm_jax.storage.tensors import renamed

Dialect = Literal["openai", "hf"]
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
# The width of a head in the text and the vision transformer, and the activation, of released weights; open_clip's names
# are those of its configs, for weights trained on LAION, and "hf" files say it in their config.json.
PUBLISHED = {
    **dict.fromkeys(("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"), ((64, 64), "quick_gelu")),
    **dict.fromkeys(("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"), ((64, 64), "quick_gelu")),
    **dict.fromkeys(("ViT-B-32", "ViT-B-16", "ViT-L-14"), ((64, 64), "gelu")),
    "ViT-H-14": ((64, 80), "gelu"),
    "ViT-g-14": ((64, 88), "gelu"),
    "ViT-bigG-14": ((64, 104), "gelu"),
}
# Names that identify a CLIP in a training checkpoint: transformers' towers, and those of OpenAI and open_clip.
MARKS = (
    *("text_model.embeddings.token_embedding.weight", "vision_model.embeddings.patch_embedding.weight"),
    *("embeddings.token_embedding.weight", "embeddings.patch_embedding.weight"),
    *("visual.conv1.weight", "token_embedding.weight"),
)
# Buffers: OpenAI's archives carry three numbers, old files of transformers the positions 0, 1, 2, ...
_IGNORED = (
    *("input_resolution", "context_length", "vocab_size"),
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)


class LoadedCLIP(NamedTuple):
    """CLIP from a file.

    Attributes:
        model: the network.
        params: its parameters.
        dialect: the layout of the file.
    """

    model: CLIP
    params: dict[str, Any]
    dialect: Dialect


class _Names(NamedTuple):
    """One dialect."""

    token: str
    text_position: str
    text_block: str
    text_ln: str
    text_projection: Callable[[str], list[Entry]]
    vision_class: str
    vision_position: str
    patch: str
    ln_pre: str
    vision_block: str
    ln_post: str
    image_projection: Callable[[str], list[Entry]]
    qkv: tuple[str, ...]
    out: str
    ln_1: str
    ln_2: str
    mlp: tuple[str, str]


NAMES = {
    "openai": _Names(
        "token_embedding.weight", "positional_embedding", "transformer.resblocks.#", "ln_final",
        lambda ours: [Entry(f"{ours}/kernel", ("text_projection",), IDENTITY)],
        "visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight", "visual.ln_pre",
        "visual.transformer.resblocks.#", "visual.ln_post",
        lambda ours: [Entry(f"{ours}/kernel", ("visual.proj",), IDENTITY)],
        ("attn.in_proj_",), "attn.out_proj", "ln_1", "ln_2", ("mlp.c_fc", "mlp.c_proj"),
    ),
    "hf": _Names(
        "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.#", "text_model.final_layer_norm",
        lambda ours: dense(ours, "text_projection", bias=False),
        "vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight", "vision_model.pre_layrnorm",
        "vision_model.encoder.layers.#", "vision_model.post_layernorm",
        lambda ours: dense(ours, "visual_projection", bias=False),
        ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."), "self_attn.out_proj",
        "layer_norm1", "layer_norm2", ("mlp.fc1", "mlp.fc2"),
    ),
}  # fmt: skip


def end_mask(tokens: jax.Array, end: int | None = None) -> jax.Array:
    """Return the mask that `CLIP.encode_text` wants, bool[B, L]: True up to the end token.

    tokens: int32[B, L]. end: the first token of this id is the end (transformers, when eos_token_id is not 2); None
    takes the largest id (OpenAI, open_clip, and transformers' configs that say eos_token_id = 2).
    """
    at = jnp.argmax(tokens if end is None else tokens == end, axis=-1)
    return jnp.arange(tokens.shape[1])[None] <= at[:, None]


def clip_table(dialect: Dialect, text_layers: int | None, vision_layers: int | tuple[int, ...] | None) -> list[Entry]:
    """Return the table of a CLIP with these numbers of layers; None is an absent tower.

    vision_layers: of a vision transformer, or the blocks in each of a ResNet's four stages.
    """
    names = NAMES[dialect]

    def blocks(ours: str, theirs: str, layers: int) -> list[Entry]:
        return [
            entry for i in range(layers) for entry in _block(f"{ours}/block_{i}", theirs.replace("#", str(i)), names)
        ]

    # A tower alone has no temperature: ours has then the one that training starts from.
    alone = text_layers is None or vision_layers is None
    start = Layout(lambda: np.float32(math.log(1 / 0.07)), lambda x: ())
    table = [Entry("log_scale", (), start) if alone else Entry("log_scale", ("logit_scale",), IDENTITY)]
    if text_layers is not None:
        table += [
            Entry("text/token/embedding", (names.token,), IDENTITY),
            Entry("text/position", (names.text_position,), IDENTITY),
            *blocks("text/transformer", names.text_block, text_layers),
            *norm("text/ln_final", names.text_ln),
            *names.text_projection("text_projection"),
        ]
    if isinstance(vision_layers, tuple):
        table += resnet_table(vision_layers)
    elif vision_layers is not None:
        table += [
            Entry("vision/class", (names.vision_class,), IDENTITY),
            Entry("vision/position", (names.vision_position,), IDENTITY),
            Entry("vision/patch/kernel", (names.patch,), KERNEL),
            *norm("vision/ln_pre", names.ln_pre),
            *blocks("vision/transformer", names.vision_block, vision_layers),
            *norm("vision/ln_post", names.ln_post),
            *names.image_projection("image_projection"),
        ]
    return table


def _block(ours: str, theirs: str, names: _Names) -> list[Entry]:
    parts = len(names.qkv)
    return [
        *norm(f"{ours}/ln_1", f"{theirs}.{names.ln_1}"),
        Entry(
            f"{ours}/qkv/kernel", tuple(f"{theirs}.{part}weight" for part in names.qkv), concatenated(TRANSPOSED, parts)
        ),
        Entry(f"{ours}/qkv/bias", tuple(f"{theirs}.{n}bias" for n in names.qkv), concatenated(IDENTITY, parts)),
        *dense(f"{ours}/out", f"{theirs}.{names.out}"),
        *norm(f"{ours}/ln_2", f"{theirs}.{names.ln_2}"),
        *dense(f"{ours}/mlp_1", f"{theirs}.{names.mlp[0]}"),
        *dense(f"{ours}/mlp_2", f"{theirs}.{names.mlp[1]}"),
    ]


def load_clip(
    tensors: Mapping[str, np.ndarray],
    *,
    head_width: int | tuple[int, int] = 64,
    activation: str | tuple[str, str] = "quick_gelu",
    dtype: Any = jnp.float32,
) -> LoadedCLIP:
    """Make a CLIP of a reference implementation's tensors.

    Args:
        tensors: as `read_tensors` gives them: OpenAI's archive or state_dict, open_clip's state_dict, or transformers'
            CLIPModel, CLIPTextModelWithProjection or CLIPVisionModelWithProjection, of which the last two give a CLIP
            with one tower. The first two may have a ResNet. Of a training checkpoint its part is taken by
            `interop.parts.select`.
        head_width: of attention; a pair is of the text and of the vision tower.
        activation: "quick_gelu" for OpenAI's weights and open_clip's "-quickgelu" ones, "gelu" for the others; a pair
            is of the text and of the vision tower.
        dtype: in which the network computes; parameters are float32.

    Raises:
        ConvertError: if the tensors are not those of such a CLIP; it lists which.
        ValueError: for an unknown activation, or a head_width that does not divide a width.
    """
    activations = (activation,) * 2 if isinstance(activation, str) else tuple(activation)
    if len(activations) != 2 or not set(activations) <= set(ACTIVATIONS):
        raise ValueError(f"{activation=} must be one of {', '.join(ACTIVATIONS)}, or a pair of them")
    tensors = _with_prefix(select(tensors, MARKS))
    dialect = "hf" if NAMES["hf"].token in tensors or NAMES["hf"].patch in tensors else "openai"
    names = NAMES[dialect]
    of_text, of_vision = ({"activation": ACTIVATIONS[one], "dtype": dtype} for one in activations)
    text_head, vision_head = (head_width, head_width) if isinstance(head_width, int) else head_width
    text = vision = None
    if names.token in tensors:
        text = _text_encoder(tensors, names, text_head, of_text)
    resnet = dialect == "openai" and is_resnet(tensors)
    if names.patch in tensors and not resnet:
        vision = _vision_transformer(tensors, names, vision_head, of_vision)
    if (text is None and vision is None) or (dialect == "openai" and (text is None or not (vision or resnet))):
        missing = names.token if text is None else names.patch
        kind = "ResNet" if resnet else "vision transformer"
        raise ConvertError(f"the file is not of a CLIP with a {kind}: it lacks {missing}")
    projection = ("text_projection", "text_projection.weight", "visual_projection.weight")
    found = [tensors[name] for name in projection if name in tensors]
    if not found:
        raise ConvertError(f"the file is not of a CLIP: it lacks {projection[0 if dialect == 'openai' else 1]}")
    if found[0].ndim != 2:
        raise ConvertError(f"the file does not fit: a projection has the shape {list(found[0].shape)}, not two axes")
    embed_dim = found[0].shape[-1 if dialect == "openai" else 0]
    if resnet:
        vision = resnet_of(tensors, embed_dim, vision_head, dtype)
    model = CLIP(vision, text, embed_dim)
    table = clip_table(dialect, *(None if tower is None else tower.layers for tower in (text, vision)))
    # The causal mask, which every text layer implies, is among an archive's attributes.
    masks = [name for name in tensors if name.split(".")[-1] == "attn_mask"]
    ignored = (*_IGNORED, *masks, *counters(table))
    return LoadedCLIP(model, to_ours(table, tensors, _shapes(model), ignored=ignored), dialect)


def _with_prefix(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Rename the tensors of a tower that transformers 5 saved alone to their names in a whole CLIP."""
    for mark, prefix in (("token_embedding", "text_model."), ("patch_embedding", "vision_model.")):
        if f"embeddings.{mark}.weight" in tensors:
            return renamed(tensors, lambda name: name if "projection" in name else prefix + name)  # noqa: B023
    return tensors


def _text_encoder(tensors: Mapping[str, np.ndarray], names: _Names, head: int, options: dict) -> TextEncoder:
    if names.text_position not in tensors:
        raise ConvertError(f"the file is not of a CLIP: it lacks {names.text_position}")
    (vocab_size, width), (context, _) = shape_of(tensors, names.token, 2), shape_of(tensors, names.text_position, 2)
    layers = count(tensors, names.text_block)
    mlp = _mlp_width(tensors, names, names.text_block, width)
    return TextEncoder(vocab_size, context, width, layers, _heads(width, head, "text"), mlp_width=mlp, **options)


def _vision_transformer(tensors: Mapping[str, np.ndarray], names: _Names, head: int, options: dict) -> Any:
    if names.vision_position not in tensors:
        raise ConvertError(f"the file is not of a CLIP with a vision transformer: it lacks {names.vision_position}")
    width, _, patch, _ = shape_of(tensors, names.patch, 4)
    side = round((shape_of(tensors, names.vision_position, 2)[0] - 1) ** 0.5)
    layers, heads = count(tensors, names.vision_block), _heads(width, head, "vision")
    mlp = _mlp_width(tensors, names, names.vision_block, width)
    return VisionTransformer(patch * side, patch, width, layers, heads, mlp_width=mlp, **options)


def shape_of(tensors: Mapping[str, np.ndarray], name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor that sizes are read from.

    Raises:
        ConvertError: if it is missing, or has another number of axes, or an empty one.
    """
    if name not in tensors:
        raise ConvertError(f"the file is not of a CLIP: it lacks {name}")
    shape = tensors[name].shape
    if len(shape) != axes or not all(shape):
        raise ConvertError(f"the file does not fit: {name} has the shape {list(shape)}; it must have {axes} axes")
    return shape


def _mlp_width(tensors: Mapping[str, np.ndarray], names: _Names, block: str, width: int) -> int | None:
    """Return the width inside the mlp, None for the usual four times the width."""
    name = f"{block.replace('#', '0')}.{names.mlp[0]}.weight"
    inside = shape_of(tensors, name, 2)[0] if name in tensors else 4 * width
    return None if inside == 4 * width else inside


def _heads(width: int, head_width: int, tower: str) -> int:
    if width % head_width:
        raise ValueError(f"{head_width=} must divide the {tower} width, which is {width}")
    return width // head_width


def export_clip(params: Mapping[str, Any], dialect: Dialect) -> dict[str, np.ndarray]:
    """Return the reference implementation's tensors, float32; they load strictly there.

    Either dialect may be asked of any CLIP but one with a ResNet, which "openai" alone has. Its file also has PyTorch's
    counters of batches, int64 zeros.

    Raises:
        ValueError: for another dialect, a ResNet in "hf", or a convolutional stem, which no reference implementation
            has.
    """
    if dialect not in NAMES:
        raise ValueError(f"{dialect=} must be one of {', '.join(NAMES)}")
    if any(name.startswith("stem") for name in params.get("vision", {})):
        raise ValueError("a CLIP with a stem of convolutions has no counterpart in another library")
    resnet = layers_of(params.get("vision", {}))
    if resnet and dialect != "openai":
        raise ValueError(f"{dialect=} has no CLIP with a ResNet; it must be openai")
    text = len(params["text"]["transformer"]) if "text" in params else None
    vision = resnet or (len(params["vision"]["transformer"]) if "vision" in params else None)
    table = clip_table(dialect, text, vision)
    return to_reference(table, params) | counters(table)


def _shapes(model: CLIP) -> Any:
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    shapes = {}
    if model.vision is not None:
        images = spec(1, model.vision.image_size, model.vision.image_size, 3)
        shapes |= parameter_shapes(model, images, method="encode_image")
    params = dict(shapes.get("params", {}))
    if model.text is not None:
        tokens = spec(1, model.text.context, dtype=jnp.int32), spec(1, model.text.context, dtype=jnp.bool_)
        made = parameter_shapes(model, *tokens, method="encode_text")
        params |= made["params"]
    return params
