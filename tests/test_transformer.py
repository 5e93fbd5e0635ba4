"""The transformer: how its blocks run changes what is stored and compiled, not what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal, random_params

from ddpm_jax.models.transformer import Transformer, stack_blocks


@pytest.mark.parametrize("options", [{"scan": True}, {"remat": "products"}, {"remat": True, "scan": True}], ids=str)
def test_how_blocks_run_changes_no_gradient(options):
    plain, other = (Transformer(3, 2, **each) for each in ({}, options))
    x = normal(1, 2, 5, 8)
    params = {"params": random_params(plain.init, x)["params"]}
    own = {"params": stack_blocks(params["params"])} if "scan" in options else params
    tree = lambda params: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert tree(own) == tree(jax.eval_shape(other.init, jax.random.key(0), x))

    def gradients(network, params):
        return fast_jit(jax.grad(lambda params, x: jnp.sum(network.apply(params, x) ** 2), argnums=(0, 1)))(params, x)

    (expected, dx), (found, own_dx) = gradients(plain, params), gradients(other, own)
    expected = {"params": stack_blocks(expected["params"])} if "scan" in options else expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (found, own_dx), (expected, dx))


@pytest.mark.parametrize(("remat", "count"), [(False, 0), (True, 5), ("products", 2)])
def test_what_remat_computes_again(remat, count):
    """A block has 4 products with weights and 2 of attention; nothing needs the output of the last again."""
    block = Transformer(1, 2, remat=remat)
    x = normal(1, 2, 5, 8)
    params = jax.eval_shape(block.init, jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(block.apply(params, x))))(params)
    assert str(jaxpr).count("dot_general") == 3 * (4 + 2) + count
