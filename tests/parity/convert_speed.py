"""Seconds and peak memory of converting a checkpoint of a billion parameters, as safetensors and as PyTorch writes it.

    pip install torch
    python tests/parity/convert_speed.py [--layers 40] [--dir DIR]

Writes a CLIP in OpenAI's layout whose image tower has the width of ViT-g/14 (float32, 4 GB, twice), and runs
`python -m ddpm_jax.convert --from clip` on each in a process of its own; DIR needs 12 GB. Peak memory is that of the
whole process, with Python, JAX and what is mapped of the file.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, TEXT_WIDTH, PATCH, SIDE, CONTEXT, VOCABULARY, EMBED = 1408, 1024, 14, 16, 77, 49408, 1024


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of OpenAI's layout."""
    found = {
        "logit_scale": (), "positional_embedding": (CONTEXT, TEXT_WIDTH), "text_projection": (TEXT_WIDTH, EMBED),
        "token_embedding.weight": (VOCABULARY, TEXT_WIDTH), "ln_final.weight": (TEXT_WIDTH,),
        "ln_final.bias": (TEXT_WIDTH,), "visual.class_embedding": (WIDTH,), "visual.proj": (WIDTH, EMBED),
        "visual.positional_embedding": (SIDE**2 + 1, WIDTH), "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }  # fmt: skip
    for name in ("ln_pre", "ln_post"):
        found |= {f"visual.{name}.weight": (WIDTH,), f"visual.{name}.bias": (WIDTH,)}
    towers = {"transformer": (TEXT_WIDTH, 2), "visual.transformer": (WIDTH, layers)}
    for tower, (width, depth) in towers.items():
        for i in range(depth):
            block = f"{tower}.resblocks.{i}"
            for layer, out, into in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
                found |= {
                    f"{block}.{layer}.weight": (out * width, into * width),
                    f"{block}.{layer}.bias": (out * width,),
                }
            found |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for layer in ("ln_1", "ln_2"):
                found |= {f"{block}.{layer}.weight": (width,), f"{block}.{layer}.bias": (width,)}
    return found


def write(directory: Path, layers: int) -> None:
    """Write both files."""
    import torch
    from safetensors.torch import save_file

    tensors = {name: torch.full(shape, 0.5) for name, shape in shapes(layers).items()}
    save_file(tensors, directory / "clip.safetensors")
    torch.save(tensors, directory / "clip.pt")


def convert(path: Path, out: Path) -> None:
    """Convert a file, and print the peak memory of the process that does it, in bytes."""
    command = [sys.executable, "-m", "ddpm_jax.convert", "--from=clip", f"--src={path}", f"--out={out}"]
    subprocess.run(command, check=True, capture_output=True)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def main() -> None:
    """Write, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--convert", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write, options.layers)
        return
    if options.convert:
        convert(*options.convert)
        return
    number = sum(int(np.prod(shape)) for shape in shapes(options.layers).values())
    print(f"{number / 1e9:.2f} billion parameters\n")
    print("| file | GB | seconds | peak memory, GB | over the file's size |")
    print("| --- | --- | --- | --- | --- |")
    # Each in a process of its own, so that the memory of one is not counted with another's.
    again = [sys.executable, __file__, f"--layers={options.layers}"]
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        subprocess.run([*again, "--write", directory], check=True)
        for path in (Path(directory) / "clip.safetensors", Path(directory) / "clip.pt"):
            out, start = Path(directory) / "out", time.perf_counter()
            done = subprocess.run([*again, "--convert", path, out], check=True, capture_output=True, text=True)
            seconds, peak, size = time.perf_counter() - start, int(done.stdout) / 1e9, path.stat().st_size / 1e9
            print(f"| {path.suffix} | {size:.2f} | {seconds:.0f} | {peak:.2f} | {peak / size:.2f} |", flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
