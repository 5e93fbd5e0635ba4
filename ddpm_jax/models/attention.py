"""Scaled dot-product attention: one function for all networks, with forms of its own for TPUs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax.models.fused_attention import can_fuse, fused


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Compute scaled dot-product attention, `softmax(q k^T / sqrt(D)) v`; logits and softmax are float32 or wider.

    In half precision both products are accumulated in float32, and only the softmax weights and the result are rounded.

    q: [B, N, H, D]; k: [B, M, H, D]; v: [B, M, H, E]; mask: bool, broadcastable to [B, H, N, M], True at keys
    that are attended to. A query whose keys are all masked gets zeros. Returns [B, N, H, E] in v's dtype.

    The heads are folded into the batch, since batched matmuls over (batch x heads) are what every backend runs
    fastest without a fused kernel. On a TPU, in half precision, reading and writing logits takes longer than the
    products: there, one kernel does everything (`fused_attention.fused`), and for the shapes that it is not made for
    the logits are computed twice and never stored (`_recomputed`).
    """
    if mask is not None:
        mask = jnp.asarray(mask).reshape((1,) * (4 - jnp.ndim(mask)) + jnp.shape(mask))
    if jnp.promote_types(q.dtype, jnp.float32) == q.dtype:
        return _unfused(_stored, q, k, v, mask)
    on_tpu = fused if can_fuse(q, k, v, mask) else functools.partial(_unfused, _recomputed)
    return jax.lax.platform_dependent(q, k, v, mask, tpu=on_tpu, default=functools.partial(_unfused, _stored))


def _unfused(form: Callable, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    (b, n, h, _), m = q.shape, k.shape[1]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (b, h, n, m)).reshape(b * h, n, m)
    out = form(_fold(q), _fold(k), _fold(v), mask)
    return out.reshape(b, h, n, v.shape[-1]).transpose(0, 2, 1, 3)


def _fold(x: jax.Array) -> jax.Array:
    b, n, h, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * h, n, d)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return q k^T / sqrt(D) in float32 or wider. q: [X, N, D]; k: [X, M, D]; mask: bool[X, N, M] -> [X, N, M]."""
    wide, scale = jnp.promote_types(q.dtype, jnp.float32), q.shape[-1] ** -0.5
    # Half-precision queries are not scaled before the product, which would round them.
    before, after = (scale, None) if q.dtype == wide else (None, scale)
    q = q if before is None else q * jnp.asarray(before, q.dtype)
    logits = jnp.einsum("xnd,xmd->xnm", q, k, preferred_element_type=wide)
    logits = logits if after is None else logits * jnp.asarray(after, wide)
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(wide).min)


def _stored(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    logits = _logits(q, k, mask)
    weights = jax.nn.softmax(logits, axis=-1)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return jnp.einsum("xnm,xmd->xnd", weights.astype(v.dtype), v, preferred_element_type=logits.dtype).astype(v.dtype)


@jax.custom_vjp
def _recomputed(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Compute the same, keeping a number for each query in place of its logits, as FlashAttention does (Dao 2022).

    The largest logit of each query comes from a first product; a second one is exponentiated where it is computed, and
    only its half-precision result is stored. The backward pass makes the weights again from `log(sum(exp(logits)))`.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> tuple:
    top = _logits(q, k, mask).max(-1)
    # Otherwise XLA sees that both products are the same, and stores the first.
    q_again, k_again, top = jax.lax.optimization_barrier((q, k, top))
    weights = _exponentials(q_again, k_again, mask, top)
    total = weights.sum(-1)
    total = jnp.where(total == 0, 1.0, total)  # of queries whose keys are all masked
    out = jnp.einsum("xnm,xmd->xnd", weights.astype(v.dtype), v, preferred_element_type=top.dtype)
    out = (out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, mask, out, top + jnp.log(total))


def _backward(residuals: tuple, g: jax.Array) -> tuple:
    q, k, v, mask, out, log_total = jax.lax.optimization_barrier(residuals)
    wide, scale = log_total.dtype, q.shape[-1] ** -0.5
    product = lambda pattern, x, y: jnp.einsum(pattern, x, y, preferred_element_type=wide)  # noqa: E731
    weights = _exponentials(q, k, mask, log_total).astype(v.dtype)
    d_v = product("xnm,xnd->xmd", weights, g)
    common = jnp.sum(g.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    d_logits = weights.astype(wide) * (product("xnd,xmd->xnm", g, v) - common) * jnp.asarray(scale, wide)
    d_logits = d_logits.astype(q.dtype)
    d_q, d_k = product("xnm,xmd->xnd", d_logits, k), product("xnm,xnd->xmd", d_logits, q)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


def _exponentials(q: jax.Array, k: jax.Array, mask: jax.Array | None, offset: jax.Array) -> jax.Array:
    weights = jnp.exp(_logits(q, k, mask) - offset[..., None])
    return weights if mask is None else jnp.where(mask, weights, 0.0)


_recomputed.defvjp(_forward, _backward)
