"""Features that the evaluation's tests and the reference tools are given."""

import numpy as np


def features():
    """Return samples, a reference and logits, float32[300, 16], [260, 16] and [300, 10]."""
    rng = np.random.RandomState(7)
    mix = rng.standard_normal((16, 16)) / 4
    x = (rng.standard_normal((300, 16)) @ mix + 0.3).astype(np.float32)
    y = (rng.standard_normal((260, 16)) @ mix * 1.2).astype(np.float32)
    return x, y, (2 * rng.standard_normal((300, 10))).astype(np.float32)


def spatial_features(count=3000):
    """Return samples and a reference, float32[count, 2023]: 7 channels at 17 x 17 positions, correlated like images'.

    More vectors than numbers, so that the covariances have full rank.
    """
    rng = np.random.RandomState(11)
    place = np.arange(17)
    root = np.linalg.cholesky(0.7 ** np.abs(place[:, None] - place))
    mix = rng.standard_normal((7, 7)) / 7**0.5
    sets = []
    for scale, shift in ((1.0, 0.3), (1.2, 0.0)):
        noise = rng.standard_normal((count, 17, 17, 7))
        smooth = np.einsum("ai,bj,nijc,cd->nabd", root, root, noise, mix, optimize=True)
        sets.append((scale * smooth + shift).reshape(count, -1).astype(np.float32))
    return sets
