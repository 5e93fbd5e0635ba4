"""The pipeline that a converted checkpoint is."""

from collections.abc import Callable
from typing import Any

import flax.traverse_util
import numpy as np

from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.errors import LoadError
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.karlo import Karlo
from ddpm_jax.pipelines.stable_diffusion import StableDiffusion
from ddpm_jax.storage.metadata import integer, number
from ddpm_jax.storage.model_directory import Converted

PIPELINES = {"karlo": Karlo, "stable-diffusion": StableDiffusion}
_LARGEST = 16_384  # pixels
_NETWORKS = {
    "karlo": {"text": CLIP, "decoder": Decoder, "first": Upsampler, "last": Upsampler},
    "stable-diffusion": {"text": TextEncoder, "unet": UNet, "autoencoder": Autoencoder},
}
_OPTIONAL = {"karlo": {"image": CLIP, "prior": DiffusionPrior}, "stable-diffusion": {}}


def pipeline_of(converted: Converted, tokenizer: Tokenizer | None = None) -> Karlo | StableDiffusion | Converted:
    """Return the pipeline that a converted checkpoint is; one network alone is returned as it is.

    Args:
        converted: as the readers of `interop` and `storage.model_directory.load` return it.
        tokenizer: in place of the one that it names.

    Raises:
        LoadError: if networks, parameters or numbers are missing or do not fit; the message names the field.
    """
    family = converted.family
    if family not in PIPELINES:
        return converted
    for name, kind in (_NETWORKS[family] | _OPTIONAL[family]).items():
        network = converted.models.get(name)
        if network is None and name in _OPTIONAL[family]:
            continue
        if not isinstance(network, kind) or name not in converted.params:
            raise LoadError(f"networks.{name} of a {family} pipeline must be a {kind.__name__}, got {_class(network)}")
    (_check_karlo if family == "karlo" else _check_stable_diffusion)(converted)
    try:
        return PIPELINES[family].from_converted(converted, tokenizer)
    except ConvertError as error:  # of the schedule
        raise LoadError(f"metadata.schedule: {error}") from None


def _class(network: Any) -> str:
    return "none" if network is None else type(network).__name__


def _check_karlo(converted: Converted) -> None:
    metadata, models = converted.metadata, converted.models
    _check(metadata, "tokenizer", lambda where, value: None)
    _check(metadata, "prior_clip", number(1e-6, 1e6))
    _check(metadata, "sizes", _sizes)
    if "image" not in models and "prior" not in models:
        raise LoadError("networks of a karlo pipeline must have a prior or an image encoder")
    if models["first"] != models["last"]:
        raise LoadError("networks.first and networks.last of a karlo pipeline must be one network with two parameters")
    if "prior" in models:
        flat = flax.traverse_util.flatten_dict(dict(converted.params.get("statistics", {})), sep="/")
        shapes, size = {name: np.shape(array) for name, array in flat.items()}, models["prior"].embed_dim
        if shapes != {"mean": (size,), "std": (size,)}:
            raise LoadError(f"statistics of a karlo pipeline must be a mean and a std of {size} numbers, got {shapes}")


def _check_stable_diffusion(converted: Converted) -> None:
    metadata = converted.metadata
    _check(metadata, "tokenizer", lambda where, value: None)
    _check(metadata, "latent_size", integer(1, _LARGEST))
    metadata.setdefault("prediction", metadata.get("kind"))  # its name in earlier versions
    _check(metadata, "prediction", _prediction)
    _check(metadata, "schedule", _schedule)


def _check(metadata: dict[str, Any], name: str, check: Callable[[str, Any], None]) -> None:
    if metadata.get(name) is None:
        raise LoadError(f"metadata lacks the field {name}")
    check(f"metadata.{name}", metadata[name])


def _sizes(where: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise LoadError(f"{where}={value!r:.60} must be two sizes of images, in pixels")
    for place, size in enumerate(value):
        integer(1, _LARGEST)(f"{where}[{place}]", size)


def _prediction(where: str, value: Any) -> None:
    if value not in ("eps", "v", "x0"):
        raise LoadError(f"{where}={value!r:.60} must be 'eps', 'v' or 'x0'")


def _schedule(where: str, value: Any) -> None:
    fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    missing = [field for field in fields if not isinstance(value, dict) or field not in value]
    if missing:
        raise LoadError(f"{where} must be an object with {', '.join(fields)}; it lacks {missing[0]}")
