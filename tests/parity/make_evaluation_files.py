"""Write tests/data/evaluation.npz: what the reference tools compute of the features in test_evaluation_statistics.py.

    pip install torch scipy && pip install --no-deps torch-fidelity pytorch-fid
    python tests/parity/make_evaluation_files.py

The numbers of guided-diffusion's evaluator are written by make_guided_evaluation.py.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent))
from make_clip_files import stand_in_for_torchvision

OUT = Path(__file__).parent.parent / "data" / "evaluation.npz"


def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
    """Return scipy's, which has lost the argument `disp`."""
    found = scipy.linalg.sqrtm(matrix)
    return found if disp else (found, 0.0)


def numbers(x: np.ndarray, y: np.ndarray, logits: np.ndarray, subsets: int, subset_size: int) -> dict[str, Any]:
    """Return the numbers of the two tools."""
    stand_in_for_torchvision()
    import torch_fidelity.metric_fid as fid
    import torch_fidelity.metric_isc as isc
    import torch_fidelity.metric_kid as kid
    import torch_fidelity.metric_prc as prc

    a, b, c = (torch.from_numpy(array) for array in (x, y, logits))
    statistics = [fid.fid_features_to_statistics(features) for features in (a, b)]
    found = {"fid/torch_fidelity": fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]}
    spec = importlib.util.find_spec("pytorch_fid.fid_score")
    source = Path(spec.origin).read_text()
    start = source.index("def calculate_frechet_distance")
    scope: dict[str, Any] = {"np": np, "linalg": types.SimpleNamespace(sqrtm=sqrtm)}
    exec(source[start : source.index("\ndef ", start + 1)], scope)  # the rest of the file wants torchvision
    moments = [(features.mean(0, dtype=np.float64), np.cov(features, rowvar=False)) for features in (x, y)]
    found["fid/pytorch_fid"] = scope["calculate_frechet_distance"](*moments[0], *moments[1])
    found["is/torch_fidelity"] = tuple(isc.isc_features_to_metric(c).values())
    how = {"kid_subsets": subsets, "kid_subset_size": subset_size, "verbose": False, "rng_seed": 2020}
    found["kid"] = tuple(kid.kid_features_to_metric(a, b, **how).values())
    pair = prc.prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False)
    found["pr/torch_fidelity"] = (pair["precision"], pair["recall"])
    return found


def main() -> None:
    """Write the file."""
    from evaluation_features import features

    found = {name: np.array(value) for name, value in numbers(*features(), 20, 100).items()}
    for name, value in found.items():
        print(name, value)
    np.savez_compressed(OUT, **found)
    print(OUT.name, OUT.stat().st_size)


if __name__ == "__main__":
    main()
