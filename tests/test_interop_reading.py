"""Weight files of every kind are read without torch, and hostile ones are refused without running anything."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fuzz_reading import KINDS, refused
from safetensors.numpy import save_file

from ddpm_jax.interop import ReadError, read_tensors

FILES = Path(__file__).parent / "data" / "torch"
EXPECTED = np.load(FILES / "expected.npz")
SAVED = [name for name in EXPECTED.files if name.startswith("state_dict.")]


@pytest.mark.parametrize("name", ["zip.pt", "stream.pt"])
def test_checkpoints_of_both_formats(name):
    found = read_tensors(FILES / name)
    assert set(found) == {*SAVED, "groups.0.momentum"}
    for key in SAVED:
        np.testing.assert_array_equal(found[key].astype(np.float32), EXPECTED[key], err_msg=key)
    types = {key.removeprefix("state_dict."): found[key].dtype for key in SAVED}
    assert types["half"] == np.float16 and types["brain"] == ml_dtypes.bfloat16 and types["flags"] == np.dtype("bool")
    assert types["whole"] == np.int64 and types["plain"] == np.float32
    assert not found["state_dict.plain"].flags.writeable


def test_the_tar_of_the_first_torch():
    found = read_tensors(FILES / "tar.pt")
    assert set(found) == {"plain", "turned", "part", "parameter"}
    for key, array in found.items():
        np.testing.assert_array_equal(array, EXPECTED[f"state_dict.{key}"])


@pytest.mark.parametrize("name", ["script.pt", "state_dict.pt"])
def test_a_torchscript_archive_gives_the_names_of_its_state_dict(name):
    found = read_tensors(FILES / name)
    assert set(found) == {"inner.weight", "inner.bias", "steps"}
    for key, array in found.items():
        np.testing.assert_array_equal(array, EXPECTED[key])


def test_safetensors_whole_and_in_shards(tmp_path):
    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5, -2], ml_dtypes.bfloat16),
        "c": np.arange(3),
    }
    for shard, names in (("model-1.safetensors", ["a.weight"]), ("model-2.safetensors", ["b", "c"])):
        save_file({name: arrays[name] for name in names}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a.weight": "model-1.safetensors", **dict.fromkeys("bc", "model-2.safetensors")}})
    )
    found = read_tensors(index)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    index.write_text(json.dumps({"weight_map": {"d": "model-2.safetensors"}}))
    with pytest.raises(ReadError, match="shards do not hold what it says: b, and 2 more"):
        read_tensors(index)
    index.write_text(json.dumps({"weight_map": {"d": "../model-2.safetensors"}}))
    with pytest.raises(ReadError, match="is not a file beside it"):
        read_tensors(index)


class Command:
    """Would make a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_a_command_is_refused_by_name(tmp_path, protocol):
    ran = tmp_path / "ran"
    data = pickle.dumps({"weight": Command(ran)}, protocol=protocol)
    path = zipped(tmp_path / "evil.pt", {"evil/data.pkl": data, "evil/version": "3"})
    with pytest.raises(ReadError, match=r"it names (posix|nt)\.system, which no tensor needs; nothing of it was run"):
        read_tensors(path)
    assert pickle.loads(data) == {"weight": 0} and ran.exists()  # and it would have run


