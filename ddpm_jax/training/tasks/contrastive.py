"""Contrastive pre-training of CLIP (Radford et al. 2021, figure 3), and of a CLIP of noised images (GLIDE, 4.4)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_type
from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.losses import contrastive_loss
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.noised_clip import NoisedCLIP
from ddpm_jax.training.tasks.classifier import check_discrete
from ddpm_jax.training.tasks.keys import named_keys
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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NoisedContrastiveTask:
    """Each noised image against every caption of the batch, at a uniform timestep for every image.

    The batch has "image" uint8[B, S, S, 3], "tokens" int32[B, L] and "mask" bool[B, L]. The temperature is fixed,
    1 / model.scale.

    Attributes:
        model: the CLIP; the process has as many steps as its image tower.
        diffusion: the process by which images are noised: that of the network that is to be guided.
        tokenizer: stored in model.json, since the text tower cannot be used without it.
    """

    model: NoisedCLIP
    diffusion: Diffusion
    tokenizer: Tokenizer

    def __post_init__(self):
        check_type("model", self.model, NoisedCLIP)
        check_type("diffusion", self.diffusion, Diffusion)
        check_discrete(self.diffusion)
        if self.model.vision.num_steps != self.diffusion.num_steps:
            raise ValueError(
                f"model.vision.num_steps={self.model.vision.num_steps} must be the {self.diffusion.num_steps} steps of "
                "the diffusion"
            )

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return new parameters."""
        del batch  # the sizes are those of the network
        size, context = self.model.vision.image_size, self.model.text.context
        tokens, mask = jnp.zeros((1, context), jnp.int32), jnp.ones((1, context), bool)
        return self.model.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32), tokens, mask)

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del frozen
        return batch

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the symmetric cross-entropy of every pair, and how often its partner is ranked first."""
        t_key, noise_key = named_keys(key, "timesteps", "noise")
        process, x0 = self.diffusion.process, to_float(batch["image"])
        t = jax.random.randint(t_key, x0.shape[:1], 0, process.num_steps, jnp.int32)
        xt = q_sample(process, x0, t, jax.random.normal(noise_key, x0.shape, x0.dtype))
        z_image, z_text = self.model.apply(params, xt, t, batch["tokens"], batch["mask"])
        return contrastive_loss(z_image, z_text, jnp.log(jnp.float32(self.model.scale)))

    def preview(self, params: Any, batch: Batch, key: jax.Array) -> np.ndarray | None:
        """Return None: there is nothing to show."""
        return None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {
            "diffusion": dataclasses.asdict(self.diffusion),
            "image_size": self.model.vision.image_size,
            "length": self.model.text.context,
            "noised": True,
            "tokenizer": self.tokenizer.to_config(),
        }
