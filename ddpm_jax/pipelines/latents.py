"""Bipartite latents (z_image, x_T) of images, and arithmetic on CLIP embeddings (DALL-E 2, sections 3 and 4).

Everything here is a function of arrays. `pipelines.manipulation` finds latents of images and decodes them.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_number, is_known, shown
from ddpm_jax.diffusion.sampling import as_steps
from ddpm_jax.errors import LoadError
from ddpm_jax.extras import needs_extra
from ddpm_jax.paths import local_path, write_whole
from ddpm_jax.storage.json_file import parse_json
from ddpm_jax.storage.tensor_file import ReadError, read_tensors

FORMAT = "ddpm_jax latents 1"
_TINY = 1e-12
_PARALLEL = 1e-4  # of the norm: below it, the part at right angles is mostly rounding errors


class BipartiteLatent(flax.struct.PyTreeNode):
    """Images as a pair: what CLIP recognises, and all that the decoder needs beside it to reconstruct them.

    Attributes:
        z_image: float32[N, D], CLIP image embeddings as the decoder of the pipeline takes them: unit vectors for
            `UnCLIP`, and as CLIP's projection gives them for `Karlo`.
        x_T: float32[N, R, R, C], the noise from which DDIM reproduces the decoder's images; None leaves the noise to
            the seed of `manipulation.decode`.
        steps: steps of the decoder with which x_T was found, the default of `manipulation.decode`; None without x_T.
    """

    z_image: Any
    x_T: Any = None
    steps: int | str | tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

    def __len__(self) -> int:
        return len(self.z_image)

    def take(self, rows: Any) -> "BipartiteLatent":
        """Return the latents of some rows; rows: a slice, or indices, which may repeat."""
        return jax.tree.map(lambda array: array[rows], self)

    def without_noise(self) -> "BipartiteLatent":
        """Return the embeddings alone."""
        return BipartiteLatent(self.z_image)


def save_latents(latent: BipartiteLatent, path: str | os.PathLike) -> None:
    """Write latents as a safetensors file, whole or not at all; `load_latents` reads it."""
    with needs_extra("train"):
        from safetensors.numpy import save
    path = local_path(path)
    arrays = {"z_image": np.asarray(latent.z_image, np.float32)}
    metadata = {"format": FORMAT}
    if latent.x_T is not None:
        arrays["x_T"], metadata["steps"] = np.asarray(latent.x_T, np.float32), json.dumps(latent.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def load_latents(path: str | os.PathLike) -> BipartiteLatent:
    """Read what `save_latents` wrote.

    Raises:
        LoadError: if it is missing, damaged, or another file.
    """
    try:
        tensors = read_tensors(local_path(path))
    except ReadError as error:
        raise LoadError(str(error).replace("weights file", "latents file", 1)) from None
    metadata = tensors.metadata or {}
    if metadata.get("format") != FORMAT:
        raise LoadError(f"{path} is not a file of latents; python -m ddpm_jax.edit encode writes one")
    z_image, xt = tensors.get("z_image"), tensors.get("x_T")
    wanted = {"z_image"} if xt is None else {"z_image", "x_T"}
    fits = z_image is not None and set(tensors) == wanted and z_image.ndim == 2 and len(z_image)
    if not fits or any(array.dtype != np.float32 or not np.isfinite(array).all() for array in tensors.values()):
        raise LoadError(f"{path} is damaged: its embeddings and noise are not finite arrays of float32")
    if xt is None:
        return BipartiteLatent(np.array(z_image))
    try:
        steps = as_steps("steps", parse_json(metadata.get("steps", "").encode()))
    except ValueError as error:
        raise LoadError(f"{path} is damaged: {error}") from None
    if xt.ndim != 4 or len(xt) != len(z_image):
        raise LoadError(f"{path} is damaged: its noise does not fit its embeddings")
    return BipartiteLatent(np.array(z_image), np.array(xt), steps)


# ---- Arithmetic ------------------------------------------------------------------------------------------------------


def as_embeddings(name: str, value: Any, size: int | None = None) -> jax.Array:
    """Return embeddings as float32[N, D].

    Raises:
        ValueError: if they are no finite numbers of this shape, or D is not `size`. Traced numbers pass.
    """
    try:
        found = jnp.asarray(value, jnp.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={shown(value)} must be embeddings, float32[N, {size or 'D'}]") from None
    if found.ndim != 2 or not len(found) or found.shape[1] != (size or found.shape[1]):
        raise ValueError(f"{name} must be float32[N, {size or 'D'}], got shape {found.shape}")
    if is_known(found) and not (finite := np.isfinite(np.asarray(found)).all(1)).all():
        raise ValueError(f"{name}[{int(np.argmin(finite))}] holds NaN or infinity")
    return found


def slerp(first: Any, second: Any, weight: Any) -> jax.Array:
    """Interpolate on the sphere: directions along the great circle, norms linearly.

        slerp(a, b, w) = ((1 - w) |a| + w |b|) (sin((1 - w) o) a / |a| + sin(w o) b / |b|) / sin o

    where o is the angle between a and b (Shoemake 1985). Of unit vectors it is that of DALL-E 2, section 3.2.

    Args:
        first: float[N, ...], a. Norms and angles are those over all axes but the first.
        second: float[N, ...], b. Opposite vectors have no shortest path between them: the result is NaN inside of it.
        weight: w, a number or float[N]; 0 gives a, and 1 gives b.

    Returns:
        float32[N, ...].
    """
    first, second = (jnp.asarray(array, jnp.float32) for array in (first, second))
    if first.shape != second.shape:
        raise ValueError(f"slerp needs arrays of one shape, got {first.shape} and {second.shape}")
    axes, wide = tuple(range(1, first.ndim)), (-1,) + (1,) * (first.ndim - 1)
    w = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), first.shape[:1]).reshape(wide)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))  # noqa: E731
    length_a, length_b = norm(first), norm(second)
    a, b = first / jnp.maximum(length_a, _TINY), second / jnp.maximum(length_b, _TINY)
    # Exact for small angles too, unlike the arc cosine of the dot product.
    angle = 2.0 * jnp.arctan2(norm(a - b), norm(a + b))
    small = angle < 1e-4
    sine = jnp.where(small, 1.0, jnp.sin(angle))
    weights = [jnp.where(small, share, jnp.sin(share * angle) / sine) for share in (1.0 - w, w)]
    direction = weights[0] * a + weights[1] * b
    direction = jnp.where((norm(a + b) < 1e-6) & (w > 0.0) & (w < 1.0), jnp.nan, direction / norm(direction))
    return ((1.0 - w) * length_a + w * length_b) * direction


def perturbed(z_image: Any, degrees: float, key: jax.Array | None = None, *, towards: Any = None) -> jax.Array:
    """Rotate embeddings by an angle, with their norms.

    Args:
        z_image: float32[N, D].
        degrees: the angle, in [0, 180].
        key: one key, of a random direction for each embedding.
        towards: float32[N, D] or [1, D], the direction in place of a random one; its part at right angles to z counts.

    Returns:
        float32[N, D], at exactly this angle to z.

    Raises:
        ValueError: if there is not one of key and towards, degrees is out of its range, or towards is parallel to z.
    """
    if (key is None) == (towards is None):
        raise ValueError("perturbed needs a key or towards, and only one of them")
    degrees = check_number("degrees", degrees, lambda v: (v >= 0) & (v <= 180), "must be in [0, 180]")
    z = as_embeddings("z_image", z_image)
    if towards is not None:
        towards = as_embeddings("towards", towards, z.shape[1])
        if len(towards) not in (1, len(z)):
            raise ValueError(f"towards must have 1 or {len(z)} rows, one for each embedding, got {len(towards)}")
    else:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(z)))
        towards = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:], z.dtype))(keys)
    length = jnp.linalg.norm(z, axis=1, keepdims=True)
    unit = z / jnp.maximum(length, _TINY)
    direction = jnp.broadcast_to(towards, z.shape)
    direction = direction / jnp.maximum(jnp.linalg.norm(direction, axis=1, keepdims=True), _TINY)
    across = direction - jnp.sum(direction * unit, axis=1, keepdims=True) * unit
    sine = jnp.linalg.norm(across, axis=1, keepdims=True)
    if is_known(degrees, sine) and 0 < degrees < 180 and (sine < _PARALLEL).any():
        row = int(jnp.argmax(sine[:, 0] < _PARALLEL))
        raise ValueError(
            f"towards is parallel to z_image[{row}] (or one of them is zero), which has no direction to turn"
        )
    across = across - jnp.sum(across * unit, axis=1, keepdims=True) * unit  # what rounding left
    across = across / jnp.maximum(jnp.linalg.norm(across, axis=1, keepdims=True), _TINY)
    angle = jnp.deg2rad(degrees)
    return length * (jnp.cos(angle) * unit + jnp.sin(angle) * across)


def text_difference(z_image: Any, z_source: Any, z_target: Any, theta: Any) -> jax.Array:
    """Move image embeddings along the difference of two captions (DALL-E 2, section 3.3).

        z_d = (z_target - z_source) / |z_target - z_source|,   z_theta = slerp(z_image, |z_image| z_d, theta)

    Args:
        z_image: float32[N, D].
        z_source: float32[D], the CLIP text embedding of what the images show, a unit vector.
        z_target: float32[D], that of what they shall show.
        theta: a number or float[N] in [0, 1], the share of the angle between z_image and z_d; the paper's largest is
            between 0.25 and 0.5.

    Returns:
        float32[N, D], of the norms of z_image.

    Raises:
        ValueError: if the captions have the same embedding.
    """
    z = as_embeddings("z_image", z_image)
    difference = np.asarray(z_target, np.float64) - np.asarray(z_source, np.float64)
    length = np.linalg.norm(difference)
    if not length > 1e-6:
        raise ValueError("the captions have the same text embedding, so that their difference has no direction")
    norms = jnp.linalg.norm(z, axis=1, keepdims=True)
    return slerp(z, norms * jnp.asarray(difference / length, jnp.float32)[None], theta)


# ---- Principal components --------------------------------------------------------------------------------------------


class Pca(flax.struct.PyTreeNode):
    """Principal components of embeddings.

    Attributes:
        mean: float32[D].
        components: float32[D, K], orthonormal columns, largest variance first.
    """

    mean: Any
    components: Any


def fit_pca(z_image: Any) -> Pca:
    """Fit all principal components to embeddings, in float64.

    Args:
        z_image: float32[N, D], N >= 2.

    Returns:
        min(N - 1, D) components: no more are determined by N embeddings.

    Raises:
        ValueError: if there are fewer than two embeddings.
    """
    z = np.asarray(as_embeddings("z_image", z_image), np.float64)
    if len(z) < 2:
        raise ValueError(f"principal components need at least two embeddings [N, D], got shape {z.shape}")
    mean = z.mean(0)
    components = np.linalg.svd(z - mean, full_matrices=False)[2].T[:, : min(len(z) - 1, z.shape[1])]
    return Pca(mean.astype(np.float32), components.astype(np.float32))


def truncated(z_image: Any, pca: Pca, dims: int) -> jax.Array:
    """Keep the first principal components of embeddings, and their norms (DALL-E 2, section 4, figure 7).

        z' = m + P P^T (z - m), scaled to |z|, with the first `dims` columns P

    Args:
        z_image: float32[N, D].
        pca: its components.
        dims: number of components, in [0, K]; 0 gives the mean.

    Raises:
        ValueError: if there are not as many components, or they are of embeddings of another size.
    """
    if not isinstance(pca, Pca):
        raise ValueError(f"pca={shown(pca)} must be a Pca, as fit_pca and pca_of return it")
    size, known = pca.components.shape
    if not isinstance(dims, (int, np.integer)) or not 0 <= dims <= known:
        raise ValueError(f"dims={dims!r} must be an integer in [0, {known}], the number of principal components")
    z, part = as_embeddings("z_image", z_image, size), jnp.asarray(pca.components)[:, :dims]
    centred = z - jnp.asarray(pca.mean)[None]
    kept = jnp.asarray(pca.mean)[None] + jnp.matmul(
        jnp.matmul(centred, part, precision="highest"), part.T, precision="highest"
    )
    scale = jnp.linalg.norm(z, axis=1, keepdims=True) / jnp.maximum(jnp.linalg.norm(kept, axis=1, keepdims=True), _TINY)
    return scale * kept


def joined(latents: Sequence[BipartiteLatent]) -> BipartiteLatent:
    """Concatenate latents of one pipeline."""
    return jax.tree.map(lambda *arrays: np.concatenate([np.asarray(array) for array in arrays]), *latents)
