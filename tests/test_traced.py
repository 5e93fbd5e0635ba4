"""Networks that are traced once for many calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.models.traced import apply_traced

TRACES = []


class Scale(nn.Module):
    factors: tuple | list

    def __call__(self, x, t=None):
        TRACES.append(x.shape)
        return self.variables["params"]["w"] * x * np.asarray(self.factors).prod()


def test_equal_networks_are_traced_once_for_each_shape():
    TRACES.clear()
    x = jnp.arange(6.0)
    for w in (2.0, 3.0):  # two programs, each of which calls its network twice
        run = jax.jit(lambda params, x: [apply_traced(Scale((2, 5)), params, each, None) for each in (x, -x)])
        plus, minus = run({"params": {"w": w}}, x)
        np.testing.assert_array_equal(plus, 10 * w * np.arange(6))
        np.testing.assert_array_equal(minus, -10 * w * np.arange(6))
    assert TRACES == [(6,)]
    np.testing.assert_array_equal(apply_traced(Scale((3,)), {"params": {"w": 1.0}}, x), 3 * np.arange(6))
    assert TRACES == [(6,)] * 2  # with other fields it is another network
    apply_traced(Scale((3,)), {"params": {"w": 1.0}}, x[:2])
    assert TRACES == [(6,), (6,), (2,)]


def test_a_network_whose_fields_cannot_be_hashed_is_called_all_the_same():
    np.testing.assert_array_equal(apply_traced(Scale([2, 2]), {"params": {"w": 1.0}}, jnp.ones(2)), [4, 4])
