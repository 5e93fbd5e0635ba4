"""Options of upsamplers besides their samplers: tiles, and low-resolution images that are left noisy (truncated)."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec, get_abstract_mesh

from ddpm_jax.checks import shown
from ddpm_jax.diffusion.samplers.grid import time_grid
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.parallel.mesh import SPACE, batch_axes
from ddpm_jax.pipelines.request import as_int
from ddpm_jax.storage.model_directory import Model

FIELDS = ("tile", "overlap", "truncated")
Pairs = tuple[tuple[str, "Enlarging"], ...]


@dataclasses.dataclass(frozen=True)
class Enlarging:
    """How an upsampler is run; another program is compiled for other fields.

    Attributes:
        tile: side of the tiles in pixels that the network runs on, one after the other; None runs on whole images. See
            `diffusion.tiles`.
        overlap: of neighbouring tiles in pixels; a quarter of the tile by default.
        truncated: True stops the stage before at the noise level, and enlarges its noisy image (truncated conditioning
            augmentation: Ho et al. 2022, cascaded diffusion, section 4.2); False adds noise to its finished image.
        stop: steps of the stage before after which it is stopped; from `with_stops`.
    """

    tile: int | None = None
    overlap: int | None = None
    truncated: bool = False
    stop: int | None = None


def checked_enlarging(names: Collection[str], given: Any, models: Sequence[Model] | None = None) -> Pairs:
    """Return how each upsampler is run, for all names in their order.

    Args:
        names: of the upsamplers.
        given: name -> `Enlarging` or a mapping of its fields, or pairs of them; whole images for what is absent.
        models: the stage before the upsamplers, and the upsamplers, whose networks tiles must fit; None checks no tile.

    Raises:
        ValueError: if a name or a field is unknown, or a field is of another type or out of its range.
    """
    entries, options = {name: _fields(name, own) for name, own in dict(given).items()}, {}
    for name, own in entries.items():
        if name not in names:
            raise ValueError(f"enlarging has no upsampler {name!r}; there are {', '.join(names) or 'none'}")
        options |= {f"{name}_{field}": value for field, value in own.items()}
    found = tuple(enlarging_options(names, {}, options)[0].items())
    for before, model, (name, own) in zip(models or (), (models or ())[1:], found):
        _check_tiles(name, own, before, model)
    return found


def tile_unit(network: Any, factor: int) -> int:
    """Return of what number of pixels tiles of an upsampler must be multiples.

    network: its U-Net downsamples the pixels that it sees; one without a U-Net does not. factor: of enlarging.
    """
    unet = getattr(network, "unet", None)
    return int(np.lcm(1 if unet is None else getattr(unet, "patch", 1) * 2 ** (len(unet.channel_mult) - 1), factor))


def check_tile(prefix: str, own: Enlarging, network: Any, factor: int) -> None:
    """Raise ValueError, with the prefix before the option's name, if tiles do not fit a network; see `tile_unit`."""
    unit = tile_unit(network, factor)
    for field in ("tile", "overlap"):
        value = getattr(own, field)
        if own.tile is not None and value is not None and value % unit:
            raise ValueError(
                f"{prefix}{field}={value} must be a multiple of {unit} pixels, so that tiles fit the network"
            )


