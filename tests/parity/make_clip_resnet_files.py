"""Write tests/data/clip_resnet.npz: a tiny CLIP with a ResNet, what it was given and what it returned.

    pip install torch jax flax open-clip-torch ftfy regex timm && pip install --no-deps clip-anytorch
    python tests/parity/make_clip_resnet_files.py

The reference is clip/model.py of clip-anytorch, OpenAI's file; the rest of that package is not imported. open_clip must
return the same for the same weights, and both must load what `export_clip` writes, strictly: this file checks that. Of
the published networks, which are only built on torch's meta device, it writes how many numbers they have.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

sys.path += [str(Path(__file__).parents[i]) for i in (0, 1, 2)]
from make_clip_files import stand_in_for_torchvision
from random_weights import random_weights

from ddpm_jax.interop.clip import export_clip, load_clip

OUT = Path(__file__).parent.parent / "data" / "clip_resnet.npz"
TINY = {
    "embed_dim": 24, "image_resolution": 64, "vision_layers": (1, 2, 1, 1), "vision_width": 16,
    "context_length": 16, "vocab_size": 64, "transformer_width": 32, "transformer_heads": 4, "transformer_layers": 2,
}  # fmt: skip
# embed_dim, image_resolution, vision_layers, vision_width, transformer_width of OpenAI's files.
PUBLISHED = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, 512), "RN101": (512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, 640), "RN50x16": (768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, 1024),
}  # fmt: skip


def openai_model() -> ModuleType:
    """Load clip/model.py alone."""
    package = importlib.util.find_spec("clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("openai_model", Path(package) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(module: ModuleType) -> dict[str, dict]:
    """Return the sizes of OpenAI's networks: arguments, parameters, and numbers of the batch norms' statistics."""
    import open_clip

    found = {}
    for name, (embed_dim, size, layers, width, text_width) in PUBLISHED.items():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        assert (embed_dim, size, layers, width) == (
            config["embed_dim"], vision["image_size"], tuple(vision["layers"]), vision["width"]
        )  # fmt: skip
        assert (text_width, text_width // 64, 12, 77, 49408) == (
            text["width"], text["heads"], text["layers"], text["context_length"], text["vocab_size"]
        )  # fmt: skip
        with torch.device("meta"):
            model = module.CLIP(embed_dim, size, layers, width, None, 77, 49408, text_width, text_width // 64, 12)
        statistics = sum(x.numel() for name, x in model.named_buffers() if "running" in name)
        found[name] = {
            "embed_dim": embed_dim, "image_size": size, "layers": layers, "width": width, "text_width": text_width,
            "parameters": sum(x.numel() for x in model.parameters()), "statistics": statistics,
        }  # fmt: skip
    return found


def tiny_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the weights that test_interop_clip_resnet.py has too."""
    weights = random_weights(shapes)
    weights["visual.attnpool.q_proj.weight"] /= 4  # features of this size would make attention choose one position
    return weights | {name: np.asarray(7) for name in shapes if name.endswith("num_batches_tracked")}


def outputs(model: torch.nn.Module, pixels: torch.Tensor, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Return embeddings and logits."""
    z_image, z_text = model.encode_image(pixels), model.encode_text(tokens)
    unit = lambda z: z / z.norm(dim=-1, keepdim=True)
    logits = model.logit_scale.exp() * unit(z_image) @ unit(z_text).T
    found = {"z_image": z_image, "z_text": z_text, "logits": logits}
    return {name: value.numpy() for name, value in found.items()}


@torch.no_grad()
def main() -> None:
    """Write the file."""
    module = openai_model()
    stand_in_for_torchvision()
    from open_clip.model import CLIP

    model = module.CLIP(**TINY, vision_patch_size=None)
    shapes = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    weights = tiny_weights(shapes)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    model.eval()
    other = CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 64, "layers": (1, 2, 1, 1), "width": 16},
        text_cfg={"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
        quick_gelu=True,
    ).eval()

    rng = np.random.default_rng(9)
    # Large and small patches: means over positions would wash out noise of single pixels. float16 halves the file.
    patches = [np.kron(rng.standard_normal((3, 64 // n, 64 // n)), np.ones((n, n))) for n in (32, 16, 4)]
    pixels = torch.from_numpy(np.stack(patches)).half().float()
    tokens = torch.zeros(3, 16, dtype=torch.long)
    tokens[0, :6] = torch.tensor([62, 5, 9, 11, 7, 63])
    tokens[1] = torch.tensor([62, *range(1, 15), 63])
    tokens[2, :3] = torch.tensor([62, 4, 63])
    found = outputs(model, pixels, tokens)
    np.testing.assert_allclose(model(pixels, tokens)[0], found["logits"], atol=1e-5)
    for name in ("z_image", "z_text"):
        spread, scale = found[name].std(0).mean(), np.abs(found[name]).mean()
        print(name, "spread", spread, "scale", scale)
        assert spread > 0.1 * scale, name

    exported = export_clip(load_clip(weights, head_width=(8, 64)).params, "openai")
    for reference in (model, other):
        for array in reference.state_dict().values():
            array.zero_()
        reference.load_state_dict({name: torch.from_numpy(array) for name, array in exported.items()}, strict=True)
        for name, value in outputs(reference, pixels, tokens).items():
            np.testing.assert_allclose(value, found[name], atol=2e-5, err_msg=name)
            print(type(reference).__module__, name, np.abs(value - found[name]).max())

    arrays = {f"out/{name}": value for name, value in found.items()}
    arrays |= {"pixels": pixels.numpy().astype(np.float16), "tokens": tokens.numpy()}
    sizes = published(module)
    for name, size in sizes.items():
        print(name, size)
    np.savez_compressed(OUT, shapes=json.dumps(shapes), published=json.dumps(sizes), **arrays)
    print(OUT.name, OUT.stat().st_size)


if __name__ == "__main__":
    main()
