"""Attention as one kernel for TPUs, which never writes logits to HBM (in the manner of FlashAttention, Dao 2022).

All keys and values of a head fit into a TPU's VMEM for the networks here, so that a block of queries sees whole rows of
logits and the backward pass keeps nothing but queries, keys and values. Heads stay where they are in the last axis:
the kernel reads slices of channels, so that nothing is transposed around it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

_SPLIT = ("data", "fsdp")
"""The axes of a mesh over which batches are split."""
_LANES = 128
_ROWS = 16
"""Of a tile of half-precision numbers."""
_LOGITS = 2**19
"""Logits of a head that are in VMEM at a time, in float32: 2 MiB for each intermediate result."""
_VMEM = 10 * 2**20
"""Bytes for blocks of queries, keys, values and their gradients, of the 16 MiB that a kernel may use."""


def can_fuse(q: Any, k: Any, v: Any, mask: Any) -> bool:
    """Return whether `fused` computes attention of these shapes; arguments as those of `fused`.

    XLA cannot split a kernel over devices, so the mesh has to be known: that of the context, as set by `jax.set_mesh`
    or, while tracing, by `jax.sharding.use_abstract_mesh`, or all of it by `jax.shard_map` or `jax.pmap` around.
    """
    shapes_fit = q.shape[-1] == v.shape[-1] and q.shape[1] >= _ROWS and k.shape[1] >= _ROWS
    mask_fits = mask is None or (mask.shape[1] == 1 and mask.shape[0] in (1, q.shape[0]) and mask.shape[3] > 1)
    placed = _batch_axes() is not None and q.shape[0] % _shards(_batch_axes()) == 0
    return placed and shapes_fit and mask_fits and _rows(q.shape[1], k.shape[1]) > 0 and _grouped(q, k) > 0


def fused(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, interpret: bool = False) -> jax.Array:
    """Compute attention in one kernel; see `attention.attention`.

    Args:
        q: [B, N, H, D], in half precision.
        k, v: [B, M, H, D].
        mask: bool[B | 1, 1, N | 1, M] or None.
        interpret: run on any platform, slowly.

    Returns:
        [B, N, H, D] in v's dtype. The arguments are such that `can_fuse` is true.
    """
    (b, n, h, d), m = q.shape, k.shape[1]
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, 0], (b, mask.shape[2], m)).astype(jnp.int8)
    compute = functools.partial(_attention, heads=h, interpret=interpret)
    axes = _batch_axes()
    if axes:
        place = PartitionSpec(axes)
        compute = jax.shard_map(
            compute, in_specs=(place,) * 4, out_specs=place, axis_names=_automatic(), check_vma=False
        )
    return compute(*(x.reshape(b, x.shape[1], h * d) for x in (q, k, v)), mask).reshape(b, n, h, d)


def _automatic() -> set[str]:
    """Return the axes of the context's mesh over which XLA would split a program."""
    mesh = get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def _batch_axes() -> tuple[str, ...] | None:
    """Return the axes that split the batch further, none of them if it is all split; None if that is not known."""
    mesh = get_abstract_mesh()
    if mesh.empty or AxisType.Explicit in mesh.axis_types:
        return None
    axes = tuple(name for name in mesh.axis_names if name in _automatic() and name in _SPLIT)
    return axes if axes or not _automatic() else None


def _shards(axes: tuple[str, ...]) -> int:
    return math.prod(get_abstract_mesh().shape[name] for name in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, heads: int, interpret: bool):
    return _run("forward", heads, interpret, q, k, v, mask)


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, heads: int, interpret: bool) -> tuple:
    return _attention(q, k, v, mask, heads, interpret), (q, k, v, mask)


def _attention_backward(heads: int, interpret: bool, residuals: tuple, gradient: jax.Array) -> tuple:
    return *_run("backward", heads, interpret, *residuals, gradient), None


_attention.defvjp(_attention_forward, _attention_backward)


def _rows(n: int, m: int) -> int:
    """Return the number of queries in a block: all of them, or else a multiple of a tile's rows that divides them."""
    most = _LOGITS // m
    return n if n <= most else max((r for r in range(_ROWS, most + 1, _ROWS) if n % r == 0), default=0)


