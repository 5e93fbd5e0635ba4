"""Contrastive pre-training of CLIP (Radford et al. 2021, figure 3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.diffusion.losses import contrastive_loss
from ddpm_jax.models.clip import CLIP
from ddpm_jax.types import to_float

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ContrastiveTask:
    """Each image against every caption of the batch. With accumulation, against those of its own micro-batch only.

    The batch has "image" uint8[B, S, S, 3], "tokens" int32[B, L] and "mask" bool[B, L]; groups of hard negatives
    ([B, group, ...], `data.shapes.hard_negatives`) are laid out as one batch of B * group pairs.

    Attributes:
        model: CLIP.
        tokenizer: stored in model.json, since the text tower cannot be used without it.
        chunk_size: images whose logits are computed at a time, see `losses.contrastive_loss`; None for all at once.
    """

    model: CLIP
    tokenizer: Tokenizer
    chunk_size: int | None = None

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return new parameters."""
        del batch  # the sizes are those of the network
        size, context = self.model.vision.image_size, self.model.text.context
        return self.model.init(
            key, jnp.zeros((1, size, size, 3)), jnp.zeros((1, context), jnp.int32), jnp.ones((1, context), bool)
        )

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del frozen
        return batch

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the symmetric cross-entropy of every pair, and how often its partner is ranked first."""
        del key
        size = self.model.vision.image_size
        batch = {
            "image": batch["image"].reshape(-1, size, size, 3),
            "tokens": batch["tokens"].reshape(-1, batch["tokens"].shape[-1]),
            "mask": batch["mask"].reshape(-1, batch["mask"].shape[-1]),
        }
        z_image, z_text, log_scale = self.model.apply(params, to_float(batch["image"]), batch["tokens"], batch["mask"])
        loss, aux = contrastive_loss(z_image, z_text, log_scale, chunk_size=self.chunk_size)
        return loss, aux | {"temperature": jnp.exp(-log_scale)}

    def preview(self, params: Any, batch: Batch, key: jax.Array) -> np.ndarray | None:
        """Return None: there is nothing to show."""
        return None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {
            "image_size": self.model.vision.image_size,
            "length": self.model.text.context,
            "tokenizer": self.tokenizer.to_config(),
        }
