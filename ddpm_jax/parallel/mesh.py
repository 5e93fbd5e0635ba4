"""The device mesh and the placement of batches on it: the only module that makes a mesh."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
"""The axes that the rules of `parallel.sharding` know: a batch is split over "data" and "fsdp", parameters over "fsdp"
and "tensor"."""
_BATCH_AXES = ("data", "fsdp")
SPACE = "space"
"""The axis of a mesh for sampling over which rows of images are split, see `pipelines.enlarging`."""


def make_mesh(axes: Mapping[str, int], *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with the named axes, in the order given.

    The axes are of type Auto: under the Explicit axes that `jax.make_mesh` defaults to, a table look-up by a sharded
    index (`alpha_bar[t]`) and a reshape of a sharded axis fail to trace.

    Args:
      axes: name out of `AXES` -> number of devices along it; one of them may be -1, which takes the devices that are
        left.
      devices: the devices to use, all of them. Every device of every process by default.

    Returns:
      A `jax.sharding.Mesh` that uses each device once.

    Raises:
      ValueError: for an unknown name, or when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    names, sizes = tuple(axes), list(axes.values())
    if not names:
        raise ValueError(f'{axes=} names no axis; a mesh for data parallelism is {{"data": -1}}')
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ValueError(f"{axes=} has the axis {unknown[0]!r}, which splits nothing; the axes are {', '.join(AXES)}")
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"{axes=}: every size must be at least 1, and only one may be -1 (the devices that are left)")
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed != 0 or (-1 not in sizes and fixed != len(devices)):
        raise ValueError(f"{axes=} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    kinds = (AxisType.Auto,) * len(names)
    try:
        return jax.make_mesh(sizes, names, axis_types=kinds, devices=devices)
    except NotImplementedError:  # no set of the axes of a TPU's torus has these sizes, so that one has to be split
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(arranged, names, axis_types=kinds)


def make_local_mesh(at_most: int | None = None, *, space: int = 1) -> Mesh:
    """Make a mesh of this process' devices, or the first few, along "data", for work that processes do not share.

    Args:
      at_most: devices along "data".
      space: devices that share each image, along "space": the rows of what upsamplers make are split over them.

    Raises:
      ValueError: if there are fewer devices than `space`.
    """
    devices = jax.local_devices()
    if not 1 <= space <= len(devices):
        raise ValueError(f"{space=} must be a number of devices in [1, {len(devices)}]")
    # Not by jax.make_mesh, which arranges the chips of a TPU and refuses three of them.
    rows = np.asarray(devices[: len(devices) // space * space]).reshape(-1, space)[:at_most]
    if space == 1:
        return Mesh(rows[:, 0], ("data",), axis_types=(AxisType.Auto,))
    return Mesh(rows, ("data", SPACE), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a whole copy of an array on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Return the axes of `mesh` that a batch is split over: "data" and "fsdp", as far as it has them."""
    return tuple(name for name in _BATCH_AXES if name in mesh.shape)


def batch_shards(mesh: Mesh) -> int:
    """Return the number of parts that a batch is split into."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def data_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis of an array over `batch_axes(mesh)`."""
    axes = batch_axes(mesh)
    return NamedSharding(mesh, PartitionSpec(axes[0] if len(axes) == 1 else axes))


def process_shards(mesh: Mesh, process: int | None = None) -> tuple[int, ...]:
    """Return which of the `batch_shards(mesh)` equal parts of a batch the devices of a process hold, in their order.

    Processes whose devices differ along "tensor" alone hold the same parts.

    Args:
      mesh: a mesh.
      process: index of the process; None for this one.

    Raises:
      ValueError: when the mesh has no device of the process.
    """
    found = _parts_by_process(mesh)
    process = jax.process_index() if process is None else process
    if process not in found:
        raise ValueError(f"mesh={dict(mesh.shape)} has no device of host {process}; each host needs one in it")
    return found[process]


@functools.cache
def _parts_by_process(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    found: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        at, part = dict(zip(mesh.axis_names, place, strict=True)), 0
        for name in batch_axes(mesh):
            part = part * mesh.shape[name] + at[name]
        found.setdefault(device.process_index, set()).add(part)
    return {process: tuple(sorted(parts)) for process, parts in found.items()}


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a batch on the devices, its leading axis split over `batch_axes(mesh)`.

    Args:
      batch: a tree of numpy arrays [B, ...], the parts `process_shards(mesh)` of the whole batch one after the other.
      mesh: a mesh with an axis "data" or "fsdp".

    Returns:
      The same tree of `jax.Array` [B * batch_shards(mesh) / number of these parts, ...].

    Raises:
      ValueError: when an array has no leading axis or does not hold numbers, or does not divide over the devices.
    """
    sharding, parts, axes = data_sharding(mesh), process_shards(mesh), " x ".join(batch_axes(mesh))
    for path, array in jax.tree_util.tree_leaves_with_path(batch):
        shape = np.shape(array)
        if np.asarray(array).dtype.kind in "OSU":
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} holds text or objects, which no device can; "
                "the loader's transforms must encode it or leave it out"
            )
        if not shape or shape[0] == 0 or shape[0] % len(parts) != 0:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {shape}, but its leading axis must be a multiple of the "
                f"{len(parts)} devices along {axes} (of {jax.process_count()} processes, on this one)"
            )
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda array: _place_parts(np.asarray(array), sharding, parts, batch_shards(mesh)), batch)


def _place_parts(array: np.ndarray, sharding: NamedSharding, parts: Sequence[int], shards: int) -> jax.Array:
    # Not by jax.make_array_from_process_local_data, which needs processes that hold as much, all alike or all apart.
    size = len(array) // len(parts)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        begin = parts.index((index[0].start or 0) // size) * size
        return array[begin : begin + size]

    return jax.make_array_from_callback((size * shards, *array.shape[1:]), sharding, read)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return a function that is traced with a mesh as JAX's context, for kernels that XLA cannot split by itself.

    See `models.fused_attention`; the function's results and shardings are the same.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced
