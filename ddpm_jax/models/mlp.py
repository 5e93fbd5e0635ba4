"""A multilayer perceptron of vectors and timesteps, for data of few dimensions (Sohl-Dickstein et al. 2015)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import TimeEmbedding


class TimeMLP(nn.Module):
    """Residual perceptron whose layers all receive the timestep.

    Attributes:
        features: D, of the output.
        width: of the hidden layers.
        layers: number of hidden layers.
    """

    features: int
    width: int = 128
    layers: int = 3

    @nn.compact
    def __call__(self, xt: jax.Array, t: jax.Array, *, train: bool = False) -> jax.Array:
        """Predict the process' output, float32[B, features].

        Args:
            xt: float[B, D].
            t: float or int[B].
            train: not used.
        """
        del train
        emb = nn.silu(TimeEmbedding(self.width, self.width, name="time")(t))
        h = nn.Dense(self.width, name="in")(xt.astype(jnp.float32))
        for i in range(self.layers):
            inner = nn.LayerNorm(name=f"norm_{i}")(h) + nn.Dense(self.width, name=f"time_{i}")(emb)
            h = h + nn.Dense(self.width, name=f"hidden_{i}")(nn.silu(inner))
        return nn.Dense(self.features, kernel_init=nn.initializers.zeros, name="out")(nn.silu(h))
