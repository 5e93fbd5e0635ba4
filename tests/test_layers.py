"""Layers against numpy in float64, and the U-Net's size against a count from the description of ADM."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal, random_params, with_zeros

from ddpm_jax.models import attention as attention_module
from ddpm_jax.models import layers
from ddpm_jax.models.attention import attention
from ddpm_jax.models.layers import (
    AttentionBlock,
    GroupNorm,
    Resample,
    ResBlock,
    TimeEmbedding,
    depth_to_space,
    downsample2,
    space_to_depth,
    timestep_embedding,
    upsample2,
)
from ddpm_jax.models.unet import UNet, check_image_size
from ddpm_jax.training.tasks.conditions import gaussian_blur3


def f64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def group_norm(x, groups, gain, bias, eps=1e-5):
    """Two passes over [B, ..., C]: the mean first, then the variance about it."""
    b, c = x.shape[0], x.shape[-1]
    grouped = x.reshape(b, -1, groups, c // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    var = ((grouped - mean) ** 2).mean((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(var + eps)).reshape(x.shape) * gain + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def conv3(x, kernel, bias):
    """3 x 3 cross-correlation, padded with zeros. kernel: [3, 3, in, out]."""
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    return sum(wide[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3)) + bias


def average2(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


@pytest.mark.parametrize("dim,shift", [(8, 0), (7, 0), (8, 1)])
def test_timestep_embedding_is_cosines_then_sines(dim, shift):
    t = np.array([0, 1, 37, 999])
    half = dim // 2
    frequencies = [10_000 ** (-i / (half - shift)) for i in range(half)]
    expected = np.array([[np.cos(s * f) for f in frequencies] + [np.sin(s * f) for f in frequencies] for s in t])
    out = np.asarray(timestep_embedding(jnp.asarray(t, jnp.int32), dim, frequency_shift=shift))
    assert out.dtype == np.float32 and out.shape == (4, dim)
    # float32 angles up to 999 are exact to 3e-5
    np.testing.assert_allclose(out[:, : 2 * half], expected, atol=1e-4)
    assert not out[:, 2 * half :].any()


def test_timestep_embedding_needs_a_frequency():
    with pytest.raises(ValueError, match="dim=3 must be at least 4 with frequency_shift=1"):
        timestep_embedding(jnp.arange(2), 3, frequency_shift=1)


@pytest.mark.parametrize("offset,tolerance", [(0.0, 1e-5), (30.0, 1e-3)])
def test_group_norm_is_that_of_two_passes_in_float64(offset, tolerance):
    """Its one pass in float32 cancels where the mean is large; at 30 standard deviations three digits stay."""
    x = normal(0, 2, 8, 8, 12) * 2.0 + 2.0 * offset
    module = GroupNorm(groups=4)
    params = random_params(module.init, x)
    scale, shift = normal(1, 2, 12), normal(2, 2, 12)
    gain, bias = f64((params["params"]["scale"], params["params"]["bias"]))
    expected = group_norm(f64(x), 4, gain, bias)
    run = fast_jit(module.apply)
    np.testing.assert_allclose(run(params, x), expected, atol=tolerance)
    wide = lambda a: f64(a)[:, None, None, :]
    out = run(params, x, scale, shift)
    np.testing.assert_allclose(out, expected * (1 + wide(scale)) + wide(shift), atol=3 * tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-4), (jnp.bfloat16, 3e-2)])
def test_gradient_of_group_norm_is_that_of_differences_in_float64(dtype, tolerance):
    """For a weighted sum of outputs, along each input: central differences, whose error is of order 1e-8."""
    x = (1.0 + 2.0 * normal(0, 2, 4, 4, 12)).astype(dtype)
    gain, offset, weights = normal(1, 2, 12), normal(2, 2, 12), normal(3, 2, 4, 4, 12)
    total = lambda *inputs: jnp.sum(weights * layers.group_norm(*inputs, 4, 1e-5).astype(jnp.float32))
    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, gain, offset)

    def reference(x, gain, offset):
        wide = lambda a: a[:, None, None, :]
        return np.sum(f64(weights) * (group_norm(x, 4, 1.0, 0.0) * wide(gain) + wide(offset)))

    inputs = [f64(a) for a in (x, gain, offset)]
    for k, grad in enumerate(grads):
        assert grad.dtype == (dtype if k == 0 else jnp.float32) and grad.shape == inputs[k].shape
        directions = np.random.default_rng(k).normal(size=(5, *grad.shape))
        for direction in directions:
            ends = []
            for step in (1e-4, -1e-4):
                moved = list(inputs)
                moved[k] = inputs[k] + step * direction
                ends.append(reference(*moved))
            expected = (ends[0] - ends[1]) / 2e-4
            size = np.sqrt(np.sum(np.square(direction * f64(grad))))
            assert abs(np.sum(direction * f64(grad)) - expected) < tolerance * size


def test_group_norm_of_a_constant_is_its_bias_and_groups_must_divide():
    module = GroupNorm(groups=4)
    x = jnp.full((1, 4, 4, 8), 3.0)
    params = random_params(module.init, x)
    out = fast_jit(module.apply)(params, x)
    np.testing.assert_allclose(out, np.broadcast_to(params["params"]["bias"], x.shape), atol=1e-3)
    with pytest.raises(ValueError, match="groups=4 must divide the number of channels, which is 6"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4, 6)))


@pytest.fixture(params=["stored", "recomputed"])
def attention_form(request, monkeypatch):
    """The forms of attention: with logits that are stored, and as on a TPU with logits that are computed twice."""
    if request.param == "recomputed":
        monkeypatch.setattr(attention_module, "_stored", attention_module._recomputed)


@pytest.mark.usefixtures("attention_form")
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_attention(masked):
    b, n, m, h, d = 2, 3, 5, 2, 4
    q, k, v = normal(0, b, n, h, d), normal(1, b, m, h, d), normal(2, b, m, h, d)
    mask = np.random.default_rng(3).random((b, 1, n, m)) < 0.6
    mask[..., 0] = True
    mask[1, 0, 2] = False  # a query that may see nothing
    logits = np.einsum("bnhd,bmhd->bhnm", f64(q), f64(k)) / np.sqrt(d)
    weights = softmax(np.where(mask, logits, -1e30)) * mask if masked else softmax(logits)
    out = np.asarray(attention(q, k, v, jnp.asarray(mask) if masked else None))
    np.testing.assert_allclose(out, np.einsum("bhnm,bmhd->bnhd", weights, f64(v)), atol=1e-5)
    assert not masked or not out[1, 2].any()


@pytest.mark.usefixtures("attention_form")
@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 0.016), ("float16", 0.002)])
@pytest.mark.parametrize("size", [1.0, 5.0, 100.0])
def test_logits_of_attention_are_float32_in_half_precision(dtype, tolerance, size):
    """Logits up to 8, 190 and 74000, against float64 with the same rounded q, k and v; one head has 40 channels."""
    a, b, v = (normal(seed, 1, 64, 2, 40) for seed in range(3))
    q, k, v = (x.astype(dtype) for x in (size * a, size * b + 0.5 * size * a, v))
    exact = f64(tuple(x.astype(jnp.float32) for x in (q, k, v)))
    weights = softmax(np.einsum("bnhd,bmhd->bhnm", *exact[:2]) / np.sqrt(40))
    out = jax.jit(lambda *x: attention(*x))(q, k, v)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), np.einsum("bhnm,bmhd->bnhd", weights, exact[2]), atol=tolerance)


@pytest.mark.usefixtures("attention_form")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_attention_in_half_precision(dtype):
    """Within the rounding of the dtype of the gradient in float32, and of the inputs' own dtype."""
    q, k, v = (normal(seed, 1, 16, 2, 40).astype(dtype) for seed in range(3))
    grad = jax.grad(lambda *x: attention(*x).astype(jnp.float32).var(), argnums=(0, 1, 2))
    exact = grad(*(x.astype(jnp.float32) for x in (q, k, v)))
    for half, full in zip(jax.jit(grad)(q, k, v), exact, strict=True):
        assert half.dtype == dtype
        np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.03 * float(jnp.abs(full).max()))


