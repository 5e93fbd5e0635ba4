"""Fit of `EmbeddingCodes`: principal components and bucket edges of CLIP embeddings, from one pass over them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_model, check_type, is_finite, shown
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.training.tasks.data import with_image_embedding

Batch = dict[str, Any]
Sums = dict[str, Any]
_DOT_BINS = 4096  # of the histogram of dot products, over [-1, 1]


@dataclasses.dataclass(frozen=True, eq=False)
class CodesTask:
    """Principal components of image embeddings, in buckets of equal width.

    The batch has what `with_image_embedding` reads, and "tokens" and "mask", or "z_text".

    Components are the eigenvectors of the covariance with the largest eigenvalues, in their order (DALL-E 2, section
    2.2). The paper does not say how it divides a component into buckets; here they are of equal width and cover
    `deviations` standard deviations on each side of the mean, which one pass can find for any number of embeddings.
    With 1024 buckets and 6 deviations the error inside is (12 / 1024)^2 / 12 = 1e-5 of the variance. What lies beyond
    counts to the outermost buckets. Dot products are divided so that each bucket has the same share of the training
    pairs.

    Attributes:
        model: the codes.
        deviations: > 0.
        role: of the frozen CLIP among the stage's needs.
    """

    model: EmbeddingCodes
    deviations: float = 6.0
    role: str = "clip"

    def __post_init__(self):
        check_model(self.model)
        check_type("model", self.model, EmbeddingCodes)
        if not is_finite(self.deviations) or self.deviations <= 0:
            raise ValueError(f"deviations={shown(self.deviations)} must be a positive number")

    @property
    def min_examples(self) -> int:
        """The number of embeddings that are needed."""
        return self.model.dims + 1

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return parameters of zeros."""
        return self.model.init(key, batch["z_image"])

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return "z_image" and "z_text", float32[B, D]."""
        batch = with_image_embedding(frozen, batch, self.role)
        if "z_text" not in batch:
            z, _ = frozen[self.role].apply(batch["tokens"], batch["mask"], method=CLIP.encode_text)
            batch = batch | {"z_text": normalize(z)}
        return {name: batch[name] for name in ("z_image", "z_text")}

    def sums(self, batch: Batch) -> Sums:
        """Return what is added up over all batches, of a prepared batch: float32 of sums, and int32 of counts."""
        z, dot = batch["z_image"], jnp.sum(batch["z_image"] * batch["z_text"], axis=-1)
        place = jnp.clip(((dot + 1.0) * (_DOT_BINS / 2)).astype(jnp.int32), 0, _DOT_BINS - 1)
        return {
            "count": jnp.full((), z.shape[0], jnp.int32),
            "z": z.sum(0),
            "zz": jnp.einsum("bd,be->de", z, z, precision="highest"),
            "dot": jnp.zeros(_DOT_BINS, jnp.int32).at[place].add(1),
        }

    def fitted(self, sums: Sums) -> tuple[Any, dict[str, float]]:
        """Return the parameters, and metrics.

        Args:
            sums: of all batches, in float64.

        Returns:
            {"params": ...}, and {"explained", "dot_product"}: the share of the variance that the components have, and
            the mean dot product of text and image embeddings.

        Raises:
            ValueError: if there are fewer embeddings than components.
        """
        network, count = self.model, int(sums["count"])
        if count < self.min_examples:
            raise ValueError(f"dims={network.dims} components need more embeddings than {count}")
        mean = np.asarray(sums["z"], np.float64) / count
        covariance = np.asarray(sums["zz"], np.float64) / count - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        vectors = vectors * np.where(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
        std = np.sqrt(np.maximum(values[: network.dims], 1e-16))
        edges = std[:, None] * np.linspace(-self.deviations, self.deviations, network.buckets + 1)
        params = {
            "mean": mean,
            "components": vectors[:, : network.dims],
            "edges": edges,
            "dot_edges": _quantiles(np.asarray(sums["dot"], np.float64), network.dot_buckets),
        }
        centres = (np.arange(_DOT_BINS) + 0.5) / (_DOT_BINS / 2) - 1.0
        metrics = {
            "explained": float(values[: network.dims].sum() / max(values.sum(), 1e-300)),
            "dot_product": float(np.dot(sums["dot"], centres) / count),
        }
        return {"params": jax.tree.map(lambda x: np.asarray(x, np.float32), params)}, metrics

    def measure(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Return the mean squared error of decoded codes as a share of the variance of the embeddings."""
        z = batch["z_image"]
        codes = self.model.apply(params, z, method=EmbeddingCodes.encode)
        error = jnp.square(z - self.model.apply(params, codes, method=EmbeddingCodes.decode)).sum(-1).mean()
        return {"quantization_error": error / jnp.square(z - z.mean(0, keepdims=True)).sum(-1).mean()}

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {}


def _quantiles(histogram: np.ndarray, buckets: int) -> np.ndarray:
    """Return the edges between buckets of equal probability, float64[buckets - 1], of a histogram over [-1, 1]."""
    below = np.concatenate([[0.0], np.cumsum(histogram)]) / histogram.sum()
    wanted = np.arange(1, buckets) / buckets
    place = np.clip(np.searchsorted(below, wanted), 1, len(histogram))
    inside = (wanted - below[place - 1]) / np.maximum(below[place] - below[place - 1], 1e-300)
    return 2.0 * (place - 1 + np.clip(inside, 0.0, 1.0)) / len(histogram) - 1.0
