"""What the TPU compiler says of a program: memory, operations, seconds, exchanges."""

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.parallel.chips import Chip
from ddpm_jax.planning.program import COLLECTIVES, Program, total_bytes

_FAST = {"exec_time_optimization_effort": -1.0}
_COMPILER_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
"""Environment variables in which the compiler finds flags, with which the same program costs something else."""
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Cost:
    """A program on one chip.

    Attributes:
        arguments, temporaries: bytes of HBM: what the program is given, and what it needs beside that.
        peak: bytes of HBM at most.
        flops: operations, recomputed ones included, as the compiler counts them.
        bytes: that the operations read and write, as the compiler counts them.
        seconds: that the compiler expects, without waiting for other chips.
        cycles: of the chip, that the compiler notes at operations; none at Pallas kernels and exchanges. With little
            effort it chooses no tile sizes, and expects several times as many.
        collectives: kind -> (how many, bytes that the chip sends).
        compile_seconds: how long the compiler took.
        parts: part of the network -> share of the expected cycles.
        fits: False if the compiler refused the program for want of HBM; of the fields above only `peak` is known then.
    """

    arguments: float = math.nan
    temporaries: float = math.nan
    peak: float = math.nan
    flops: float = math.nan
    bytes: float = math.nan
    seconds: float = math.nan
    cycles: float = math.nan
    collectives: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    compile_seconds: float = math.nan
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fits: bool = True

    @property
    def sent(self) -> float:
        """The bytes that the chip sends in all."""
        return sum(size for _, size in self.collectives.values())


def measure(
    lowered: jax.stages.Lowered,
    chip: Chip,
    *,
    cache: Path | None = None,
    keep: Path | None = None,
    fast: bool = False,
    topology: str = "",
) -> Cost:
    """Compile a program for a TPU and read what it costs.

    Args:
        lowered: for the devices of a topology (`topology.topology_devices`).
        chip: of the topology.
        cache: a directory for results; a program that was measured before is not compiled again.
        keep: a file for the text of the compiled program.
        fast: compile with little effort: the same operations, but no prefetches to VMEM and no search for tile sizes.
        topology: name of the topology, on which the exchanges of a program for several chips depend; "" for one chip.

    Raises:
        jax.errors.JaxRuntimeError: if the compiler fails for another reason than memory.
    """
    place = None if cache is None else cache / f"{_fingerprint(lowered, chip, fast, topology)}.json"
    if place is not None and place.exists() and (keep is None or keep.exists()):
        found = json.loads(place.read_text())
        return Cost(**found | {"collectives": {kind: tuple(pair) for kind, pair in found["collectives"].items()}})
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=_FAST if fast else None)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed_memory(str(error))
        if needed is None:
            raise
        cost = Cost(peak=needed, compile_seconds=time.perf_counter() - begin, fits=False)
    else:
        text = compiled.as_text()
        if keep is not None:
            keep.write_text(text)
        cost = _cost(compiled, Program(text), time.perf_counter() - begin, chip)
    if place is not None:
        cache.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(dataclasses.asdict(cost)))
    return cost


def _cost(compiled: jax.stages.Compiled, program: Program, seconds: float, chip: Chip) -> Cost:
    totals, memory = compiled.cost_analysis(), compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    collectives, loops, cycles = program.collectives(), program.loop_factor(), program.cycles_by_source()
    flops, moved = totals.get("flops", 0.0), totals["bytes accessed"]
    optimal = totals["optimal_seconds"]
    if optimal <= 0 or chip.name in ("v5e", "v6e"):
        # There, the compiler counts -1 s for some exchanges. Elsewhere its number is close to this sum.
        optimal = flops / chip.peak_flops + moved / chip.hbm_bandwidth
    by_kind = {
        kind: (sum(each.times for each in of), total_bytes(of))
        for kind in COLLECTIVES
        if (of := [each for each in collectives if each.kind == kind])
    }
    whole = sum(cycles.values())
    return Cost(
        arguments=arguments,
        temporaries=temporaries,
        peak=peak,
        flops=flops * loops,
        bytes=moved * loops,
        seconds=optimal * loops,
        cycles=whole,
        collectives=by_kind,
        compile_seconds=seconds,
        parts={part: count / (whole or 1) for part, count in list(cycles.items())[:12]},
    )


def _needed_memory(message: str) -> float | None:
    """Return the HBM that a program would need, from the compiler's error; None for another error."""
    found = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT]?)", message)
    return float(found[1]) * _UNITS[found[2]] if found else None


def _fingerprint(lowered: jax.stages.Lowered, chip: Chip, fast: bool, topology: str = "") -> str:
    import libtpu

    text = lowered.as_text()
    read = 5 if "while" in text else 4  # changes when another number is read from the same program
    parts: tuple[Any, ...] = (text, chip.name, getattr(libtpu, "__version__", ""), jax.__version__, read)
    parts += ("fast",) if fast else ()
    parts += (topology,) if topology else ()
    parts += tuple((name, os.environ[name]) for name in _COMPILER_FLAGS if os.environ.get(name))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
