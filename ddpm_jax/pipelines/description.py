"""Format of pipeline.json: the model directory of each role, and the sampling options of each stage."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_jax.checks import shown
from ddpm_jax.diffusion.sampling import Sampling, sampling_from
from ddpm_jax.diffusion.tokens import TokenSampling, token_sampling_from
from ddpm_jax.errors import LoadError, ReadError
from ddpm_jax.paths import as_path
from ddpm_jax.pipelines.enlarging import checked_enlarging
from ddpm_jax.storage.json_file import read_json, write_json
from ddpm_jax.storage.metadata import check_plain, integer, number
from ddpm_jax.version import __version__

FORMAT, PIPELINE_FILE = "ddpm_jax pipeline 1", "pipeline.json"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_UPSAMPLERS = 16
_ROLES = (
    "clip",
    "codes",
    "statistics",
    "prior",
    "decoder",
    "base",
    "classifier",
    "noised_clip",
)  # which no upsampler has as its name


class Kind(NamedTuple):
    """Roles and options of a class of pipelines.

    Attributes:
        required, optional: roles of one model each; `upsamplers` is a list in every pipeline.
        unsampled: the roles that are not sampled.
        options: name -> check of the option's value.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    unsampled: tuple[str, ...]
    options: Mapping[str, Callable[[str, Any], None]]


