"""Write tests/data/evaluation_guided.npz: what guided-diffusion's evaluator computes of the features of the tests.

    pip install torch scipy && git clone https://github.com/openai/guided-diffusion
    python tests/parity/make_guided_evaluation.py guided-diffusion

The evaluator is on no package registry. It needs TensorFlow for its Inception graph, for the softmax and for blocks of
distances; the latter two are numpy here, in float32. (In TensorFlow the blocks are in half precision where that does
not overflow.) scipy's root of a matrix takes minutes for the 2,023 dimensions of sFID; the same root is found by an
eigenvalue decomposition there.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.linalg
import torch

sys.path.append(str(Path(__file__).parent.parent))
from evaluation_features import features, spatial_features

OUT = Path(__file__).parent.parent / "data" / "evaluation_guided.npz"


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
    path = Path(sys.argv[1]) / "evaluations" / "evaluator.py"
    spec = importlib.util.spec_from_file_location("guided_evaluator", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    module.linalg = types.SimpleNamespace(sqrtm=sqrtm)
    return module


def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
    """Return scipy's, which has lost the argument `disp`."""
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


def principal_root(sigma: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Return the principal root of sigma @ other, sigma and other positive definite.

    With sigma = L L^T, L^-1 product L is symmetric and positive definite. The root is unique, so that it is scipy's.
    """
    factor = np.linalg.cholesky(sigma)
    similar = scipy.linalg.solve_triangular(factor, product @ factor, lower=True)
    values, vectors = np.linalg.eigh((similar + similar.T) / 2)
    assert values[0] > 0
    middle = (vectors * np.sqrt(values)) @ vectors.T
    root = scipy.linalg.solve_triangular(factor, (factor @ middle).T, lower=True, trans="T").T
    assert np.linalg.norm(root @ root - product) < 1e-8 * np.linalg.norm(product)
    return root


def sfid() -> float:
    """Return sFID of guided-diffusion's evaluator."""
    module = guided_evaluator()
    evaluator = object.__new__(module.Evaluator)
    x, y = (evaluator.compute_statistics(each) for each in spatial_features())
    module.linalg.sqrtm = lambda product, disp: (principal_root(x.sigma, product), 0.0)
    return x.frechet_distance(y)


def main() -> None:
    """Write the file."""
    found = guided_numbers(*features()) | {"sfid/guided_diffusion": sfid()}
    for name, value in found.items():
        print(name, value)
    np.savez_compressed(OUT, **{name: np.array(value) for name, value in found.items()})
    print(OUT.name, OUT.stat().st_size)


if __name__ == "__main__":
    main()
