"""Agreement of images with captions by a CLIP: CLIP score (Hessel et al. 2021) and R-precision (Xu et al. 2018)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax.evaluation.compare import Measure
from ddpm_jax.evaluation.summary import gather_arrays
from ddpm_jax.storage.embedder import ClipEmbedder, open_embedder


def clip_scores(z_image: np.ndarray, z_text: np.ndarray) -> np.ndarray:
    """Return 100 max(cos, 0) of each image and its caption, float64[N], of unit embeddings float[N, D].

    Hessel et al. print 2.5 max(cos, 0), a fortieth of it.
    """
    return 100.0 * np.maximum(np.sum(z_image.astype(np.float64) * z_text, axis=1), 0.0)


def r_precision(
    z_image: np.ndarray, z_text: np.ndarray, captions: Sequence[str], *, candidates: int = 100, seed: int = 0
) -> np.ndarray:
    """Find for which images their own caption is the nearest of `candidates`, the others at random.

    The others are captions of the set that differ from the image's own; fewer if the set is smaller.

    Args:
        z_image, z_text: unit embeddings, float[N, D].
        captions: N strings.
        candidates: R >= 2.
        seed: of the choice.

    Returns:
        bool[N].

    Raises:
        ValueError: if all captions are equal.
    """
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    different = np.array(sorted(first.values()))
    if len(different) < 2 or candidates < 2:
        raise ValueError(f"R-precision needs at least two different captions and {candidates=} of at least 2")
    numbers = {int(row): place for place, row in enumerate(different)}
    rng, found = np.random.default_rng([seed, 0x52]), []
    for i, caption in enumerate(captions):
        others = np.delete(different, numbers[first[caption]])
        chosen = rng.choice(others, min(candidates - 1, len(others)), replace=False)
        own = z_image[i].astype(np.float64) @ z_text[first[caption]]
        found.append(own > (z_text[chosen].astype(np.float64) @ z_image[i]).max())
    return np.array(found)


class CaptionScores:
    """Embeds images and their captions, batch by batch.

    Args:
        path: a model directory with a CLIP that has both towers and a tokenizer.

    Raises:
        LoadError: if it cannot be read.
        ValueError: if it has none of these.
    """

    def __init__(self, path: str):
        self._embed, self._path = open_embedder(path), path
        if not isinstance(self._embed, ClipEmbedder) or not self._embed.reads_captions:
            raise ValueError(f"{path} holds no CLIP that reads captions")
        self._parts: list[dict[str, Any]] = []

    def add(self, batch: dict[str, Any]) -> None:
        """Add a batch of an `ImageSet`; raise ValueError if it has no captions."""
        if "caption" not in batch:
            raise ValueError("CLIP score and R-precision need images with captions")
        captions = [_one(caption) for caption in batch["caption"]]
        self._parts.append({**self._embed(batch["image"], captions), "caption": captions})

    def measures(self, *, candidates: int, replicates: int, seed: int) -> list[Measure]:
        """Return CLIP score and R-precision of all hosts' images."""
        z_image, z_text = (np.concatenate([part[name] for part in self._parts]) for name in ("z_image", "z_text"))
        captions = [caption for part in self._parts for caption in part["caption"]]
        if jax.process_count() > 1:
            text = np.frombuffer("\0".join(captions).encode(), np.uint8)
            parts = gather_arrays({"image": z_image, "text": z_text, "captions": text})
            z_image, z_text = (np.concatenate([part[name] for part in parts]) for name in ("image", "text"))
            captions = [caption for part in parts for caption in part["captions"].tobytes().decode().split("\0")]
        scores = clip_scores(z_image, z_text)
        how = {"replicates": replicates, "seed": seed}
        note = f"100 max(cos, 0), {self._embed.fingerprint[:17]}"
        found = [Measure.of_means("CLIP score", scores, note=note, **how)]
        if len(set(captions)) < 2:
            return found
        right = r_precision(z_image, z_text, captions, candidates=candidates, seed=seed)
        note = f"of {min(candidates, len(set(captions)))} captions"
        return [*found, Measure.of_means("R-precision", right, note=note, most=1.0, **how)]


def _one(caption: Any) -> str:
    """Return a caption, the first of several."""
    return caption if isinstance(caption, str) else caption[0]
