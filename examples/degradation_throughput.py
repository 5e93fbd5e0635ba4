"""Throughput of BSR degradation: `python examples/degradation_throughput.py [--seconds 5]`.

Degrades random crops of captioned shapes by a factor of 4, and prints images per second of one core, by processor time.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from ddpm_jax.data.degradation import DegradeBSR  # noqa: E402
from ddpm_jax.data.shapes.scenes import ShapesSource  # noqa: E402


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of processor time, for each size")
    seconds = parser.parse_args().seconds
    print("| crop | images per second of a core |\n| --- | --- |")
    for size in (64, 128, 256):
        source, transform, count = ShapesSource(0, size), DegradeBSR(4), 0
        images = [source[i]["image"] for i in range(16)]
        transform.degrade(images[0], np.random.default_rng(0))  # which imports what it needs
        start = time.process_time()
        while time.process_time() - start < seconds:
            transform.degrade(images[count % 16], np.random.default_rng(count))
            count += 1
        print(f"| {size} x {size} | {count / (time.process_time() - start):.0f} |", flush=True)


if __name__ == "__main__":
    main()
