"""Seconds and peak memory of reading a checkpoint of a billion parameters, float32.

    pip install torch
    python tests/parity/reading_speed.py [--parameters 1e9] [--dir DIR]

Writes one as safetensors and one as PyTorch's zip into DIR (8 GB), then reads each in a process of its own: once for
the names and views alone, and once into float32 arrays of our layout, as a conversion does.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTH = 4096


def write(directory: Path, parameters: float) -> list[Path]:
    """Write both files."""
    import torch
    from safetensors.torch import save_file

    layers = max(1, round(parameters / WIDTH**2))
    tensors = {f"layers.{i}.weight": torch.full((WIDTH, WIDTH), float(i)) for i in range(layers)}
    save_file(tensors, directory / "model.safetensors")
    torch.save(tensors, directory / "model.pt")
    return [directory / "model.safetensors", directory / "model.pt"]


def measure(path: str, convert: bool) -> None:
    """Read one file and print what it took."""
    import numpy as np

    from ddpm_jax.interop import read_tensors
    from ddpm_jax.interop.table import TURNED, Entry, to_ours

    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    tensors = read_tensors(path)
    kept = tensors
    if convert:
        table = [Entry(name, (name,), TURNED) for name in tensors]
        kept = to_ours(table, tensors, {name: np.broadcast_to(np.float32(0), (WIDTH, WIDTH)) for name in tensors})
    seconds = time.perf_counter() - begin
    assert all(array[3, 5] == int(name.split(".")[1]) for name, array in kept.items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "peak": peak / 2**20, "size": Path(path).stat().st_size / 2**30}))


def main() -> None:
    """Write, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--convert", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.convert)
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        print("| file | GiB | read | seconds | peak memory, GiB | over the file's size |")
        print("| --- | --- | --- | --- | --- | --- |")
        for path in write(Path(directory), options.parameters):
            for convert in (False, True):
                command = [sys.executable, __file__, "--measure", str(path), *(["--convert"] if convert else [])]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                what = "into our layout" if convert else "names and views"
                ratio = found["peak"] / found["size"]
                numbers = f"{found['seconds']:.2f} | {found['peak']:.2f} | {ratio:.2f}"
                print(f"| {path.suffix} | {found['size']:.2f} | {what} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
