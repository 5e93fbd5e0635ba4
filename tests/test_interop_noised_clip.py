"""GLIDE's noised CLIP and its tokenizer: what OpenAI's code returned, the gradient that guides, and the way back."""

import gzip
import json
import pickle
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights

from ddpm_jax import cosine_betas, make_process
from ddpm_jax.data.glide_tokenizer import GlideTokenizer
from ddpm_jax.diffusion.guidance import classifier_guided, log_prob_gradient
from ddpm_jax.interop import noised_clip
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.clip import normalize
from ddpm_jax.models.noised_clip import NoisedCLIP, NoisedVisionTransformer
from ddpm_jax.models.text_encoder import TextEncoder

REFERENCE = np.load(Path(__file__).parent / "data" / "noised_clip.npz")
MODEL = NoisedCLIP(NoisedVisionTransformer(16, 4, 24, 2, 3, 50), TextEncoder(64, 12, 32, 2, 2), 24)
CASES = json.loads(str(REFERENCE["captions"]))


def weights(name):
    shapes = json.loads(str(REFERENCE[f"{name}/shapes"]))
    drawn = random_weights(shapes, ("image", "text").index(name))
    return {name: array + name.endswith(".g") for name, array in drawn.items()}


def given(name):
    array = REFERENCE[name]
    if array.dtype == np.int64:
        array = array.astype(np.int32)
    return jnp.asarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


X, T, TOKENS, LENGTHS = (given(name) for name in ("x", "t", "tokens", "lengths"))
MASK = jnp.arange(TOKENS.shape[1])[None] < LENGTHS[:, None]


@pytest.fixture(scope="module")
def params():
    return noised_clip.load_noised_clip(weights("image"), weights("text"), MODEL)


def run(params, method, *inputs):
    with jax.default_matmul_precision("highest"):
        return fast_jit(lambda params: MODEL.apply({"params": params}, *inputs, method=method))(params)


def test_the_embeddings_equal_the_reference(params):
    image, text = run(params, "encode_image", X, T), run(params, "encode_text", TOKENS, MASK)
    for name, ours in {"image": image, "text": text}.items():
        theirs = REFERENCE[f"{name}/raw"]
        assert np.ptp(theirs, axis=0).min() > 1e-2
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        np.testing.assert_allclose(normalize(ours), REFERENCE[f"{name}/unit"], atol=2e-5)
    pair = run(params, "__call__", X, T, TOKENS, MASK)
    np.testing.assert_allclose(pair[0], REFERENCE["image/unit"], atol=2e-5)
    np.testing.assert_allclose(pair[1], REFERENCE["text/unit"], atol=2e-5)


def test_a_shorter_row_of_tokens_gives_the_same(params):
    ours = run(params, "encode_text", TOKENS[2:, :4], MASK[2:, :4])
    np.testing.assert_allclose(ours, REFERENCE["text/raw"][2:], atol=2e-5)


def test_the_gradient_equals_the_reference(params):
    z_text = jnp.asarray(REFERENCE["text/unit"])
    theirs, process = REFERENCE["gradient"].transpose(0, 2, 3, 1), make_process(cosine_betas(50))

    @fast_jit
    def both(params):
        log_prob = lambda xt, t: MODEL.apply({"params": params}, xt, t, z_text, method="log_prob")
        denoise = classifier_guided(process, lambda xt, t: jnp.zeros_like(xt), log_prob, 3.0)
        return 3.0 * log_prob_gradient(log_prob, X, T), denoise(X, T)

    with jax.default_matmul_precision("highest"):
        gradient, guided = both(params)
    size = np.abs(theirs).max()
    np.testing.assert_allclose(gradient, theirs, atol=2e-5 * size)
    sigma = process.sigma[T].reshape(3, 1, 1, 1)
    np.testing.assert_allclose(guided, -sigma * theirs, atol=2e-5 * size)


def test_export_is_the_inverse(params):
    for name, back in zip(("image", "text"), noised_clip.export_noised_clip(params, MODEL), strict=True):
        reference = weights(name)
        assert {key: list(array.shape) for key, array in back.items()} == json.loads(str(REFERENCE[f"{name}/shapes"]))
        for key, array in reference.items():
            np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_a_bias_of_keys_changes_nothing(params):
    """So that its export, which leaves it out, is the same network."""
    moved = jax.tree.map(lambda x: x, params)
    for tower, width in (("vision", 24), ("text", 32)):
        for block in moved[tower]["transformer"].values():
            assert not block["qkv"]["bias"][width : 2 * width].any()
            block["qkv"]["bias"][width : 2 * width] = 1.0
    np.testing.assert_allclose(run(moved, "encode_image", X, T), REFERENCE["image/raw"], atol=2e-5)
    np.testing.assert_allclose(run(moved, "encode_text", TOKENS, MASK), REFERENCE["text/raw"], atol=2e-5)


def test_another_file_is_refused():
    image, text = weights("image"), weights("text")
    with pytest.raises(ConvertError, match=r"the image tower .* lacks blocks\.input\.ln\.b, .* unknown .*w_voc"):
        noised_clip.load_noised_clip(text, image, MODEL)
    with pytest.raises(ConvertError, match=r"the text tower .* of another shape, blocks\.input\.w_pos \[77, 32\]"):
        noised_clip.load_noised_clip(image, text | {"blocks.input.w_pos": np.zeros((77, 32), np.float32)}, MODEL)
    name = "blocks.block_1.f_attn.f_q.b"
    with pytest.raises(ConvertError, match=r"of another shape, blocks\.block_1\.f_attn\.f_q\.b \[25\]"):
        noised_clip.load_noised_clip(image | {name: np.zeros(25, np.float32)}, text, MODEL)


