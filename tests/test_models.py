"""Networks: what conditions do, that dropped ones do nothing, bit for bit, and what compute types and remat change.

All parameters are random, since at its start a network ignores its conditions: zeros stand in front of its output.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal, random_params, with_zeros

from ddpm_jax.models.decoder import Decoder, GridCrossAttention
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import RecurrentTextEncoder, TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler

B, L, D, W, VOCAB = 3, 5, 6, 7, 11
MASK = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
T = jnp.array([3, 400, 999], jnp.int32)
ALL, NONE, ODD = jnp.ones(B, bool), jnp.zeros(B, bool), jnp.array([True, False, True])
INPUTS = {
    "t": T,
    "z_image": normal(1, B, D),
    "z_text": normal(2, B, D),
    "text": normal(3, B, L, W),
    "mask": MASK,
    "keep_image": ALL,
    "keep_text": ALL,
}
# Something else in place of every condition, and of padding alone.
OTHER = {
    "z_image": normal(4, B, D),
    "z_text": normal(5, B, D),
    "text": normal(6, B, L, W),
    "mask": jnp.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool),
}
TOKENS = jnp.array([[1, 4, 2, 0, 0], [1, 5, 6, 7, 2], [1, 2, 0, 0, 0]], jnp.int32)
OTHER_TOKENS = jnp.array([[1, 8, 9, 2, 0], [1, 2, 0, 0, 0], [1, 3, 4, 5, 2]], jnp.int32)


def encoder(**options):
    return TextEncoder(VOCAB, L, 8, 1, 2, name="text_encoder", **options)


def make_decoder(own_text=False, **options):
    unet = UNet(16, 3, (1, 2), 1, (4,), head_channels=8, groups=4, modulate=own_text, **options)
    own = {}
    if own_text:
        own = {"word_vectors": VOCAB, "cond_map_heads": 2, "text_encoder": encoder(causal=False, **options)}
    return Decoder(unet, D, 8, cond_map_channels=3, dtype=unet.dtype, **own)


def make_prior(own_text=False, **options):
    return DiffusionPrior(D, L, 8, 2, 2, text_encoder=encoder(**options) if own_text else None, **options)


def bind(network, x, text):
    """Return (params, run): run(params=..., **changed inputs) is one compiled program for all of them."""
    if isinstance(network, Decoder):
        names = ("t", "z_image", "z_text", "text", "mask", "keep_image", "keep_text")
    else:
        names = ("t", "z_text", "text", "mask", "keep_text")
    inputs = INPUTS | {"x": x, "text": text}
    order = ("x", *names)
    params = random_params(network.init, *(inputs[name] for name in order))
    program = fast_jit(network.apply)

    def run(params=params, **changed):
        return np.asarray(program(params, *((inputs | changed)[name] for name in order)))

    return params, run


X = {"decoder": normal(0, B, 8, 8, 3), "prior": normal(0, B, D)}


@functools.cache
def bound(name, own_text=False):
    network = {"decoder": make_decoder, "prior": make_prior}[name](own_text)
    return bind(network, X[name], TOKENS if own_text else INPUTS["text"])


NETWORKS = [(name, own_text) for name in ("decoder", "prior") for own_text in (False, True)]


def other_text(own_text):
    return {"text": OTHER_TOKENS if own_text else OTHER["text"]}


@pytest.mark.parametrize("own_text", [False, True])
def test_a_dropped_image_leaves_no_trace(own_text):
    _, run = bound("decoder", own_text)
    dropped = run(keep_image=NONE)
    np.testing.assert_array_equal(dropped, run(keep_image=NONE, z_image=OTHER["z_image"]))
    assert np.isfinite(dropped).all()
    assert (run() != dropped).any((1, 2, 3)).all()


@pytest.mark.parametrize("name,own_text", NETWORKS)
def test_a_dropped_caption_leaves_no_trace(name, own_text):
    _, run = bound(name, own_text)
    dropped = run(keep_text=NONE)
    changes = {"z_text": OTHER["z_text"], "mask": OTHER["mask"]} | other_text(own_text)
    for change in [{field: value} for field, value in changes.items()] + [changes]:
        np.testing.assert_array_equal(dropped, run(keep_text=NONE, **change))
    assert np.isfinite(dropped).all()
    assert (run() != dropped).reshape(B, -1).any(1).all()


def test_with_both_dropped_nothing_but_the_image_and_the_time_matters():
    _, run = bound("decoder")
    null = {"keep_image": NONE, "keep_text": NONE}
    np.testing.assert_array_equal(run(**null), run(**null, **OTHER))
    assert (run(**null) != run(**null, t=T[::-1]))[0].any()
    assert (run(**null) != run(**null, x=X["decoder"] + 0.1)).all()


@pytest.mark.parametrize("name,own_text", NETWORKS)
def test_every_kept_condition_matters_in_every_row(name, own_text):
    _, run = bound(name, own_text)
    kept = run()
    conditions = ["z_text", "text", "mask"] + ["z_image"] * (name == "decoder")
    for condition in conditions:
        changed = run(**{condition: (OTHER | other_text(own_text))[condition]})
        difference = np.abs(changed - kept).reshape(B, -1).max(1)
        assert (difference > 1e-4).all(), (condition, difference)


def influence(run, change, **keep):
    """The root mean square of what another condition changes, as a share of that of the output, for each row."""
    a, b = (run(**keep).astype(np.float64), run(**keep, **change).astype(np.float64))
    square = lambda x: np.square(x).reshape(B, -1).mean(1)
    return np.sqrt(square(b - a) / square(a))


@pytest.mark.parametrize(
    "condition,without",
    [
        ("z_image", {"keep_image": NONE}),
        ("text", {"mask": jnp.zeros_like(MASK)}),
        ("text", {"keep_text": NONE}),
        ("z_text", {"keep_text": NONE}),
    ],
)
def test_the_influence_of_a_condition_is_measured_and_that_of_a_dropped_one_is_zero(condition, without):
    _, run = bound("decoder")
    change = {condition: OTHER[condition]}
    np.testing.assert_array_equal(influence(run, change, **without), 0.0)
    # Others stay: text tokens that are masked leave the pooled text, a dropped caption leaves the image embedding.
    others = {"z_image": "z_text", "text": "z_image", "z_text": "z_image"}[condition]
    for kept in (influence(run, change), influence(run, {others: OTHER[others]}, **without)):
        assert (kept > 0.02).all() and (kept < 3.0).all(), kept


@pytest.mark.parametrize("name,own_text", NETWORKS)
def test_padding_does_not_matter(name, own_text):
    _, run = bound(name, own_text)
    text = TOKENS if own_text else INPUTS["text"]
    mask = MASK if own_text else MASK[..., None]
    padding = jnp.where(mask, text, other_text(own_text)["text"])
    assert (padding != text).any()
    np.testing.assert_array_equal(run(), run(text=padding))


@pytest.mark.parametrize("name,own_text", NETWORKS)
def test_a_row_does_not_depend_on_the_others(name, own_text):
    _, run = bound(name, own_text)
    changes = OTHER | other_text(own_text) | {"x": X[name] + 1.0, "t": T + 50, "keep_text": NONE, "keep_image": NONE}
    inputs = INPUTS | {"x": X[name], "text": TOKENS if own_text else INPUTS["text"]}
    row = jnp.arange(B) == 1
    mixed = {
        field: jnp.where(row.reshape((B,) + (1,) * (value.ndim - 1)), value, inputs[field])
        for field, value in changes.items()
    }
    kept, changed = run(), run(**mixed)
    np.testing.assert_array_equal(kept[[0, 2]], changed[[0, 2]])
    assert (kept[1] != changed[1]).any()


def test_rows_are_dropped_one_by_one():
    _, run = bound("decoder")
    whole, image, text = run(), run(keep_image=ODD), run(keep_text=ODD)
    np.testing.assert_array_equal(image[[0, 2]], whole[[0, 2]])
    np.testing.assert_array_equal(image[1], run(keep_image=NONE)[1])
    np.testing.assert_array_equal(text[[0, 2]], whole[[0, 2]])
    np.testing.assert_array_equal(text[1], run(keep_text=NONE)[1])


@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_no_mask_of_drops_keeps_everything(name):
    _, run = bound(name)
    np.testing.assert_array_equal(run(), run(keep_text=None, keep_image=None))


@pytest.mark.parametrize(
    "condition,paths",
    [("z_image", ["image_emb", "image_tokens_in"]), ("caption", ["text_emb", "text_in"])],
)
def test_the_embedding_and_the_tokens_are_two_paths_of_a_condition(condition, paths):
    """Each alone carries the condition to the output; with both closed nothing of it arrives."""
    params, run = bound("decoder")
    names = ["z_image"] if condition == "z_image" else ["z_text", "text"]
    change = {name: OTHER[name] for name in names}
    for path in paths:
        cut = with_zeros(params, "params", path)
        assert (run(params=cut) != run(params=cut, **change)).any((1, 2, 3)).all(), path
    cut = functools.reduce(lambda tree, path: with_zeros(tree, "params", path), paths, params)
    np.testing.assert_array_equal(run(params=cut), run(params=cut, **change))


def test_word_vectors_are_a_path_of_their_own_and_their_sum_has_no_order():
    params, run = bound("decoder", True)
    for path in ("text_emb", "text_in", "places"):
        params = with_zeros(params, "params", path)
    only_words = run(params=params)
    assert (only_words != run(params=params, text=OTHER_TOKENS)).any((1, 2, 3)).all()
    swapped = TOKENS.at[0, :3].set(TOKENS[0, 2::-1])
    assert (swapped != TOKENS).any()
    np.testing.assert_allclose(only_words, run(params=params, text=swapped), rtol=1e-5, atol=1e-5)
    without = with_zeros(params, "params", "words")
    np.testing.assert_array_equal(run(params=without), run(params=without, text=OTHER_TOKENS))


def test_places_ask_words():
    """Softmax attention of learned queries against numpy in float64; without words the map is 0, bit for bit."""
    hidden, heads, (height, width, channels) = normal(0, B, L, 7), 2, (2, 3, 4)
    module = GridCrossAttention((height, width, channels), heads, VOCAB)
    params = random_params(module.init, hidden, TOKENS, MASK)
    run = fast_jit(module.apply)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    key = (np.asarray(hidden, np.float64) @ p["kernel"]).reshape(B, L, heads, 16)
    value = p["value"]["embedding"][np.asarray(TOKENS)].reshape(B, L, heads, channels)
    logits = np.einsum("hpd,blhd->bhpl", p["query"], key) / 4
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * np.asarray(MASK)[:, None, None]
    found = np.einsum("bhpl,blhc->bpc", weights / weights.sum(-1, keepdims=True), value)
    expected = found.reshape(B, height, width, channels)
    np.testing.assert_allclose(run(params, hidden, TOKENS, MASK), expected, atol=2e-5)
    np.testing.assert_array_equal(run(params, hidden, TOKENS, jnp.zeros_like(MASK)), 0)


def test_places_have_float32_logits_in_half_precision():
    """Logits above 65504, the largest number of float16, are finite; one word per place is then left."""
    hidden = 6e4 * jnp.tanh(normal(0, B, L, 7))
    module = GridCrossAttention((2, 3, 4), 2, VOCAB, jnp.float16)
    params = random_params(module.init, hidden, TOKENS, MASK)
    out = np.asarray(module.apply(params, hidden.astype(jnp.float16), TOKENS, MASK), np.float64)
    words = np.asarray(params["params"]["value"]["embedding"])[np.asarray(TOKENS)].reshape(B, L, 2, 4)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    ask = np.einsum("hpd,whd->whp", p["query"], p["kernel"].reshape(7, 2, 16)) / 4
    logits = np.einsum("blw,whp->blhp", np.asarray(hidden, np.float64), ask)
    assert np.abs(logits).max() > 65504
    chosen = np.where(np.asarray(MASK)[:, :, None, None], logits, -np.inf).argmax(1)  # [B, heads, places]
    picked = sum(np.take_along_axis(words[:, :, head], chosen[:, head, :, None], 1) for head in range(2))
    np.testing.assert_allclose(out.reshape(B, 6, 4), picked, atol=0.02)


def test_grid_cross_attention_reads_the_order_of_words():
    """Unlike a sum of word vectors, cross-attention alone distinguishes swapped words."""
    params, run = bound("decoder", True)
    assert params["params"]["places"]["query"].shape == (2, 8 * 8, 16)
    params = with_zeros(params, "params", "text_emb")
    attends = [name for name in params["params"]["unet"] if name.endswith("_attn")]
    assert len(attends) == 4
    for block in attends:
        params = with_zeros(params, "params", "unet", block, "context_kv")
    swapped = TOKENS.at[1, 0].set(TOKENS[1, 3]).at[1, 3].set(TOKENS[1, 0])
    assert np.abs(run(params=params)[1] - run(params=params, text=swapped)[1]).max() > 1e-3
    closed = with_zeros(params, "params", "places")
    np.testing.assert_allclose(run(params=closed), run(params=closed, text=swapped), atol=1e-4)


def test_recurrent_text_encoder_against_flax_cells():
    """Both directions of both layers, and the hidden states of short captions, as flax's own cell computes them."""
    module = RecurrentTextEncoder(VOCAB, 8, layers=2)
    params = random_params(module.init, TOKENS, MASK)
    p = params["params"]
    lengths = np.asarray(MASK).sum(1)
    x = p["token"]["embedding"][TOKENS]
    for i in range(2):
        sides = []
        for n, name in enumerate(("ahead", "back")):
            dense, kernel = p[f"in_{i}_{name}"], p[f"kernel_{i}_{name}"]
            cell = {f"h{gate}": {"kernel": kernel[:, 4 * g : 4 * g + 4]} for g, gate in enumerate("rzn")}
            cell["hn"]["bias"] = p[f"bias_{i}"][n, 0]
            for g, gate in enumerate("rzn"):
                columns = slice(4 * g, 4 * g + 4)
                cell[f"i{gate}"] = {"kernel": dense["kernel"][:, columns], "bias": dense["bias"][columns]}
            rnn = nn.RNN(nn.GRUCell(4), reverse=name == "back", keep_order=True)
            run = fast_jit(lambda cell, x, rnn=rnn: rnn.apply({"params": {"cell": cell}}, x, seq_lengths=lengths))
            sides.append(run(cell, x))
        x = jnp.concatenate(sides, -1)
    expected = fast_jit(nn.LayerNorm(epsilon=1e-5).apply)({"params": p["ln_final"]}, x)
    real = np.asarray(MASK)
    np.testing.assert_allclose(fast_jit(module.apply)(params, TOKENS, MASK)[real], expected[real], atol=2e-6)