def test_gradient_of_attention_whose_logits_are_computed_twice():
    """In float32 it is that of the plain form, but for masked queries, which have none."""
    q, k, v = normal(0, 2, 3, 2, 4), normal(1, 2, 5, 2, 4), normal(2, 2, 5, 2, 4)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 2, 3, 5)) < 0.6).at[1, 0, 2].set(False)
    folded = [attention_module._fold(x) for x in (q, k, v)] + [mask.reshape(4, 3, 5)]
    grads = [
        jax.grad(lambda *x, form=form: (form(*x) ** 2).sum(), argnums=(0, 1, 2))(*folded)
        for form in (attention_module._stored, attention_module._recomputed)
    ]
    for plain, twice in zip(*grads, strict=True):
        np.testing.assert_allclose(twice, plain, atol=1e-5)


@pytest.mark.usefixtures("attention_form")
def test_attention_has_a_finite_gradient_where_a_query_sees_nothing():
    q = normal(0, 1, 2, 1, 4)
    grad = jax.grad(lambda q: attention(q, q, q, jnp.zeros((1, 1, 2, 2), bool)).sum())(q)
    assert np.isfinite(grad).all()


def test_up_and_down_sampling():
    x = normal(0, 2, 4, 6, 3)
    np.testing.assert_array_equal(upsample2(x), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_allclose(downsample2(x), average2(f64(x)), atol=1e-6)
    np.testing.assert_array_equal(downsample2(upsample2(x)), x)


@pytest.mark.parametrize("pad_after", [False, True])
def test_a_convolution_that_halves_pads_all_sides_or_the_last_ones(pad_after):
    x, module = normal(0, 1, 4, 4, 2), Resample(3, "down", pad_after=pad_after)
    params = random_params(module.init, x)
    p = f64(params["params"]["conv"])
    pad = (0, 1) if pad_after else (1, 1)
    padded = np.pad(f64(x), ((0, 0), pad, pad, (0, 0)))
    expected = [
        [np.einsum("hwc,hwcd->d", padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], p["kernel"]) for j in range(2)]
        for i in range(2)
    ]
    np.testing.assert_allclose(module.apply(params, x)[0], np.array(expected) + p["bias"], atol=1e-5)