def test_other_inputs_are_refused(params):
    encode = fast_jit(lambda x, t: MODEL.apply({"params": params}, x, t, method="encode_image"))
    with pytest.raises(ValueError, match=r"this CLIP takes \[B, 16, 16, 3\]"):
        encode(X[:, :8], T)
    for t in (T[:2], T[:, None], T.astype(jnp.float32)):
        with pytest.raises(ValueError, match="t must be one integer for each of 3 images"):
            encode(X, t)
    assert np.isnan(encode(X, T + 1))[2].all()


def test_the_published_network_has_a_table():
    model, theirs = noised_clip.NOISED_CLIP(), json.loads(str(REFERENCE["published"]))
    shapes = noised_clip.noised_clip_shapes(model)
    flat = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    tables = noised_clip.image_table(model), noised_clip.text_table(model)
    assert sorted(flat) == sorted(entry.ours for table in tables for entry in table)
    for table, reference in zip(tables, theirs, strict=True):
        assert {name for entry in table for name in entry.theirs} == set(reference)
        for entry in table:
            read = entry.layout.read(*(np.broadcast_to(np.float32(0), reference[name]) for name in entry.theirs))
            assert read.shape == flat[entry.ours].shape, entry.ours
    config = json.loads(str(REFERENCE["config"]))
    assert (model.vision.heads, model.text.heads) == (config["n_head_image"], config["n_head_text"])
    assert (model.vision.image_size, model.scale) == (config["image_size"], config["logit_scale"])


def write(directory, **changed):
    for name in ("encoder.json", "vocab.bpe"):
        (directory / f"{name}.gz").write_bytes(gzip.compress(str(REFERENCE[name]).encode("utf-8")))
    for name, data in changed.items():
        (directory / name.replace("__", ".")).write_bytes(data)
    return directory


@pytest.fixture
def tokenizer(tmp_path):
    return GlideTokenizer(write(tmp_path))


def test_the_ids_equal_the_reference(tokenizer):
    """By a part of GLIDE's vocabulary: `kept` has the id there of each id here."""
    kept = REFERENCE["kept"]
    assert len(CASES) >= 30 and max(max(case["ids"]) for case in CASES) > 40000
    for case in CASES:
        assert kept[tokenizer.ids(case["text"])].tolist() == case["ids"], case["text"]
        assert tokenizer.decode(tokenizer.ids(case["text"])) == case["text"].lower()
    assert kept[tokenizer.pad] == 50256 and tokenizer.vocab_size == len(kept)


def test_the_rows_equal_the_reference(tokenizer):
    cases = [case for case in CASES if len(case["ids"]) <= 40]
    assert 30 <= len(cases) < len(CASES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, mask = tokenizer([case["text"] for case in cases], 40)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(tokens, [case["padded"] for case in cases])
    np.testing.assert_array_equal(mask.sum(1), [len(case["ids"]) for case in cases])
    assert not np.any(mask[:, 1:] > mask[:, :-1])
    assert tokenizer(["a"])[0].shape == (1, 128)


def test_a_long_text_is_cut_with_a_warning(tokenizer):
    case = max(CASES, key=lambda case: len(case["ids"]))
    with pytest.warns(UserWarning, match=f"is {len(case['ids'])} tokens, cut to 40") as caught:
        tokens, mask = tokenizer([case["text"]], 40)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(tokens[0], case["padded"])
    assert mask.all()


def test_the_caption_without_words(tokenizer):
    tokens, mask = tokenizer.null()
    assert tokens.dtype == np.int32 and tokens.shape == mask.shape == (1, 128)
    assert (tokens == tokenizer.pad).all() and not mask.any()
    with pytest.raises(ValueError, match="the text is empty"):
        tokenizer(["a corgi", " \n"])
    with pytest.raises(TypeError, match="a sequence of strings"):
        tokenizer("a corgi")
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        tokenizer.null(0)


def test_it_goes_to_another_process(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.ids("a corgi") == tokenizer.ids("a corgi")


@pytest.mark.parametrize("name", ["encoder.json.gz", "vocab.bpe.gz"])
def test_missing_and_damaged_files_are_named(tmp_path, name):
    data = write(tmp_path).joinpath(name).read_bytes()
    damaged = [data[: len(data) // 2], b"plain text", gzip.compress(b"\xff\xfe"), gzip.compress(b"[1, 2]")]
    damaged.append(data[:40] + bytes(100) + data[140:])
    for broken in damaged:
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name} is damaged, or not GLIDE's {name}"):
            GlideTokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"directory has no {name}"):
        GlideTokenizer(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    ids = json.loads(str(REFERENCE["encoder.json"]))
    bytes_only = {symbol: i for i, symbol in enumerate(symbol for symbol in ids if len(symbol) == 1)}
    few = {symbol: i for i, symbol in enumerate(list(bytes_only)[1:])}
    holes = {symbol: i + (i > 9) for symbol, i in ids.items()}
    for vocabulary, message in (
        (bytes_only, "do not belong together: vocab.bpe.gz makes"),
        (few, "no id for 1 of the 256 bytes, '!' among them"),
        (holes, "one of the ids 0, 1, 2"),
    ):
        write(tmp_path, encoder__json__gz=gzip.compress(json.dumps(vocabulary).encode()))
        with pytest.raises(ValueError, match=message):
            GlideTokenizer(tmp_path)
