"""Classifiers of noised images, for classifier guidance (Dhariwal and Nichol 2021, section 4 and appendix H)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.checks import check_model, check_type
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.training.tasks.data import Images
from ddpm_jax.training.tasks.keys import named_keys

Batch = dict[str, Any]


def check_discrete(diffusion: Diffusion) -> None:
    """Raise ValueError for a process of continuous time, in which no classifier and no noised CLIP is trained."""
    if diffusion.continuous is not None:
        raise ValueError(
            f"diffusion={diffusion.schedule!r} with time={diffusion.time!r} is of continuous time; what guides by its "
            "gradient is trained at the timesteps of a discrete process"
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ClassifierTask:
    """Cross-entropy of the class of x_t, at a uniform timestep for every example.

    The batch has "image" uint8[B, S, S, C] and "label" int32[B].

    Attributes:
        model: a network (xt, t) -> logits float[B, K], such as `models.adm.Classifier`.
        diffusion: the process by which images are noised: that of the network that is to be guided.
        x0: the clean images.
        noised: False trains on clean images, for a classifier that judges samples.
        names: of the classes.
    """

    model: nn.Module
    diffusion: Diffusion
    x0: Images
    noised: bool = True
    names: tuple[str, ...] | None = None

    def __post_init__(self):
        check_model(self.model)
        check_type("diffusion", self.diffusion, Diffusion)
        check_type("x0", self.x0, Images)
        check_discrete(self.diffusion)

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return new parameters."""
        x0 = self.x0(batch)
        return self.model.init(key, x0, jnp.zeros(x0.shape[0], jnp.int32))

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del frozen
        return batch

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the cross-entropy of every example, and whether the class is right."""
        (dropout_key,) = named_keys(key, "dropout")
        return self._loss(params, batch, key, train=True, rngs={"dropout": dropout_key})

    def eval_loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the same without dropout."""
        return self._loss(params, batch, key)

    def _loss(self, params: Any, batch: Batch, key: jax.Array, **options: Any) -> tuple[jax.Array, dict[str, Any]]:
        t_key, noise_key = named_keys(key, "timesteps", "noise")
        process, x0 = self.diffusion.process, self.x0(batch)
        t = jax.random.randint(t_key, x0.shape[:1], 0, process.num_steps, jnp.int32)
        if self.noised:
            xt = q_sample(process, x0, t, jax.random.normal(noise_key, x0.shape, x0.dtype))
        else:
            xt, t = x0, jnp.zeros_like(t)
        logits, labels = self.model.apply(params, xt, t, **options), batch["label"].astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss, {"accuracy": (logits.argmax(-1) == labels).astype(jnp.float32)}

    def preview(self, params: Any, batch: Batch, key: jax.Array) -> np.ndarray | None:
        """Return None: there is nothing to show."""
        return None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        names = None if self.names is None else list(self.names)
        return {
            "diffusion": dataclasses.asdict(self.diffusion),
            "labels": {"num_classes": self.model.num_classes, "null": None, "names": names},
            "noised": self.noised,
            **self.x0.metadata(),
        }
