"""Binomial diffusion of binary data (Sohl-Dickstein et al. 2015)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_model, check_type
from ddpm_jax.diffusion.binomial import binomial_terms, q_sample_bits
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.losses import stratified_timesteps
from ddpm_jax.training.tasks.data import Vectors
from ddpm_jax.training.tasks.keys import named_keys
from ddpm_jax.types import Denoiser

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BinomialTask:
    """The variational bound of bits, one term for every example, at timesteps spread over the process.

    The batch has "vector" float32[B, D], 0 or 1.

    Attributes:
        model: a network (xt, t) -> logits of x0, float32[B, D]; xt is -1 or 1.
        diffusion: the process; only its schedule and length are used.
        x0: the clean data.
    """

    model: nn.Module
    diffusion: Diffusion
    x0: Vectors

    def __post_init__(self):
        check_model(self.model)
        check_type("diffusion", self.diffusion, Diffusion)
        check_type("x0", self.x0, Vectors)

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return new parameters."""
        x0 = self.x0(batch)
        return self.model.init(key, x0, jnp.zeros(x0.shape[0], jnp.int32))

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del frozen
        return batch

    def denoiser(self, params: Any) -> Denoiser:
        """Return the network as the functions of `diffusion.binomial` take it: xt is 0 or 1."""
        return lambda xt, t: self.model.apply(params, 2.0 * xt - 1.0, t)

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return T times a term of the bound in bits, whose mean over timesteps is the bound of a sequence."""
        x0, process = self.x0(batch), self.diffusion.process
        t_key, noise_key = named_keys(key, "timesteps", "noise")
        t = stratified_timesteps(t_key, x0.shape[0], process.num_steps)
        xt = q_sample_bits(process, noise_key, x0, t)
        return process.num_steps * binomial_terms(process, self.denoiser(params), x0, xt, t), {}

    def preview(self, params: Any, batch: Batch, key: jax.Array) -> np.ndarray | None:
        """Return None: there is no image to show."""
        return None

    def metadata(self) -> dict[str, Any]:
        """Return what a sampler has to know, plain data."""
        return {"diffusion": dataclasses.asdict(self.diffusion), "binomial": True, **self.x0.metadata()}
