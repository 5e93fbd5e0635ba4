"""Descriptions: equal for what behaves alike, different for whatever changes it, and the same in every process."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.split import split_source
from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.data.transforms import CenterCrop, RandomCrop, Select, Tokenize
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.losses import min_snr, snr_power
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.unet import UNet
from ddpm_jax.training.describe import describe
from ddpm_jax.training.stage import Stage, Training
from ddpm_jax.training.tasks import DiffusionTask, Images, Labels, LowResolution

ROOT = Path(__file__).parents[1]


def double(x):
    return 2 * x


def power(x, exponent=2, *, sign=1):
    return sign * x**exponent


def scaled(factor, offset=0):
    return lambda x: factor * x + offset


class Slots:
    __slots__ = ("size",)

    def __init__(self, size):
        self.size = size

    def apply(self, record):
        return record


class Attributes:
    def __init__(self, size, names=("a",)):
        self.size, self.names = size, names


class Private:
    def __init__(self, factor):
        self._factor = factor


class Marked:
    def __init__(self, mark):
        self.mark, self.cache = mark, object()

    def fingerprint(self):
        return self.mark


@dataclasses.dataclass
class Hidden:
    size: int
    shown: bool = dataclasses.field(default=False, metadata={"describe": False})


def unet(**fields):
    return UNet(**({"channels": 8, "out_channels": 3, "channel_mult": (1,), "groups": 4} | fields))


def task(**fields):
    options = {
        "model": unet(),
        "diffusion": Diffusion("cosine", 100),
        "x0": Images(8),
        "conditions": (Labels(3, 0.1), LowResolution(4, 2)),
        "weighting": min_snr(5.0, "eps"),
    }
    return DiffusionTask(**(options | fields))


def images(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3), np.uint8)


# Functions that make an object; each one is unlike all the others.
OBJECTS = {
    "None": lambda: None,
    "True": lambda: True,
    "one": lambda: 1,
    "another number": lambda: 1.5,
    "a string": lambda: "1",
    "a tuple": lambda: (1, 2),
    "another order": lambda: [2, 1],
    "nested": lambda: {"a": {"b": [1, (2,)]}},
    "nested otherwise": lambda: {"a": {"b": [1, (3,)]}},
    "a set": lambda: {"x", "y", "z"},
    "bytes": lambda: b"abc",
    "other bytes": lambda: b"abd",
    "an array": lambda: np.arange(6.0),
    "an array with another number": lambda: np.array([0, 1, 2, 3, 4, 5.5]),
    "an array of another dtype": lambda: np.arange(6, dtype=np.int64),
    "an array of another shape": lambda: np.arange(6.0).reshape(2, 3),
    "an array of JAX": lambda: jnp.arange(6.0),
    "a function": lambda: double,
    "a function with defaults": lambda: power,
    "another function": lambda: scaled,
    "a closure": lambda: scaled(2.0),
    "a closure over another number": lambda: scaled(3.0),
    "a closure over another offset": lambda: scaled(2.0, 1),
    "a weighting": lambda: min_snr(5.0, "eps"),
    "a weighting with another number": lambda: min_snr(4.0, "eps"),
    "a weighting of another prediction": lambda: min_snr(5.0, "v"),
    "another weighting": lambda: snr_power(0.5, 4.0, "x0"),
    "a partial": lambda: functools.partial(power, exponent=3),
    "a partial with another keyword": lambda: functools.partial(power, exponent=4),
    "a partial with an argument": lambda: functools.partial(power, 3),
    "a jitted closure": lambda: jax.jit(scaled(2.0)),
    "a jitted closure over another number": lambda: jax.jit(scaled(3.0)),
    "a dtype": lambda: jnp.float32,
    "another dtype": lambda: jnp.bfloat16,
    "a class": lambda: Slots,
    "an activation": lambda: nn.gelu,
    "another activation": lambda: nn.silu,
    "slots": lambda: Slots(3),
    "other slots": lambda: Slots(4),
    "a method": lambda: Slots(3).apply,
    "a method of another object": lambda: Slots(4).apply,
    "attributes": lambda: Attributes(3),
    "other attributes": lambda: Attributes(3, ("b",)),
    "private attribute": lambda: Private(3),
    "other private attribute": lambda: Private(4),
    "module": lambda: Private(math),
    "a fingerprint": lambda: Marked("one"),
    "another fingerprint": lambda: Marked("two"),
    "a dataclass": lambda: Hidden(3),
    "a tokenizer": lambda: CompactTokenizer(("a", "b")),
    "another tokenizer": lambda: CompactTokenizer(("a", "c")),
    "a transform": lambda: Tokenize(CompactTokenizer(("a", "b")), 7),
    "a transform of another length": lambda: Tokenize(CompactTokenizer(("a", "b")), 8),
    "a selection": lambda: Select(("image",)),
    "a crop": lambda: CenterCrop(8),
    "another crop": lambda: CenterCrop(9),
    "a random crop": lambda: RandomCrop(8),
    "a source": lambda: ArraySource(images()),
    "a source of other images": lambda: ArraySource(images(1)),
    "a source with labels": lambda: ArraySource(images(), labels=[0, 1, 0, 1]),
    "half of a source": lambda: split_source(ArraySource(images()), 2)[0],
    "the other half": lambda: split_source(ArraySource(images()), 2)[1],
    "a network": lambda: unet(),
    "a network with more channels": lambda: unet(channels=16),
    "a network of another dtype": lambda: unet(dtype=jnp.bfloat16),
    "a task": lambda: task(),
    "a task with another network": lambda: task(model=unet(channels=16)),
    "a task with another process": lambda: task(diffusion=Diffusion("cosine", 101)),
    "a task with another rate": lambda: task(conditions=(Labels(3, 0.2), LowResolution(4, 2))),
    "a task with conditions in another order": lambda: task(conditions=(LowResolution(4, 2), Labels(3, 0.1))),
    "a task with another blur": lambda: task(conditions=(Labels(3, 0.1), LowResolution(4, 2, 0.7))),
    "a task with another weighting": lambda: task(weighting=None),
    "a task with other timesteps": lambda: task(timesteps="importance"),
    "a training": lambda: Training(batch_size=8, num_steps=10, learning_rate=1e-3),
}


@pytest.fixture(scope="module")
def described():
    return {name: describe(make()) for name, make in OBJECTS.items()}


def test_it_is_plain_data_and_the_same_for_an_object_that_is_made_again(described):
    for name, make in OBJECTS.items():
        assert describe(make()) == described[name], name
        text = json.dumps(described[name])
        assert " at 0x" not in text and "<" not in text.replace("<lambda>", "").replace("<locals>", ""), text


def test_no_two_of_them_are_alike(described):
    found = {}
    for name, value in described.items():
        # JSON writes 1, 1.0 and True in different ways.
        text = json.dumps(value, sort_keys=True)
        assert text not in found, f"{name} and {found.get(text)}: {text}"
        found[text] = name


def test_every_field_of_a_training_counts():
    base = Training(batch_size=8, num_steps=10, learning_rate=1e-3)
    for field in dataclasses.fields(Training):
        value = getattr(base, field.name)
        other = "x" if isinstance(value, str) else (value or 0) + 1
        changed = describe(dataclasses.replace(base, **{field.name: other}))
        before = describe(base)  # where a field that was added later is absent unless it is used
        assert {name for name, entry in changed.items() if name not in before or before[name] != entry} == {field.name}


def test_the_same_in_other_words():
    assert describe(np.float32) == describe(jnp.float32) == describe(np.dtype("float32")) == "float32"
    assert describe(np.float64(1.5)) == 1.5 and describe(np.int32(3)) == 3 and describe(np.bool_(True)) is True
    assert describe([1, 2]) == describe((1, 2))
    assert describe({"b": 1, "a": 2}) == describe({"a": 2, "b": 1})
    assert describe(frozenset("abc")) == describe({"c", "a", "b"})
    assert describe(np.asfortranarray(np.arange(6.0).reshape(2, 3))) == describe(np.arange(6.0).reshape(2, 3))


def test_what_does_not_count():
    """A field marked so, the state of a source with a fingerprint, and the place of a network in another one."""
    assert describe(Hidden(3, shown=True)) == describe(Hidden(3)) == {"class": "Hidden", "size": 3}
    assert describe(Marked("one")) == {"class": "Marked", "fingerprint": "one"}
    assert {"parent", "name"}.isdisjoint(describe(unet()))
    assert describe(unet(remat=True)) == describe(unet())  # the same numbers, computed again
    task = DiffusionTask(model=unet(), diffusion=Diffusion(), x0=Images(8))
    assert describe(dataclasses.replace(task, sampling=Sampling("ddim", 2))) == describe(task)  # of previews


def test_an_object_that_refers_to_itself_needs_a_fingerprint():
    looped = Attributes(3)
    looped.names = [looped]
    with pytest.raises(
        ValueError, match=r"an object of the class Attributes cannot be .* give it a method fingerprint\(\)"
    ):
        describe(looped)


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_describe import OBJECTS, describe
print(json.dumps({name: describe(make()) for name, make in OBJECTS.items()}))
"""


def test_it_is_the_same_in_every_process(described):
    """With other hashes of strings, on which the order of sets depends."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "tests")]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == described


def test_the_stages_of_the_shapes_recipe_are_the_same_when_they_are_made_again():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "configs" / "shapes.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config("smoke")
    one, two = (recipe.stages(config) for _ in range(2))
    assert all(isinstance(stage, Stage) for stage in one)
    assert json.dumps([describe(stage) for stage in one]) == json.dumps([describe(stage) for stage in two])
    config.decoder.weighting.power = 0.25
    changed = [describe(stage) for stage in recipe.stages(config)]
    assert [a != describe(b) for a, b in zip(changed, one, strict=True)] == [False, False, True, False]
