"""Faithfulness of a pipeline to captions that state everything, one image a caption, uncurated."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.evaluation import faithfulness
from ddpm_jax.pipelines.sharing import generate_on_all_hosts
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.progress import progress_bar

SPLITS = {
    "single": "one object",
    "held_out": "one object, held-out colour-shape pair",
    "two": "two objects",
    "two_held_out": "two objects, held-out relation",
}
# "Why a prior?" (DALL-E 2, figure 8): what the decoder is given as image embedding, and whether it sees the caption.
CONDITIONS: dict[str, dict[str, Any]] = {
    "caption alone": {"embedding": "none", "use_text": True},
    "caption + CLIP text embedding": {"embedding": "text", "use_text": True},
    "caption + prior's image embedding": {"embedding": "prior", "use_text": True},
    "caption + true image embedding": {"embedding": "image", "use_text": True},
    "CLIP text embedding alone": {"embedding": "text", "use_text": False},
    "prior's image embedding alone": {"embedding": "prior", "use_text": False},
    "true image embedding alone": {"embedding": "image", "use_text": False},
}


def measure(
    pipeline: UnCLIP,
    split: str,
    *,
    num_captions: int,
    seed: int,
    progress: bool = True,
    **kwargs: Any,
) -> dict[str, Any]:
    """Sample an image for each of a split's captions and read it back; the hosts of a run share the work.

    Args:
        pipeline: that knows captions of captioned shapes.
        split: of the captioned shapes, see `data.shapes.scenes.ShapesSource`.
        num_captions: N.
        seed: of captions and noise.
        progress: True shows a bar on stderr.
        **kwargs: options of `UnCLIP.generate` but mesh; embedding="image" takes the embedding of the true image.

    Returns:
        The result of `faithfulness.score`, and "captions" and "images" uint8[N, R, R, 3].
    """
    if num_captions < 1:
        raise ValueError(f"num_captions={num_captions} must be at least 1")
    source = ShapesSource(seed, pipeline.clip.network.vision.image_size, split)
    records = [source[i] for i in range(num_captions)]
    captions = [record["caption"] for record in records]
    each: dict[str, Any] = {"prompts": captions}
    if kwargs.get("embedding") == "image":
        each["images"] = np.stack([record["image"] for record in records])
    hidden, share = not progress or jax.process_index() != 0, -(-num_captions // jax.process_count())
    with progress_bar(share, description=split, unit="image", shown=not hidden) as bar:
        kwargs |= {"seed": seed, "report": bar.update}
        images = generate_on_all_hosts(pipeline.generate, num_captions, each, **kwargs)
    scored = faithfulness.score(images, [source.scene(i) for i in range(num_captions)])
    return scored | {"captions": captions, "images": images}


def measure_all(
    pipeline: UnCLIP,
    *,
    num_captions: int,
    seed: int,
    splits: Sequence[str] = tuple(SPLITS),
    progress: bool = True,
    on_result: Callable[[str, dict[str, Any]], None] | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, Any]]:
    """Measure every split with the whole pipeline; **kwargs as in `measure`. Returns split -> result of `measure`."""
    results = {}
    for split in splits:
        results[split] = measure(pipeline, split, num_captions=num_captions, seed=seed, progress=progress, **kwargs)
        if on_result is not None:
            on_result(split, results[split])
    return results


def compare_conditions(
    pipeline: UnCLIP, *, num_captions: int, seed: int, split: str = "single", progress: bool = True, **kwargs: Any
) -> dict[str, dict[str, Any]]:
    """Measure one split with each of `CONDITIONS` ("why a prior?"). Returns condition -> result of `measure`."""
    return {
        name: measure(pipeline, split, num_captions=num_captions, seed=seed, progress=progress, **kwargs, **condition)
        for name, condition in CONDITIONS.items()
    }


def compare_disagreement(
    pipeline: UnCLIP, *, num_captions: int, seed: int, split: str = "single", progress: bool = True, **kwargs: Any
) -> dict[str, Any]:
    """Sample an image for each caption and the embedding of the next record's image, and count which it follows.

    Each attribute is judged by the images in whose caption and embedded image it differs. Arguments as in `measure`.

    Returns:
        {"n": {attribute: number of those images}, "caption": {attribute: share as the caption says}, "embedding":
        {attribute: share as the embedded image is}, "captions": list of str, "embedded": uint8[N, S, S, 3], "images":
        uint8[N, R, R, 3]}; the rest of a share shows neither. A share is NaN where no image differs.

    Raises:
        ValueError: if num_captions is less than 2.
    """
    if num_captions < 2:
        raise ValueError(f"num_captions={num_captions} must be at least 2, to embed another image")
    source = ShapesSource(seed, pipeline.clip.network.vision.image_size, split)
    records = [source[i] for i in range(num_captions)]
    captions, embedded = [record["caption"] for record in records], np.stack([record["image"] for record in records])
    embedded, scenes = np.roll(embedded, -1, axis=0), [source.scene(i) for i in range(num_captions)]
    hidden, share = not progress or jax.process_index() != 0, -(-num_captions // jax.process_count())
    with progress_bar(share, description="caption against embedding", unit="image", shown=not hidden) as bar:
        each = {"prompts": captions, "images": embedded}
        kwargs |= {"seed": seed, "report": bar.update, "embedding": "image"}
        images = generate_on_all_hosts(pipeline.generate, num_captions, each, **kwargs)
    followed = faithfulness.compare(images, scenes, scenes[1:] + scenes[:1])
    return followed | {"captions": captions, "embedded": embedded, "images": images}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what is worth storing of results: N and rates."""
    return {name: {"n": result["n"], "rates": result["rates"]} for name, result in results.items()}