def test_recurrent_text_encoder_does_not_see_padding():
    module = RecurrentTextEncoder(VOCAB, 8)
    params = random_params(module.init, TOKENS, MASK)
    real = np.asarray(MASK)
    run = fast_jit(module.apply)
    hidden = run(params, TOKENS, MASK)[real]
    np.testing.assert_array_equal(hidden, run(params, jnp.where(MASK, TOKENS, 7), MASK)[real])
    with pytest.raises(ValueError, match="width=7 must be even"):
        jax.eval_shape(RecurrentTextEncoder(VOCAB, 7).init, jax.random.key(0), TOKENS, MASK)


def test_an_encoder_that_is_not_causal_reads_every_real_token_and_no_other():
    module = TextEncoder(VOCAB, L, 8, 2, 2, causal=False)
    params = random_params(module.init, TOKENS, MASK)
    run = fast_jit(module.apply)
    hidden = np.asarray(run(params, TOKENS, MASK))
    later = np.asarray(run(params, TOKENS.at[0, 2].set(9), MASK))
    assert (hidden[0, 0] != later[0, 0]).any()
    padding = np.asarray(run(params, TOKENS.at[0, 3].set(9), MASK))
    np.testing.assert_array_equal(hidden[0, :3], padding[0, :3])
    with pytest.raises(ValueError, match="that is not causal needs a mask"):
        jax.eval_shape(module.apply, params, TOKENS)


