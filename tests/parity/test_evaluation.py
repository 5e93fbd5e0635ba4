"""sFID of features as many as Inception has, against guided-diffusion's evaluator (make_guided_evaluation.py)."""

import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from evaluation_features import spatial_features  # noqa: E402

from ddpm_jax.evaluation.statistics import Moments, frechet_distance  # noqa: E402


def test_sfid_is_that_of_guided_diffusion():
    moments = []
    for vectors in spatial_features():
        moments.append(Moments(vectors.shape[1]))
        moments[-1].add(vectors)
    (x, y), reference = moments, np.load(TESTS / "data" / "evaluation_guided.npz")
    found = frechet_distance(x.mean, x.covariance, y.mean, y.covariance)
    assert found == pytest.approx(float(reference["sfid/guided_diffusion"]), rel=1e-6)
