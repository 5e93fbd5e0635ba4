"""The sizes of every published network that can be loaded, without its weights.

    python examples/published_sizes.py [PART OF A NAME ...]

builds each network at its published size, shapes without numbers, writes the shapes of its parameters in the layout of
the library that it comes from, and compares names and shapes with what that library has
(tests/data/published_sizes.json, by tests/parity/make_published_sizes.py). Prints one markdown table: the parameters
here, the numbers in the file, what paper or model card say, and whether names and shapes agree.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop import glide, karlo, noised_clip, stable_diffusion
from ddpm_jax.interop.clip import clip_table
from ddpm_jax.interop.guided import PUBLISHED, guided_shapes, guided_table
from ddpm_jax.interop.modified_resnet import counters
from ddpm_jax.interop.table import Entry
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.modified_resnet import ModifiedResNet
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import TextEncoder

EXPECTED = Path(__file__).parent.parent / "tests" / "data" / "published_sizes.json"
Shapes = dict[str, tuple[int, ...]]


class Network(NamedTuple):
    """A network without its numbers: table, our parameters' shapes, and what a file holds besides."""

    table: list[Entry]
    shapes: Mapping[str, Any]
    besides: Shapes = {}


class Row(NamedTuple):
    """A published network; published: parameters by its paper or model card, where they say."""

    family: str
    build: Callable[[], Network]
    published: str = ""


def ours(network: Network) -> Shapes:
    """Return the shapes of our parameters by their paths."""
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(network.shapes, sep="/").items()}


def theirs(network: Network) -> Shapes:
    """Return what the file holds, names and shapes, as our table writes it."""
    found, shapes = dict(network.besides), ours(network)
    for entry in network.table:
        zeros = np.broadcast_to(np.float32(0.0), shapes[entry.ours])
        for name, array in zip(entry.theirs, entry.layout.write(zeros), strict=True):
            found[name] = array.shape
    return found


def size(shapes: Shapes) -> int:
    """Return how many numbers arrays of these shapes hold."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def digest(shapes: Shapes) -> str:
    """Return the SHA-256 of the names and shapes in order of the names, one a line."""
    lines = "".join(f"{name} {list(shape)}\n" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _init(model: nn.Module, *inputs: tuple[int, ...] | jax.ShapeDtypeStruct, **options: Any) -> Any:
    """Return the shapes of a network's parameters; a tuple stands for a float32 array of that shape."""
    inputs = [jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x for x in inputs]
    return jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **options), *inputs)["params"]


