"""Fingerprint of parameters, so that a stage is only used with the networks that it was trained with."""

import hashlib
from typing import Any

import jax
import numpy as np


def tree_fingerprint(tree: Any) -> str:
    """Return a SHA-256 over all arrays of a tree, in the order of their names."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