@pytest.mark.parametrize("fields", [(1e-5, 0, False), (1e-6, 1, True)], ids=["adm", "ddpm"])
def test_fields_of_a_unet_reach_all_its_layers(fields):
    names, found = ("norm_eps", "frequency_shift", "pad_after"), set()

    def note(call, args, options, context):
        for name in ("eps", *names):
            if hasattr(context.module, name) and not isinstance(context.module, UNet):
                found.add(("norm_eps" if name == "eps" else name, getattr(context.module, name)))
        return call(*args, **options)

    given = {} if fields[1] == 0 else dict(zip(names, fields))
    options = {"attention_levels": (1,), "head_channels": 4, "groups": 4, "conv_resample": True}
    with nn.intercept_methods(note):
        init = UNet(8, 3, (1, 1), 1, (), **options, **given).init
        jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
    assert found == set(zip(names, fields))


def test_space_to_depth_keeps_every_pixel_in_row_order():
    x = np.asarray(normal(0, 2, 4, 6, 3))
    out = np.asarray(space_to_depth(jnp.asarray(x), 2))
    assert out.shape == (2, 2, 3, 12)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(out[:, i, j], x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1))
    np.testing.assert_array_equal(depth_to_space(jnp.asarray(out), 2), x)
    np.testing.assert_array_equal(space_to_depth(jnp.asarray(x), 1), x)


