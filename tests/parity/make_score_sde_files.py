"""Write tests/data/score_sde.npz: tiny networks of score_sde_pytorch and their scores, for test_interop_score_sde.py.

    git clone https://github.com/yang-song/score_sde_pytorch && pip install torch ml_collections
    PYTHONPATH=score_sde_pytorch python tests/parity/make_score_sde_files.py

Every weight is random (tests/random_weights.py). CUDA operations are not compiled: on a CPU others are in their place.
Of the published configs the file has the number of parameters, and a hash of the names and shapes of the state.
"""

import hashlib
import importlib
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.utils.cpp_extension

torch.utils.cpp_extension.load = lambda *args, **options: None

import sde_lib  # noqa: E402
from configs.default_cifar10_configs import get_default_configs  # noqa: E402
from models import ncsnpp, up_or_down_sampling, utils  # noqa: E402

sys.path.append(str(Path(__file__).parent.parent))
from random_weights import random_weights  # noqa: E402

OUT = Path(__file__).parent.parent / "data" / "score_sde.npz"
SIZE, LEVELS = 8, 9
COMMON = {
    "name": "ncsnpp", "normalization": "GroupNorm", "nonlinearity": "swish", "nf": 16, "ch_mult": (1, 2),
    "num_res_blocks": 1, "attn_resolutions": (4,), "resamp_with_conv": True, "conditional": True, "fir": True,
    "fir_kernel": [1, 3, 3, 1], "skip_rescale": True, "resblock_type": "biggan", "progressive": "none",
    "progressive_input": "none", "progressive_combine": "sum", "init_scale": 0.0, "fourier_scale": 16,
    "embedding_type": "positional", "scale_by_sigma": False, "dropout": 0.1, "num_scales": 1000,
}  # fmt: skip
VE = {"scale_by_sigma": True, "embedding_type": "fourier"}
# (sde, continuous, the config of the model)
NETWORKS = {
    "ve": ("ve", True, VE | {"progressive_input": "residual"}),
    "vp": ("vp", True, {"fir": False}),
    "sub_vp": ("sub_vp", True, {"progressive_input": "residual"}),
    "skips": ("ve", True, VE | {"progressive": "output_skip", "progressive_input": "input_skip", "ch_mult": (1, 2, 2),
                                "progressive_combine": "cat"}),
    "smld": ("ve", False, VE | {"embedding_type": "positional", "progressive_input": "input_skip",
                                "num_scales": LEVELS}),
    "ddpm": ("vp", False, {"resblock_type": "ddpm", "fir": False, "skip_rescale": False,
                           "progressive_input": "residual", "progressive": "output_skip"}),
    "filters": ("vp", True, {"resblock_type": "ddpm", "progressive_input": "residual", "progressive": "residual",
                             "fir_kernel": [1, 2, 4, 1]}),
    "bare": ("vp", True, {"resblock_type": "ddpm", "fir": False, "resamp_with_conv": False,
                          "progressive_input": "input_skip", "progressive": "residual", "skip_rescale": False}),
}  # fmt: skip
PUBLISHED = [
    *(f"{sde}/cifar10_{net}{deep}_continuous" for sde in ("vp", "subvp") for net in ("ddpmpp", "ncsnpp")
      for deep in ("", "_deep")),
    "vp/cifar10_ddpmpp", "vp/cifar10_ncsnpp", "ve/cifar10_ncsnpp", "ve/cifar10_ncsnpp_continuous",
    "ve/cifar10_ncsnpp_deep_continuous", "ve/bedroom_ncsnpp_continuous", "ve/church_ncsnpp_continuous",
    "ve/celebahq_256_ncsnpp_continuous", "ve/ffhq_256_ncsnpp_continuous", "ve/ffhq_ncsnpp_continuous",
    "ve/celebahq_ncsnpp_continuous",
]  # fmt: skip


def fix_upsampling() -> None:
    """Let two operations that enlarge run, which no published network has.

    torch refuses slices of negative stride, strides of four axes, and the mode of interpolation in place of the scale.
    """
    interpolate = torch.nn.functional.interpolate
    torch.nn.functional.interpolate = lambda x, size, mode: interpolate(x, size, mode=mode)
    source = inspect.getsource(up_or_down_sampling.upsample_conv_2d)
    for wrong, right in (("w[..., ::-1, ::-1]", "torch.flip(w, (-2, -1))"), ("[1, 1, factor, factor]", "[factor] * 2")):
        assert wrong in source
        source = source.replace(wrong, right)
    exec(source, vars(up_or_down_sampling))  # noqa: S102


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what is stored."""
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@torch.no_grad()
def main() -> None:
    """Write the file."""
    fix_upsampling()
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for name, (kind, continuous, fields) in NETWORKS.items():
        config = get_default_configs()
        config.model.update(COMMON | fields)
        config.data.update(image_size=SIZE, centered=kind != "ve")
        config.training.continuous = continuous or fields.get("embedding_type") == "fourier"
        network = ncsnpp.NCSNpp(config).eval()
        shapes = {key: shape for key, shape in shapes_of(network).items() if key != "sigmas"}
        state = {key: torch.from_numpy(value) for key, value in random_weights(shapes).items()}
        assert network.load_state_dict(state, strict=False).missing_keys == ["sigmas"]
        x = torch.randn(2, 3, SIZE, SIZE, generator=generator)
        sde = {
            "ve": sde_lib.VESDE(0.01, 50, LEVELS),
            "vp": sde_lib.VPSDE(0.1, 20.0 if continuous else 5.0, LEVELS),
            "sub_vp": sde_lib.subVPSDE(0.1, 20.0, LEVELS),
        }[kind]
        t = torch.tensor([0.3, 0.8]) if continuous else torch.tensor([2, 7]) / (LEVELS - 1)
        score = utils.get_score_fn(sde, network, continuous=continuous)(x, t)
        trained = [key for key, value in network.named_parameters() if value.requires_grad]
        arrays |= {
            f"{name}/shapes": json.dumps(shapes),
            f"{name}/trained": json.dumps(trained),
            f"{name}/x": x.numpy(),
            f"{name}/t": t.numpy(),
            f"{name}/score": score.numpy(),
        }
        print(name, sum(int(np.prod(shape)) for shape in shapes.values()), score.std((1, 2, 3)))
    for name in PUBLISHED:
        config = importlib.import_module(f"configs.{name.replace('/', '.')}").get_config()
        shapes = shapes_of(ncsnpp.NCSNpp(config))
        text = json.dumps(sorted((key, list(shape)) for key, shape in shapes.items()))
        arrays[f"published/{name}/sha256"] = hashlib.sha256(text.encode()).hexdigest()
        arrays[f"published/{name}/count"] = sum(int(np.prod(shape)) for key, shape in shapes.items() if key != "sigmas")
        print(name, arrays[f"published/{name}/count"])
    np.savez_compressed(OUT, **arrays)
    print(OUT.name, OUT.stat().st_size)


if __name__ == "__main__":
    main()
