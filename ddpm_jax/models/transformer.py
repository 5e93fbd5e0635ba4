"""The pre-norm transformer behind CLIP, the text encoders and the diffusion prior."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
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


class Cache(flax.struct.PyTreeNode):
    """Keys and values of the positions that have been read, so that one more position costs one more column.

    Attributes:
        k, v: [layers, B, M, heads, width / heads], or without the first axis for one block.
        index: int32[], the number of positions that have been read; x is put after them.
    """

    k: jax.Array
    v: jax.Array
    index: jax.Array


class Block(nn.Module):
    """One pre-norm block: `x + attn(ln_1(x))`, then `x + mlp(ln_2(x))`. x: [B, N, width].

    With a cache x attends to the M positions of the cache, of which it becomes a part, and the pair of the result and
    the keys and values is returned.

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
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, cache: Cache | None = None) -> Any:
        b, n, width = x.shape
        if width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={width}")
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)  # noqa: E731
        dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)  # noqa: E731
        project = HeadProjections(3, self.heads, width // self.heads, by_head=False, dtype=self.dtype, name="qkv")
        q, k, v = project(norm("ln_1")(x))
        if cache is not None:
            put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.index, 1)  # noqa: E731
            k, v = put(cache.k, k), put(cache.v, v)
        h = attention(q, k, v, mask)
        x = x + dense(width, "out")(h.reshape(b, n, width))
        h = self.activation(dense(self.mlp_width or 4 * width, "mlp_1")(norm("ln_2")(x)))
        x = x + dense(width, "mlp_2")(h)
        return x if cache is None else (x, (k, v))


class Transformer(nn.Module):
    """A stack of blocks. x: [B, N, width]; mask: bool, broadcastable to [B, heads, N, N], True where attended to.

    With a `Cache` of M positions the mask is [B, heads, N, M], and the result is the pair of x and the cache with it.

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
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, cache: Cache | None = None) -> Any:
        fields, count = (self.heads, self.activation, self.dtype, self.mlp_width), x.shape[1]
        if not self.scan:
            block, read = rematerialized(Block, self.remat), []
            for i in range(self.layers):
                one = block(*fields, name=f"block_{i}")
                if cache is None:
                    x = one(x, mask)
                else:
                    x, (k, v) = one(x, mask, Cache(cache.k[i], cache.v[i], cache.index))
                    read.append((k, v))
            k, v = (jnp.stack(part) for part in zip(*read)) if read else (None, None)
        else:
            # The loop itself keeps what is computed again apart, so that nothing else has to.
            block = rematerialized(_Iteration, self.remat, prevent_cse=False)
            loop = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast if cache is None else (nn.broadcast, nn.broadcast, 0),
                length=self.layers,
            )(*fields, name="blocks")
            if cache is None:
                return loop(x, mask)[0]
            x, (k, v) = loop(x, mask, cache.index, (cache.k, cache.v))
        return x if cache is None else (x, Cache(k, v, cache.index + count))


class _Iteration(Block):
    """A block as the body of a scan.

    Attributes:
        As `Block`.
    """

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, index: jax.Array | None = None, kv: Any = None
    ) -> tuple[jax.Array, Any]:
        if kv is None:
            return super().__call__(x, mask), None
        return super().__call__(x, mask, Cache(*kv, index))


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a `Transformer` with scan=True that computes the same as one with scan=False.

    params: of its own, {"block_0": ..., "block_1": ...}. Returns {"blocks": ...}.
    """
    blocks = [params[f"block_{i}"] for i in range(len(params))]
    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def causal_mask(n: int) -> jax.Array:
    """Return bool[1, 1, n, n]: position i attends to positions 0..i."""
    return jnp.tril(jnp.ones((n, n), bool))[None, None]
