"""Weight files of every kind are read without torch, and hostile ones are refused without running anything."""

import io
import json
import os
import pickle
import tarfile
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fuzz_reading import KINDS, refused
from safetensors.numpy import save_file

from ddpm_jax.interop import ReadError, read_tensors
from ddpm_jax.interop.clip import load_clip
from ddpm_jax.interop.table import IDENTITY, KERNEL, ConvertError, Entry, Layout, count, to_ours

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
    for other in ("../model-2.safetensors", index.name):
        index.write_text(json.dumps({"weight_map": {"d": other}}))
        with pytest.raises(ReadError, match="is not a weights file beside it"):
            read_tensors(index)


def test_shards_that_contradict_their_index_are_refused(tmp_path):
    one, two = np.ones(2, np.float32), np.zeros(1, np.float32)
    save_file({"a": one}, tmp_path / "1.safetensors")
    save_file({"a": one * 9, "b": two}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(ReadError, match=r"its shard 2\.safetensors holds a, which it says is in 1\.safetensors"):
        read_tensors(index)
    save_file({"b": two}, tmp_path / "2.safetensors")
    assert set(read_tensors(index)) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"b": "1.safetensors", "a": "2.safetensors"}}))
    with pytest.raises(ReadError, match=r"its shard 1\.safetensors holds a, which it says is in 2\.safetensors"):
        read_tensors(index)


