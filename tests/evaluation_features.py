"""Features that the evaluation's tests and the reference tools are given."""

import numpy as np


def features():
    """Return samples, a reference and logits, float32[300, 16], [260, 16] and [300, 10]."""
    rng = np.random.RandomState(7)
    mix = rng.standard_normal((16, 16)) / 4
    x = (rng.standard_normal((300, 16)) @ mix + 0.3).astype(np.float32)
    y = (rng.standard_normal((260, 16)) @ mix * 1.2).astype(np.float32)
    return x, y, (2 * rng.standard_normal((300, 10))).astype(np.float32)
