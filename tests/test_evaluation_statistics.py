"""Statistics of features against closed forms, numpy in float64 and reference tools (evaluation*.npz)."""

from pathlib import Path

import numpy as np
import pytest
from evaluation_features import features

from ddpm_jax.evaluation.bootstrap import bootstrap_means, interval
from ddpm_jax.evaluation.neighbours import bootstrap_kernel, kernel_distances, precision_recall
from ddpm_jax.evaluation.statistics import (
    ClassScores,
    Moments,
    bootstrap_frechet,
    bootstrap_score,
    frechet_distance,
    root,
)

DATA = Path(__file__).parent / "data"
REFERENCE = {**np.load(DATA / "evaluation.npz"), **np.load(DATA / "evaluation_guided.npz")}
RNG = np.random.RandomState(0)


def rotation(size, seed=0):
    return np.linalg.qr(np.random.RandomState(seed).standard_normal((size, size)))[0]


def test_moments_are_those_of_numpy_in_any_batches():
    x = RNG.standard_normal((500, 7)) @ RNG.standard_normal((7, 7)) + 1e6
    parts = [Moments(7), Moments(7)]
    for number, batch in enumerate(np.array_split(x, [3, 3, 100, 101, 480])):
        parts[number % 2].add(batch)
    parts[0].merge(parts[1])
    np.testing.assert_allclose(parts[0].mean, x.mean(0), rtol=1e-15)
    np.testing.assert_allclose(parts[0].covariance, np.cov(x - 1e6, rowvar=False), rtol=1e-8)
    with pytest.raises(ValueError, match="at least two images, got 1"):
        one = Moments(7)
        one.add(x[:1])
        assert one.covariance is None
    with pytest.raises(ValueError, match="not finite"):
        parts[0].add(np.full((1, 7), np.nan))


@pytest.mark.parametrize("exponents", [(0, 0), (-12, 4), (-30, 2)], ids=["plain", "condition 1e16", "singular"])
def test_frechet_distance_of_gaussians_on_the_same_axes(exponents):
    """Sum of (sqrt a - sqrt b)^2 over the axes."""
    size, q = 64, rotation(64)
    a, b = np.logspace(*exponents, size), np.logspace(*exponents[::-1], size)
    mean = RNG.standard_normal(size)
    found = frechet_distance(mean, (q * a) @ q.T, np.zeros(size), (q * b) @ q.T)
    wanted = mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert found == pytest.approx(wanted, rel=1e-7)


def test_frechet_distance_of_gaussians_on_other_axes():
    """With C_2 = T C_1 T, T positive, T is the optimal transport, and the distance tr (T - 1) C_1 (T - 1)."""
    q, r = rotation(40, 1), rotation(40, 2)
    first = (q * np.logspace(-9, 3, 40)) @ q.T
    transport = (r * np.linspace(0.5, 2, 40)) @ r.T
    second = transport @ first @ transport
    move = transport - np.eye(40)
    wanted = np.trace(move @ first @ move)
    assert frechet_distance(np.zeros(40), first, np.zeros(40), second) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(np.ones(40), first, np.ones(40), first) == pytest.approx(0.0, abs=1e-9)


def test_what_is_no_covariance_is_refused():
    for bad, message in (
        (np.diag([1.0, -1.0]), "no negative eigenvalue"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "symm"),
    ):
        with pytest.raises(ValueError, match=message):
            root(bad)
    with pytest.raises(ValueError, match=r"got the shapes \(2,\), \(3, 3\)"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))


