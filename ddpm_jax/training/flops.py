"""The floating-point operations of a function: those of matrix products and convolutions, loops included."""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Return the floating-point operations of the matrix products and convolutions of a function.

    What a backward pass computes again is counted like anything else, so count a loss, and take three times its number
    for a training step: that is the usual definition of model FLOPs (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
        function: traced, not run.
        args: arrays, or their shapes.

    Returns:
        Two for each multiplication and addition; at the border of an image also those with zeros.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / outputs
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += times * _count(inner)
    return total
