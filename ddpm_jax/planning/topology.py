"""TPU slices: their names, and their devices as the compiler knows them, without a TPU."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from ddpm_jax.extras import needs_extra
from ddpm_jax.parallel.chips import CHIPS, Chip

_TPUS = {chip.name: chip for chip in CHIPS if chip.name in ("v4", "v5e", "v5p", "v6e")}
_ALIASES = {"v5litepod": "v5e", "v5p": "v5p", "v5e": "v5e", "v4": "v4", "v6e": "v6e"}
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""The slices of v5e and v6e."""
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""The slices of v4 and v5p that are less than a cube of 4 x 4 x 4; larger ones are made of such cubes."""
_LARGEST = {"v4": 4096, "v5p": 6144}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a TPU pod.

    Attributes:
        chip: what it is made of.
        shape: chips along each dimension of the torus.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As in "v5p:4x4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def accelerator_type(self) -> str:
        """As Cloud TPU names it, "v5p-128": the number of TensorCores for v4 and v5p, of chips for others."""
        prefix = "v5litepod" if self.chip.name == "v5e" else self.chip.name
        return f"{prefix}-{self.chips * self.chip.cores}"


def parse_topology(text: str) -> Topology:
    """Read the name of a slice.

    Args:
        text: the chip and the shape, "v5p:4x4x4", or the accelerator type, "v5p-128" (v4, v5p: TensorCores, two for
            each chip; v5e, v6e: chips).

    Raises:
        ValueError: for a slice that does not exist; the message lists those of the chip.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)|(\w+)-(\d+)", text.strip())
    chip = None if match is None else _TPUS.get(_ALIASES.get(match[1] or match[3], ""))
    if chip is None:
        raise ValueError(
            f"topology {text!r} does not exist: it is a chip ({', '.join(_TPUS)}) and a shape, as v5p:4x4x4 or "
            "v5e:8x8, or an accelerator type, as v5p-128 or v6e-64"
        )
    if match[2]:
        shape = tuple(map(int, match[2].split("x")))
        if _exists(chip, shape):
            return Topology(chip, shape)
    else:
        found = [shape for shape in _shapes(chip) if math.prod(shape) * chip.cores == int(match[4])]
        if found:
            return Topology(chip, min(found, key=lambda shape: max(shape) - min(shape)))
    raise ValueError(f"topology {text!r} does not exist: slices of {chip.name} are {_described(chip)}")


def topology_devices(topology: Topology) -> Sequence[Any]:
    """Return the devices of a slice, which programs can be compiled for but not run on.

    Raises:
        ModuleNotFoundError: naming the extra, if libtpu is not installed.
        RuntimeError: if the compiler refuses the slice.
    """
    with needs_extra("plan"):
        import libtpu  # noqa: F401 (JAX loads it by itself; here it only has to be there)
    # It would look for the TPU of this machine otherwise, and refuse a second process.
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1,) * len(topology.shape)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(f"the TPU compiler refuses {topology.name}: {str(error).splitlines()[0]}") from None


_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if chip.axes == 2:
        return shape in _FLAT
    cubes = len(shape) == 3 and all(side % 4 == 0 and side > 0 for side in shape) and tuple(sorted(shape)) == shape
    return shape in _SMALL or (cubes and math.prod(shape) <= _LARGEST[chip.name])


def _shapes(chip: Chip) -> list[tuple[int, ...]]:
    """Return the slices of a chip."""
    if chip.axes == 2:
        return list(_FLAT)
    sides = range(4, 65, 4)
    cubes = [(a, b, c) for a in sides for b in sides if b >= a for c in sides if c >= b]
    return [*_SMALL, *(shape for shape in cubes if math.prod(shape) <= _LARGEST[chip.name])]


def _described(chip: Chip) -> str:
    name = lambda shape: "x".join(map(str, shape))  # noqa: E731
    if chip.axes == 2:
        return f"{', '.join(map(name, _FLAT))}, as in {chip.name}:4x8, or {chip.name}-32"
    return (
        f"{', '.join(map(name, _SMALL))}, and AxBxC with A <= B <= C, all multiples of 4, of at most "
        f"{_LARGEST[chip.name]} chips, as in {chip.name}:4x4x8, or {chip.name}-256"
    )
