"""Read mutated weight files of every kind: `python tests/fuzz_reading.py [--count 2000] [--seed 0]`.

Bytes are changed, cut out or doubled, bits flipped, ends cut off. Each file must be read or refused in one sentence
(`ReadError`); any other exception ends the program, and so does an attempt to start a program, to open a connection, or
to let Python's own pickle look up a name.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from ddpm_jax.interop import ReadError, read_tensors

FILES = Path(__file__).parent / "data" / "torch"
KINDS = ("zip.pt", "stream.pt", "tar.pt", "script.pt", "safetensors")
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")


def good(kind: str, directory: Path) -> bytes:
    """Return an intact file of a kind; directory: for what has to be written first."""
    if kind != "safetensors":
        return (FILES / kind).read_bytes()
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3)}, directory / kind)
    return (directory / kind).read_bytes()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a file with one to eight changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, size = rng.randrange(len(data)), rng.randrange(1, 16)
        change = rng.randrange(4)
        if change == 0:
            data[place : place + size] = rng.randbytes(size)
        elif change == 1:
            del data[place : place + size]
        elif change == 2:
            data[place:place] = data[place : place + size]
        else:
            data[place] ^= 1 << rng.randrange(8)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def refused(kind: str, count: int, directory: Path, seed: int = 0) -> int:
    """Read this number of mutated files of a kind, and return the number that were refused."""
    intact, rng, number = good(kind, directory), random.Random(f"{kind} {seed}"), 0
    for _ in tqdm(range(count), desc=kind, unit="file", disable=count < 1000):
        (directory / "mutated").write_bytes(mutated(intact, rng))
        try:
            read_tensors(directory / "mutated")
        except ReadError as error:
            assert str(error).isprintable()
            number += 1
    return number


def main() -> None:
    """Read, and print how many were refused."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def watch(event: str, arguments: tuple) -> None:
        if event in FORBIDDEN:
            raise SystemExit(f"reading a file led to {event} {arguments}")

    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory() as directory:
        numbers = {kind: refused(kind, options.count, Path(directory), options.seed) for kind in KINDS}
    print("| kind | mutated files | refused | read all the same |\n| --- | --- | --- | --- |")
    for kind, number in numbers.items():
        print(f"| {kind} | {options.count} | {number} | {options.count - number} |")
    print(f"{len(KINDS) * options.count} files: each was read or refused in one sentence, and nothing was run")


if __name__ == "__main__":
    main()