def _grouped(q: Any, k: Any) -> int:
    """Return the number of heads in a block, whose channels fill whole lanes or are all there are; 0 if none fits."""
    (_, n, heads, d), m = q.shape, k.shape[1]
    rows = _rows(n, m)
    for group in (g for g in range(1, heads + 1) if heads % g == 0):
        if (group * d) % _LANES and group != heads:
            continue
        lanes = math.ceil(group * d / _LANES) * _LANES
        # Two buffers of three blocks of queries and four of keys, in half precision, and two sums in float32.
        if lanes * (2 * 2 * (3 * rows + 4 * m) + 2 * 4 * m) <= _VMEM:
            return group
    return 0


def _run(kind: str, heads: int, interpret: bool, *given: jax.Array | None) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    arrays = [x for x in given if x is not None]
    q, k, masked = arrays[0], arrays[1], given[3] is not None
    (b, n, c), m = q.shape, k.shape[1]
    d, rows = c // heads, _rows(n, m)
    split = lambda x: jax.ShapeDtypeStruct((*x.shape[:2], heads, d), x.dtype)  # noqa: E731
    group = _grouped(split(q), split(k))
    queries = pl.BlockSpec((1, rows, group * d), lambda i, j, x: (i, x, j))
    keys = pl.BlockSpec((1, m, group * d), lambda i, j, x: (i, 0, j))
    masks = []
    if masked:
        per_query = arrays[3].shape[1] > 1
        masks = [pl.BlockSpec((1, rows if per_query else 1, m), lambda i, j, x: (i, x if per_query else 0, 0))]
    forward = kind == "forward"
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    products, read = (2, sum(x.nbytes for x in arrays[:3])) if forward else (5, 2 * sum(x.nbytes for x in arrays[:3]))
    read += q.nbytes + (arrays[3].nbytes * (heads // group if rows < n else 1) if masked else 0)
    return pl.pallas_call(
        functools.partial(_forward_kernel if forward else _backward_kernel, d, masked),
        grid=(b, heads // group, n // rows),
        in_specs=[queries, keys, keys, *masks] + ([] if forward else [queries]),
        out_specs=queries if forward else (queries, keys, keys),
        out_shape=like(q) if forward else (like(q), like(k), like(k)),
        scratch_shapes=[] if forward else [pltpu.VMEM((m, group * d), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * b * n * m * c, transcendentals=b * heads * n * m, bytes_accessed=read
        ),
        interpret=interpret,
        name=f"attention_{kind}",
    )(*arrays)


def _weights(q: jax.Array, k: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Return the softmax weights of a head in float32. q: [R, D]; k: [M, D]; seen: bool[R | 1, M] -> [R, M]."""
    logits = _product(q, k, 1, 1) * q.shape[-1] ** -0.5
    if seen is not None:
        logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)  # zero: of queries whose keys are all masked


def _product(x: jax.Array, y: jax.Array, axis_x: int, axis_y: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((axis_x,), (axis_y,)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(d: int, masked: bool, q: Any, k: Any, v: Any, *rest: Any) -> None:
    *mask, out = rest
    seen = mask[0][0].astype(jnp.int32) != 0 if masked else None
    for start in range(0, out.shape[-1], d):
        head = slice(start, start + d)
        weights = _weights(q[0, :, head], k[0, :, head], seen)
        out[0, :, head] = _product(weights.astype(v.dtype), v[0, :, head], 1, 0).astype(out.dtype)


def _backward_kernel(d: int, masked: bool, q: Any, k: Any, v: Any, *rest: Any) -> None:
    from jax.experimental import pallas as pl

    *mask, gradient, d_q, d_k, d_v, sum_k, sum_v = rest
    seen = mask[0][0].astype(jnp.int32) != 0 if masked else None

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    for start in range(0, q.shape[-1], d):
        head = slice(start, start + d)
        q_h, k_h, g_h = q[0, :, head], k[0, :, head], gradient[0, :, head]
        weights = _weights(q_h, k_h, seen)
        sum_v[:, head] += _product(weights.astype(g_h.dtype), g_h, 0, 0)
        d_weights = _product(g_h, v[0, :, head], 1, 1)
        common = (weights * d_weights).sum(-1, keepdims=True)
        d_logits = (weights * (d_weights - common) * d**-0.5).astype(q_h.dtype)
        d_q[0, :, head] = _product(d_logits, k_h, 1, 0).astype(d_q.dtype)
        sum_k[:, head] += _product(d_logits, q_h, 0, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        d_k[0] = sum_k[...].astype(d_k.dtype)
        d_v[0] = sum_v[...].astype(d_v.dtype)
