"""Networks of a few parameters, all of them random: layers that start at zero would hide what a test looks for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# XLA's compiler takes most of the time of these tests; what it makes runs once or twice.
fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def random_params(init, *args, seed=0):
    """Return parameters of the structure that init(key, *args) would return, drawn by numpy.

    Kernels have variance 1 / fan-in, gains of norms are around 1 and everything else is around 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise, name = rng.normal(size=leaf.shape), path[-1].key
        if name == "log_scale":
            value = np.ones(leaf.shape)
        elif name == "scale":
            value = 1 + 0.2 * noise
        elif name == "kernel":
            value = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            value = 0.5 * noise
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0), *args))


def normal(seed, *shape):
    """Return float32 standard normal noise, drawn by numpy."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_zeros(params, *path):
    """Return a copy of `params` in which the part at `path` is zero."""
    first, *rest = path
    part = with_zeros(params[first], *rest) if rest else jax.tree.map(jnp.zeros_like, params[first])
    return {**params, first: part}
