"""Read hostile files of over 100 kinds, and print time and memory of each: `python tests/hostile_files.py [--size 60]`.

Each file is read in a process of its own. It must be refused in one printable line, or read, as its kind says, within
2 s of processor time and 200 MB beyond what the process had; otherwise the program ends with status 1.
"""

import argparse
import gzip
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hostile_kinds import (
    OLD,
    PICKLES,
    SAFETENSORS,
    ZIPS,
    A,
    checkpoint,
    entries,
    entry,
    safetensors,
)

from ddpm_jax.data.glide_tokenizer import GlideTokenizer
from ddpm_jax.errors import LoadError
from ddpm_jax.interop import ReadError, read_tensors
from ddpm_jax.interop.clip import load_clip
from ddpm_jax.interop.diffusers_layout import read_config
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.unet import UNet
from ddpm_jax.pipelines.description import read_pipeline
from ddpm_jax.storage.model_directory import FORMAT, open_model, read_description
from ddpm_jax.storage.networks import describe

SECONDS, MEGABYTES = 2.0, 200.0
REFUSED = (ReadError, ConvertError, LoadError, ValueError, FileNotFoundError)
Case = tuple[str, Callable[[Path, int], Callable[[], object]]]


def file_case(name: str, make: Callable[[int], bytes]) -> Case:
    """Return the case of one file for `read_tensors`."""

    def build(directory: Path, size: int) -> Callable[[], object]:
        (directory / "file").write_bytes(make(size))
        return lambda: read_tensors(directory / "file")

    return name, build


def json_case(name: str, make: Callable[[int], bytes], file: str, read: Callable[[Path], object]) -> Case:
    """Return the case of a JSON file, or another file, for another reader; read gets its directory."""

    def build(directory: Path, size: int) -> Callable[[], object]:
        (directory / file).write_bytes(make(size))
        (directory / "a.safetensors").write_bytes(safetensors({"a": entry()}))
        return lambda: read(directory)

    return name, build


def model_case(name: str, make: Callable[[int], bytes]) -> Case:
    """Return the case of the parameters in a model directory."""

    def build(directory: Path, size: int) -> Callable[[], object]:
        described = {"format": FORMAT, "version": "0.1.0", "family": "ddpm_jax", "metadata": {}}
        described |= {"networks": {"model": describe(UNet(8, 3))}, "shapes": {"model": {"a": [1]}}}
        (directory / "model.json").write_text(json.dumps(described))
        (directory / "model.safetensors").write_bytes(make(size))
        return lambda: open_model(directory)

    return name, build


def place_case(name: str, make: Callable[[Path], object], file: str = "file") -> Case:
    """Return the case of something that is no regular file."""

    def build(directory: Path, size: int) -> Callable[[], object]:
        make(directory / file)
        return lambda: read_tensors(directory / file)

    return name, build


def index(*pairs: tuple[str, str]) -> bytes:
    """Return an index of shards, with names repeated as they are given."""
    listed = ", ".join(f"{json.dumps(name)}: {json.dumps(shard)}" for name, shard in pairs)
    return f'{{"weight_map": {{{listed}}}}}'.encode()


