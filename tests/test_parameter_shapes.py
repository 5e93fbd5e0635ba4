"""Shapes of parameters are those of `init`, and are traced once for equal networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.models.shapes import parameter_shapes


class Counting(nn.Module):
    """Counts how often it is traced."""

    width: int
    seen: tuple | list = ()
    calls = []

    @nn.compact
    def __call__(self, x, *, scale=None):
        self.calls.append(self.width)
        x = nn.Dense(self.width, name="dense")(x)
        return x if scale is None else x * self.param("scale", nn.initializers.ones, scale.shape)[None]

    @nn.compact
    def halved(self, x):
        return nn.Dense(self.width // 2, name="half")(x)


@pytest.fixture(autouse=True)
def calls():
    Counting.calls.clear()
    return Counting.calls


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def test_they_are_those_of_init_and_traced_once_for_each_network_and_input(calls):
    made = Counting(6).init(jax.random.key(0), jnp.zeros((1, 3)))
    calls.clear()
    for _ in range(2):
        assert shapes(parameter_shapes(Counting(6), spec(1, 3))) == shapes(made)
    assert calls == [6]
    assert parameter_shapes(Counting(6), spec(1, 4))["params"]["dense"]["kernel"].shape == (4, 6)
    assert parameter_shapes(Counting(4), spec(1, 4))["params"]["dense"]["kernel"].shape == (4, 4)
    assert parameter_shapes(Counting(4), spec(1, 4), scale=spec(4))["params"]["scale"].shape == (4,)
    assert shapes(parameter_shapes(Counting(4), spec(1, 4), method="halved")["params"]) == {
        "half": {"kernel": (4, 2), "bias": (2,)}
    }
    assert calls == [6, 6, 4, 4]


def test_a_network_with_a_list_is_traced_each_time(calls):
    for _ in range(2):
        assert parameter_shapes(Counting(2, [1]), spec(1, 3))["params"]["dense"]["bias"].shape == (2,)
    assert calls == [2, 2]


def test_an_error_of_the_network_is_its_own():
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        parameter_shapes(Counting(2), spec(1, 3), other=spec(1))