def _levels(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise LoadError(f"{where}={value!r:.60} must be an object with a level for each upsampler")
    for name, level in value.items():
        number(0.0, 1.0)(f"{where}.{name}", level)


def _enlarging(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise LoadError(f"{where}={value!r:.60} must be an object with an object for each upsampler")
    try:
        checked_enlarging(list(value), value)
    except ValueError as error:
        raise LoadError(f"{where}: {error}") from None


_SHARED = {"batch_size": integer(1, 65_536), "noise_levels": _levels, "enlarging": _enlarging}
KINDS = {
    "UnCLIP": Kind(
        ("clip", "prior", "decoder"),
        ("codes", "statistics"),
        ("clip", "codes", "statistics"),
        {"candidates": integer(1, 1000)} | _SHARED,
    ),
    "Cascade": Kind(("base",), ("classifier", "noised_clip"), ("classifier", "noised_clip"), _SHARED),
}


@dataclasses.dataclass(frozen=True)
class PipelineDescription:
    """Models and options of a pipeline, as a recipe's `pipeline(config)` returns it and pipeline.json stores it.

    Attributes:
        kind: the class, "UnCLIP" or "Cascade".
        models: role -> directory of a model, relative to that of pipeline.json: a stage's name. "upsamplers" has a list
            of them, smallest images first.
        sampling: how each stage is sampled, by its role, or by the name of an upsampler's directory; the pipeline's
            default for one that is absent.
        options: plain data: "batch_size", "noise_levels" and "enlarging" of the upsamplers by name, and for UnCLIP
            "candidates".

    Raises:
        ValueError: if a role, a stage or an option is unknown, missing or out of its range.
    """

    kind: str
    models: Mapping[str, Any]
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"class={self.kind!r:.60} must be one of {', '.join(map(repr, KINDS))}")
        kind = KINDS[self.kind]
        _check_object("models", self.models, (*kind.required, *kind.optional, "upsamplers"))
        for role in kind.required:
            if role not in self.models:
                raise ValueError(f"models lacks {role!r}, which {self.kind} needs")
        for role, place in self.models.items():
            if role == "upsamplers":
                self._check_upsamplers(place)
            else:
                _check_place(f"models.{role}", place)
        stages = self.stages
        _check_object("sampling", self.sampling, stages)
        sampling = {
            stage: _sampling(value, f"sampling.{stage}", stage == "prior" and "codes" in self.models)
            for stage, value in self.sampling.items()
        }
        object.__setattr__(self, "sampling", sampling)
        _check_object("options", self.options, tuple(kind.options))
        for name, value in self.options.items():
            try:
                kind.options[name](f"options.{name}", value)
            except LoadError as error:
                raise ValueError(str(error)) from None
        for name in ("noise_levels", "enlarging"):
            _check_object(f"options.{name}", self.options.get(name, {}), self.upsamplers)

    def _check_upsamplers(self, places: Any) -> None:
        if isinstance(places, str) or not isinstance(places, Sequence) or len(places) > _UPSAMPLERS:
            raise ValueError(f"models.upsamplers={places!r:.60} must be a list of at most {_UPSAMPLERS} directories")
        for i, place in enumerate(places):
            _check_place(f"models.upsamplers[{i}]", place)
        names = [Path(place).name for place in places]
        odd = [name for name in names if not _NAME.fullmatch(name) or name in _ROLES]
        if odd or len(set(names)) < len(names):
            raise ValueError(
                f"models.upsamplers={list(places)!r:.200} must be directories with different names of letters, digits "
                "and _, which name the options of generate"
            )

    @property
    def upsamplers(self) -> tuple[str, ...]:
        """Names of the upsamplers, those of their directories."""
        return tuple(Path(place).name for place in self.models.get("upsamplers", ()))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that are sampled, in their order."""
        kind = KINDS[self.kind]
        roles = (*kind.required, *(role for role in kind.optional if role in self.models))
        return (*(role for role in roles if role not in kind.unsampled), *self.upsamplers)

    def write(self, directory: str | os.PathLike) -> None:
        """Write pipeline.json into a directory, whole or not at all, by the first process alone.

        Raises:
            OSError: if it cannot be written.
        """
        models = {role: list(p) if role == "upsamplers" else str(p) for role, p in self.models.items()}
        value = {
            "format": FORMAT,
            "version": __version__,
            "class": self.kind,
            "models": models,
            "sampling": {stage: value.describe() for stage, value in self.sampling.items()},
            "options": dict(self.options),
        }
        write_json(as_path(directory) / PIPELINE_FILE, value)


def read_pipeline(directory: str | os.PathLike) -> PipelineDescription:
    """Read pipeline.json.

    Raises:
        LoadError: if it is missing, not such a file, or has a field that cannot be.
    """
    path = as_path(directory) / PIPELINE_FILE
    try:
        described = read_json(path)
    except FileNotFoundError:
        raise ReadError(f"{directory} holds no pipeline (it has no {PIPELINE_FILE})") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ReadError(f"{path} is not the description of a pipeline of this package: {reason}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else type(described).__name__
        raise ReadError(f"{path} has the format {found!r:.60}, and this version reads {FORMAT!r}")
    for name, part in described.items():
        check_plain(part, f"{path}: {name}")
    version = described.get("version")
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}[A-Za-z0-9.+-]{0,40}", version):
        raise LoadError(f"{path}: version={version!r:.60} must be a version such as {__version__!r}")
    unknown = set(described) - {"format", "version", "class", "models", "sampling", "options"}
    if unknown:
        raise LoadError(f"{path} has no field {min(unknown)!r:.60} in this version")
    try:
        fields = {name: described.get(name, {}) for name in ("models", "sampling", "options")}
        return PipelineDescription(described.get("class"), **fields)
    except ValueError as error:
        raise LoadError(f"{path}: {error}") from None


def _check_object(where: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r:.60} must be an object")
    for name in value:
        if name not in known:
            raise ValueError(f"{where} has no part {name!r:.60}; it has {', '.join(known)}")


def _check_place(where: str, place: Any) -> None:
    if not isinstance(place, str | os.PathLike) or not 0 < len(str(place)) < 4096 or "\0" in str(place):
        raise ValueError(f"{where}={place!r:.60} must be the directory of a model")


def _sampling(value: Any, where: str, of_codes: bool) -> Sampling | TokenSampling:
    if isinstance(value, Sampling | TokenSampling):
        if isinstance(value, TokenSampling) != of_codes:
            raise ValueError(f"{where} must be a {'TokenSampling' if of_codes else 'Sampling'}, got {shown(value)}")
        return value.checked(f"{where}.")
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r:.60} must be an object with the options of a sampler")
    return token_sampling_from(value, name=where) if of_codes else sampling_from(value, name=where)
