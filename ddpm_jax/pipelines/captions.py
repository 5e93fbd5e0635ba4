"""Captions of a cascade: tokens for its networks (GLIDE), and a noised CLIP that guides the base to them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.data.tokenizer import tokenizer_from_config
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.models.clip import normalize
from ddpm_jax.models.noised_clip import NoisedCLIP
from ddpm_jax.pipelines.request import as_prompts, tokenize
from ddpm_jax.pipelines.upsampling import image_size_of
from ddpm_jax.storage.metadata import thaw
from ddpm_jax.storage.model_directory import Model


class Captions(NamedTuple):
    """Captions as the networks of a pipeline read them; None for those that it does not have.

    Attributes:
        tokens, mask: int32[B, L] and bool[B, L], of the diffusion models.
        clip_tokens, clip_mask: int32[B, L'] and bool[B, L'], of the noised CLIP.
    """

    tokens: Any = None
    mask: Any = None
    clip_tokens: Any = None
    clip_mask: Any = None


def token_metadata(models: Mapping[str, Model]) -> Mapping[str, Any] | None:
    """Return how captions become tokens of the diffusion models, which must agree; None if none has captions.

    Raises:
        ValueError: if they differ.
    """
    own = {name: m.metadata["tokens"] for name, m in models.items() if "tokens" in m.metadata.get("conditions", ())}
    forms = {name: (found["length"], found["tokenizer"]) for name, found in own.items()}
    first = next(iter(forms), None)
    odd = next((name for name in forms if forms[name] != forms[first]), None)
    if odd is not None:
        raise ValueError(f"{first} and {odd} read captions with different tokenizers or lengths")
    return None if first is None else own[first]


def check_noised_clip(clip: Model, base: Model) -> None:
    """Raise ValueError if a noised CLIP cannot guide a base."""
    if not isinstance(clip.network, NoisedCLIP) or not {"tokenizer", "length", "diffusion"} <= set(clip.metadata):
        raise ValueError(
            f"noised_clip must be a NoisedCLIP with a tokenizer, length and diffusion, got a "
            f"{type(clip.network).__name__}"
        )
    sizes = image_size_of(base), image_size_of(clip)
    if sizes[0] != sizes[1]:
        raise ValueError(f"base has images of size {sizes[0]}, and noised_clip is for those of size {sizes[1]}")
    check_same_process("noised_clip", clip, base)


def check_same_process(role: str, model: Model, base: Model) -> None:
    """Raise ValueError if a model that guides a base was trained with another noise process."""
    of_both = {"prediction": "eps", "variance": "fixed_small"}  # which do not belong to the process
    processes = [m.diffusion.replace(**of_both) for m in (base, model)]
    if processes[0] != processes[1]:
        raise ValueError(
            f"base and {role} were trained with different noise processes: {_difference(*processes)}; train the {role} "
            "with the diffusion of the base"
        )


def _difference(one: Diffusion, other: Diffusion) -> str:
    """Return the fields in which two processes differ, with both values."""
    found = []
    for name in ("schedule", "num_steps", "span", "time"):
        values = getattr(one, name), getattr(other, name)
        if values[0] == values[1]:
            continue
        if name == "schedule" and all(isinstance(value, tuple) for value in values):
            pairs = enumerate(zip(*values))
            different = ((f"beta {step}", pair) for step, pair in pairs if pair[0] != pair[1])
            name, values = next(different, ("number of betas", tuple(map(len, values))))
        elif name == "schedule":
            values = ["own betas" if isinstance(value, tuple) else value for value in values]
        shown = ["the published one" if value is None else str(value) for value in values]
        found.append(f"{name} is {shown[0]} and {shown[1]}")
    return ", ".join(found)


def tokenized(
    prompts: str | Iterable[str], count: int | None, own: Mapping[str, Any] | None, clip: Model | None
) -> Captions:
    """Return captions as numpy arrays.

    Args:
        prompts: one for all images, or one for each.
        count: N; by default the number of prompts.
        own: from `token_metadata`.
        clip: the noised CLIP, or None.

    Raises:
        ValueError: if there is not one prompt for each image, or a tokenizer refuses one.
    """
    texts = [prompts] * (1 if count is None else count) if isinstance(prompts, str) else as_prompts(prompts)
    if count is not None and len(texts) != count:
        raise ValueError(f"prompts must be one for each of {count} images, got {len(texts)}")
    found = Captions()
    if own is not None:
        tokens, mask = _tokens(texts, own["tokenizer"], own["length"])
        found = found._replace(tokens=tokens, mask=mask)
    if clip is not None:
        tokens, mask = _tokens(texts, clip.metadata["tokenizer"], clip.metadata["length"])
        found = found._replace(clip_tokens=tokens, clip_mask=mask)
    return found


def no_captions(count: int, own: Mapping[str, Any]) -> Captions:
    """Return the null caption of the diffusion models for N images."""
    shape = (count, own["length"])
    return Captions(np.zeros(shape, np.int32), np.zeros(shape, bool))


def _tokens(texts: Sequence[str], tokenizer: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    return tokenize(tokenizer_from_config(thaw(tokenizer)), texts, length, allow_empty=True)


def similarity(clip: Model, captions: Captions) -> Any:
    """Return (xt, t) -> the similarity of noised images and captions, float32[B], whose gradient guides to them."""
    z_text = normalize(clip.apply(captions.clip_tokens, captions.clip_mask, method=NoisedCLIP.encode_text))

    def log_prob(xt: jax.Array, t: jax.Array) -> jax.Array:
        return clip.apply(xt, t, z_text, method=NoisedCLIP.log_prob)

    return log_prob
