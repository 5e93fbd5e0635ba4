"""Write tests/data/guided.npz: tiny networks of guided diffusion, and what they return, for test_interop_guided.py.

    pip install torch guided-diffusion-sdk
    python tests/parity/make_guided_files.py

guided-diffusion-sdk is openai/guided-diffusion under another name; without blocks that change the resolution its U-Net
is that of improved diffusion. Every weight is random (tests/random_weights.py).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

sys.path.append(str(Path(__file__).parent.parent))
from random_weights import random_weights

OUT = Path(__file__).parent.parent / "data" / "guided.npz"
COMMON = {
    "image_size": 16, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": (2,),
    "channel_mult": (1, 2), "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
UNET = COMMON | {"out_channels": 6}
NETWORKS = {
    "adm": (UNetModel, UNET | {"num_classes": 10}),
    "new_order": (UNetModel, UNET | {"use_new_attention_order": True}),
    "improved": (
        UNetModel,
        UNET | {"resblock_updown": False, "use_scale_shift_norm": False, "num_head_channels": -1, "num_heads": 4},
    ),
    "wide": (UNetModel, UNET | {"channel_mult": (2, 1, 1), "num_res_blocks": 2, "attention_resolutions": (2, 4)}),
    "upsampler": (SuperResModel, UNET | {"num_classes": 10}),
} | {
    f"classifier/{pool}": (EncoderUNetModel, COMMON | {"out_channels": 10, "pool": pool})
    for pool in ("attention", "adaptive", "spatial", "spatial_v2")
}

# Of one image each, of in_channels channels.
OTHERS = {
    "heads_up": UNET | {"num_head_channels": -1, "num_heads": 4, "num_heads_upsample": 2, "in_channels": 4,
                        "use_new_attention_order": True},
    "pooled": UNET | {"resblock_updown": False, "conv_resample": False, "in_channels": 1, "out_channels": 2,
                      "num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
}  # fmt: skip


def randomized(kind: type[torch.nn.Module], options: dict) -> tuple[torch.nn.Module, str]:
    """Return a network with random weights, and their shapes."""
    model = kind(**options).eval()
    shapes = {key: tuple(array.shape) for key, array in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(array) for key, array in random_weights(shapes).items()})
    return model, json.dumps(shapes)


@torch.no_grad()
def main() -> None:
    """Write the file."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 16, 16, generator=generator)
    low = torch.randn(3, 3, 4, 4, generator=generator)
    t, y = torch.tensor([0.0, 417.0, 999.0]), torch.tensor([3, 0, 9])
    out = {"x": x.numpy(), "low": low.numpy(), "t": t.numpy(), "y": y.numpy()}
    for name, (kind, options) in NETWORKS.items():
        model, out[f"{name}/shapes"] = randomized(kind, options)
        given = {"y": y} if "num_classes" in options else {}
        given |= {"low_res": low} if kind is SuperResModel else {}
        out[f"{name}/out"] = model(x, t, **given).numpy()
        print(name, out[f"{name}/out"].std())
    for name, options in OTHERS.items():
        model, out[f"{name}/shapes"] = randomized(UNetModel, options)
        x = torch.randn(1, options["in_channels"], 16, 16, generator=generator)
        out |= {f"{name}/x": x.numpy(), f"{name}/out": model(x, t[1:2]).numpy()}
        print(name, out[f"{name}/out"].std())
    # Images of other sizes than 16 x 16, which the networks were built for.
    x = torch.randn(1, 3, 8, 32, generator=generator)
    out |= {"size/x": x.numpy(), "size/out": randomized(UNetModel, UNET)[0](x, t[1:2]).numpy()}
    classifier = randomized(EncoderUNetModel, COMMON | {"out_channels": 10, "pool": "adaptive"})[0]
    out["size/classifier"] = classifier(x, t[1:2]).numpy()
    np.savez_compressed(OUT, **out)
    print(OUT.name, OUT.stat().st_size)


if __name__ == "__main__":
    main()
