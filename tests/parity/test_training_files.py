"""PyTorch's own files of training runs, with what trainers store beside the weights, read as torch saved them."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import pathlib
import random

import numpy as np
import pytest
import torch

from ddpm_jax.interop import read_tensors


class Colour(enum.Enum):
    """An enumeration that the reader does not know."""

    RED = 1


@dataclasses.dataclass
class Config:
    """A class that the reader does not know."""

    width: int = 1
    parts: list = dataclasses.field(default_factory=list)


def training_state() -> dict:
    """Return what trainers store beside the weights; tensors of these types are left out."""
    kinds = {
        "complex": torch.zeros(2, dtype=torch.complex64),
        "sparse": torch.eye(2).to_sparse(),
        "float8": torch.zeros(3).to(torch.float8_e4m3fn),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    return {
        "numpy": [np.float64(0.3), np.int32(4), np.bool_(True), np.arange(5), np.array(["a"]), np.dtype("int8")],
        "args": argparse.Namespace(lr=1e-3, path=pathlib.Path("/x"), betas=(0.9, 0.99), device=torch.device("cpu")),
        "times": [datetime.datetime(2020, 1, 1), datetime.timedelta(1)],
        "sets": [{1, 2}, frozenset({"a"}), b"abc", bytearray(b"abc"), 1 + 2j, range(3), ...],
        "objects": [Colour.RED, Config(), functools.partial(torch.nn.functional.gelu, approximate="tanh"), layer],
        "classes": [torch.nn.Linear, torch.float16, torch.Size([1, 2]), torch.nn.functional.relu],
        "collections": [collections.defaultdict(list, {"a": [1]}), collections.Counter("ab"), collections.deque([1])],
        "keys": {(1, 2): 3, 0.5: 4, None: 5, True: 6, Colour.RED: 7},
        "random": [random.getstate(), np.random.get_state(), np.random.default_rng(0).bit_generator.state],
        "tensors": kinds,
        "optimizer": optimizer.state_dict(),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_training_files_read_as_torch_saved_them(tmp_path, protocol, zipped):
    base = torch.randn(4, 6)
    subclass = torch.randn(2, 2)
    subclass.note = "a tensor with an attribute"
    state = {
        "plain": base,
        "turned": base.t()[1:, ::2],
        "half": base.half(),
        "brain": base.bfloat16(),
        "whole": torch.arange(5),
        "parameter": torch.nn.Parameter(base[0].clone()),
        "attribute": subclass,
        "module.weight": torch.nn.Linear(3, 2).weight,
        "empty": torch.zeros(0, 3),
    }
    saved = {"state_dict": collections.OrderedDict(state), **training_state()}
    torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read_tensors(tmp_path / "x.pt")
    for name, tensor in state.items():
        array = found[f"state_dict.{name}"]
        np.testing.assert_array_equal(array.astype(np.float32), tensor.detach().float().numpy(), err_msg=name)
    moments = found["optimizer.state.0.exp_avg"]
    np.testing.assert_array_equal(moments, saved["optimizer"]["state"][0]["exp_avg"].numpy())
    assert not [name for name in found if name.startswith(("tensors.", "objects.", "numpy."))]
    assert {"tensors.complex", "tensors.sparse", "tensors.float8", "tensors.quantized", "args"} <= set(found.unread)
