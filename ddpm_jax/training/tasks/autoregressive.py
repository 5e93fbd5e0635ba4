"""The autoregressive prior: cross-entropy of the codes of image embeddings (DALL-E 2, section 2.2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.checks import check_model, check_type
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.tokens import TokenSampling, sample_codes
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.training.tasks.conditions import Captions, check_guidance
from ddpm_jax.training.tasks.data import with_image_embedding
from ddpm_jax.training.tasks.health import embedding_health

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AutoregressiveTask:
    """Mean cross-entropy of the codes of an embedding, in nats.

    The batch has what `Captions` and `with_image_embedding` read.

    Attributes:
        model: the network.
        captions: how captions are read and dropped.
        role: of the frozen CLIP among the stage's needs.
        codes: of the fitted `EmbeddingCodes` among the stage's needs.
        sampling: of the embeddings that evaluations compare with the true ones (`tasks.health`); None makes none.
    """

    model: AutoregressivePrior
    captions: Captions
    role: str = "clip"
    codes: str = "codes"
    sampling: TokenSampling | None = dataclasses.field(default=None, metadata={"describe": False})

    def __post_init__(self):
        check_model(self.model)
        check_type("model", self.model, AutoregressivePrior)
        check_type("captions", self.captions, Captions)
        if self.sampling is not None:
            check_type("sampling", self.sampling, TokenSampling)
            check_guidance(self.sampling, (self.captions,))

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return new parameters."""
        return self.model.init(key, batch["codes"], batch["dot_code"], **self._arguments(batch, None))

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Add "codes" int32[B, K], "dot_code" int32[B], and what the captions need."""
        batch = self.captions.prepare(frozen, with_image_embedding(frozen, batch, self.role))
        own = frozen[self.codes]
        if not isinstance(own.network, EmbeddingCodes):
            kind = type(own.network).__name__
            raise ValueError(f"its model for the role {self.codes!r} must be EmbeddingCodes, got a {kind}")
        sizes = {name: (getattr(own.network, name), getattr(self.model, name)) for name in _SHARED}
        odd = next((name for name, (a, b) in sizes.items() if a != b), None)
        if odd is not None:
            raise ValueError(f"{odd} of {self.codes} is {sizes[odd][0]}, and of the prior {sizes[odd][1]}")
        codes = own.apply(batch["z_image"], method=EmbeddingCodes.encode)
        dot_code = own.apply(batch["z_text"], batch["z_image"], method=EmbeddingCodes.dot_code)
        kept = {name: value for name, value in batch.items() if name not in ("image", "clip_image")}
        return kept | {"codes": codes, "dot_code": dot_code}

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of every example, and how often a code is the most probable one."""
        return self._loss(params, batch, self._arguments(batch, key))

    def eval_loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the same with all captions."""
        del key
        return self._loss(params, batch, self._arguments(batch, None))

    @property
    def health_needs(self) -> tuple[str, ...] | None:
        """The roles of the models that `health` needs; None where the task is not sampled."""
        return None if self.sampling is None else (self.codes,)

    def health(self, params: Any, frozen: Any, batch: Batch, key: jax.Array) -> Mapping[str, jax.Array]:
        """Sample an embedding for every example of a prepared batch and compare it with the true one.

        frozen: the models of `health_needs`, by role. Returns float32[] by name, see `embedding_health`.
        """
        sampling, own = self.sampling.checked(), self._arguments(batch, None)
        if sampling.scale is not None:
            own = jax.tree.map(lambda *parts: jnp.concatenate(parts), own, self.captions.null(own))
        found = sample_codes(
            sampling,
            example_keys(key, batch["z_image"].shape[0]),
            dims=self.model.dims,
            dot_buckets=self.model.dot_buckets,
            begin=lambda dot_code: self.model.apply(params, dot_code, **own, method="begin"),
            following=lambda state, code: self.model.apply(params, state, code, method="next"),
        )
        z = frozen[self.codes].apply(found, method=EmbeddingCodes.decode)
        return embedding_health(z, batch["z_image"], batch["z_text"])

    def preview(self, params: Any, batch: Batch, key: jax.Array) -> np.ndarray | None:
        """Return None: there is nothing to show."""
        return None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {"conditions": ["caption"], "caption": self.captions.metadata()}

    def _arguments(self, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        return self.captions(batch, batch["codes"], key)

    def _loss(self, params: Any, batch: Batch, arguments: dict[str, jax.Array]) -> tuple:
        logits = self.model.apply(params, batch["codes"], batch["dot_code"], **arguments)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["codes"])
        right = jnp.argmax(logits, axis=-1) == batch["codes"]
        return loss.mean(-1), {"accuracy": right.mean(-1, dtype=jnp.float32)}


_SHARED = ("embed_dim", "dims", "buckets", "dot_buckets")
