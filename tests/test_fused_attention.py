"""The attention kernel of TPUs, run by Pallas' interpreter against the formula in float64, and when it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from random_networks import normal

from ddpm_jax.models import fused_attention
from ddpm_jax.models.attention import attention
from ddpm_jax.models.layers import HeadProjections
from ddpm_jax.parallel.mesh import make_mesh, on_mesh

B, N, M, H, D = 2, 48, 40, 2, 64


def arrays(dtype="float32"):
    shapes = ((B, N, H, D), (B, M, H, D), (B, M, H, D), (B, N, H, D))
    return [normal(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes)]


def expected(q, k, v, g, mask):
    """Return attention and its gradient by the formulas of softmax attention, in float64."""
    q, k, v, g = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, g))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    seen = np.ones_like(logits) if mask is None else np.broadcast_to(mask, logits.shape)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * seen
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    d_weights = np.einsum("bnhd,bmhd->bhnm", g, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return (
        np.einsum("bhnm,bmhd->bnhd", weights, v),
        np.einsum("bhnm,bmhd->bnhd", d_logits, k),
        np.einsum("bhnm,bnhd->bmhd", d_logits, q),
        np.einsum("bhnm,bnhd->bmhd", weights, g),
    )


def run(q, k, v, g, mask):
    def both(q, k, v, g):
        out, back = jax.vjp(lambda *x: fused_attention.fused(*x, mask, True), q, k, v)
        return out, *back(g)

    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    return jax.jit(on_mesh(both, mesh))(q, k, v, g)


def masks(kind):
    rng = np.random.default_rng(5)
    if kind == "keys":
        mask = rng.random((B, 1, 1, M)) < 0.6
        mask[1] = False  # queries that may see nothing
        return mask
    return None if kind == "none" else np.tri(N, M, dtype=bool)[None, None]


@pytest.mark.parametrize("kind", ["none", "keys", "causal"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_kernel_is_softmax_attention_and_its_gradient(monkeypatch, kind, blocks):
    monkeypatch.setattr(fused_attention, "_LOGITS", N * M // blocks)
    given, mask = arrays(), masks(kind)
    for found, true in zip(run(*given, mask), expected(*given, mask), strict=True):
        np.testing.assert_allclose(found, true, atol=2e-5)


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 0.02), ("float16", 0.0025)])
def test_kernel_in_half_precision(dtype, tolerance):
    """Within a few roundings of the largest number of each result."""
    given, mask = arrays(dtype), masks("keys")
    for found, true in zip(run(*given, mask), expected(*given, mask), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), true, atol=tolerance * np.abs(true).max())


def test_kernel_splits_the_batch_over_devices_and_can_be_mapped():
    q, k, v, _ = arrays()
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    run = on_mesh(lambda *x: fused_attention.fused(*x, None, True), mesh)
    exact = expected(q, k, v, q, None)[0]
    out = jax.jit(run, in_shardings=place, out_shardings=place)(q, k, v)
    np.testing.assert_allclose(out, exact, atol=2e-5)
    stacked = [jnp.stack([x, 0 * x]) for x in (q, k, v)]
    place = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    np.testing.assert_allclose(jax.jit(jax.vmap(run), in_shardings=place)(*stacked)[0], exact, atol=2e-5)


def lowered(shape=(B, N, H, D), dtype="bfloat16", mesh=None, mask=None):
    """Return the text of attention with its gradient, lowered for TPUs."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    loss = jax.grad(lambda x: attention(x, x, x, mask).astype(jnp.float32).sum())
    traced = jax.jit(loss if mesh is None else on_mesh(loss, mesh)).trace(x)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def test_kernel_is_chosen_where_the_mesh_is_known_and_the_shapes_fit():
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    kernel = "tpu_custom_call"
    assert kernel in lowered(mesh=mesh)
    assert kernel in lowered((B, 64, 9, 64), mesh=mesh)  # an odd number of heads of 64 channels
    assert kernel in lowered((B, 257, 16, 80), mesh=mesh)
    assert kernel not in lowered()
    assert kernel not in lowered(dtype="float32", mesh=mesh)
    assert kernel not in lowered((B, 8, H, D), mesh=mesh)  # less than a tile
    assert kernel not in lowered((B, 16384, H, D), mesh=mesh)  # keys that do not fit into VMEM
    assert kernel not in lowered(mesh=mesh, mask=np.ones((B, H, N, N), bool))  # a mask of its own for each head


def test_kernel_is_not_chosen_for_a_batch_that_the_mesh_does_not_divide():
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    x = jax.ShapeDtypeStruct((2, N, H, D), jnp.bfloat16)
    assert not on_mesh(lambda: fused_attention.can_fuse(x, x, x, None), mesh)()
    x = jax.ShapeDtypeStruct((8, N, H, D), jnp.bfloat16)
    assert on_mesh(lambda: fused_attention.can_fuse(x, x, x, None), mesh)()


def test_attention_with_a_known_mesh_is_the_same_elsewhere():
    q, k, v, _ = arrays("bfloat16")
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    grad = jax.grad(lambda *x: attention(*x, masks("keys")).astype(jnp.float32).var(), argnums=(0, 1, 2))
    for plain, placed in zip(jax.jit(grad)(q, k, v), jax.jit(on_mesh(grad, mesh))(q, k, v), strict=True):
        np.testing.assert_array_equal(plain, placed)


@pytest.mark.parametrize("by_head", [False, True])
def test_queries_keys_and_values_in_half_precision_are_those_of_one_product(by_head):
    layer = lambda dtype: HeadProjections(3, 2, 4, by_head, dtype=dtype)  # noqa: E731
    x = normal(0, 2, 5, 8).astype(jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf + 0.1, layer(jnp.float32).init(jax.random.key(0), x))
    y = (x.astype(jnp.float32) @ params["params"]["kernel"] + params["params"]["bias"][None, None]).reshape(
        (2, 5, 2, 3, 4) if by_head else (2, 5, 3, 2, 4)
    )
    expected = jnp.moveaxis(y, 3 if by_head else 2, 0)
    np.testing.assert_array_equal(jnp.stack(layer(jnp.float32).apply(params, x)), expected)
    np.testing.assert_allclose(jnp.stack(layer(jnp.bfloat16).apply(params, x)).astype(jnp.float32), expected, atol=0.03)
