"""The cost of a training step as the sum over the blocks of its network, where compiling the whole takes too long.

A U-Net of 300 million parameters takes the TPU compiler minutes, and each of its blocks, of which many are alike,
seconds. The sum leaves out fusions across blocks and waiting for other chips. docs/performance.md gives the error,
measured where both were done.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from ddpm_jax.models.layers import AttentionBlock, Resample, ResBlock, rematerialized_function
from ddpm_jax.models.ncsnpp import ResBlockPP
from ddpm_jax.models.spatial_transformer import SpatialTransformer
from ddpm_jax.models.transformer import Block, Transformer
from ddpm_jax.parallel.chips import Chip
from ddpm_jax.parallel.mesh import on_mesh
from ddpm_jax.planning.measure import Cost, measure
from ddpm_jax.training.flops import count_flops

_BLOCKS = (ResBlock, ResBlockPP, AttentionBlock, Resample, SpatialTransformer, Block)
UPDATE_BYTES = 44
"""Bytes that AdamW, the average and the two norms read and write for a parameter, in float32: the gradient and the
parameter three times each, and the average and both moments twice each, less one write."""


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    Attributes:
        module: unbound, with its fields.
        shapes: of the arguments, (shape, dtype) or the argument itself where it is no array.
        name: of the module, as "down_0_1".
        remat: what the backward pass computes again, see `models.layers.rematerialized`.
    """

    module: nn.Module
    shapes: tuple
    name: str
    remat: bool | str = False

    def key(self) -> str:
        """Text that two calls share if their programs are the same."""
        fields = {f.name: getattr(self.module, f.name) for f in _fields(self.module)}
        return repr((type(self.module).__qualname__, sorted(fields.items()), self.shapes, self.remat))


def find_blocks(loss: Callable[..., Any], args: tuple) -> list[BlockCall]:
    """Return the calls of blocks in a loss, from the shapes of its arguments."""
    found: list[BlockCall] = []
    depth, remat = 0, False

    def intercept(function: Callable, args: tuple, kwargs: Mapping, context: Any) -> Any:
        nonlocal depth, remat
        module = context.module
        if not isinstance(module, _BLOCKS) and not (isinstance(module, Transformer) and module.scan):
            return function(*args, **kwargs)
        if type(module).__name__.startswith("Checkpoint"):  # the next block is computed again
            remat = getattr(module.parent, "remat", True)
            return function(*args, **kwargs)
        if context.method_name != "__call__":
            return function(*args, **kwargs)
        if depth == 0:
            describe = lambda x: (tuple(x.shape), x.dtype) if hasattr(x, "dtype") else x  # noqa: E731
            shapes = jax.tree.map(describe, (args, dict(kwargs)))
            fields = {f.name: getattr(module, f.name) for f in _fields(module)}
            found.append(BlockCall(type(module)(**fields, parent=None), shapes, module.name or "", remat))
            remat = False
        depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1

    with nn.intercept_methods(intercept):
        jax.eval_shape(lambda *args: loss(*args), *args)  # a new function: JAX remembers the traces of others
    return found


