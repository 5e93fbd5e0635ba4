"""Shapes of a network's parameters, without any numbers."""

import functools
from typing import Any

import flax.linen as nn
import jax


def parameter_shapes(
    network: nn.Module, *inputs: jax.ShapeDtypeStruct, method: str | None = None, **options: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """Return what `network.init` makes of inputs of these shapes, with a `jax.ShapeDtypeStruct` for each parameter.

    Tracing a deep network takes seconds, so the results for the last networks are kept: a model that is loaded again
    is not traced again.

    Args:
        network: to initialise.
        *inputs: positional arguments of a call.
        method: that is called; None is `__call__`.
        **options: keyword arguments of a call.

    Returns:
        The collections that the network makes; "params" holds the parameters. It is not to be changed.
    """
    try:
        return _traced(network, inputs, method, tuple(sorted(options.items())))
    except TypeError:
        if _can_be_compared(network):
            raise
        return _traced.__wrapped__(network, inputs, method, tuple(options.items()))


@functools.lru_cache(maxsize=64)
def _traced(network: nn.Module, inputs: tuple, method: str | None, options: tuple) -> dict[str, Any]:
    init = lambda *args, **options: network.init(jax.random.key(0), *args, method=method, **options)  # noqa: E731
    return jax.eval_shape(init, *inputs, **dict(options))


def _can_be_compared(network: nn.Module) -> bool:
    """Return whether a network can be a key: fields of a caller's network may be lists."""
    try:
        hash(network)
    except TypeError:
        return False
    return True
