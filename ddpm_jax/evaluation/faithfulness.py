"""Faithfulness of generated images to the scenes their captions describe, measured with the raw oracle.

An image counts as right in an attribute when all objects of its scene are right in it; `all` needs every attribute,
the number of objects included. Objects are matched to the scene's by the assignment with the most agreement.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ddpm_jax.data.shapes.scenes import Scene, place_of, relation_of
from ddpm_jax.evaluation.oracle import Reading, ReadObject, read

ATTRIBUTES: tuple[str, ...] = ("count", "shape", "colour", "size", "background", "position")
_OF_OBJECTS = ("shape", "colour", "size")


def _position(scene: Scene, found: Sequence[ReadObject | None]) -> bool:
    """Return whether the place of the one object, or the relation of the two, is the scene's."""
    if any(thing is None for thing in found):
        return False
    centres = [(thing.x, thing.y) for thing in found]
    if len(centres) == 1:
        return place_of(*centres[0]) == scene.place
    return relation_of(*centres) == scene.relation


def judge(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Compare one reading with the scene it should show.

    Returns:
        A bool for each of `ATTRIBUTES` ("position" is the place of a single object and the relation of two) and for
        "all". Of a missing object every attribute is wrong; a superfluous one spoils "count" and "all" alone.
    """
    wanted = scene.objects
    candidates = reading.objects + (None,) * max(0, len(wanted) - len(reading.objects))
    best, best_key = None, None
    for found in itertools.permutations(candidates[: len(wanted) + 2], len(wanted)):
        agree = {
            name: [
                thing is not None and getattr(thing, name) == getattr(want, name)
                for want, thing in zip(wanted, found, strict=True)
            ]
            for name in _OF_OBJECTS
        }
        position = _position(scene, found)
        key = (sum(map(sum, agree.values())), position)
        if best_key is None or key > best_key:
            best, best_key = {name: all(flags) for name, flags in agree.items()} | {"position": position}, key
    best |= {"count": len(reading.objects) == len(wanted), "background": reading.background == scene.background}
    return {name: best[name] for name in ATTRIBUTES} | {"all": all(best.values())}


def score(images: np.ndarray, scenes: Sequence[Scene]) -> dict:
    """Measure the shares of images that show what their scenes say.

    Args:
        images: uint8[N, R, R, 3].
        scenes: N scenes.

    Returns:
        {"n": N, "rates": {attribute: fraction}, "examples": {attribute: bool[N]}} over `ATTRIBUTES` and "all".

    Raises:
        ValueError: if there are no images, or not as many as scenes.
    """
    if len(images) != len(scenes) or not len(scenes):
        raise ValueError(f"images and scenes must be as many and not none, got {len(images)} and {len(scenes)}.")
    verdicts = [judge(scene, read(np.asarray(image))) for image, scene in zip(images, scenes, strict=True)]
    examples = {name: np.array([v[name] for v in verdicts]) for name in (*ATTRIBUTES, "all")}
    return {"n": len(scenes), "rates": {k: float(v.mean()) for k, v in examples.items()}, "examples": examples}


def _attributes(scene: Scene) -> dict[str, str]:
    (thing,) = scene.objects
    found = {name: getattr(thing, name) for name in _OF_OBJECTS}
    return found | {"background": scene.background, "position": scene.place}


def compare(images: np.ndarray, first: Sequence[Scene], second: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Measure which of two scenes of one object each image shows, attribute by attribute, where the two differ.

    Args:
        images: uint8[N, R, R, 3].
        first, second: N scenes of one object each.

    Returns:
        {"n": {attribute: images whose scenes differ in it}, "caption": {attribute: share that shows the first scene's},
        "embedding": {attribute: share that shows the second's}} over shape, colour, size, background and position.
    """
    names = (*_OF_OBJECTS, "background", "position")
    counts = {kind: dict.fromkeys(names, 0) for kind in ("n", "caption", "embedding")}
    for image, one, other in zip(images, first, second, strict=True):
        reading, one_has, other_has = read(np.asarray(image)), _attributes(one), _attributes(other)
        shown = judge(one, reading), judge(other, reading)
        for name in names:
            if one_has[name] != other_has[name]:
                counts["n"][name] += 1
                counts["caption"][name] += shown[0][name]
                counts["embedding"][name] += shown[1][name]
    n = counts["n"]
    shares = {kind: {k: counts[kind][k] / n[k] if n[k] else np.nan for k in names} for kind in ("caption", "embedding")}
    return {"n": n} | shares


def comparison_table(followed: Mapping[str, Mapping[str, float]]) -> str:
    """Format the result of `compare` as a Markdown table: what images show where caption and embedding differ."""
    names = tuple(followed["n"])
    lines = ["| the image shows | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    for kind, words in {"caption": "what the caption says", "embedding": "what the embedded image shows"}.items():
        cells = [f"{100 * followed[kind][name]:.1f} %" for name in names]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines + ["| images | " + " | ".join(str(followed["n"][name]) for name in names) + " |"])


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a rate, 95 % by default (Wilson 1927, JASA 22)."""
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def table(results: Mapping[str, dict]) -> str:
    """Format results of `score` as a Markdown table, one row each, with 95 % Wilson intervals for "all"."""
    header = ("captions", "N", *ATTRIBUTES, "all right", "95 % interval")
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, result in results.items():
        low, high = wilson_interval(round(result["rates"]["all"] * result["n"]), result["n"])
        cells = [f"{100 * result['rates'][key]:.1f} %" for key in (*ATTRIBUTES, "all")]
        lines.append(f"| {name} | {result['n']} | " + " | ".join(cells) + f" | {100 * low:.1f}-{100 * high:.1f} % |")
    return "\n".join(lines)