def test_word_vectors_need_token_ids():
    decoder = make_decoder().clone(word_vectors=VOCAB)
    inputs = [INPUTS[name] for name in ("t", "z_image", "z_text", "text", "mask")]
    with pytest.raises(ValueError, match="word_vectors need token ids"):
        jax.eval_shape(decoder.init, jax.random.key(0), X["decoder"], *inputs)


def test_without_text_embedding_that_of_clip_does_not_matter():
    decoder = make_decoder().clone(text_embedding=False)
    _, run = bind(decoder, X["decoder"], INPUTS["text"])
    np.testing.assert_array_equal(run(), run(z_text=OTHER["z_text"]))
    assert (run() != run(text=OTHER["text"])).any((1, 2, 3)).all()


def test_the_image_is_four_tokens_that_all_matter():
    params, run = bound("decoder")
    tokens = params["params"]["image_tokens_in"]["kernel"]
    assert tokens.shape == (D, 4 * 8)
    for i in range(4):
        cut = tokens.reshape(D, 4, 8).at[:, i].set(0.0).reshape(D, -1)
        changed = {
            "params": params["params"] | {"image_tokens_in": params["params"]["image_tokens_in"] | {"kernel": cut}}
        }
        assert (run(params=changed) != run()).any(), i


def test_the_prior_reads_the_noised_embedding_and_the_time():
    _, run = bound("prior")
    for change in ({"x": X["prior"] + 0.1}, {"t": T[::-1]}):
        assert (np.abs(run(**change) - run())[0] > 1e-5).any()


