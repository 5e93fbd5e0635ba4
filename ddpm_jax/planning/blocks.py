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
from jax.sharding import SingleDeviceSharding

from ddpm_jax.models.layers import AttentionBlock, Resample, ResBlock, rematerialized_function
from ddpm_jax.models.spatial_transformer import SpatialTransformer
from ddpm_jax.models.transformer import Block, Transformer
from ddpm_jax.parallel.chips import Chip
from ddpm_jax.planning.flops import count_flops
from ddpm_jax.planning.measure import Cost, measure

_BLOCKS = (ResBlock, AttentionBlock, Resample, SpatialTransformer, Block)
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
        cache: see `measure.measure`.
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
        program, shapes = _program(call, batch_size, shards)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), shapes
        )
        cost = measure(jax.jit(program).lower(*placed), chip, cache=cache)
        seen[call.name] = (count, cost)
        if not cost.fits:
            return cost, seen
        show(f"{number}/{len(groups)} {call.name} x {count}: {cost.seconds * 1e3:.3f} ms, {cost.compile_seconds:.0f} s")
        for name in ("flops", "bytes", "seconds", "compile_seconds"):
            totals[name] += getattr(cost, name) * (1 if name == "compile_seconds" else count)
        forward = lambda params, arguments, module=call.module: _apply(module, params, arguments)  # noqa: E731
        counted += 3 * count * count_flops(forward, *shapes[:2])
        kept += count * _size(shapes[1])
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


def _program(call: BlockCall, batch_size: int, shards: int) -> tuple[Callable[..., Any], tuple]:
    """Return a function that runs a block and its gradient, and the shapes of its arguments on one device."""
    is_shape = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], tuple) and hasattr(x[1], "itemsize")  # noqa: E731

    def local(x: Any) -> Any:
        if not is_shape(x):
            return x
        (first, *others), dtype = (x[0] or (0,)), x[1]
        if not x[0]:
            return jax.ShapeDtypeStruct((), dtype)
        return jax.ShapeDtypeStruct((first // shards if first % batch_size == 0 else first, *others), dtype)

    args, kwargs = jax.tree.map(local, call.shapes, is_leaf=is_shape)
    arrays = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.ShapeDtypeStruct)]
    structure = jax.tree.structure((args, kwargs))
    leaves = jax.tree.leaves((args, kwargs))

    def filled(values: list) -> tuple:
        given = iter(values)
        return jax.tree.unflatten(
            structure, [next(given) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        )

    module = call.module
    object.__setattr__(module, "_plan_filled", filled)
    params = jax.eval_shape(lambda key: _init(module, key, filled(_zeros(arrays))), jax.random.key(0))
    out = jax.eval_shape(lambda params, values: _apply(module, params, values), params, arrays)

    def program(params: Any, values: list, gradient: Any) -> Any:
        floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in arrays]

        def run(params: Any, of: list) -> Any:
            given = iter(of)
            return _apply(module, params, [next(given) if f else x for f, x in zip(floating, values, strict=True)])

        y, backward = jax.vjp(
            rematerialized_function(run, call.remat), params, [x for f, x in zip(floating, values, strict=True) if f]
        )
        return y, backward(gradient)

    return program, (params, arrays, out)


def _init(module: nn.Module, key: jax.Array, inputs: tuple) -> Any:
    args, kwargs = inputs
    return module.init({"params": key, "dropout": key}, *args, **kwargs)


def _apply(module: nn.Module, params: Any, values: list) -> Any:
    args, kwargs = module._plan_filled(values)
    return module.apply(params, *args, **kwargs, rngs={"dropout": jax.random.key(0)})


def _zeros(shapes: list) -> list:
    return [jnp.zeros(x.shape, x.dtype) for x in shapes]


def _fields(module: nn.Module) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]


def _size(shapes: list) -> float:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)
