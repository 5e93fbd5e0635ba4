"""Peak speeds and memories of accelerators, from their makers' tables.

TPU: https://cloud.google.com/tpu/docs/v3, /v4, /v5e, /v5p and /v6e (read in 2026; the links of v4 and all of v2 from
/system-architecture-tpu-vm). GPU: NVIDIA's data sheets of A100, H100 (SXM), H200, L4 and V100: dense matrix products in
bfloat16 (float16 on V100). Bandwidths between chips are of one direction, over all links of a chip.
"""

import dataclasses

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker describes it.

    Attributes:
        name: as in "v5p" or "H100".
        device_kinds: beginnings of `jax.Device.device_kind`, in lower case.
        peak_flops: of bfloat16 matrix products, FLOP/s.
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s to other chips, one direction, over all links.
        devices: JAX devices that a chip is.
        axes: dimensions of the torus of a TPU, 0 for others.
        cores: TensorCores of a TPU chip, by which names such as "v5p-8" count.
        chips_per_host: of a TPU.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    devices: int = 1
    axes: int = 0
    cores: int = 1
    chips_per_host: int = 4


CHIPS = (
    Chip("v2", ("tpu v2",), 45 * TERA, 16 * GIB, 700 * GIGA, 248 * GIGA, devices=2, axes=2, cores=2),
    Chip("v3", ("tpu v3",), 123 * TERA, 32 * GIB, 900 * GIGA, 328 * GIGA, devices=2, axes=2, cores=2),
    Chip("v4", ("tpu v4",), 275 * TERA, 32 * GIB, 1200 * GIGA, 300 * GIGA, axes=3, cores=2),
    Chip("v5e", ("tpu v5 lite", "tpu v5e"), 197 * TERA, 16 * GIB, 819 * GIGA, 200 * GIGA, axes=2),
    Chip("v5p", ("tpu v5p", "tpu v5"), 459 * TERA, 95 * GIB, 2765 * GIGA, 600 * GIGA, axes=3, cores=2),
    Chip("v6e", ("tpu v6 lite", "tpu v6e"), 918 * TERA, 32 * GIB, 1600 * GIGA, 400 * GIGA, axes=2),
    Chip("V100", ("tesla v100",), 125 * TERA, 16 * GIB, 900 * GIGA, 150 * GIGA),
    Chip("A100-80GB", ("nvidia a100-sxm4-80gb", "nvidia a100 80gb"), 312 * TERA, 80 * GIB, 2039 * GIGA, 300 * GIGA),
    Chip("A100", ("nvidia a100",), 312 * TERA, 40 * GIB, 1555 * GIGA, 300 * GIGA),
    Chip("H100", ("nvidia h100 80gb hbm3",), 989 * TERA, 80 * GIB, 3350 * GIGA, 450 * GIGA),
    Chip("H200", ("nvidia h200",), 989 * TERA, 141 * GIGA, 4800 * GIGA, 450 * GIGA),
    Chip("L4", ("nvidia l4",), 121 * TERA, 24 * GIB, 300 * GIGA, 32 * GIGA),
)


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a `jax.Device.device_kind`, or None for one that is not in the table.

    Of several beginnings that fit, the longest counts: "TPU v5 lite" is not a "TPU v5".
    """
    kind = device_kind.lower()
    found = [(len(start), chip) for chip in CHIPS for start in chip.device_kinds if kind.startswith(start)]
    # "NVIDIA L40S" is no L4: after the beginning comes the end or something that is no letter or digit.
    found = [(size, chip) for size, chip in found if not kind[size : size + 1].isalnum()]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def device_peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOP/s in bfloat16 of one JAX device, which may be half a chip; None if it is not known."""
    chip = find_chip(device_kind)
    return None if chip is None else chip.peak_flops / chip.devices