def test_the_prior_takes_texts_of_one_length_only():
    prior = make_prior()
    z, short = normal(0, B, D), normal(0, B, L - 1, W)
    with pytest.raises(ValueError, match=f"text has {L - 1} tokens; this prior was built for {L}"):
        jax.eval_shape(prior.init, jax.random.key(0), z, T, z, short, MASK[:, 1:])


@pytest.mark.parametrize("name,make", [("decoder", make_decoder), ("prior", make_prior)])
def test_compute_type_and_remat_keep_the_parameters_and_about_the_output(name, make):
    params, run = bound(name, True)
    tree = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    for options, tolerance in (({"remat": True}, 1e-5), ({"dtype": jnp.bfloat16, "remat": True}, 0.1)):
        own_params, own_run = bind(make(True, **options), X[name], TOKENS)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), own_params) == tree
        out, expected = own_run(params=params), run()
        assert out.dtype == np.float32
        assert np.abs(out - expected).max() <= tolerance * np.abs(expected).max()


def test_the_unet_predicts_zero_at_its_start():
    unet = UNet(8, 3, (1,), 1, (), mid_attention=False, groups=4)
    out, params = fast_jit(lambda key: unet.init_with_output(key, X["decoder"], T))(jax.random.key(0))
    np.testing.assert_array_equal(out, jnp.zeros_like(out))
    assert params["params"]["in_conv"]["kernel"].any()


