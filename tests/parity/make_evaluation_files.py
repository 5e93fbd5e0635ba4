"""Write tests/data/evaluation.npz: what the reference tools compute of the features in test_evaluation_statistics.py.

    pip install torch scipy && pip install --no-deps torch-fidelity pytorch-fid
    git clone https://github.com/openai/guided-diffusion
    GUIDED_DIFFUSION=guided-diffusion python tests/parity/make_evaluation_files.py

guided-diffusion's evaluator needs TensorFlow for its Inception graph, for the softmax and for blocks of distances; the
latter two are numpy here, in float32. (In TensorFlow the blocks are in half precision where that does not overflow.)
"""

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent))
from make_clip_files import stand_in_for_torchvision

OUT = Path(__file__).parent.parent / "data" / "evaluation.npz"


class Distances:
    """guided-diffusion's DistanceBlock in numpy."""

    def __init__(self, dtype: Any = np.float32):
        self.dtype = dtype

    def pairwise_distances(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return squared distances, float32[U, V]."""
        u, v = u.astype(self.dtype), v.astype(self.dtype)
        squares = np.square(u).sum(1)[:, None] - 2 * (u @ v.T) + np.square(v).sum(1)[None]
        return np.maximum(squares, 0.0).astype(np.float32)

    def less_thans(self, u: np.ndarray, radii_u: np.ndarray, v: np.ndarray, radii_v: np.ndarray) -> tuple:
        """Return which of each are in a ball of the other."""
        distances = self.pairwise_distances(u, v)[..., None]
        return (distances <= radii_v).any(1), (distances <= radii_u[:, None]).any(0)


def guided_evaluator() -> Any:
    """Return guided-diffusion's evaluator.py as a module."""
    stubs = {name: types.ModuleType(name) for name in ("requests", "tensorflow", "tensorflow.compat")}
    stubs["tensorflow.compat.v1"] = stubs["tensorflow.compat"].v1 = types.ModuleType("tensorflow.compat.v1")
    stubs["tensorflow"].compat = stubs["tensorflow.compat"]
    path = Path(os.environ["GUIDED_DIFFUSION"]) / "evaluations" / "evaluator.py"
    spec = importlib.util.spec_from_file_location("guided_evaluator", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    module.linalg = types.SimpleNamespace(sqrtm=sqrtm)
    return module


def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
    """Return scipy's, which has lost the argument `disp`."""
    import scipy.linalg

    found = scipy.linalg.sqrtm(matrix)
    return found if disp else (found, 0.0)


def guided_numbers(x: np.ndarray, y: np.ndarray, logits: np.ndarray, dtype: Any = np.float32) -> dict[str, Any]:
    """Return FID, Inception Score, precision and recall of guided-diffusion's evaluator."""
    module = guided_evaluator()
    evaluator = object.__new__(module.Evaluator)
    evaluator.softmax_batch_size, evaluator.softmax = 512, None
    session = lambda _, feed_dict: torch.softmax(torch.from_numpy(next(iter(feed_dict.values()))).double(), 1).numpy()
    evaluator.sess, evaluator.softmax_input = types.SimpleNamespace(run=session), None
    with mock.patch.object(module, "DistanceBlock", lambda session: Distances(dtype)):
        evaluator.manifold_estimator = module.ManifoldEstimator(None, row_batch_size=100, col_batch_size=100)
    np.bool = bool
    fid = evaluator.compute_statistics(x).frechet_distance(evaluator.compute_statistics(y))
    size = len(logits) // 10
    parts = [evaluator.compute_inception_score(logits[i * size : (i + 1) * size], size) for i in range(10)]
    assert np.isclose(np.mean(parts), evaluator.compute_inception_score(logits, size))
    pair = evaluator.compute_prec_recall(y, x)
    return {
        "fid/guided_diffusion": fid,
        "is/guided_diffusion": (np.mean(parts), np.std(parts)),
        "pr/guided_diffusion": pair,
    }


def numbers(x: np.ndarray, y: np.ndarray, logits: np.ndarray, subsets: int, subset_size: int) -> dict[str, Any]:
    """Return the numbers of the three tools."""
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
    return found | guided_numbers(x, y, logits)


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
