"""The autoregressive prior: cross-entropy of the codes of image embeddings (DALL-E 2, section 2.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.checks import check_model, check_type
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.training.tasks.conditions import Captions
from ddpm_jax.training.tasks.data import with_image_embedding

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
    """

    model: AutoregressivePrior
    captions: Captions
    role: str = "clip"
    codes: str = "codes"

    def __post_init__(self):
        check_model(self.model)
        check_type("model", self.model, AutoregressivePrior)
        check_type("captions", self.captions, Captions)

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
        kept = {name: value for name, value in batch.items() if name not in ("image", "clip_image", "z_image")}
        return kept | {"codes": codes, "dot_code": dot_code}

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of every example, and how often a code is the most probable one."""
        return self._loss(params, batch, self._arguments(batch, key))

    def eval_loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the same with all captions."""
        del key
        return self._loss(params, batch, self._arguments(batch, None))

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