def test_dropout_is_for_training_and_needs_its_key():
    unet = UNet(16, 3, (1,), 1, (), mid_attention=False, groups=4, dropout=0.5)
    x = X["decoder"]
    params = random_params(unet.init, x, T)
    run = fast_jit(lambda key: unet.apply(params, x, T, train=True, rngs={"dropout": key}))
    once, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(functools.partial(unet.apply, train=True), params, x, T)


def test_the_unet_refuses_an_image_that_it_cannot_halve():
    unet = UNet(16, 3, (1, 1, 1), 1, (), mid_attention=False, groups=4, patch=2)
    for shape in ((1, 12, 16, 3), (1, 16, 12, 3)):
        with pytest.raises(ValueError, match="image size 12 cannot be halved .* multiple of 8"):
            jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros(shape), T[:1])
    out = jax.eval_shape(lambda key: unet.init_with_output(key, jnp.zeros((1, 8, 24, 3)), T[:1])[0], jax.random.key(0))
    assert out.shape == (1, 8, 24, 3)


def make_upsampler():
    return Upsampler(UNet(16, 3, (1, 2), 1, (), mid_attention=False, groups=4))


def test_the_upsampler_sees_the_small_image_has_no_attention_and_fits_every_size():
    upsampler = make_upsampler()
    x, low = normal(0, 2, 8, 8, 3), normal(1, 2, 4, 4, 3)
    params = random_params(upsampler.init, x, T[:2], low)
    names = {part.key for path, _ in jax.tree_util.tree_leaves_with_path(params) for part in path}
    assert not [name for name in names if "attn" in name or "qkv" in name]
    run = fast_jit(upsampler.apply)
    out = run(params, x, T[:2], low)
    assert (out != run(params, x, T[:2], low.at[1].add(0.1)))[1].any()
    np.testing.assert_array_equal(out[0], run(params, x, T[:2], low.at[1].add(0.1))[0])
    # The same parameters on a larger image; the small one is resized, so any ratio will do.
    larger = jax.eval_shape(upsampler.apply, params, jnp.zeros((2, 32, 16, 3)), T[:2], low)
    assert larger.shape == (2, 32, 16, 3)