def test_gaussian_blur3_is_a_normalised_gaussian():
    sigma = 0.6
    y, x = np.mgrid[-1:2, -1:2]
    kernel = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    impulse = np.zeros((1, 5, 5, 1), np.float32)
    impulse[0, 2, 2] = 1.0
    blurred = np.asarray(gaussian_blur3(jnp.asarray(impulse), sigma))
    np.testing.assert_allclose(blurred[0, 1:4, 1:4, 0], kernel, atol=1e-6)
    np.testing.assert_allclose(blurred.sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(gaussian_blur3(jnp.full((1, 4, 4, 3), -0.7), sigma), -0.7, atol=1e-6)


@pytest.mark.parametrize("resample,features,scale_shift", [(None, 12, True), ("down", 8, True), ("up", 8, False)])
def test_res_block_is_the_published_one(resample, features, scale_shift):
    x, emb = normal(0, 2, 4, 4, 8), normal(1, 2, 6)
    module = ResBlock(features, resample, scale_shift, groups=4)
    params = random_params(module.init, x, emb)
    p = f64(params["params"])
    move = {None: lambda y: y, "down": average2, "up": lambda y: np.repeat(np.repeat(y, 2, 1), 2, 2)}[resample]
    h = silu(group_norm(f64(x), 4, p["norm_1"]["scale"], p["norm_1"]["bias"]))
    h = conv3(move(h), p["conv_1"]["kernel"], p["conv_1"]["bias"])
    e = (silu(f64(emb)) @ p["emb"]["kernel"] + p["emb"]["bias"])[:, None, None, :]
    norm_2 = lambda y: group_norm(y, 4, p["norm_2"]["scale"], p["norm_2"]["bias"])
    h = norm_2(h) * (1 + e[..., :features]) + e[..., features:] if scale_shift else norm_2(h + e)
    h = conv3(silu(h), p["conv_2"]["kernel"], p["conv_2"]["bias"])
    skip = move(f64(x))
    if features != 8:
        skip = skip @ p["skip"]["kernel"][0, 0] + p["skip"]["bias"]
    np.testing.assert_allclose(fast_jit(module.apply)(params, x, emb), skip + h, atol=5e-5)


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_layout_scales_and_shifts_every_position_by_itself(resample):
    size = {None: 4, "down": 2, "up": 8}[resample]
    x, emb, cond_map = normal(0, 2, 4, 4, 8), normal(1, 2, 6), normal(2, 2, size, size, 5)
    module = ResBlock(8, resample, groups=4)
    apply = lambda params, x, emb, cond_map: module.apply(params, x, emb, False, cond_map)
    params = random_params(lambda *args: module.init(*args[:3], False, args[3]), x, emb, cond_map)
    p = f64(params["params"])
    move = {None: lambda y: y, "down": average2, "up": lambda y: np.repeat(np.repeat(y, 2, 1), 2, 2)}[resample]
    h = silu(group_norm(f64(x), 4, p["norm_1"]["scale"], p["norm_1"]["bias"]))
    h = conv3(move(h), p["conv_1"]["kernel"], p["conv_1"]["bias"])
    e = (silu(f64(emb)) @ p["emb"]["kernel"] + p["emb"]["bias"])[:, None, None, :]
    e = e + f64(cond_map) @ p["layout_emb"]["kernel"]
    h = group_norm(h, 4, p["norm_2"]["scale"], p["norm_2"]["bias"]) * (1 + e[..., :8]) + e[..., 8:]
    h = conv3(silu(h), p["conv_2"]["kernel"], p["conv_2"]["bias"])
    np.testing.assert_allclose(fast_jit(apply)(params, x, emb, cond_map), move(f64(x)) + h, atol=5e-5)


def test_a_layout_needs_scale_and_shift():
    block = ResBlock(8, scale_shift=False, groups=4)
    with pytest.raises(ValueError, match="cond_map needs scale_shift=True"):
        jax.eval_shape(
            block.init, jax.random.key(0), normal(0, 2, 4, 4, 8), normal(1, 2, 6), False, normal(2, 2, 4, 4, 5)
        )


@pytest.mark.parametrize("modulate", [False, True])
def test_the_cond_map_reaches_every_block_of_its_level_only_if_it_modulates(modulate):
    """Zero the stem's weights of the map: only the blocks can read it, averaged down to their level."""
    unet = UNet(16, 3, (1, 2), 1, (), mid_attention=False, groups=4, modulate=modulate)
    x, t, cond_map = normal(0, 2, 4, 4, 3), jnp.array([3, 500]), normal(1, 2, 4, 4, 5)
    run = fast_jit(lambda params, cond_map: unet.apply(params, x, t, cond_map=cond_map))
    params = random_params(lambda key: unet.init(key, x, t, cond_map=cond_map))
    kernel = params["params"]["in_conv"]["kernel"].at[:, :, 3:].set(0)
    params = {"params": params["params"] | {"in_conv": params["params"]["in_conv"] | {"kernel": kernel}}}
    blocks = {name: p for name, p in params["params"].items() if "conv_1" in p}
    assert len(blocks) == 10 and all(("layout_emb" in p) == modulate for p in blocks.values())
    assert (run(params, cond_map) != run(params, -cond_map)).any() == modulate
    if not modulate:
        return
    # Blocks of the lower level read averages of 2 x 2 of silu(cond_map): what keeps these does not matter to them.
    for name in ("down_0_0", "up_0_0", "up_0_1", "up_1_sample"):
        params = with_zeros(params, "params", name, "layout_emb")
    swapped = cond_map[:, :, jnp.array([1, 0, 3, 2])]
    np.testing.assert_allclose(run(params, cond_map), run(params, swapped), atol=1e-4)
    assert np.abs(run(params, cond_map) - run(params, -cond_map)).max() > 1e-2


def test_blocks_begin_as_their_skip():
    x, emb, context = normal(0, 2, 4, 4, 8), normal(1, 2, 6), normal(2, 2, 3, 5)

    def begin(module, *inputs):
        return fast_jit(module.init_with_output)(jax.random.key(0), *inputs)[0]

    np.testing.assert_array_equal(begin(ResBlock(8, groups=4), x, emb), x)
    np.testing.assert_array_equal(begin(ResBlock(8, "up", groups=4), x, emb), upsample2(x))
    np.testing.assert_array_equal(begin(AttentionBlock(4, groups=4), x, context), x)


def test_attention_block_attends_to_context_and_pixels():
    x, context, mask = normal(0, 2, 2, 2, 8), normal(1, 2, 3, 5), np.array([[1, 1, 0], [0, 0, 0]], bool)
    module = AttentionBlock(head_channels=4, groups=4)
    params = random_params(module.init, x, context)
    p = f64(params["params"])
    h = group_norm(f64(x), 4, p["norm"]["scale"], p["norm"]["bias"]).reshape(2, 4, 8)
    qkv = (h @ p["qkv"]["kernel"] + p["qkv"]["bias"]).reshape(2, 4, 2, 3, 4)  # heads first, then q, k, v
    kv = (f64(context) @ p["context_kv"]["kernel"] + p["context_kv"]["bias"]).reshape(2, 3, 2, 2, 4)
    k = np.concatenate([kv[:, :, :, 0], qkv[:, :, :, 1]], axis=1)
    v = np.concatenate([kv[:, :, :, 1], qkv[:, :, :, 2]], axis=1)
    logits = np.einsum("bnhd,bmhd->bhnm", qkv[:, :, :, 0], k) / 2.0
    seen = np.concatenate([mask, np.ones((2, 4), bool)], axis=1)[:, None, None, :]
    h = np.einsum("bhnm,bmhd->bnhd", softmax(np.where(seen, logits, -1e30)), v).reshape(2, 4, 8)
    expected = f64(x) + (h @ p["out"]["kernel"] + p["out"]["bias"]).reshape(x.shape)
    apply = fast_jit(module.apply)
    np.testing.assert_allclose(apply(params, x, context, mask), expected, atol=2e-5)
    hidden = context.at[:, 2].set(99.0).at[1].set(-99.0)
    np.testing.assert_array_equal(apply(params, x, context, mask), apply(params, x, hidden, mask))
    with pytest.raises(ValueError, match="head_channels=3 must divide the 8 channels"):
        jax.eval_shape(AttentionBlock(3, groups=4).init, jax.random.key(0), x)


def test_time_embedding_is_two_layers():
    t = jnp.array([0, 500], jnp.int32)
    module = TimeEmbedding(6, 10)
    params = random_params(module.init, t)
    p = f64(params["params"])
    h = f64(timestep_embedding(t, 6)) @ p["dense_0"]["kernel"] + p["dense_0"]["bias"]
    expected = silu(h) @ p["dense_1"]["kernel"] + p["dense_1"]["bias"]
    np.testing.assert_allclose(fast_jit(module.apply)(params, t), expected, atol=1e-5)


def adm_parameters(ch, mult, depth, attended, out):
    """Count the parameters of ADM (Dhariwal & Nichol 2021, section 3 and appendix) from its description.

    Time: two layers to 4 ch. Block i -> o: norm, 3 x 3, projection of the time to a scale and a shift, norm, 3 x 3, and
    a 1 x 1 skip where i != o. Attention on c channels: norm, q k v, output. A level down has `depth` blocks and, but
    for the last, a block that halves; a level up has depth + 1 blocks, each of which takes one skip, and, but for the
    first, a block that doubles; the middle has block, attention, block. `attended`: levels with attention.
    """
    conv = lambda i, o, size=9: size * i * o + o
    block = lambda i, o: 2 * i + conv(i, o) + conv(4 * ch, 2 * o, 1) + 2 * o + conv(o, o) + (i != o) * conv(i, o, 1)
    attention = lambda c: 2 * c + conv(c, 4 * c, 1)
    widths = [ch * m for m in mult]
    total = conv(ch, 4 * ch, 1) + conv(4 * ch, 4 * ch, 1) + conv(3, ch)
    skips, now = [ch], ch
    for level, width in enumerate(widths):
        for _ in range(depth):
            total += block(now, width) + (level in attended) * attention(width)
            now = width
            skips.append(now)
        if level < len(widths) - 1:
            total += block(now, now)
            skips.append(now)
    total += 2 * block(now, now) + attention(now)
    for level in reversed(range(len(widths))):
        for _ in range(depth + 1):
            total += block(now + skips.pop(), widths[level]) + (level in attended) * attention(widths[level])
            now = widths[level]
        total += (level > 0) * block(now, now)
    assert not skips
    return total + 2 * now + conv(now, out)


def test_the_unet_has_the_parameters_of_adm_on_imagenet_64():
    unet = UNet(192, 6, (1, 2, 3, 4), 3, (32, 16, 8), head_channels=64)
    x, t = jnp.zeros((1, 64, 64, 3)), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(unet.init, jax.random.key(0), x, t)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert count == adm_parameters(192, (1, 2, 3, 4), 3, {1, 2, 3}, 6)
    classes = 1000 * 4 * 192  # an embedding of the class, as wide as that of the time
    assert round((count + classes) / 1e6) == 296  # what the paper reports


def test_check_image_size_names_what_would_fit():
    for size, patch, levels in [(64, 1, 4), (8, 1, 4), (96, 4, 2), (5, 1, 1)]:
        check_image_size(size, patch, levels)
    for size, patch, levels, unit in [(60, 1, 4, 8), (4, 1, 4, 8), (36, 4, 3, 16), (0, 1, 1, 1)]:
        with pytest.raises(ValueError, match=rf"image size {size} cannot be halved .* multiple of {unit}$"):
            check_image_size(size, patch, levels)