def test_shards_of_pytorch(tmp_path):
    for name, scale in ((b"v", 1), (b"w", 2)):
        members = {"x/data.pkl": hand(b"}", item(name)), "x/data/0": (NUMBERS * scale).tobytes()}
        zipped(tmp_path / f"{name.decode()}.bin", members)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": {"v": "v.bin", "w": "w.bin"}}))
    found = read_tensors(index)
    assert set(found) == {"v", "w"}
    np.testing.assert_array_equal(found["v"], NUMBERS.reshape(2, 3))
    np.testing.assert_array_equal(found["w"], 2 * NUMBERS.reshape(2, 3))


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
    assert not ran.exists()
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
    "refers to itself": (hand(b"]q\x00h\x00a"), "are more than 100 deep in each other"),
    "doubles itself": (
        hand(b"]", b"".join(b"q%c0](h%ch%ce" % (k, k, k) for k in range(40))), "more than 20000000 characters together"
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


def item(name=b"w", kind=b"FloatStorage", numel=6, shape=(2, 3), strides=(3, 1), offset=0):
    """Opcodes that add a tensor to the dictionary on the stack."""
    number = lambda n: b"J" + int(n).to_bytes(4, "little", signed=True)
    many = lambda numbers: b"(" + b"".join(map(number, numbers)) + b"t"
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(numel)
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + number(offset) + many(shape) + many(strides)
    return text(name) + call + b"\x89NtRs"


def text(name):
    return b"X" + len(name).to_bytes(4, "little") + name


def tensor_pickle(**change):
    return hand(b"}", item(**change))


NUMBERS = np.arange(6, dtype="<f4")


def test_a_file_by_hand_is_read(tmp_path):
    """The file that the next test damages is valid."""
    path = zipped(tmp_path / "good.pt", {"x/data.pkl": tensor_pickle(), "x/data/0": NUMBERS.tobytes()})
    np.testing.assert_array_equal(read_tensors(path)["w"], NUMBERS.reshape(2, 3))


SPOILT = {
    "larger shape": ({"shape": (20, 3)}, NUMBERS.tobytes(), "needs 60 numbers of its storage, which has 6"),
    "huge strides": ({"strides": (2**30, 1)}, NUMBERS.tobytes(), "numbers of its storage, which has 6"),
    "negative offset": ({"offset": -1}, NUMBERS.tobytes(), "which cannot be"),
    "negative stride": ({"strides": (-3, 1)}, NUMBERS.tobytes(), "which cannot be"),
    "strides of 0": (
        {"shape": (30000, 30000), "strides": (0, 0)},
        NUMBERS.tobytes(),
        r"a tensor of shape \(30000, 30000\) has 900000000 numbers, more than its storage, which has 6",
    ),
    "a stride of 0": (
        {"shape": (2, 6), "strides": (0, 1)}, NUMBERS.tobytes(), "has 12 numbers, more than its storage, which has 6"
    ),
    "many axes": ({"shape": (1,) * 65, "strides": (1,) * 65}, NUMBERS.tobytes(), "has 65 axes, more than 64"),
    "fewer strides": ({"strides": (1,)}, NUMBERS.tobytes(), "which cannot be"),
    "fewer numbers": ({}, NUMBERS.tobytes()[:20], "the storage of w has 5 numbers, and 6 by its description"),
    "a type of its own": ({"kind": b"EvilStorage"}, NUMBERS.tobytes(), "names torch.EvilStorage"),
}  # fmt: skip


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


DOUBLED = b")" + b"".join(b"q%c0h%ch%c\x86" % (k, k, k) for k in range(60))  # a pair of pairs of pairs: 2^60 leaves
LONG = text(b"n" * 9000)
MANY = b"]" + item()[len(text(b"w")) : -1] + b"a" + b"".join(b"q%c0](h%ch%ce" % (k, k, k) for k in range(12))
COSTLY = {
    "a key of tuples of tuples": (hand(b"}", DOUBLED, b"K\x01s"), "it has a key of type tuple, which is neither"),
    "a deep key": (hand(b"}", b")", b"\x85" * 100_000, b"K\x01s"), "it has a key of type tuple"),
    "such a key in pairs": (
        hand(b"ccollections\nOrderedDict\n](", DOUBLED, b"K\x01\x86e\x85R"), "it has a key of type tuple"
    ),
    "a fraction for a key": (hand(b"}G", b"\x00" * 8, b"K\x01s"), "it has a key of type float"),
    "a long key": (hand(b"}", item(b"n" * 10_001)), "it has a name of 10001 characters, more than 10000"),
    "a number of many digits for a key": (hand(b"}\x8a\x40", b"\x7f" * 64, b"K\x01s"), "a number of 511 bits"),
    "a long joined name": (hand(b"}", LONG, b"}", item(b"m" * 9000), b"s"), "it has a name of 18001 characters"),
    "a long name for many": (hand(b"}", LONG, MANY, b"s"), "its names have more than 20000000 characters together"),
    "a long name of a function": (hand(b"cos\n", b"n" * 10_001, b"\n"), "it has a name of 10004 characters"),
    "copies of a large dictionary": (
        hand(b"ctorch\nSize\nq\x00](", b"N" * 10_000, b"e\x85q\x01", b"h\x00h\x01R0" * 2000),
        "it takes more than 1500000 steps",
    ),
    "the same name twice": (
        hand(b"}", item(b"a.b"), text(b"a"), b"}", item(b"b"), b"s"), "it has two tensors of the name a.b"
    ),
    "the same number twice": (hand(b"}", item(b"1"), b"K\x01", item()[len(text(b"w")) :]), "two tensors of the name 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_small_files_that_would_cost_much_are_refused_at_once(tmp_path, name):
    data, message = COSTLY[name]
    path = zipped(tmp_path / "costly.pt", {"x/data.pkl": data, "x/data/0": NUMBERS.tobytes()})
    begin = time.perf_counter()
    with pytest.raises(ReadError, match=message) as caught:
        read_tensors(path)
    assert time.perf_counter() - begin < 5 and str(caught.value).isprintable()


def test_storages_by_keys_of_tuples_are_refused(tmp_path):
    """The formats before the zip file have lists of storages, whose keys are looked up too."""
    stream = [pickle.dumps(n, 2) for n in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    (tmp_path / "stream.pt").write_bytes(b"".join(stream) + hand(b"](", DOUBLED, b"e"))
    with pytest.raises(ReadError, match="it has a key of type tuple"):
        read_tensors(tmp_path / "stream.pt")
    storages = pickle.dumps(1, 2) + hand(DOUBLED, text(b"cpu"), b"ctorch\nFloatStorage\n\x87")
    with tarfile.open(tmp_path / "tar.pt", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (("storages", storages + bytes(8)), ("tensors", b""), ("pickle", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ReadError, match="it has a key of type tuple"):
        read_tensors(tmp_path / "tar.pt")


def test_what_would_unpack_to_more_than_memory_is_refused(tmp_path):
    for name in ("data.pkl", "byteorder"):
        path = zipped(tmp_path / "bomb.pt", {"x/data.pkl": tensor_pickle()} if name == "byteorder" else {})
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"x/{name}", bytes(1 << 20))
        with pytest.raises(ReadError, match=f"its member x/{name} is compressed"):
            read_tensors(path)
    with zipfile.ZipFile(tmp_path / "large.pt", "w") as archive:
        archive.writestr("x/data.pkl", hand(b"}"))
        archive.infolist()[0].file_size = (1 << 26) + 1  # what the list of members says, not what is there
    with pytest.raises(ReadError, match=r"its member x/data\.pkl has 67108865 bytes, more than 67108864"):
        read_tensors(tmp_path / "large.pt")
    sparse = tarfile.TarInfo("storages")
    sparse.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "sparse.pt").write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ReadError, match="its member storages is not a file"):
        read_tensors(tmp_path / "sparse.pt")


def test_errors_without_words_are_named(tmp_path, monkeypatch):
    def full(path):
        raise MemoryError

    monkeypatch.setattr("ddpm_jax.storage.tensor_file.read_torch", full)
    with pytest.raises(ReadError, match=r"zip\.pt cannot be read: MemoryError$"):
        read_tensors(FILES / "zip.pt")


def test_names_reach_the_message_as_one_printable_line(tmp_path):
    name = b"sy\nst\x1b[31m\xe2\x80\xae\xc3\xa9"  # a line break, a colour, text from right to left, and a letter
    path = zipped(tmp_path / "evil.pt", {"x/data.pkl": hand(text(b"os"), text(name), b"\x93")})
    with pytest.raises(ReadError) as caught:
        read_tensors(path)
    assert r"it names os.sy\nst\x1b[31m\u202e" + "\u00e9, which" in str(caught.value)
    assert str(caught.value).isprintable()
    strange = name.decode()
    with pytest.raises(ConvertError) as caught:
        to_ours([Entry("a", ("a",), IDENTITY)], {strange: NUMBERS, "a": NUMBERS}, {"a": NUMBERS})
    assert str(caught.value).isprintable() and r"sy\nst\x1b[31m\u202e" in str(caught.value)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": strange}}))
    with pytest.raises(ReadError, match="does not exist") as caught:
        read_tensors(index)
    assert str(caught.value).isprintable()
    with pytest.raises(ReadError, match=r"n\.\.\. \(6100 characters more\)$"):
        raise ReadError("n" * 10_100)


def test_the_count_of_layers_is_bounded_by_that_of_tensors():
    names = [f"blocks.{n}.weight" for n in range(3)]
    assert count(names, "blocks.#") == 3 and count(names, "others.#") == 0
    assert count([*names, "blocks.x.weight", "blocks.\u00b2.weight"], "blocks.#.weight") == 3
    for number in (4, 2_000_000_000, "9" * 5000):
        with pytest.raises(
            ConvertError, match=f"tensor blocks.{number}.weight, of more layers than its 4 tensors"[:200]
        ):
            count([*names, f"blocks.{number}.weight"], "blocks.#")
    tensors = {
        "positional_embedding": np.zeros((4, 64), np.float32),
        "token_embedding.weight": np.zeros((8, 64), np.float32),
        "text_projection": np.zeros((64, 8), np.float32),
        "transformer.resblocks.2000000000.ln_1.weight": np.zeros(64, np.float32),
    }
    with pytest.raises(ConvertError, match=r"tensor transformer\.resblocks\.2000000000\.ln_1\.weight, of more layers"):
        load_clip(tensors)


@pytest.mark.parametrize(
    "layout",
    [
        KERNEL,
        Layout(lambda x: x.reshape(0, x.shape[-1] // x.shape[0]), lambda x: (x,)),
        Layout(lambda x: (_ for _ in x.shape) + 1, lambda x: (x,)),
        Layout(lambda x: x.item.shape, lambda x: (x,)),
    ],
    ids=["ValueError", "ZeroDivisionError", "TypeError", "AttributeError"],
)
def test_tensors_of_another_rank_are_of_another_shape(layout):
    tensors = {"a.weight": np.zeros((0, 3), np.float32)}
    with pytest.raises(
        ConvertError, match=r"it has, of another shape, a\.weight \[0, 3\] \(for a parameter of shape \[6\]"
    ):
        to_ours([Entry("a", ("a.weight",), layout)], tensors, {"a": NUMBERS})
