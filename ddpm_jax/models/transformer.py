"""The pre-norm transformer behind CLIP, the text encoders and the diffusion prior."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.attention import attention
from ddpm_jax.models.layers import HeadProjections, rematerialized


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return `x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Return the exact `x * Phi(x)`, the activation of GLIDE, Karlo and open_clip."""
    return jax.nn.gelu(x, approximate=False)


class Block(nn.Module):
    """One pre-norm block: `x + attn(ln_1(x))`, then `x + mlp(ln_2(x))`. x: [B, N, width].

    Attributes:
        heads: number of attention heads; divides the width.
        activation: of the MLP.
        dtype: in which the layers compute; parameters are float32.
        mlp_width: width of the MLP's hidden layer; 4 * width if None.
    """

    heads: int
    activation: Callable = gelu
    dtype: Any = jnp.float32
    mlp_width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        b, n, width = x.shape
        if width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={width}")
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)  # noqa: E731
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)  # noqa: E731
        project = HeadProjections(3, self.heads, width // self.heads, by_head=False, dtype=self.dtype, name="qkv")
        h = attention(*project(norm("ln_1")(x)), mask)
        x = x + dense(width, "out")(h.reshape(b, n, width))
        h = self.activation(dense(self.mlp_width or 4 * width, "mlp_1")(norm("ln_2")(x)))
        return x + dense(width, "mlp_2")(h)


class Transformer(nn.Module):
    """A stack of blocks. x: [B, N, width]; mask: bool, broadcastable to [B, heads, N, N], True where attended to.

    Attributes:
        layers: number of blocks.
        heads: number of attention heads; divides the width.
        activation: of the MLPs.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        scan: True compiles one block and runs it in a loop, so that a deep network compiles in a fraction of the time;
            the parameters are then those of a block, "blocks", with a leading axis of `layers`.
        dtype: in which the layers compute; parameters are float32.
        mlp_width: width of the MLPs' hidden layer; 4 * width if None.
    """

    layers: int
    heads: int
    activation: Callable = gelu
    remat: bool | str = False
    dtype: Any = jnp.float32
    mlp_width: int | None = None
    scan: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        fields = (self.heads, self.activation, self.dtype, self.mlp_width)
        if not self.scan:
            block = rematerialized(Block, self.remat)
            for i in range(self.layers):
                x = block(*fields, name=f"block_{i}")(x, mask)
            return x
        # The loop itself keeps what is computed again apart, so that nothing else has to.
        block = rematerialized(_Iteration, self.remat, prevent_cse=False)
        loop = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        return loop(*fields, name="blocks")(x, mask)[0]


class _Iteration(Block):
    """A block as the body of a scan.

    Attributes:
        As `Block`.
    """

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, None]:
        return super().__call__(x, mask), None


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a `Transformer` with scan=True that computes the same as one with scan=False.

    params: of its own, {"block_0": ..., "block_1": ...}. Returns {"blocks": ...}.
    """
    blocks = [params[f"block_{i}"] for i in range(len(params))]
    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def causal_mask(n: int) -> jax.Array:
    """Return bool[1, 1, n, n]: position i attends to positions 0..i."""
    return jnp.tril(jnp.ones((n, n), bool))[None, None]
