"""Checkpoints as trainers leave them: prefixes, averages, objects beside the weights, and variants side by side."""

import argparse
import collections
import datetime
import enum
import fractions
import functools
import io
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import types
import uuid
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddpm_jax.interop import ReadError, guided, read_tensors
from ddpm_jax.interop.clip import _with_prefix
from ddpm_jax.interop.families import FAMILIES, Options
from ddpm_jax.interop.guided import export_guided, load_guided
from ddpm_jax.interop.latent_diffusion import AUTOENCODER, UNET, state_dict
from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import IDENTITY, ConvertError, Entry, to_ours
from ddpm_jax.models.unet import UNet
from ddpm_jax.storage.tensors import Tensors
from ddpm_jax.storage.weight_files import only_weights, weights_of_part

ONE = np.arange(4, dtype=np.float32)


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Write nested dictionaries as torch.save does, with arrays for tensors, without torch."""
    module, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    module.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    exec("def _rebuild_tensor_v2(*parts): raise RuntimeError", utils.__dict__)
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    module._utils = utils
    storage = type("Storage", (), {"__init__": lambda self, key, array: vars(self).update(key=key, size=array.size)})

    def write(saved, name="x.pt", protocol=2):
        arrays = []

        class Pickler(pickle._Pickler):
            def persistent_id(self, value):
                named = isinstance(value, storage)
                return ("storage", module.FloatStorage, value.key, "cpu", value.size) if named else None

        class Tensor:
            def __init__(self, array):
                self.array = np.array(array, np.float32, order="C")

            def __reduce__(self):
                arrays.append(self.array)
                shape, steps = self.array.shape, tuple(step // 4 for step in self.array.strides)
                parts = (storage(str(len(arrays) - 1), self.array), 0, tuple(map(int, shape)), steps, False)
                return utils._rebuild_tensor_v2, (*parts, collections.OrderedDict())

        def wrap(value):
            if type(value) is dict:
                return {key: wrap(entry) for key, entry in value.items()}
            return Tensor(value) if type(value) is np.ndarray and value.dtype == np.float32 else value

        buffer = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", module)
            patch.setitem(sys.modules, "torch._utils", utils)
            Pickler(buffer, protocol).dump(wrap(saved))
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("x/data.pkl", buffer.getvalue())
            for number, array in enumerate(arrays):
                archive.writestr(f"x/data/{number}", array.tobytes())
        return tmp_path / name

    return write


class Colour(enum.Enum):
    """An enumeration that the reader does not know."""

    RED = 1


class Config(dict):
    """A dictionary of a class that the reader does not know."""


Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024
EXTRAS = {
    "numpy scalars": [np.float64(0.3), np.int32(4), np.bool_(True)],
    "numpy arrays": [np.arange(5), np.array(["a", "b"]), np.dtype("int8")],
    "a namespace": argparse.Namespace(lr=1e-3, path=pathlib.PurePosixPath("/x"), betas=[0.9, 0.99]),
    "results of os and subprocess": [
        *(os.stat("."), os.terminal_size((80, 24)), os.times(), subprocess.CompletedProcess(["a"], 0, "b")),
        *(socket.AF_INET, shutil.Error("a")),
    ],
    "paths and dates": [pathlib.PurePosixPath("x"), datetime.date(2020, 1, 1), datetime.timedelta(1)],
    "sets": [{1, 2}, frozenset({"a"}), set()],
    "bytes": [b"abc", bytearray(b"abc"), b""],
    "an enumeration": {"kind": Colour.RED},
    "a partial": functools.partial(np.mean, axis=1),
    "a class and a function": [Config, np.mean, functools.partial],
    "a dictionary of its own class": Config(a=1, b=[2]),
    "collections": [collections.defaultdict(list, {"a": [1]}), collections.Counter("ab"), collections.deque([1])],
    "a named tuple": Pair(1, 2),
    "numbers": [1 + 2j, fractions.Fraction(1, 3), 1 << 100, -(1 << 70), float("nan"), uuid.UUID(int=5), range(3), ...],
    "odd keys": {(1, 2): 3, 0.5: 4, None: 5, True: 6, Colour.RED: 7, frozenset({1}): 8},
    "a generator's state": np.random.RandomState(0).get_state(),
    "long strings": ["x" * 50_000, "\U0001f600" * 20_000],
}


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_objects_beside_the_weights_are_left_out(save, protocol):
    saved = {"state_dict": {"a": ONE}, "extra": EXTRAS, "epoch": 3}
    found = read_tensors(save(saved, protocol=protocol))
    assert set(found) == {"state_dict.a"}
    np.testing.assert_array_equal(found["state_dict.a"], ONE)
    assert found.unread["extra.a namespace"] == "argparse.Namespace"
    assert found.unread["extra.an enumeration.kind"] in (
        f"{__name__}.Colour",
        "builtins.getattr",
        "__builtin__.getattr",
    )


@pytest.mark.parametrize("name", EXTRAS)
def test_each_of_them_alone(save, name):
    assert set(read_tensors(save({"w": ONE, "best": EXTRAS[name]}))) == {"w"}


def test_nothing_of_them_is_imported_or_called(save):
    """A module that does not exist cannot be imported."""
    file = save({"w": ONE, "x": argparse.Namespace(a=1)})
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["x/data.pkl"] = members["x/data.pkl"].replace(b"argparse\nNamespace", b"no_such_\nNamespace")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    found = read_tensors(file)
    assert found.unread == {"x": "no_such_.Namespace"} and "no_such_" not in sys.modules


class Module:
    """Pickled as torch.nn.Module is: an object with dictionaries of parameters and of modules."""

    def __init__(self, modules):
        self.training, self._parameters, self._buffers, self._modules = False, {"w": 1.0}, {}, modules


class Network(Module):
    """The outermost of the modules."""


@pytest.mark.parametrize("saved", [Network({"a": Module({})}), {"model": Network({"a": Module({})}), "epoch": 3}])
def test_a_whole_module_is_refused_with_what_to_save(save, saved):
    message = (
        rf"it holds a whole module, an object of {__name__}\.Network, .* torch\.save\(model\.state_dict\(\), path\)$"
    )
    with pytest.raises(ReadError, match=message):
        read_tensors(save(saved))


PROGRAMS = [os.system, os.execv, os.remove, subprocess.Popen, shutil.rmtree, pickle.loads, eval, open, socket.socket]


@pytest.mark.parametrize("function", PROGRAMS, ids=lambda function: function.__name__)
def test_functions_that_run_or_change_are_refused(save, function):
    with pytest.raises(ReadError, match=r"it names .*, which no tensor needs; nothing of it was run$"):
        read_tensors(save({"w": ONE, "x": function}))


def test_an_object_in_place_of_a_tensor_is_named(save):
    tensors = read_tensors(save({"state_dict": {"w": np.arange(3), "other": ONE}}))
    table = [Entry("w", ("w",), IDENTITY), Entry("other", ("other",), IDENTITY)]
    with pytest.raises(ConvertError, match=r"it has in place of a tensor w \(an object of numpy\..*_reconstruct\)"):
        to_ours(table, select(tensors, ["other"]), {"w": ONE, "other": ONE})
    with pytest.raises(ReadError, match=r"it names numpy\..*, which no tensor needs; nothing of it was run"):
        read_tensors(save({"w": np.arange(3)}))


def test_an_object_in_place_of_a_tensor_is_named_after_renaming():
    text = "embeddings.token_embedding.weight"
    found = _with_prefix(Tensors({text: ONE}, {"embeddings.position_embedding.weight": "numpy.ndarray"}))
    assert found.unread == {"text_model.embeddings.position_embedding.weight": "numpy.ndarray"}
    assert set(found) == {f"text_model.{text}"}


# ---- Prefixes and parts ----------------------------------------------------------------------------------------------

NET = {"time_embed.0.weight": ONE, "out.0.bias": ONE + 1}
MARKS = ("time_embed.0.weight",)


def under(prefix, tensors=NET):
    return {prefix + name: array for name, array in tensors.items()}


def shifted(by):
    return {name: array + by for name, array in NET.items()}


OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": ONE}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
WRAPPED = {
    "as it is": NET,
    "open_clip": {"epoch": 1, "name": "x", "state_dict": under("module."), "optimizer": OPTIMIZER},
    "Lightning": {"state_dict": under("model."), "optimizer_states": [OPTIMIZER], "global_step": 9},
    "torch.compile": under("_orig_mod."),
    "both": under("module._orig_mod."),
    "inside": {"time_embed._orig_mod.0.weight": ONE, "out._fsdp_wrapped_module.0.bias": ONE + 1},
    "model": {"model": NET, "step": 5},
    "averages beside": {"model": NET, "ema": shifted(1), "optimizer": OPTIMIZER},
    "timm": {"state_dict": NET, "state_dict_ema": under("module.", shifted(1))},
    "averages inside": NET | {"ema": shifted(1) | {"decay": ONE[:1]}},
    "lucidrains": {"model": NET, "ema": under("ema_model.", shifted(1)) | under("online_model.", shifted(2))},
    "averages alone": {"ema_state_dict": NET},
    "swa": {"model": NET, "swa_model": shifted(3), "g_ema": shifted(4), "model_ema_0.9999": shifted(4)},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_a_networks_tensors_are_found(save, name):
    found = select(read_tensors(save(WRAPPED[name])), MARKS)
    assert set(found) == set(NET)
    for key, array in NET.items():
        np.testing.assert_array_equal(found[key], array)


def test_parts_are_chosen_by_name(save):
    file = save(WRAPPED["averages beside"])
    np.testing.assert_array_equal(read_tensors(file, part="ema")["out.0.bias"], ONE + 2)
    raw = select(read_tensors(file), MARKS)
    assert raw.chosen == "those under model.; averages under ema are left out, --part takes them"
    np.testing.assert_array_equal(raw["out.0.bias"], ONE + 1)
    averages = select(read_tensors(save(WRAPPED["timm"], "timm.pt"), part="state_dict_ema"), MARKS)
    np.testing.assert_array_equal(averages["out.0.bias"], ONE + 2)
    assert averages.chosen == "those under state_dict_ema.module."
    nested = select(read_tensors(save(WRAPPED["lucidrains"], "nested.pt"), part="ema_model"), MARKS)
    np.testing.assert_array_equal(nested["out.0.bias"], ONE + 2)
    with pytest.raises(ReadError, match=r"part='emma' is not in it; it has ema, model, optimizer$"):
        read_tensors(file, part="emma")
    with pytest.raises(ReadError, match="part is empty"):
        read_tensors(file, part="")
    two = save({"a": {"net": NET}, "b": {"net": NET}}, "two.pt")
    with pytest.raises(ReadError, match=r"part='net' could be any of a\.net, b\.net$"):
        read_tensors(two, part="net")
    with pytest.raises(ConvertError, match=r"holds 2 networks that could be meant, under a\.net, b\.net; choose one"):
        select(read_tensors(two), MARKS)


PYTORCH_EMA = {"initted": ONE, "step": 3} | under("online_model.", shifted(2)) | under("ema_model.", shifted(1))


def test_a_part_of_averages_gives_averages(save):
    """ema_pytorch keeps a copy of the raw network beside them."""
    file = save({"model": NET, "ema": PYTORCH_EMA})
    for part in ("ema", "ema.ema_model", "ema_model"):
        np.testing.assert_array_equal(select(read_tensors(file, part=part), MARKS)["out.0.bias"], ONE + 2)
    np.testing.assert_array_equal(select(read_tensors(file, part="online_model"), MARKS)["out.0.bias"], ONE + 3)
    with pytest.raises(ConvertError, match=r"2 networks that could be meant, under ema\.ema_model, ema\.online_model;"):
        select(read_tensors(save({"ema": PYTORCH_EMA}, "alone.pt")), MARKS)


AVERAGES = ("model-ema", "modelEMA", "ModelEma", "EMAModel", "netema", "net_ema", "polyak", "teacher", "ema.0", "ema0")


@pytest.mark.parametrize("name", [*AVERAGES, "avg_model", "model_averaged", "G-EMA", "unetEma"])
def test_averages_have_many_names(name):
    tensors = Tensors(under("net.") | under(f"{name}.", shifted(1)))
    found = select(tensors, MARKS)
    np.testing.assert_array_equal(found["out.0.bias"], ONE + 1)
    assert found.chosen == f"those under net.; averages under {name} are left out, --part takes them"


@pytest.mark.parametrize("name", ["schema", "emanuel", "target", "cinema", "shadows"])
def test_other_names_are_no_averages(name):
    with pytest.raises(ConvertError, match="2 networks that could be meant"):
        select(Tensors(under("net.") | under(f"{name}.", shifted(1))), MARKS)


def test_averages_of_latent_diffusion_take_the_place_of_what_they_are_of(save):
    """LitEma keeps the averages of `model` as buffers whose names have lost their dots."""
    raw = under(UNET) | {f"{AUTOENCODER}decoder.conv_in.weight": ONE, "betas": ONE}
    averages = {f"model_ema.diffusion_model{name.replace('.', '')}": array + 5 for name, array in NET.items()}
    whole = raw | averages | {"model_ema.decay": ONE[:1], "model_ema.num_updates": ONE[:1]}
    file = save({"state_dict": whole, "epoch": 1})
    plain, averaged = state_dict(read_tensors(file)), state_dict(read_tensors(file, part="model_ema"))
    np.testing.assert_array_equal(plain[f"{UNET}out.0.bias"], ONE + 1)
    np.testing.assert_array_equal(averaged[f"{UNET}out.0.bias"], ONE + 6)
    np.testing.assert_array_equal(averaged[f"{AUTOENCODER}decoder.conv_in.weight"], ONE)
    assert set(averaged) == set(raw)
    file = save(whole | {"model_ema.diffusion_modelother": ONE})
    with pytest.raises(
        ReadError, match=r"its average model_ema\.diffusion_modelother belongs to no tensor of the file"
    ):
        read_tensors(file, part="model_ema")


def test_wrapped_and_bare_names_of_one_tensor_are_refused():
    with pytest.raises(ConvertError, match=r"it has the tensor a\.b both wrapped and as it is"):
        select(Tensors({"a.b": ONE, "a._orig_mod.b": ONE}), MARKS)


def test_a_training_checkpoint_loads_and_converts(save, monkeypatch):
    model, rng = UNet(32, 3, (1,), 1, (), head_channels=16), np.random.default_rng(0)
    shapes = guided.guided_shapes(model, 8)
    params = jax.tree.map(lambda shape: rng.normal(size=shape.shape).astype(np.float32), shapes)
    plain = export_guided(params, model, image_size=8)
    averages = {name: array * 2 for name, array in plain.items()}
    saved = {"state_dict": under("model.", plain), "ema": averages, "hparams": argparse.Namespace(lr=1.0)}
    file = save(saved)
    loaded = load_guided(read_tensors(file), model, image_size=8)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    monkeypatch.setitem(guided.PUBLISHED, "tiny", guided.Published(lambda: model, 8))
    for part, scale, chosen in (
        (None, 1, "those under state_dict.model.; averages under ema are left out, --part takes them"),
        ("ema", 2, "those under ema."),
    ):
        read = FAMILIES["guided"].read(file, Options(model="tiny", part=part))
        assert read.assumed["tensors"] == chosen
        same = lambda ours, theirs, scale=scale: np.testing.assert_array_equal(ours, scale * np.asarray(theirs))
        jax.tree.map(same, read.converted.params["model"], params)


# ---- Variants --------------------------------------------------------------------------------------------------------

D, M = "diffusion_pytorch_model", "model"
PARTS = [
    ([f"{D}.fp16.safetensors"], f"{D}.fp16.safetensors"),
    ([f"{D}.fp16.safetensors", f"{D}.safetensors"], f"{D}.safetensors"),
    ([f"{D}.fp16.safetensors", f"{D}.bin"], f"{D}.bin"),
    ([f"{M}.fp16.safetensors", "pytorch_model.fp16.bin"], f"{M}.fp16.safetensors"),
    (["pytorch_model.fp16.bin"], "pytorch_model.fp16.bin"),
    ([f"{D}.safetensors.index.fp16.json", f"{D}.fp16-00001-of-00002.safetensors"], f"{D}.safetensors.index.fp16.json"),
    ([f"{M}.fp16.safetensors.index.json", f"{M}.fp16-00001-of-00002.safetensors"], f"{M}.fp16.safetensors.index.json"),
    ([f"{D}.non_ema.safetensors"], f"{D}.non_ema.safetensors"),
    (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json"),
    ([f"{D}.fp16.safetensors", f"{D}.bf16.safetensors"], "only in the variants bf16, fp16; remove all but one"),
    (["other.safetensors"], "has no weights"),
    ([], "has no weights"),
]


@pytest.mark.parametrize(("files", "wanted"), PARTS)
def test_the_weights_of_a_part_are_chosen(tmp_path, files, wanted):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    if " " in wanted:
        with pytest.raises(ReadError, match=wanted):
            weights_of_part(tmp_path)
    else:
        assert weights_of_part(tmp_path).name == wanted


ALONE = [
    (["pytorch_model.fp16.bin", "model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
    (["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
    (["model.fp16.safetensors", "pytorch_model.fp16.bin"], "model.fp16.safetensors"),
    ([f"{M}.safetensors.index.fp16.json", f"{M}.fp16-00001-of-00002.safetensors"], f"{M}.safetensors.index.fp16.json"),
    (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model.safetensors.index.json"),
    (["v1-5.emaonly.safetensors"], "v1-5.emaonly.safetensors"),
    (["ViT-L-14.pt"], "ViT-L-14.pt"),
    (["a.pth", "config.json", "b.txt"], "a.pth"),
    (["model.fp16.safetensors", "model.bf16.safetensors"], "only in the variants bf16, fp16; give one of the files"),
    (["a.safetensors", "b.safetensors"], r"it holds a\.safetensors, b\.safetensors$"),
    (["config.json"], "it holds none$"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "wanted"), ALONE)
def test_the_only_weights_of_a_directory_are_chosen(tmp_path, files, wanted):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    if " " in wanted:
        with pytest.raises(ReadError, match=wanted):
            only_weights(tmp_path)
    else:
        assert only_weights(tmp_path).name == wanted


def test_shards_of_a_variant_are_read(tmp_path):
    where = {"a": f"{D}.fp16-00001-of-00002.safetensors", "b": f"{D}.fp16-00002-of-00002.safetensors"}
    for name, file in where.items():
        save_file({name: ONE.astype(np.float16)}, tmp_path / file)
    (tmp_path / f"{D}.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": where}))
    assert set(read_tensors(weights_of_part(tmp_path))) == {"a", "b"}
