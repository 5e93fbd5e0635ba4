"""Write tests/data/inception.npz: what torch-fidelity's Inception network returns, for test_interop_inception.py.

    pip install torch && pip install --no-deps torch-fidelity
    python tests/parity/make_inception_files.py

Every weight is random (tests/random_weights.py), so no file is downloaded. torchvision gets a stand-in.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent))
from make_clip_files import stand_in_for_torchvision
from random_weights import random_weights

OUT = Path(__file__).parent.parent / "data" / "inception.npz"
NAMES = ("64", "192", "768", "2048", "logits_unbiased", "logits")


@torch.no_grad()
def main() -> None:
    """Write the file."""
    stand_in_for_torchvision()
    import torch_fidelity.feature_extractor_inceptionv3 as module

    kind = module.FeatureExtractorInceptionV3
    load, module.load_state_dict_from_url = kind.load_state_dict, lambda *_, **__: {}
    kind.load_state_dict = lambda *_, **__: None
    model = kind("inception-v3-compat", list(NAMES))
    kind.load_state_dict = load
    shapes = {
        name: tuple(array.shape)
        for name, array in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    model.load_state_dict({k: torch.from_numpy(a) for k, a in random_weights(shapes).items()}, strict=False)
    x = torch.randint(0, 256, (3, 3, 40, 52), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    x[1] = (torch.arange(40)[:, None] * 4 + torch.arange(52)[None]).byte()
    spatial = []  # of sFID: mixed_6/conv of the TensorFlow graph
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, output: spatial.append(output[:, :7]))
    out = dict(zip(NAMES, model.eval()(x), strict=True))
    for name, features in out.items():
        print(
            name,
            tuple(features.shape),
            "mean",
            float(features.mean()),
            "between pictures",
            float(features.std(0).mean()),
        )
    half = torch.nn.functional.interpolate(x.float(), (299, 299), mode="bilinear", align_corners=False)
    arrays = {f"out/{name}": features.numpy() for name, features in out.items()}
    arrays |= {"half_pixel": half[:, :, ::23, ::23].numpy(), "images": x.numpy(), "shapes": json.dumps(shapes)}
    arrays["spatial"] = spatial[0].numpy()
    resized = module.interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(299, 299), align_corners=False)
    np.savez_compressed(OUT, tensorflow=resized[:, :, ::23, ::23].numpy(), **arrays)
    print(OUT.name, OUT.stat().st_size)


if __name__ == "__main__":
    main()