def hand(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


ODD = {
    "calls a method of a builtin": (hand(b"cbuiltins\ngetattr\n", b"(", b"tR"), "it names builtins.getattr"),
    "sets attributes of a function": (
        hand(b"ctorch._utils\n_rebuild_tensor_v2\n", b"}", b"X\x01\x00\x00\x00aK\x01sb"),
        "no dict to add to",
    ),
    "calls what it built": (hand(b"}", b")R"), "calls something that is not one of torch's"),
    "makes an object of a number": (hand(b"K\x01", b")\x81"), "makes an object that is not a tensor"),
    "asks the extension registry": (hand(b"\x82\x01"), "EXT1"),
    "is a whole module": (hand(b"ctorch.nn.modules.linear\nLinear\n", b")\x81"), "torch.nn.modules.linear.Linear"),
    "refers to itself": (hand(b"]q\x00h\x00a"), "more than 1000000 entries|RecursionError|recursion"),
    "doubles itself": (
        hand(b"]", b"".join(b"q%c0](h%ch%ce" % (k, k, k) for k in range(40))), "more than 1000000 entries"
    ),
    "ends early": (hand(b"(K\x01")[:-1], "broken"),
    "remembers nothing": (hand(b"q\x00"), "nothing to remember"),
    "has a tensor of nothing": (
        hand(b"ctorch._utils\n_rebuild_tensor_v2\n", b"(K\x00K\x00))\x89NtR"), "a tensor has no storage"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_pickles_are_refused_in_one_sentence(tmp_path, name):
    data, message = ODD[name]
    with pytest.raises(ReadError, match=message) as caught:
        read_tensors(zipped(tmp_path / "odd.pt", {"odd/data.pkl": data}))
    assert "\n" not in str(caught.value)


def tensor_pickle(kind=b"FloatStorage", numel=6, shape=(2, 3), strides=(3, 1), offset=0):
    number = lambda n: b"J" + int(n).to_bytes(4, "little", signed=True)
    many = lambda numbers: b"(" + b"".join(map(number, numbers)) + b"t"
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(numel)
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + number(offset) + many(shape) + many(strides)
    return hand(b"}X\x01\x00\x00\x00w", call, b"\x89NtRs")


NUMBERS = np.arange(6, dtype="<f4")


def test_a_file_by_hand_is_read(tmp_path):
    """What the next test spoils is right as it stands."""
    path = zipped(tmp_path / "good.pt", {"x/data.pkl": tensor_pickle(), "x/data/0": NUMBERS.tobytes()})
    np.testing.assert_array_equal(read_tensors(path)["w"], NUMBERS.reshape(2, 3))


SPOILT = {
    "larger shape": ({"shape": (20, 3)}, NUMBERS.tobytes(), "needs 60 numbers of its storage, which has 6"),
    "huge strides": ({"strides": (2**30, 1)}, NUMBERS.tobytes(), "numbers of its storage, which has 6"),
    "negative offset": ({"offset": -1}, NUMBERS.tobytes(), "which cannot be"),
    "negative stride": ({"strides": (-3, 1)}, NUMBERS.tobytes(), "which cannot be"),
    "fewer strides": ({"strides": (1,)}, NUMBERS.tobytes(), "which cannot be"),
    "fewer numbers": ({}, NUMBERS.tobytes()[:20], "needs 6 numbers of its storage, which has 5"),
    "a type of its own": ({"kind": b"EvilStorage"}, NUMBERS.tobytes(), "names torch.EvilStorage"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_tensors_that_leave_their_storage_are_refused(tmp_path, name):
    change, data, message = SPOILT[name]
    path = zipped(tmp_path / "bad.pt", {"x/data.pkl": tensor_pickle(**change), "x/data/0": data})
    with pytest.raises(ReadError, match=message):
        read_tensors(path)


def test_archives_with_odd_members_are_refused(tmp_path):
    good = {"x/data.pkl": tensor_pickle(), "x/data/0": NUMBERS.tobytes()}
    for name in ("../../out", "/etc/out", "x/../../out", "x\\..\\out"):
        path = zipped(tmp_path / "bad.pt", good | {name: b"out"})
        with pytest.raises(ReadError, match="a path that leads out of the archive"):
            read_tensors(path)
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in good.items():
            archive.writestr(name, data)
    with pytest.raises(ReadError, match="is compressed"):
        read_tensors(tmp_path / "small.pt")
    with pytest.raises(ReadError, match="lacks the numbers of a tensor"):
        read_tensors(zipped(tmp_path / "bad.pt", {"x/data.pkl": tensor_pickle()}))
    with pytest.raises(ReadError, match="not one of PyTorch"):
        read_tensors(zipped(tmp_path / "bad.pt", {"x/other": b""}))
    with pytest.raises(ReadError, match="big-endian"):
        read_tensors(zipped(tmp_path / "bad.pt", good | {"x/byteorder": b"big"}))


def test_other_files_are_refused(tmp_path):
    for data, message in (
        (b"", "is empty"),
        (b"hello, world", "neither safetensors nor"),
        (pickle.dumps({"a": 1}), "a pickle, but not one of PyTorch"),
        ((10**12).to_bytes(8, "little") + b"{}", "neither safetensors nor"),
        ((2).to_bytes(8, "little") + b"{]", "cannot be read"),
    ):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ReadError, match=message):
            read_tensors(tmp_path / "file")
    with pytest.raises(ReadError, match="does not exist"):
        read_tensors(tmp_path / "none.pt")
    with pytest.raises(ReadError, match="is a directory"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(tmp_path, kind):
    """300 of each kind; `python tests/fuzz_reading.py` reads more."""
    assert refused(kind, 300, tmp_path) > 30
