"""Random weights that need not be stored beside expected outputs: the same numbers in any process. Needs numpy only."""

import zlib

import numpy as np


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 arrays, each drawn from its own name and the seed, none of them zero.

    Matrices and kernels have variance 1 / fan-in of PyTorch's layout (all axes but the first), gains of norms (vectors
    named "weight") are around one, stored variances are around 0.45, which undoes what ReLU halves, and everything else
    is around zero.
    """
    found = {}
    for name, shape in shapes.items():
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(tuple(shape))
        if len(shape) > 1:
            noise = noise / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("running_var"):
            noise = 0.4 + 0.1 * np.abs(noise)
        elif name.endswith("weight"):
            noise = 1.0 + 0.2 * noise
        elif name.endswith("logit_scale"):
            noise = noise + 2.0
        else:
            noise = 0.2 * noise
        found[name] = np.asarray(noise, np.float32)
    return found
