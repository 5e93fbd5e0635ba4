"""Hard negatives for contrastive training: scenes that differ from one another in one thing.

In a batch of random scenes almost any attribute tells two captions apart, so CLIP hardly needs the shape, and never
needs to know which of two objects is the red one. Groups of near-identical scenes require exactly that; Yuksekgonul
et al. 2022 do it with captions ("When and why vision-language models behave like bags-of-words", section 4).
"""

import dataclasses
from typing import SupportsIndex

import numpy as np

from ddpm_jax.data.shapes import scenes as shapes
from ddpm_jax.data.shapes.captions import caption
from ddpm_jax.data.shapes.scenes import Object, Scene, ShapesSource

_TRIES = 20


class HardNegatives:
    """A source of groups: record i stacks record i of the training split and `size - 1` variants of its scene.

    Args:
        source: captioned shapes, split "train".
        size: scenes of a group, at least 1; 1 only adds an axis to the source's records.

    Records are {"image": uint8[size, R, R, 3], "caption": tuple of strings, "index": int64}. All scenes of a group are
    training scenes: nothing held out appears.
    """

    def __init__(self, source: ShapesSource, size: int):
        if size < 1:
            raise ValueError(f"size={size} of a group must be at least 1")
        if source.split != "train":
            raise ValueError(f"source must be of split 'train', got {source.split!r}")
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """Return a text that differs if the records differ."""
        return f"HardNegatives of {self.size}, of {self.source.fingerprint()}"

    def __getitem__(self, index: SupportsIndex) -> dict:
        index = index.__index__()
        record = self.source[index]
        # 1 keeps this stream apart from the one that the scene itself is sampled from.
        rng = np.random.default_rng((self.source.seed, index, 1))
        scenes = variants(self.source.scene(index), rng, self.size - 1)
        images = [record["image"], *(shapes.render(scene, self.source.resolution) for scene in scenes)]
        captions = (record["caption"], *(caption(scene, rng) for scene in scenes))
        return {"image": np.stack(images), "caption": captions, "index": record["index"]}


def variants(scene: Scene, rng: np.random.Generator, count: int) -> list[Scene]:
    """Return `count` training scenes, each one change away from `scene`; one may come twice if another is not found."""
    group = [scene]
    for _ in range(count):
        for _ in range(_TRIES):
            changed = _change_one(scene, rng) if len(scene.objects) == 1 else _change_two(scene, rng)
            if changed not in group and is_training_scene(changed):
                break
        group.append(changed if is_training_scene(changed) else scene)
    return group[1:]


def is_training_scene(scene: Scene) -> bool:
    """Return whether nothing of a scene is held out, and two objects differ in (colour, shape)."""
    pairs = [(thing.colour, thing.shape) for thing in scene.objects]
    if any(pair in shapes.HELD_OUT_PAIRS for pair in pairs) or len(set(pairs)) < len(pairs):
        return False
    if len(pairs) == 1:
        return True
    return (pairs[0][1], scene.relation, pairs[1][1]) not in shapes.HELD_OUT_RELATIONS


def _other(options: object, current: str, rng: np.random.Generator) -> str:
    rest = [name for name in options if name != current]
    return rest[int(rng.integers(len(rest)))]


def _change_object(thing: Object, rng: np.random.Generator) -> Object:
    name = ("shape", "shape", "shape", "colour", "size")[int(rng.integers(5))]
    options = {"shape": shapes.SHAPES, "colour": shapes.COLOURS, "size": shapes.SIZES}[name]
    return dataclasses.replace(thing, **{name: _other(options, getattr(thing, name), rng)})


def _change_one(scene: Scene, rng: np.random.Generator) -> Scene:
    u, (thing,) = rng.random(), scene.objects
    if u < 0.15:
        return dataclasses.replace(scene, background=_other(shapes.BACKGROUNDS, scene.background, rng))
    if u < 0.4:
        place = _other(shapes.PLACES, scene.place, rng)
        x, y = shapes.PLACES[place]
        return dataclasses.replace(scene, place=place, objects=(dataclasses.replace(thing, x=x, y=y),))
    return dataclasses.replace(scene, objects=(_change_object(thing, rng),))


def _change_two(scene: Scene, rng: np.random.Generator) -> Scene:
    """Swap what the two objects are, a single attribute of theirs, or change one of them."""
    first, second = scene.objects
    u = rng.random()
    if u < 0.5:
        names = (("colour",), ("shape",), ("colour", "shape"))[int(rng.integers(3))]
        swapped = tuple(
            dataclasses.replace(thing, **{name: getattr(other, name) for name in names})
            for thing, other in ((first, second), (second, first))
        )
        return dataclasses.replace(scene, objects=swapped)
    # A size stays: objects of another size could touch, or leave the frame.
    number = int(rng.integers(2))
    changed = _change_object(scene.objects[number], rng)
    changed = dataclasses.replace(changed, size=scene.objects[number].size)
    objects = (changed, second) if number == 0 else (first, changed)
    return dataclasses.replace(scene, objects=objects)
