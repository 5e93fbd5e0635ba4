"""Fit of `EmbeddingStatistics`: mean and deviation of CLIP image embeddings, from one pass over them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_model, check_type
from ddpm_jax.models.embedding_norm import EmbeddingStatistics
from ddpm_jax.training.tasks.data import with_image_embedding

Batch = dict[str, Any]
Sums = dict[str, Any]
_OF_MEANS = ("mean", "square", "square_rest")


@dataclasses.dataclass(frozen=True, eq=False)
class StatisticsTask:
    """Mean and standard deviation of each entry of the image embeddings, for a diffusion prior that standardizes them.

    The batch has what `with_image_embedding` reads.

    Attributes:
        model: the statistics.
        role: of the frozen CLIP among the stage's needs.
    """

    model: EmbeddingStatistics
    role: str = "clip"

    # A deviation needs two.
    min_examples = 2

    def __post_init__(self):
        check_model(self.model)
        check_type("model", self.model, EmbeddingStatistics)

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return a mean of 0 and a deviation of 1."""
        del batch
        return self.model.init(key)

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return "z_image", float32[B, D]."""
        return {"z_image": with_image_embedding(frozen, batch, self.role)["z_image"]}

    def sums(self, batch: Batch) -> Sums:
        """Return what is added up over all batches, which are of one size, of a prepared batch.

        Where the mean of an entry is hundreds of times its deviation, as in a few entries of public CLIPs, the rounding
        of squares in float32 would hide the deviation. So squares are those of differences from the batch's mean, and
        the square of that mean is in two parts: of its first 12 bits, which has 24 and is exact, and the rest.
        """
        z = batch["z_image"]
        mean = z.mean(0)
        first = jax.lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=11)
        rest = mean - first
        return {
            "count": jnp.full((), z.shape[0], jnp.int32),
            "batches": jnp.ones((), jnp.int32),
            "mean": mean,
            "square": jnp.square(first),
            "square_rest": 2.0 * first * rest + jnp.square(rest),
            "within": jnp.square(z - mean[None]).sum(0),
        }

    def fitted(self, sums: Sums) -> tuple[Any, dict[str, float]]:
        """Return the parameters, and metrics.

        Args:
            sums: of all batches, in float64.

        Returns:
            {"params": ...}, and {"mean_norm", "std_norm", "smallest_std"}: the norms of the mean and of the deviations,
            whose squares add up to 1 for unit vectors, and the smallest deviation.

        Raises:
            ValueError: if there are fewer than two embeddings, or an entry is the same in all of them.
        """
        count = int(sums["count"])
        if count < self.min_examples:
            raise ValueError(f"a deviation needs at least {self.min_examples} embeddings, got {count}")
        of_batches = {name: np.asarray(sums[name], np.float64) / sums["batches"] for name in _OF_MEANS}
        mean = of_batches["mean"]
        square = of_batches["square"] + of_batches["square_rest"]
        variance = np.asarray(sums["within"], np.float64) / count + square - mean**2
        std = np.sqrt(np.maximum(variance, 0.0))
        if not (std > 1e-7).all():
            entry = int(np.argmin(std))
            raise ValueError(
                f"entry {entry} of the embeddings is {mean[entry]:.4g} in all of them, which cannot be standardized"
            )
        norms = {"mean_norm": np.linalg.norm(mean), "std_norm": np.linalg.norm(std), "smallest_std": std.min()}
        params = {"mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}
        return {"params": params}, {name: float(value) for name, value in norms.items()}

    def measure(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Return the mean square of standardized entries, about 1."""
        norm = self.model.apply(params)
        return {"mean_square": jnp.square(norm.normalize(batch["z_image"])).mean(-1)}

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {}