def _clip(vision: nn.Module, embed_dim: int, width: int, dialect: str = "openai") -> Network:
    model = CLIP(vision, TextEncoder(49408, 77, width, 12, width // 64), embed_dim)
    images = (1, vision.image_size, vision.image_size, 3)
    tokens = [jax.ShapeDtypeStruct((1, 77), dtype) for dtype in (jnp.int32, jnp.bool_)]
    table = clip_table(dialect, 12, vision.layers)
    besides = {name: array.shape for name, array in counters(table).items()}
    return Network(table, _init(model, images, *tokens), besides)


def _vit(size: int, patch: int, large: bool, dialect: str) -> Network:
    vision = VisionTransformer(size, patch, *((1024, 24, 16) if large else (768, 12, 12)))
    return _clip(vision, *((768, 768) if large else (512, 512)), dialect)


def _resnet(size: int, width: int, layers: tuple[int, ...], embed_dim: int, text: int) -> Network:
    return _clip(ModifiedResNet(size, width, layers, embed_dim), embed_dim, text)


def _guided(name: str) -> Network:
    published = PUBLISHED[name]
    model, options = published.model(), (published.image_size, published.new_attention_order)
    return Network(guided_table(model, *options), guided_shapes(model, published.image_size))


def _glide(model: Any, image_size: int, channels: int) -> Network:
    return Network(glide.glide_table(model, image_size), glide.glide_shapes(model, image_size, channels))


def _prior() -> Network:
    prior = DiffusionPrior(768, 77, 2048, 20, 32)
    mask = jax.ShapeDtypeStruct((1, 77), jnp.bool_)
    shapes = _init(prior, (1, 768), (1,), (1, 768), (1, 77, 768), mask)
    return Network(karlo.prior_table(81, 2048, 20), shapes, dict.fromkeys(karlo.STATISTICS, (1, 768)))


def _decoder(unet: bool) -> Network:
    """Return one of the two files of Karlo's decoder: the U-Net, or the projection of its conditions (text_proj)."""
    decoder = karlo.DECODER()
    mask = jax.ShapeDtypeStruct((1, 5), jnp.bool_)
    shapes = _init(decoder, (1, 64, 64, 3), (1,), (1, 768), (1, 768), (1, 5, 768), mask)
    table = [
        Entry(entry.ours, tuple(name.split(".", 1)[1] for name in entry.theirs), entry.layout)
        for entry in karlo.decoder_table(decoder, 64)
        if entry.ours.startswith("unet/") == unet
    ]
    return Network(table, {name: part for name, part in shapes.items() if (name == "unet") == unet})


def _upsampler() -> Network:
    model = karlo.UPSAMPLER()
    shapes = _init(model, (1, 256, 256, 3), (1,), (1, 64, 64, 3))
    return Network(karlo.unet_table(model.unet, 256, "unet/", ""), shapes)


def _noised(tower: str) -> Network:
    model = noised_clip.NOISED_CLIP()
    table = noised_clip.text_table(model) if tower == "text" else noised_clip.image_table(model)
    parts = {entry.ours.partition("/")[0] for entry in table}
    shapes = noised_clip.noised_clip_shapes(model)
    return Network(table, {name: part for name, part in shapes.items() if name in parts})


def _stable(part: str) -> Network:
    if part == "unet":
        model = stable_diffusion.UNET()
        return Network(stable_diffusion.unet_table(model), stable_diffusion.unet_shapes(model, 768))
    model = stable_diffusion.AUTOENCODER()
    return Network(stable_diffusion.autoencoder_table(model), stable_diffusion.autoencoder_shapes(model))


_CLIPS = {"ViT-B-32": (224, 32, False), "ViT-B-16": (224, 16, False), "ViT-L-14": (224, 14, True),
          "ViT-L-14-336": (336, 14, True)}  # fmt: skip
_OPENAI, _HF, _ADM, _IDDPM = (
    "CLIP, OpenAI and open_clip",
    "CLIP, transformers",
    "guided diffusion",
    "improved diffusion",
)
_KARLO, _GLIDE, _NOISED, _STABLE = "Karlo, diffusers", "GLIDE", "GLIDE's noised CLIP", "Stable Diffusion 1, diffusers"
# Dhariwal & Nichol 2021, tables 11 and 12; Nichol & Dhariwal 2021, section 6, the names of its files and its README.
_ADM_SIZES = {
    "64x64_diffusion": "296 M", "128x128_diffusion": "422 M", "256x256_diffusion": "554 M",
    "256x256_diffusion_uncond": "", "512x512_diffusion": "559 M", "64_256_upsampler": "312 M", "128_512_upsampler": "",
    "lsun": "552 M", "64x64_classifier": "65 M", "128x128_classifier": "43 M", "256x256_classifier": "54 M",
    "512x512_classifier": "54 M",
}  # fmt: skip
_IDDPM_SIZES = {
    "imagenet64_uncond_100M_1500K": "120 M", "imagenet64_uncond_vlb_100M_1500K": "120 M",
    "cifar10_uncond_50M_500K": "50 M", "cifar10_uncond_vlb_50M_500K": "50 M", "imagenet64_cond_270M_250K": "270 M",
    "upsample_cond_500K": "280 M", "lsun_uncond_100M_1200K_bs128": "100 M", "lsun_uncond_100M_2400K_bs64": "100 M",
}  # fmt: skip

ROWS = {
    **{f"openai/{name}": Row(_OPENAI, lambda x=x: _vit(*x, "openai")) for name, x in _CLIPS.items()},
    **{f"transformers/{name}": Row(_HF, lambda x=x: _vit(*x, "hf")) for name, x in _CLIPS.items()},
    "openai/RN50": Row(_OPENAI, lambda: _resnet(224, 64, (3, 4, 6, 3), 1024, 512)),
    "openai/RN101": Row(_OPENAI, lambda: _resnet(224, 64, (3, 4, 23, 3), 512, 512)),
    "openai/RN50x4": Row(_OPENAI, lambda: _resnet(288, 80, (4, 6, 10, 6), 640, 640)),
    "openai/RN50x16": Row(_OPENAI, lambda: _resnet(384, 96, (6, 8, 18, 8), 768, 768)),
    "openai/RN50x64": Row(_OPENAI, lambda: _resnet(448, 128, (3, 15, 36, 10), 1024, 1024)),
    "karlo/prior": Row(_KARLO, _prior, "1 B"),
    "karlo/decoder": Row(_KARLO, lambda: _decoder(True), "900 M"),
    "karlo/text_proj": Row(_KARLO, lambda: _decoder(False)),
    "karlo/super_res_first": Row(_KARLO, _upsampler, "700 M"),
    "karlo/super_res_last": Row(_KARLO, _upsampler, "700 M"),
    **{name: Row(_ADM, lambda name=name: _guided(name), published) for name, published in _ADM_SIZES.items()},
    **{name: Row(_IDDPM, lambda name=name: _guided(name), published) for name, published in _IDDPM_SIZES.items()},
    "glide/base": Row(_GLIDE, lambda: _glide(glide.BASE(), 64, 3)),
    "glide/upsample": Row(_GLIDE, lambda: _glide(glide.UPSAMPLER(), 256, 6)),
    "glide/base-inpaint": Row(_GLIDE, lambda: _glide(glide.BASE(), 64, 7)),
    "glide/upsample-inpaint": Row(_GLIDE, lambda: _glide(glide.UPSAMPLER(), 256, 10)),
    "glide/image-enc": Row(_NOISED, lambda: _noised("image")),
    "glide/text-enc": Row(_NOISED, lambda: _noised("text")),
    "stable-diffusion/unet": Row(_STABLE, lambda: _stable("unet")),
    "stable-diffusion/vae": Row(_STABLE, lambda: _stable("vae")),
}


def lines(names: Iterable[str], expected: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Yield the rows of the table in markdown."""
    yield "| network | family | parameters here | numbers in the file | published | names and shapes |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    for name in names:
        row = ROWS[name]
        network = row.build()
        agrees = digest(theirs(network)) == expected[name]["sha256"]
        yield (
            f"| {name} | {row.family} | {size(ours(network)):,} | {expected[name]['numbers']:,} | {row.published} | "
            f"{expected[name]['tensors']} {'agree' if agrees else 'DIFFER'} |"
        )


def main() -> None:
    """Print the table of all networks, or of those whose names contain an argument."""
    names = [name for name in ROWS if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    for line in lines(names, json.loads(EXPECTED.read_text())):
        print(line, flush=True)
    print()
    print(
        "Where the first two numbers differ: Karlo's files hold the statistics of embeddings besides and no vectors\n"
        "for dropped text, which are zeros here; ResNets' files hold a counter for each batch norm; and the keys of\n"
        "GLIDE's noised CLIP have no bias there and zeros here."
    )


if __name__ == "__main__":
    main()
