"""Muon: momentum whose matrices are orthogonalized before they become an update (Jordan et al. 2024).

AdamW scales every number by itself. Muon takes the weights of a layer as one matrix and moves all of its directions by
about the same amount, the rare ones too. It is for the hidden matrices of a network; the rest stays with AdamW.

Sources: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/; the scale of the update is that of Liu et al. 2025 (arXiv:2502.16982, 2.2).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel.mesh import batch_shards, data_sharding, replicated

with needs_extra("train"):
    import optax

# a, b, c of Jordan et al., chosen for a steep slope at 0: singular values end near 1, not at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Liu et al.: the root mean square that AdamW's updates usually have, 0.2 to 0.4.
UPDATE_RMS = 0.2


class MuonState(NamedTuple):
    """The state of `scale_by_muon`: the momentum, of the parameters' structure."""

    momentum: Any


def orthogonalize(x: jax.Array) -> jax.Array:
    """Bring the singular values of a matrix near 1 and keep its singular vectors.

    Five times X <- a X + b X X^T X + c (X X^T)^2 X from X = x / (|x|_F + 1e-8), with (a, b, c) = `COEFFICIENTS` (Jordan
    et al.). Singular values of at least 0.002 |x|_F end in [0.68, 1.21], smaller ones grow up to a^5 = 485 times. For a
    tall X all of it happens in the Gram matrix, since an odd polynomial of X is X times a polynomial of A = X^T X:

      Q = a I + b A + c A A,  P <- P Q,  A <- A Q Q,  and at last X P,

    so that the iterations multiply n x n matrices only. For a convolution's kernel (m = 9 n) that is 70 n^3 operations
    in place of 190 n^3, for a square matrix 38 n^3 in place of 30 n^3. A wide matrix is transposed before and after.

    Args:
      x: float32[m, n].

    Returns:
      float32[m, n]; a matrix of zeros stays one.

    Raises:
      ValueError: when x is not a matrix.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix, got shape {x.shape}")
    if x.shape[0] < x.shape[1]:
        return orthogonalize(x.T).T
    a, b, c = COEFFICIENTS
    x = x / (jnp.linalg.norm(x) + 1e-8)
    gram = _multiply(x.T, x)
    identity = jnp.eye(x.shape[1], dtype=x.dtype)
    product = None
    for i in range(ITERATIONS):
        q = a * identity + b * gram + c * _multiply(gram, gram)
        product = q if product is None else _multiply(product, q)
        if i < ITERATIONS - 1:
            gram = _multiply(gram, _multiply(q, q))
    return _multiply(x, product)


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    # A TPU rounds the factors of float32 products to bfloat16 by default. The usual iteration bears that,
    # this one does not: A holds the squares of the singular values, so that 2^-9 of the largest would hide all below
    # 1/20 of it, and P reaches a^5 = 485, so that its rounding would be as large as the result.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def scale_by_muon(beta: float = 0.95, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Convert gradients to orthogonalized Nesterov momentum of the size of AdamW's updates.

    With a leaf seen as a matrix of (all axes but the last) x (the last), that is inputs x outputs of a layer:

      m <- beta m + (1 - beta) g,  u = beta m + (1 - beta) g    (Jordan et al.)
      update = 0.2 sqrt(max(rows, columns)) orthogonalize(u)    (Liu et al., 2.2)

    An orthogonal matrix has a root mean square of 1 / sqrt(max(rows, columns)), so the update's is about 0.2, and
    learning rate and weight decay mean what they mean in AdamW.

    Matrices of one shape are orthogonalized together. With a mesh each device along "data" and "fsdp" does its part of
    them, where all would do the same otherwise; what goes in and comes out is the same on every device.

    Args:
      beta: decay of the momentum, in [0, 1).
      mesh: devices that share the work; None computes everything wherever the gradients are.

    Returns:
      A transformation of float32 leaves with two axes or more; the momentum is its whole state.

    Raises:
      ValueError: for a beta out of its range and, at `init`, for a leaf with fewer than two axes.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"{beta=} must be in [0, 1)")

    def init(params: Any) -> MuonState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.ndim < 2:
                raise ValueError(f"Muon takes matrices; {jax.tree_util.keystr(path)} has shape {leaf.shape}")
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        mix = lambda m, g: beta * m + (1 - beta) * g
        momentum = jax.tree.map(mix, state.momentum, grads)
        leaves, treedef = jax.tree.flatten(jax.tree.map(mix, momentum, grads))
        return treedef.unflatten(_orthogonalized(leaves, mesh)), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def _orthogonalized(leaves: list[jax.Array], mesh: Mesh | None) -> list[jax.Array]:
    """Return each leaf's update; `mesh` as in `scale_by_muon`."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault((math.prod(leaf.shape[:-1]), leaf.shape[-1]), []).append(i)
    results: list[Any] = [None] * len(leaves)
    for shape, members in groups.items():
        stack = jnp.stack([leaves[i].reshape(shape) for i in members])
        if mesh is not None:
            # Zeros fill the last device's part: a constraint wants equal ones.
            stack = jnp.pad(stack, ((0, -len(members) % batch_shards(mesh)), (0, 0), (0, 0)))
            stack = jax.lax.with_sharding_constraint(stack, data_sharding(mesh))
        stack = UPDATE_RMS * max(shape) ** 0.5 * jax.vmap(orthogonalize)(stack)
        if mesh is not None:
            stack = jax.lax.with_sharding_constraint(stack, replicated(mesh))
        for i, matrix in zip(members, stack):
            results[i] = matrix.reshape(leaves[i].shape)
    return results


def is_muon_weight(path: tuple, leaf: Any) -> bool:
    """Return whether Muon trains a leaf of a tree of parameters; for `jax.tree_util.tree_map_with_path`.

    It trains every "kernel" (or "kernel_...", where a module has several) of a dense layer (two axes) or a convolution
    (four), but for the modules

      out_conv               the output of a U-Net, whose columns are pixels;
      layout                 a table: a map of the U-Net's grid for each direction of the conditions;
      time/dense_0, dense_1  tables too, read at the sinusoids of t.

    Embeddings, positions, learned vectors, biases, gains of norms and the temperature are AdamW's too: Muon is meant
    for the weights of hidden layers (Jordan et al.).

    Args:
      path: the leaf's keys, as `jax.tree_util` gives them.
      leaf: an array, or its shape.
    """
    names = [str(getattr(key, "key", "")) for key in path]
    if not names or names[-1].partition("_")[0] != "kernel" or leaf.ndim not in (2, 4):
        return False
    module = names[-2] if len(names) > 1 else ""
    in_time = len(names) > 2 and names[-3] == "time" and module in ("dense_0", "dense_1")
    return module not in ("out_conv", "layout") and not in_time