INDEX = "m.safetensors.index.json"
INDICES = {
    "index: names without end": lambda n: index(*[(f"t{i}", "a.safetensors") for i in range(n // 25)]),
    "index: shards without end": lambda n: index(*[(f"t{i}", f"{i}.safetensors") for i in range(min(n // 30, 90_000))]),
    "index: a shard elsewhere": lambda n: index(("a", "../a.safetensors")),
    "index: a shard with an absolute path": lambda n: index(("a", "/etc/hostname")),
    "index: a shard with a zero byte": lambda n: index(("a", "a\0.safetensors")),
    "index: a shard that is an index": lambda n: index(("a", INDEX)),
    "index: a shard that is missing": lambda n: index(("a", "b.safetensors")),
    "index: a shard that is the directory": lambda n: index(("a", ".")),
    "index: a shard with a long name": lambda n: index(("a", "s" * 5000)),
    "index: a tensor twice": lambda n: index(("a", "a.safetensors"), ("a", "a.safetensors")),
    "index: a tensor that is missing": lambda n: index(("a", "a.safetensors"), ("b", "a.safetensors")),
    "index: no tensor": lambda n: index(),
    "index: lists in each other": lambda n: b"[" * n,
    "index: a number of the whole file": lambda n: b"9" * n,
    "index: a list": lambda n: b"[1]",
    "index: not UTF-8": lambda n: b'{"weight_map": {"\xff": "a.safetensors"}}',
    "read: index: one shard": lambda n: index(("a", "a.safetensors")),
}
JSON = {
    "objects without end": lambda n: b"[" + b"{}," * (n // 3) + b"{}]",
    "objects in each other": lambda n: b'{"a":' * (n // 5),
    "one string": lambda n: b'{"a": "' + b"a" * n + b'"}',
    "a name twice": lambda n: b'{"format": 1, "format": 2}',
}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("config.json", lambda directory: read_config(directory, "", ["a"], family="Karlo")),
    "model.json": ("model.json", read_description),
    "pipeline.json": ("pipeline.json", read_pipeline),
}


def layers(size: int) -> bytes:
    """Return a file of a CLIP whose tensors are one a layer, as many as a file may have."""
    names = "".join(
        f'"transformer.resblocks.{i}.x":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},' for i in range(90_000)
    )
    shapes = {"positional_embedding": (1, 64), "token_embedding.weight": (1, 64), "text_projection": (64, 1)}
    shapes |= {"visual.conv1.weight": (64, 1, 1, 1), "visual.positional_embedding": (1, 64)}
    rest = {
        name: entry(shape=shape, begin=256 * i, end=256 * i + 256) for i, (name, shape) in enumerate(shapes.items())
    }
    return safetensors(b"{" + names.encode() + json.dumps(rest)[1:].encode(), bytes(256 * 5))


def glide(make: Callable[[int], bytes]) -> Callable[[Path, int], Callable[[], object]]:
    """Return the case of GLIDE's vocabulary."""

    def build(directory: Path, size: int) -> Callable[[], object]:
        (directory / "encoder.json.gz").write_bytes(gzip.compress(make(size), 1))
        (directory / "vocab.bpe.gz").write_bytes(gzip.compress(b"#version\n"))
        return lambda: GlideTokenizer(directory)

    return build


def cases() -> list[Case]:
    """Return all kinds."""
    found = [file_case(f"pickle: {name}", lambda n, make=make: checkpoint(make(n))) for name, make in PICKLES.items()]
    found += [file_case(f"zip: {name}", make) for name, make in ZIPS.items()]
    found += [file_case(f"safetensors: {name}", make) for name, make in SAFETENSORS.items()]
    found += [file_case(name, make) for name, make in OLD.items()]
    found += [json_case(name, make, INDEX, lambda d: read_tensors(d / INDEX)) for name, make in INDICES.items()]
    for reader, (file, read) in READERS.items():
        found += [json_case(f"{reader}: {name}", make, file, read) for name, make in JSON.items()]
    weights = {
        "empty tensors without end": lambda n: safetensors(entries(n // 60), b""),
        "a config of the whole file": lambda n: safetensors({"__metadata__": {"format": "x", "config": "[" * n}}, b""),
        "a tensor twice": lambda n: safetensors(b'{"a":' + A + b',"a":' + A + b"}"),
    }
    found += [model_case(f"model directory: {name}", make) for name, make in weights.items()]
    found.append(json_case("clip: a layer for each tensor", layers, "w", lambda d: load_clip(read_tensors(d / "w"))))
    found += [
        ("GLIDE's vocabulary: zeros, packed", glide(lambda n: bytes(20 * n))),
        ("GLIDE's vocabulary: lists in each other", glide(lambda n: b"[" * n)),
        place_case("place: a pipe", os.mkfifo),
        place_case("place: a directory called x.pt", lambda path: path.mkdir(), "x.pt"),
        place_case("place: a link to itself", lambda path: path.symlink_to(path)),
        place_case("place: a link to a device", lambda path: path.symlink_to("/dev/zero")),
        place_case("place: a link to nothing", lambda path: path.symlink_to("nothing")),
        place_case("place: nothing", lambda path: None),
        place_case("place: an empty file", lambda path: path.write_bytes(b"")),
        place_case("place: one byte", lambda path: path.write_bytes(b"\x80")),
        place_case("place: a long name", lambda path: None, "n" * 300),
        place_case("place: a name with a zero byte", lambda path: None, "a\0b"),
        place_case("place: a file as a directory", lambda path: path.parent.write_bytes(b"x"), "sub/file"),
        place_case("place: an index that is a pipe", os.mkfifo, INDEX),
    ]
    return [
        ("read: " + name.replace("read: ", ""), build) if "read: " in name else (name, build) for name, build in found
    ]


def outcome(read: Callable[[], object]) -> dict[str, object]:
    """Read in a process of its own, and return {"seconds", "megabytes", "read", "message"}."""
    there, here = os.pipe()
    child = os.fork()
    if not child:
        os.close(there)
        before = _resident()
        start = time.process_time()
        try:
            read()
            found: dict[str, object] = {"read": True, "message": ""}
        except REFUSED as error:
            found = {"read": False, "message": str(error)}
        except BaseException as error:
            found = {"read": None, "message": f"{type(error).__name__}: {error}"}
        seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with os.fdopen(here, "w") as pipe:
            json.dump(found | {"seconds": seconds, "megabytes": max(0.0, peak - before)}, pipe)
        os._exit(0)
    os.close(here)
    with os.fdopen(there) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    ended = {"seconds": 0.0, "megabytes": 0.0, "read": None, "message": f"the process ended with status {status}"}
    return json.loads(said) if said else ended


def _resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS")


def fault(name: str, found: dict[str, object], full: bool) -> str | None:
    """Return what is wrong with an outcome; full: files are so large that those without end exceed every limit."""
    message = str(found["message"])
    if found["read"] is None or (found["read"] != ("read: " in name) and (full or not found["read"])):
        return f"was {'read' if found['read'] else 'not read: ' + message}"
    if not found["read"] and (not message or not message.isprintable()):
        return f"has no message of one printable line: {message!r}"
    if float(found["seconds"]) > SECONDS or float(found["megabytes"]) > MEGABYTES:
        return f"took {found['seconds']:.1f} s and {found['megabytes']:.0f} MB"
    return None


def main() -> None:
    """Read all kinds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=60.0, help="of the large files, in megabytes")
    parser.add_argument("--only", default="", help="kinds with this in their name")
    options = parser.parse_args()
    faults, number = [], 0
    print("| kind | MB | s | peak MB | outcome |\n| --- | ---: | ---: | ---: | --- |")
    for name, build in cases():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "case").mkdir()
            read = build(Path(directory) / "case", int(options.size * 1e6))
            files = [path for path in Path(directory).rglob("*") if path.is_file() and not path.is_symlink()]
            size = sum(path.stat().st_size for path in files) / 1e6
            found = outcome(read)
            wrong = fault(name, found, options.size >= 60)
        message = str(found["message"]).replace(directory + "/case/", "")[:150].replace("|", "/")
        print(
            f"| {name} | {size:.1f} | {found['seconds']:.2f} | {found['megabytes']:.0f} | {message or 'read'} |",
            flush=True,
        )
        number += 1
        faults += [f"{name} {wrong}"] if wrong else []
    print(f"{number} kinds, {len(faults)} faults")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