def test_numbers_of_the_reference_tools():
    x, y, logits = features()
    ours, theirs = Moments(16), Moments(16)
    ours.add(x)
    theirs.add(y)
    fid = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    assert fid == pytest.approx(float(REFERENCE["fid/torch_fidelity"]), rel=1e-5)
    assert fid == pytest.approx(float(REFERENCE["fid/pytorch_fid"]), rel=1e-5)
    assert fid == pytest.approx(float(REFERENCE["fid/guided_diffusion"]), rel=1e-5)
    for seed, name in ((2020, "torch_fidelity"), (None, "guided_diffusion")):
        scores = ClassScores(300, 10, seed=seed)
        for begin in range(0, 300, 64):
            scores.add(np.arange(begin, min(begin + 64, 300)), logits[begin : begin + 64])
        found = (scores.scores().mean(), scores.scores().std())
        np.testing.assert_allclose(found, REFERENCE[f"is/{name}"], rtol=1e-5)
    kid = kernel_distances(x, y, subsets=20, subset_size=100)
    np.testing.assert_allclose((kid.mean(), kid.std()), REFERENCE["kid"], rtol=1e-4)
    inside = precision_recall(y, x)
    np.testing.assert_allclose([each.mean() for each in inside], REFERENCE["pr/torch_fidelity"], rtol=1e-6)
    np.testing.assert_allclose([each.mean() for each in inside], REFERENCE["pr/guided_diffusion"], rtol=1e-6)


def test_inception_scores_in_closed_form():
    scores = ClassScores(40, 8, splits=2)
    scores.add(np.arange(40), np.zeros((40, 8)))
    np.testing.assert_allclose(scores.scores(), 1.0)
    sure = ClassScores(40, 8, splits=1, seed=None)
    sure.add(np.arange(40), 1e3 * np.eye(8)[np.arange(40) % 8])
    np.testing.assert_allclose(sure.scores(), 8.0)


def test_precision_and_recall_in_blocks_and_by_hand(monkeypatch):
    """Points on a line; k = 1: the balls of the reference have radius 1, those of the samples 3 and 0.5."""
    reference, samples = np.array([[0.0], [1.0], [10.0], [11.0]]), np.array([[1.5], [4.5], [20.0], [20.5]])
    inside = precision_recall(reference, samples, k=1)
    np.testing.assert_array_equal(inside[0], [True, False, False, False])
    np.testing.assert_array_equal(inside[1], [True, True, False, False])
    x, y, _ = features()
    whole = precision_recall(y, x)
    monkeypatch.setattr("ddpm_jax.evaluation.neighbours.ROWS", 40)
    monkeypatch.setattr("ddpm_jax.evaluation.neighbours.COLUMNS", 128)
    for part, all_at_once in zip(precision_recall(y, x), whole, strict=True):
        np.testing.assert_array_equal(part, all_at_once)
    with pytest.raises(ValueError, match="k=4 must be at least 1 and less than the number of images, 4"):
        precision_recall(reference, samples, k=4)


def test_intervals_have_the_spread_of_new_samples():
    """The bootstrap's standard deviation is that of the number over independent sets, within its own error."""
    rng, size, mix = np.random.RandomState(3), 400, rotation(3, 5) * np.array([1.0, 2.0, 0.5])
    draw = lambda: (rng.standard_normal((size, 3)) ** 3 @ mix).astype(np.float32)  # noqa: E731
    mean, covariance = np.full(3, 0.5), np.eye(3)
    reference = rng.standard_normal((size, 3)).astype(np.float32)
    sets = [draw() for _ in range(40)]
    how = {"replicates": 60, "seed": 0}

    def fid(x):
        return frechet_distance(x.mean(0), np.cov(x, rowvar=False), mean, covariance)

    def kid(x):
        return kernel_distances(x, reference, subsets=1, subset_size=size)[0]

    def entropy(x):
        scores = ClassScores(size, 3, splits=1)
        scores.add(np.arange(size), x)
        return scores.scores()[0]

    fids = lambda x: bootstrap_frechet(x, mean, covariance, count=size, **how)  # noqa: E731
    kids = lambda x: bootstrap_kernel(x, reference, **how)  # noqa: E731
    inception = lambda x: bootstrap_score(x, count=size, **how)  # noqa: E731
    for value, replicates in ((fid, fids), (kid, kids), (entropy, inception)):
        spread = np.std([value(x) for x in sets])
        found = np.mean([replicates(x).std() for x in sets[:4]])
        assert 0.6 < found / spread < 1.6, (value.__name__, found, spread)
    flags = rng.rand(1000) < 0.3
    low, high = interval(flags.mean(), bootstrap_means(flags, replicates=400, seed=1))
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.3 * 0.7 / 1000), rel=0.15)
    assert interval(0.5, np.zeros(1)) is None
