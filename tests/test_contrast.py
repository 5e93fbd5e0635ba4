"""Groups of near-identical scenes."""

import numpy as np
import pytest

from ddpm_jax.data.shapes import hard_negatives as contrast
from ddpm_jax.data.shapes import scenes as shapes
from ddpm_jax.data.shapes.hard_negatives import HardNegatives, is_training_scene, variants
from ddpm_jax.data.shapes.scenes import Object, Scene, ShapesSource


def differences(a: Scene, b: Scene) -> int:
    """Count the attributes in which two scenes of one object differ."""
    (x,), (y,) = a.objects, b.objects
    return sum(
        (x.shape != y.shape, x.colour != y.colour, x.size != y.size, a.background != b.background, a.place != b.place)
    )


def test_variants_of_one_object_differ_in_one_attribute():
    for i in range(300):
        scene = shapes.scene_from(0, i, split="single")
        group = variants(scene, np.random.default_rng(i), 3)
        assert [differences(scene, other) for other in group] == [1, 1, 1]
        assert len({scene, *group}) == 4


def test_variants_of_two_objects_are_other_training_scenes_that_the_frame_holds():
    swaps = 0
    for i in range(300):
        scene = shapes.scene_from(0, i, split="two")
        group = variants(scene, np.random.default_rng(i), 3)
        assert len({scene, *group}) == 4
        for other in group:
            assert is_training_scene(other)
            assert [(o.size, o.x, o.y) for o in other.objects] == [(o.size, o.x, o.y) for o in scene.objects]
            swaps += sorted(o.colour for o in other.objects) == sorted(o.colour for o in scene.objects) and [
                o.colour for o in other.objects
            ] != [o.colour for o in scene.objects]
    assert swaps > 200


def test_nothing_held_out_is_a_training_scene():
    colour, shape = next(iter(shapes.HELD_OUT_PAIRS))
    assert not is_training_scene(Scene((Object(shape, colour, "small", 0.5, 0.5),), "white", place="center"))
    first, relation, second = next(iter(shapes.HELD_OUT_RELATIONS))
    colours = [next(c for c in shapes.COLOURS if (c, name) not in shapes.HELD_OUT_PAIRS) for name in (first, second)]
    objects = (Object(first, colours[0], "small", 0.5, 0.3), Object(second, colours[1], "small", 0.5, 0.7))
    assert not is_training_scene(Scene(objects, "white", relation=relation))


def test_records_are_a_function_of_the_index():
    source = ShapesSource(3, 16, length=50)
    groups = HardNegatives(source, 4)
    first, again = groups[7], HardNegatives(source, 4)[np.int64(7)]
    assert first["image"].shape == (4, 16, 16, 3) and first["image"].dtype == np.uint8
    assert len(groups) == 50 and len(first["caption"]) == 4
    np.testing.assert_array_equal(first["image"], again["image"])
    assert first["caption"] == again["caption"]
    np.testing.assert_array_equal(first["image"][0], source[7]["image"])
    assert first["caption"][0] == source[7]["caption"]


def test_errors():
    with pytest.raises(ValueError, match="size=0 of a group must be at least 1"):
        HardNegatives(ShapesSource(0, 16), 0)
    with pytest.raises(ValueError, match="source must be of split 'train', got 'single'"):
        HardNegatives(ShapesSource(0, 16, "single"), 2)
    assert contrast.variants(shapes.scene_from(0, 0, split="single"), np.random.default_rng(0), 0) == []
