"""Write tests/data/clip/*.npz: tiny CLIPs of other libraries, what they were given and what they returned.

    pip install torch transformers ftfy regex timm && pip install --no-deps open-clip-torch
    python tests/parity/make_clip_files.py

Every weight is random (tests/random_weights.py). torchvision is not needed: the towers do not use it, and imports that
do get a stand-in.
"""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent.parent))
from random_weights import random_weights

OUT = Path(__file__).parent.parent / "data" / "clip"
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "projection_dim": 24, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 24,
    "patch_size": 8, "projection_dim": 24,
}  # fmt: skip


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter the value that test_interop_clip.py gives it too."""
    shapes = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in random_weights(shapes).items()})
    return model.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and captions of different lengths; padded with 0, and in one case with the end token."""
    tokens = torch.zeros(3, 16, dtype=torch.long)
    tokens[0, :6] = torch.tensor([62, 5, 9, 11, 7, 63])
    tokens[1] = torch.tensor([62, *range(1, 15), 63])
    tokens[2] = torch.tensor([62, 4, *[63] * 14])
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(9)), tokens


def transformers_clip(activation: str) -> tuple[dict, dict]:
    """Return outputs and weights of CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    act = {"hidden_act": activation}
    model = CLIPModel(CLIPConfig(text_config=TEXT | act, vision_config=VISION | act, projection_dim=24))
    model, (pixels, tokens) = randomize(model), inputs()
    text, image = model.text_model(input_ids=tokens), model.vision_model(pixel_values=pixels)
    return {
        "hidden": text.last_hidden_state,
        "z_text": model.text_projection(text.pooler_output),
        "z_image": model.visual_projection(image.pooler_output),
        "logits": model(input_ids=tokens, pixel_values=pixels).logits_per_image,
    }, model.state_dict()


def open_clip_clip(quick: bool) -> tuple[dict, dict]:
    """Return outputs and weights of open_clip's CLIP, whose names are those of OpenAI's."""
    from open_clip.model import CLIP

    model = CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 24, "layers": 1, "width": 48, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
        quick_gelu=quick,
    )
    model, (pixels, tokens) = randomize(model), inputs()
    image, text, scale = model(pixels, tokens)
    found = {
        "z_text": model.encode_text(tokens),
        "z_image": model.encode_image(pixels),
        "logits": scale * image @ text.T,
    }
    return found, model.state_dict()


class _Anything(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (torch.nn.Module,), {})


def stand_in_for_torchvision() -> None:
    """Let open_clip import names that the towers never call."""
    for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".utils", ".models", ".datasets"):
        module = _StandIn(f"torchvision{name}")
        module.__path__, module.__version__ = [], "0.0"
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
        if name:
            setattr(sys.modules["torchvision" + name.rpartition(".")[0]], name.rpartition(".")[2], module)


def preprocessing() -> None:
    """Write what transformers' image processor, the one of Pillow, makes of images of several sizes."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 31, 3), (20, 57, 3), (24, 24, 3))]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    made = processor(images=[Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    np.savez_compressed(OUT / "pixels.npz", made=made, **{f"image_{i}": image for i, image in enumerate(images)})


@torch.no_grad()
def main() -> None:
    """Write the files."""
    OUT.mkdir(parents=True, exist_ok=True)
    preprocessing()
    pixels, tokens = inputs()
    made = {f"hf_{name}": transformers_clip(name) for name in ("quick_gelu", "gelu")}
    stand_in_for_torchvision()
    made |= {f"openai_{name}": open_clip_clip(name == "quick_gelu") for name in ("quick_gelu", "gelu")}
    for name, (found, weights) in made.items():
        arrays = {f"out/{key}": value.numpy() for key, value in found.items()}
        arrays["shapes"] = json.dumps({key: list(value.shape) for key, value in weights.items()})
        np.savez_compressed(OUT / f"{name}.npz", pixels=pixels.numpy(), tokens=tokens.numpy(), **arrays)
        print(name, (OUT / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