def measure_blocks(
    loss: Callable[..., Any],
    args: tuple,
    device: Any,
    chip: Chip,
    *,
    batch_size: int,
    shards: int,
    cache: Path | None = None,
    fast: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> tuple[Cost, Mapping[str, tuple[int, Cost]]]:
    """Add up what the blocks of a loss and of its gradient cost on one chip.

    Args:
        loss: of a task.
        args: shapes of its arguments, for the whole batch.
        device: of the chip.
        chip: its description.
        batch_size: of the arguments.
        shards: parts that the batch is split into.
        cache, fast: see `measure.measure`.
        show: is called with a line for each block.

    Returns:
        (sum, blocks): the temporaries of the sum are the inputs of all blocks, which the backward pass reads, and the
        most that one block needs. blocks: name -> (calls, cost of one).
    """
    calls = find_blocks(loss, args)
    groups: dict[str, list[BlockCall]] = collections.defaultdict(list)
    for call in calls:
        groups[call.key()].append(call)
    seen, kept, largest, parts = {}, 0.0, 0.0, collections.Counter()
    totals: collections.Counter = collections.Counter()
    counted = 0.0
    for number, group in enumerate(groups.values(), 1):
        call, count = group[0], len(group)
        local = _LocalBlock(call, batch_size, shards)
        cost = _sum([measure(each, chip, cache=cache, fast=fast) for each in local.lower(device)])
        seen[call.name] = (count, cost)
        if not cost.fits:
            return cost, seen
        show(f"{number}/{len(groups)} {call.name} x {count}: {cost.seconds * 1e3:.3f} ms, {cost.compile_seconds:.0f} s")
        for name in ("flops", "bytes", "seconds", "compile_seconds"):
            totals[name] += getattr(cost, name) * (1 if name == "compile_seconds" else count)
        counted += 3 * count * count_flops(local.apply, local.params, local.arrays)
        kept += count * _size(local.arrays)
        largest = max(largest, cost.temporaries)
        parts[call.name] += cost.seconds * count
    # What is no block, such as the first and the last convolution, at the speed of the blocks.
    rest = max(1.0, 3 * count_flops(loss, *args) / shards / counted) if counted else 1.0
    whole = sum(parts.values()) or 1.0
    return (
        Cost(
            temporaries=kept + largest,
            flops=totals["flops"] * rest,
            bytes=totals["bytes"] * rest,
            seconds=totals["seconds"] * rest,
            compile_seconds=totals["compile_seconds"],
            parts={part: seconds / whole for part, seconds in parts.most_common(12)},
        ),
        seen,
    )


def _sum(costs: list[Cost]) -> Cost:
    """Return the cost of programs that run one after the other."""
    total = lambda name: sum(getattr(cost, name) for cost in costs)  # noqa: E731
    return Cost(
        temporaries=max(cost.temporaries for cost in costs),
        peak=max(cost.peak for cost in costs),
        flops=total("flops"),
        bytes=total("bytes"),
        seconds=total("seconds"),
        compile_seconds=total("compile_seconds"),
        fits=all(cost.fits for cost in costs),
    )


class _LocalBlock:
    """A block with the part of the batch that one chip has.

    Attributes:
        params, arrays: shapes of the parameters, and of the arguments that are arrays.
    """

    def __init__(self, call: BlockCall, batch_size: int, shards: int):
        def local(x: Any) -> Any:
            if not _is_described(x):
                return x
            shape, dtype = x
            if shape and shape[0] % batch_size == 0:
                shape = (shape[0] // shards, *shape[1:])
            return jax.ShapeDtypeStruct(shape, dtype)

        self._call = call
        described = jax.tree.map(local, call.shapes, is_leaf=_is_described)
        self._leaves, self._structure = jax.tree.flatten(described)
        self.arrays = [x for x in self._leaves if isinstance(x, jax.ShapeDtypeStruct)]
        self.params = jax.eval_shape(self._init, jax.random.key(0))

    def apply(self, params: Any, arrays: list) -> Any:
        """Run the block."""
        args, kwargs = self._arguments(arrays)
        return self._call.module.apply(params, *args, **kwargs, rngs={"dropout": jax.random.key(0)})

    def lower(self, device: Any) -> list[jax.stages.Lowered]:
        """Lower the block with its gradient; apart from each other where the latter computes the block again."""
        floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in self.arrays]

        def backward(params: Any, arrays: list, gradient: Any) -> Any:
            def run(params: Any, differentiable: list) -> Any:
                given = iter(differentiable)
                return self.apply(params, [next(given) if f else x for f, x in zip(floating, arrays, strict=True)])

            differentiable = [x for f, x in zip(floating, arrays, strict=True) if f]
            y, back = jax.vjp(rematerialized_function(run, self._call.remat), params, differentiable)
            return back(gradient) if self._call.remat else (y, back(gradient))

        shapes = (self.params, self.arrays, jax.eval_shape(self.apply, self.params, self.arrays))
        place, mesh = SingleDeviceSharding(device), Mesh([device], ("data",), axis_types=(AxisType.Auto,))
        apply, backward = on_mesh(self.apply, mesh), on_mesh(backward, mesh)
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        forward = [jax.jit(apply).lower(*placed[:2])] if self._call.remat else []
        return [*forward, jax.jit(backward).lower(*placed)]

    def _init(self, key: jax.Array) -> Any:
        args, kwargs = self._arguments([jnp.zeros(x.shape, x.dtype) for x in self.arrays])
        return self._call.module.init({"params": key, "dropout": key}, *args, **kwargs)

    def _arguments(self, arrays: list) -> Any:
        given = iter(arrays)
        leaves = [next(given) if isinstance(x, jax.ShapeDtypeStruct) else x for x in self._leaves]
        return jax.tree.unflatten(self._structure, leaves)


def _is_described(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], tuple) and hasattr(x[1], "itemsize")


def _fields(module: nn.Module) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]


def _size(shapes: list) -> float:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)
