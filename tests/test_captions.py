import itertools

import numpy as np
import pytest

from ddpm_jax.data.shapes.captions import MAX_WORDS, SYNONYMS, VOCABULARY, caption
from ddpm_jax.data.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    scene_from,
)

ISSUE_SCENE = Scene(
    (Object("star", "green", "small", 0.5, 0.25), Object("ring", "red", "large", 0.5, 0.65)), "gray", relation="above"
)
ISSUE_TEXT = "a small green star above a large red ring on a gray background"


def words(text):
    return text.replace(",", "").split()


def says(text, name):
    """Return whether a phrase for `name` occurs in the text, as whole words."""
    padded = f" {' '.join(words(text))} "
    return any(f" {phrase} " in padded for phrase in SYNONYMS[name])


def test_plain_captions():
    assert caption(ISSUE_SCENE) == ISSUE_TEXT
    one = Scene((Object("circle", "orange", "large", 0.3, 0.3),), "tan", place="top left")
    assert caption(one) == "a large orange circle in the top left on a tan background"


def test_the_example_is_also_a_random_caption():
    texts = {caption(ISSUE_SCENE, np.random.default_rng(i)) for i in range(20000)}
    assert ISSUE_TEXT in texts
    assert len(texts) > 500


def test_every_name_has_words():
    names = (*SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *PLACES, *RELATIONS)
    assert set(names) == set(SYNONYMS)
    phrases = [phrase for options in SYNONYMS.values() for phrase in options]
    assert len(phrases) == len(set(phrases))  # no phrase has two meanings


@pytest.mark.parametrize("split", ["single", "two", "train"])
def test_full_captions_state_everything_in_known_words(split):
    seen = set()
    for i in range(4000):
        scene = scene_from(0, i, split=split)
        text = caption(scene, np.random.default_rng(i))
        used = words(text)
        seen |= set(used)
        assert len(used) <= MAX_WORDS and set(used) <= set(VOCABULARY) and text == text.lower()
        stated = [scene.background, scene.relation or scene.place]
        stated += [name for thing in scene.objects for name in (thing.size, thing.colour, thing.shape)]
        assert all(says(text, name) for name in stated), text
        for i, word in enumerate(used[:-1]):
            if word in ("a", "an"):
                assert (word == "an") == (used[i + 1][0] in "aeiou"), text
    if split == "train":
        assert seen == set(VOCABULARY)


def test_the_longest_caption_fits_twenty_four_tokens():
    longest = max(
        (caption(scene_from(1, i, two_fraction=1.0), np.random.default_rng(i)) for i in range(20000)),
        key=lambda text: len(words(text)),
    )
    assert len(words(longest)) + 2 <= 24


def test_the_first_object_named_is_the_scenes_first():
    for i in range(500):
        scene = scene_from(0, i, split="two")
        text = caption(scene, np.random.default_rng(i))
        first, second = (
            [
                min(
                    text.find(f"{colour} {shape}")
                    for colour in SYNONYMS[thing.colour]
                    for shape in SYNONYMS[thing.shape]
                    if f"{colour} {shape}" in text
                )
            ]
            for thing in scene.objects
        )
        assert first < second


def test_a_share_of_the_training_captions_leaves_something_open():
    silent = 0
    left_out = set()
    for i in range(4000):
        scene = scene_from(0, i)
        text = caption(scene, np.random.default_rng(i), open_fraction=0.25)
        missing = [
            kind
            for kind, name in (
                ("size", scene.objects[0].size),
                ("background", scene.background),
                ("place", scene.place),
            )
            if name and not says(text, name)
        ]
        # Of two objects, one may have the size that the other lacks; colours, shapes and the relation are always said.
        assert all(says(text, thing.colour) and says(text, thing.shape) for thing in scene.objects)
        assert scene.relation is None or says(text, scene.relation)
        silent += bool(missing)
        left_out.add(tuple(missing))
    assert abs(silent / 4000 - 0.25) < 4 * np.sqrt(0.1875 / 4000)
    some = [()] + [kinds for n in (1, 2, 3) for kinds in itertools.combinations(("size", "background", "place"), n)]
    assert left_out == set(some)


def test_captions_are_functions_of_the_generator():
    scene = scene_from(0, 0)
    assert caption(scene, np.random.default_rng(1)) == caption(scene, np.random.default_rng(1))
    assert len({caption(scene, np.random.default_rng(i)) for i in range(100)}) > 30