def _check_tiles(name: str, own: Enlarging, before: Model, model: Model) -> None:
    sizes = [stage.metadata.get("image_size") for stage in (model, before)]
    if own.tile is not None and all(sizes):
        check_tile(f"{name}_", own, model.network, sizes[0] // sizes[1])


def stored_enlarging(pairs: Pairs) -> dict[str, dict[str, Any]]:
    """Return what differs from whole images, as plain data."""
    found = {name: {f: v for f, v in _fields(name, own).items() if v not in (None, False)} for name, own in pairs}
    return {name: own for name, own in found.items() if own}


def stops_of(pairs: Pairs) -> list[int | None]:
    """Return where each stage stops, the first of all included and the last upsampler too."""
    return [own.stop for _, own in pairs] + [None]


def _fields(name: str, own: Any) -> dict[str, Any]:
    if isinstance(own, Enlarging):
        return {field: getattr(own, field) for field in FIELDS}
    if not isinstance(own, Mapping) or any(field not in FIELDS for field in own):
        raise ValueError(f"enlarging.{name}={shown(own)} must have fields out of {', '.join(FIELDS)}")
    return dict(own)


def enlarging_options(
    names: Collection[str], defaults: Mapping[str, Enlarging], options: Mapping[str, Any]
) -> tuple[dict[str, Enlarging], dict[str, Any]]:
    """Return how each upsampler is run, and the options that are left.

    Args:
        names: of the upsamplers.
        defaults: by name, for what is not given.
        options: of a request; <name>_tile, <name>_overlap and <name>_truncated are taken.

    Raises:
        ValueError: if one is of another type or out of its range.
    """
    found, options = {}, dict(options)
    for name in names:
        given = {field: options.pop(f"{name}_{field}", None) for field in FIELDS}
        own = {field: value for field, value in given.items() if value is not None}
        for field in ("tile", "overlap"):
            if field in own:
                own[field] = as_int(f"{name}_{field}", own[field], least=1 if field == "tile" else 0)
        if not isinstance(own.get("truncated", False), bool):
            raise ValueError(f"{name}_truncated={shown(own['truncated'])} must be True or False")
        chosen = dataclasses.replace(defaults.get(name, Enlarging()), **own)
        if chosen.overlap is not None and (chosen.tile is None or chosen.overlap >= chosen.tile):
            raise ValueError(f"{name}_overlap={chosen.overlap} must be below {name}_tile={chosen.tile}")
        found[name] = chosen
    return found, options


def with_stops(
    enlarging: Mapping[str, Enlarging],
    stages: Mapping[str, Model],
    sampling: Mapping[str, Sampling],
    levels: Mapping[str, float],
) -> tuple[Pairs, dict[str, float]]:
    """Return how each upsampler is run, as a static argument, and the noise levels, each at a step of the stage before.

    A truncated stage stops at the step whose noise is nearest to the level, and that is the level then.

    Args:
        enlarging: by upsampler.
        stages: the models in the order in which they run; the first is no upsampler.
        sampling: of each stage.
        levels: of noise, by upsampler.

    Raises:
        ValueError: if an upsampler cannot enlarge noisy images of the stage before it.
    """
    found, levels, order = {}, dict(levels), list(stages)
    for before, name in zip(order, order[1:]):
        own = enlarging.get(name, Enlarging())
        _check_tiles(name, own, stages[before], stages[name])
        if own.truncated:
            low = stages[name].metadata.get("low_resolution", {})
            if not (low.get("variance_preserving", False) and low.get("noise_level_input", False)):
                raise ValueError(
                    f"{name}_truncated=True needs an upsampler that was trained with variance_preserving=True and "
                    "noise_level_input=True of its low-resolution images"
                )
            if not levels.get(name):
                raise ValueError(f"{name}_truncated=True needs {name}_noise_level above 0, where {before} is to stop")
            grid = time_grid(sampling[before].process(stages[before].diffusion))
            sigma = np.asarray(grid.sigma, np.float64)
            if np.abs(np.square(sigma) + np.square(np.asarray(grid.alpha, np.float64)) - 1).max() > 1e-3:
                raise ValueError(f"{name}_truncated=True needs a {before} whose noise process preserves the variance")
            usable = [step for step in range(1, len(sigma) - 1) if sigma[step] <= low.get("noise", 1.0)]
            if not usable:
                raise ValueError(
                    f"{name}_truncated=True: none of the {len(sigma) - 1} steps of {before} has noise of at most "
                    f"{low['noise']}, the largest level of {name}; sample {before} in more steps"
                )
            stop = min(usable, key=lambda step: abs(sigma[step] - levels[name]))
            own, levels[name] = dataclasses.replace(own, stop=stop), float(sigma[stop])
        found[name] = own
    return tuple(found.items()), levels


def split_rows(x: jax.Array) -> jax.Array:
    """Split the rows of images [B, H, W, C] over the axis "space" of the mesh in whose context a program is traced."""
    mesh = get_abstract_mesh()
    if SPACE not in mesh.shape:
        return x
    if x.shape[1] % mesh.shape[SPACE]:
        raise ValueError(
            f"the axis 'space' of the mesh has {mesh.shape[SPACE]} devices, which do not divide {x.shape[1]} rows"
        )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(mesh), SPACE))


def in_context(mesh: Mesh | None, program: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled program that is traced in the context of a mesh, if the mesh has an axis "space"."""
    if mesh is None or SPACE not in mesh.shape:
        return program

    def call(*arguments: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return program(*arguments, **options)

    return call
