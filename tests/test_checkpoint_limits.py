"""Limits of docs/checkpoints.md on hostile and damaged files: each limit, each contradiction."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import INDEX, INDICES
from hostile_kinds import (
    GOOD,
    OLD,
    PICKLES,
    SAFETENSORS,
    ZIPS,
    W,
    archive,
    checkpoint,
    entries,
    entry,
    fill,
    member,
    safetensors,
    saved,
    tensor,
    text,
    whole,
)

from ddpm_jax.interop import ReadError, read_tensors, table
from ddpm_jax.storage import json_file, pickles, tar_file, tensor_file, torch_file, zip_file

DOCS = Path(__file__).parents[1] / "docs" / "checkpoints.md"
LIMITS = {
    "tensors of a file, or of all shards of an index": torch_file.TENSORS,
    "members of a zip file": zip_file.MEMBERS,
    "bytes of a zip file's list of members": zip_file.DIRECTORY,
    "bytes of a pickle (`data.pkl`)": torch_file.DESCRIPTION,
    "steps of a file's pickles; a tensor takes about 50": pickles.STEPS,
    "bytes of an integer in a pickle": pickles.INTEGER_BYTES,
    "characters of a name": pickles.NAME_LENGTH,
    "characters of all names together": torch_file.NAMES,
    "entries of all dictionaries and lists": torch_file.ENTRIES,
    "depth of dictionaries and lists in each other": torch_file.DEPTH,
    "axes of a tensor": torch_file.AXES,
    "bytes of JSON: a safetensors header, an index, a config": json_file.JSON_BYTES,
    "commas, opening brackets and strings of JSON": json_file.JSON_VALUES,
    "shards of an index": tensor_file.SHARDS,
    "members of a tar file": tar_file.MEMBERS,
    "layers of a transformer whose file says how many it has": table.LAYERS,
}


def test_the_documented_limits_are_those_of_the_code():
    rows = re.findall(r"^\| (.*?) \| ([\d,]+)( MiB)? \|$", DOCS.read_text(), re.MULTILINE)
    said = {what: int(number.replace(",", "")) << (20 if unit else 0) for what, number, unit in rows}
    assert {what: said.get(what) for what in LIMITS} == LIMITS


def nested(depth):
    return b"}" + (text(b"a") + b"}") * depth + text(b"w") + tensor() + b"s" + b"s" * depth


AT_LIMITS = {
    "names": lambda over: checkpoint(b"}" + text(b"n" * (10_000 + over)) + tensor() + b"s"),
    "names of safetensors": lambda over: safetensors({"n" * (10_000 + over): entry()}),
    "depth": lambda over: checkpoint(nested(99 + over)),
    "axes": lambda over: checkpoint(W + tensor((1,) * (63 + over) + (6,), (6,) * (63 + over) + (1,)) + b"s"),
    "axes of safetensors": lambda over: safetensors({"a": entry(shape=(1,) * (63 + over) + (6,))}),
    "integers": lambda over: checkpoint(GOOD + text(b"i") + whole(1 << 8 * (254 + over)) + b"s"),
}  # fmt: skip


@pytest.mark.parametrize("what", AT_LIMITS)
def test_a_limit_is_the_last_that_is_read(tmp_path, what):
    (tmp_path / "file").write_bytes(AT_LIMITS[what](0))
    assert read_tensors(tmp_path / "file")
    (tmp_path / "file").write_bytes(AT_LIMITS[what](1))
    with pytest.raises(ReadError, match="more than|at most"):
        read_tensors(tmp_path / "file")


BEYOND = {
    "members": (lambda: archive([member("x")], count=100_001, zip64=True), "it has 100001 members, more than 100000"),
    "the list of members": (
        lambda: archive([member(f"{i}", b"", {"extra": bytes(60_000)}) for i in range(280)]), "its list of members has"
    ),
    "tensors": (lambda: safetensors(entries(100_001), b""), "it has 100001 tensors, more than 100000"),
    "steps": (lambda: checkpoint(fill(b"N0", 3_000_000)), "it takes more than 1500000 steps"),
    "nested tuples": (lambda: checkpoint(b")" + b"\x85" * 3_900_000), "it takes more than 1500000 steps"),
    "a size of 64 megabits": (
        lambda: checkpoint(W + tensor(shape=(1 << (1 << 26), 3)) + b"s"), "an integer of 8388609 bytes, more than 255"
    ),
    "a million empty tensors": (
        lambda: safetensors(entries(260_000), b""), "its JSON has about 3120000 values and separators, more than"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BEYOND)
def test_what_is_beyond_a_limit_is_refused_by_it(tmp_path, what):
    make, message = BEYOND[what]
    (tmp_path / "file").write_bytes(make())
    with pytest.raises(ReadError, match=message):
        read_tensors(tmp_path / "file")


def test_beyond_the_limits_of_indices_and_tars(tmp_path):
    (tmp_path / INDEX).write_bytes(INDICES["index: shards without end"](60_000))
    with pytest.raises(ReadError, match="it names 2000 shards, more than 1000"):
        read_tensors(tmp_path / INDEX)
    (tmp_path / "file").write_bytes(OLD["tar: members without end"](40_000))
    with pytest.raises(ReadError, match="a tar file of more than 64 members"):
        read_tensors(tmp_path / "file")
    names = [f"transformer.resblocks.{i}.weight" for i in range(66)]
    assert table.count(names[:64], "transformer.resblocks.#") == 64
    with pytest.raises(table.ConvertError, match=r"has 66 layers called transformer\.resblocks\.#, more than 64"):
        table.count(names, "transformer.resblocks.#")


CONTRADICTIONS = {
    "a storage of more numbers": (PICKLES, "the storage of w has 6 numbers, and 7 by its description"),
    "a storage of fewer numbers": (PICKLES, "the storage of w has 6 numbers, and 5 by its description"),
    "tensors of one name": (PICKLES, r"two tensors of the name a\.b"),
    "a program named in text": (PICKLES, r"it names os\.system, which no tensor needs; nothing of it was run"),
    "a program from the stack": (PICKLES, r"it names builtins\.eval"),
    "another size in its own header": (ZIPS, "has 20 bytes by its own header and 24 by the list"),
    "another name in its own header": (ZIPS, "has another name in its own header"),
    "another checksum in its own header": (ZIPS, "by its own header"),
    "a member compressed in its own header": (ZIPS, "is compressed"),
    "a compressed member": (ZIPS, "is compressed"),
    "an encrypted member": (ZIPS, "is encrypted"),
    "overlapping members": (ZIPS, "overlaps what follows it"),
    "duplicate members": (ZIPS, "two of its members have the name 'x/data/0'"),
    "a member with a path to the outside": (ZIPS, "a path that leads out of the archive"),
    "a damaged description": (ZIPS, "is damaged"),
    "overlapping tensors": (SAFETENSORS, "b overlaps the numbers of the tensor before it"),
    "a gap between tensors": (SAFETENSORS, "b leaves a gap after those of the tensor before it"),
    "bytes after the last tensor": (SAFETENSORS, "it has 1000 bytes after the last tensor"),
    "offsets beyond the file": (SAFETENSORS, "a ends at byte 4398046511104 of the numbers, of which the file has 24"),
    "a tensor twice": (SAFETENSORS, "its JSON has the name 't' twice in one object"),
    "a shape twice": (SAFETENSORS, "its JSON has the name 'shape' twice in one object"),
    "stream: a storage of more numbers": (OLD, "its storage 0 has 7 numbers, and 6 by its description"),
    "stream: a storage described twice": (OLD, "its storage 0 is described in two ways"),
    "stream: a storage twice": (OLD, "its list of storages is not that of its tensors"),
    "tar: a member twice": (OLD, "its member storages is there twice"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, kind):
    kinds, message = CONTRADICTIONS[kind]
    data = kinds[kind](1000)
    (tmp_path / "file").write_bytes(checkpoint(data) if kinds is PICKLES else data)
    with pytest.raises(ReadError, match=message) as caught:
        read_tensors(tmp_path / "file")
    assert str(caught.value).isprintable()


def test_a_member_that_is_not_used_may_be_what_it_likes(tmp_path):
    """TorchScript's archives have their code compressed."""
    members = [member("x/data.pkl", saved(GOOD)), member("x/data/0", bytes(24))]
    (tmp_path / "file").write_bytes(archive([*members, member("x/code.py", b"x", {"method": 8}, method=8)]))
    assert set(read_tensors(tmp_path / "file")) == {"w"}


def test_over_200_kinds_of_hostile_files_cost_little():
    """Files of 60 MB by `python tests/hostile_files.py`; here of half a megabyte."""
    command = [sys.executable, str(Path(__file__).parent / "hostile_files.py"), "--size", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kinds, faults = re.search(r"^(\d+) kinds, (\d+) faults$", done.stdout, re.MULTILINE).groups()
    assert int(kinds) >= 200 and int(faults) == 0
