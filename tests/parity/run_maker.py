"""Run a writer of reference outputs with other weights and into another directory: `run_maker.py NAME OUT WEIGHTS`.

NAME: of a make_*.py beside this file. OUT: the directory that takes the place of tests/data. WEIGHTS: a directory of
files that this package exported, named by what `key` makes of names, shapes and seed; where the writer would draw
random weights, the reference loads such a file, strictly, and it is an error if there is none. "random" draws.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def key(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> str:
    """Return the name of the file with the weights of this number of tensors."""
    text = json.dumps([sorted((name, list(shape)) for name, shape in shapes.items()), seed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    """Run one writer."""
    import random_weights

    name, out, weights = sys.argv[1:4]
    if weights != "random":
        from safetensors.numpy import load_file

        def exported(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
            file = Path(weights) / f"{key(shapes, seed)}.safetensors"
            if not file.is_file():
                raise SystemExit(f"{name} wants weights that nothing exported: {', '.join(list(shapes)[:4])}, ...")
            print("loaded", file.name)
            return load_file(file)

        random_weights.random_weights = exported
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OUT = Path(out) / module.OUT.name
    module.main()


if __name__ == "__main__":
    main()
