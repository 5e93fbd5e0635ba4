import json
import pathlib
import pickle
import warnings

import numpy as np
import pytest

from ddpm_jax.data.shapes.captions import VOCABULARY
from ddpm_jax.data.tokenizer import ClipTokenizer, CompactTokenizer, tokenizer_from_config

# Ids that OpenAI's and open_clip's own tokenizers gave (they agree on all of these).
FIXTURE = json.loads(pathlib.Path(__file__).with_name("data").joinpath("clip_tokens.json").read_text())


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer()


@pytest.fixture
def compact():
    return CompactTokenizer(("a", "green", "red", "star"))


def test_clip_agrees_with_openai_and_open_clip(clip):
    assert len(FIXTURE) >= 100
    wrong = [case["text"] for case in FIXTURE if clip.ids(case["text"]) != case["ids"]]
    assert not wrong


def test_clip_layout_and_padding(clip):
    # From the CLIP repository: "a photo of a cat" is 320 1125 539 320 2368, start 49406, end 49407, filled with 0.
    tokens, mask = clip(["a photo of a cat", "cat"], 8)
    np.testing.assert_array_equal(tokens[0], [49406, 320, 1125, 539, 320, 2368, 49407, 0])
    np.testing.assert_array_equal(tokens[1], [49406, 2368, 49407, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(mask.sum(1), [7, 3])
    assert tokens.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(ClipTokenizer(pad="eot").encode("cat", 5), [49406, 2368, 49407, 49407, 49407])
    assert clip.encode("cat").shape == (77,)
    assert (clip.vocab_size, clip.sot, clip.eot, clip.pad) == (49408, 49406, 49407, 0)


def test_clip_decodes_and_special_names_are_text(clip):
    assert clip.decode(clip.encode("Héllo WORLD 😀", 20)) == "héllo world 😀"
    ids = clip.ids("<|endoftext|><|startoftext|>")
    assert clip.eot not in ids and clip.sot not in ids


@pytest.mark.parametrize("make", [ClipTokenizer, lambda: CompactTokenizer(("word",))])
def test_long_texts_are_cut_with_a_warning_and_keep_their_end(make):
    tokenizer = make()
    with pytest.warns(UserWarning, match="is 502 tokens, cut to 24") as caught:
        tokens, mask = tokenizer(["word " * 500, "word"], 24)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert tokens[0, -1] == tokenizer.eot and mask[0].all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["word " * 22], 24)


@pytest.mark.parametrize("make", [ClipTokenizer, lambda: CompactTokenizer(("word",))])
def test_empty_texts_are_refused_but_null_exists(make):
    tokenizer = make()
    for text in ("", "  \n"):
        with pytest.raises(ValueError, match="the text is empty"):
            tokenizer(["word", text], 8)
    tokens, mask = tokenizer.null(4)
    np.testing.assert_array_equal(tokens, [[tokenizer.sot, tokenizer.eot, tokenizer.pad, tokenizer.pad]])
    np.testing.assert_array_equal(mask, [[True, True, False, False]])


def test_compact_words_and_punctuation(compact):
    tokens, mask = compact(["A red, green star!", "star."], 7)
    np.testing.assert_array_equal(tokens, [[1, 3, 5, 4, 6, 2, 0], [1, 6, 2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask.sum(1), [6, 3])
    assert compact.vocab_size == 7 and compact.decode(tokens[0]) == "a red green star"


def test_compact_names_the_unknown_word_and_the_nearest_known_one(compact):
    with pytest.raises(ValueError, match='word "grean" is not in the vocabulary; the nearest known word is "green"'):
        compact(["a grean star"], 8)
    with pytest.raises(ValueError, match='"zzz"'):
        compact(["zzz"], 8)
    with pytest.raises(ValueError, match="empty"):
        compact(["?!"], 8)


@pytest.mark.parametrize("tokenizer", [ClipTokenizer(), ClipTokenizer(pad="eot"), CompactTokenizer(VOCABULARY)])
def test_config_and_pickle_round_trips(tokenizer):
    text = ["a small green star above a large red ring on a gray background"]
    wanted, _ = tokenizer(text, 24)
    for copy in (
        tokenizer_from_config(json.loads(json.dumps(tokenizer.to_config()))),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert type(copy) is type(tokenizer) and copy.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(copy(text, 24)[0], wanted)


def test_bad_arguments(compact):
    with pytest.raises(ValueError, match="kind must be"):
        tokenizer_from_config({"kind": "bert"})
    with pytest.raises(ValueError, match="pad must be"):
        ClipTokenizer(pad=1)
    with pytest.raises(ValueError, match="length must be at least 3"):
        compact(["star"], 2)
    with pytest.raises(TypeError, match="one string"):
        compact("star", 8)
    for vocab in ((), ("a", "a"), ("A",), ("two words",), ("",)):
        with pytest.raises(ValueError, match="vocab must hold distinct"):
            CompactTokenizer(vocab)
