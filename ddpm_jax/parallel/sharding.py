"""Which devices hold which part of a parameter: rules by the parameter's path, and the gathering of weights before use.

Data parallelism leaves every parameter whole on every device. Fully sharded data parallelism (FSDP; Rajbhandari et al.
2020, ZeRO stage 3) stores a part of each on the devices along "fsdp", gathers a weight just before it is used, and
scatters the sum of its gradient. Tensor parallelism (Shoeybi et al. 2019, Megatron-LM) also computes with a part of a
layer on the devices along "tensor".
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rule = tuple[str, Sequence[str | tuple[str, ...] | None]]
"""A regular expression, searched for in the path of a parameter ("params/block_0/mlp_1/kernel"), and for each axis of
the parameter the mesh axis or axes that it is split over, or None."""

# The first layer of a pair is split by its outputs, the second by its inputs, so that one all-reduce follows the pair.
TENSOR_RULES: tuple[Rule, ...] = (
    (r"(^|/)mlp_1/kernel$", (None, "tensor")),
    (r"(^|/)mlp_1/bias$", ("tensor",)),
    (r"(^|/)mlp_2/kernel$", ("tensor", None)),
    (r"(^|/)conv_1/kernel$", (None, None, None, "tensor")),
    (r"(^|/)conv_1/bias$", ("tensor",)),
    (r"(^|/)norm_2/(scale|bias)$", ("tensor",)),
    (r"(^|/)conv_2/kernel$", (None, None, "tensor", None)),
)
"""Of the networks of `models/`: the MLPs of transformers, and the convolutions of residual blocks with what is between
them. The rest is whole along "tensor"."""

MIN_SIZE = 2**12
"""Smaller parameters are whole on every device: gathering them costs more time than the memory is worth."""


def parameter_specs(params: Any, mesh: Mesh, rules: Sequence[Rule] = (), *, min_size: int = MIN_SIZE) -> Any:
    """Return how each parameter is split over the axes of a mesh.

    The first of `rules` whose expression is found in the path of a parameter decides; where none is, `TENSOR_RULES` do
    as far as they divide, and then "fsdp" splits the largest axis that it divides and that is not yet split.

    Args:
        params: a tree of arrays, or of shapes.
        mesh: with axes out of `mesh.AXES`; those that it lacks split nothing.
        rules: of the user; they are exact, so that "fsdp" is added to none of them.
        min_size: parameters with fewer numbers are not split over "fsdp".

    Returns:
        A tree of PartitionSpec.

    Raises:
        ValueError: if an expression is not one or matches no parameter, or if a rule has another number of axes than
            its parameter, names an axis that the mesh lacks, or does not divide.
    """
    paths = [(path_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    _check_rules(rules, paths)
    specs = [_spec(path, leaf.shape, mesh, rules, min_size) for path, leaf in paths]
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def path_of(path: tuple) -> str:
    """Return the path of a leaf as "params/block_0/kernel"."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def specs_like(tree: Any, params: Any, specs: Any) -> Any:
    """Return specs for a tree that holds trees of the structure of the parameters, such as an optimizer's state.

    A leaf is split like the parameter whose path ends its own and whose shape it has; others are whole everywhere.

    Args:
        tree: of arrays or shapes.
        params: the parameters, or their shapes.
        specs: of the parameters, from `parameter_specs`.
    """
    known = {
        path: (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True
        )
    }

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        for start in range(len(path)):
            shape, found = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return found
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def named_shardings(mesh: Mesh, specs: Any) -> Any:
    """Return the shardings of a tree of specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def is_sharded(specs: Any, mesh: Mesh) -> bool:
    """Return whether any parameter is split over "fsdp", so that it has to be gathered."""
    return mesh.shape.get("fsdp", 1) > 1 and any(
        "fsdp" in _axes(entry) for spec in jax.tree.leaves(specs, is_leaf=_is_spec) for entry in spec
    )


def make_gather(mesh: Mesh, specs: Any, dtypes: Any = None) -> Callable[[Any], Any]:
    """Make the function that gathers parameters along "fsdp", for use inside of a loss that is differentiated.

    Forward, each parameter is constrained to be whole along "fsdp", so that XLA gathers weights instead of splitting
    convolutions. Backward, its gradient is constrained to the parameter's own sharding, so that the sum over the
    devices is a reduce-scatter. Gathered weights stay until they are used there, in the dtype that they are gathered
    in: a `jax.checkpoint` around the loss that saves all but them would also save what the blocks of a network are to
    compute again, and XLA would merge both gathers.

    Args:
        mesh: of the parameters.
        specs: from `parameter_specs`.
        dtypes: a tree of dtypes that parameters are rounded to before they are gathered, see `used_dtypes`; None
            gathers them as they are.
    """
    sharded = named_shardings(mesh, specs)
    whole = named_shardings(mesh, jax.tree.map(_without_fsdp, specs, is_leaf=_is_spec))

    @jax.custom_vjp
    def gather(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, whole)

    gather.defvjp(
        lambda params: (gather(params), None),
        lambda _, gradients: (jax.lax.with_sharding_constraint(gradients, sharded),),
    )

    def gather_parameters(params: Any) -> Any:
        if dtypes is not None:
            params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, dtypes)
            params = jax.lax.with_sharding_constraint(params, sharded)
        return gather(params)

    return gather_parameters


def used_dtypes(function: Callable[[Any], Any], params: Any) -> Any:
    """Return the dtype in which `function` uses each parameter.

    Networks keep parameters in float32 and round most of them to their own dtype where they use them. A parameter all
    of whose uses begin with rounding to one narrower dtype can be rounded before it is gathered: the results are the
    same, and half as many bytes are sent.

    Args:
        function: params -> anything; it is traced, not run.
        params: a tree of arrays, or of shapes.

    Returns:
        A tree of dtypes.
    """
    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    found = [_uses(jaxpr, var) for var in jaxpr.invars]
    dtypes = [
        next(iter(uses)) if len(uses) == 1 and None not in uses else leaf.dtype
        for uses, leaf in zip(found, jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), dtypes)


def _uses(jaxpr: Any, var: Any) -> set[jnp.dtype | None]:
    """Return the dtypes that a variable is rounded to where it is used; None stands for any other use."""
    found: set[jnp.dtype | None] = {None} if any(out is var for out in jaxpr.outvars) else set()
    for eqn in jaxpr.eqns:
        for position, operand in enumerate(eqn.invars):
            if operand is var:
                found |= _uses_in(eqn, position)
    return found


def _uses_in(eqn: Any, position: int) -> set[jnp.dtype | None]:
    if eqn.primitive.name == "convert_element_type":
        dtype = jnp.dtype(eqn.params["new_dtype"])
        narrower = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < eqn.invars[0].aval.dtype.itemsize
        return {dtype if narrower else None}
    inner = [getattr(each, "jaxpr", each) for each in (eqn.params.get("jaxpr"), eqn.params.get("call_jaxpr"))]
    inner = next((each for each in inner if each is not None), None)
    # Calls take their operands in order. Loops and branches do not, or carry them from step to step.
    if inner is None or eqn.primitive.name in ("while", "cond", "scan") or len(inner.invars) != len(eqn.invars):
        return {None}
    return _uses(inner, inner.invars[position])


def _check_rules(rules: Sequence[Rule], paths: Sequence[tuple[str, Any]]) -> None:
    for pattern, spec in rules:
        try:
            expression = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"the sharding rule {pattern!r} is not a regular expression: {error}") from None
        if not any(expression.search(path) for path, _ in paths):
            examples = ", ".join(path for path, _ in paths[:3])
            raise ValueError(f"the sharding rule {pattern!r} matches no parameter; their paths are as {examples}")
        if isinstance(spec, str) or not isinstance(spec, Sequence):
            raise ValueError(f"the sharding rule {pattern!r} must have a mesh axis or None for each axis, got {spec!r}")


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule], min_size: int) -> PartitionSpec:
    for pattern, spec in rules:
        if re.search(pattern, path):
            _check_spec(pattern, spec, path, shape, mesh)
            return _shortest(tuple(entry) if isinstance(entry, list) else entry for entry in spec)
    entries: list[str | None] = [None] * len(shape)
    for pattern, spec in TENSOR_RULES:
        size = mesh.shape.get("tensor", 1)
        if size > 1 and re.search(pattern, path) and len(spec) <= len(shape):
            # Parameters of scanned blocks have the layers as their first axis.
            axis = tuple(spec).index("tensor") + len(shape) - len(spec)
            if shape[axis] % size == 0:
                entries[axis] = "tensor"
            break
    size = mesh.shape.get("fsdp", 1)
    free = [axis for axis, entry in enumerate(entries) if entry is None and shape[axis] % size == 0]
    if size > 1 and free and math.prod(shape) >= min_size:
        entries[max(free, key=lambda axis: shape[axis])] = "fsdp"
    return _shortest(entries)


def _check_spec(pattern: str, spec: Sequence, path: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    rule = f"the sharding rule {pattern!r}: {tuple(spec)}"
    if len(spec) != len(shape):
        raise ValueError(f"{rule} has {len(spec)} entries, and {path} has the shape {shape}")
    for length, entry in zip(shape, spec, strict=True):
        for axis in _axes(entry):
            if axis not in mesh.shape:
                raise ValueError(f"{rule} names {axis!r}, and the mesh has the axes {', '.join(mesh.axis_names)}")
        size = math.prod(mesh.shape[axis] for axis in _axes(entry))
        if length % size:
            raise ValueError(f"{rule} splits an axis of {path}, of shape {shape}, into {size} parts that are not equal")


def _axes(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    entries = (tuple(axis for axis in _axes(entry) if axis != "fsdp") for entry in spec)
    return _shortest(axes[0] if len(axes) == 1 else axes or None for axes in entries)


def _shortest(entries: Iterable[str | tuple[str, ...] | None]) -> PartitionSpec:
    """Return the spec without None at its end: jit takes specs that differ in them for different ones."""
    found = list(entries)
    while found and found[-1] is None:
        found.pop()
    return PartitionSpec(*found)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
