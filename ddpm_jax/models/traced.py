"""Networks that are traced once for many calls."""

import functools
from typing import Any

import flax.linen as nn
import jax


def apply_traced(network: nn.Module, params: Any, *args: Any, **inputs: Any) -> Any:
    """Return `network.apply(params, *args, **inputs)`, traced once for inputs of the same shapes.

    Tracing a deep network takes seconds, and a sampler calls one several times: for guidance with a condition and
    without, in a solver of second order at two times. JAX keeps the trace of an equal network, so programs with other
    samplers and options share it as well. Inside of a program the result is that of `apply`; outside of one it is
    compiled.

    Args:
        network: to call. One whose fields cannot be hashed is traced by every call.
        params: as `network.apply` takes them.
        *args: arrays, or None.
        **inputs: arrays, or None.
    """
    try:
        hash(network)
    except TypeError:
        return network.apply(params, *args, **inputs)
    return _apply(network, params, *args, **inputs)


@functools.partial(jax.jit, static_argnums=0)
def _apply(network: nn.Module, params: Any, *args: Any, **inputs: Any) -> Any:
    return network.apply(params, *args, **inputs)
