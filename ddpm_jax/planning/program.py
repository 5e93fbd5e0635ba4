"""What a compiled TPU program does, read from its text: collectives, and the time of each operation.

The compiler's totals count the body of a loop once, and leave out what it has no model for. The text has both: the
number of a loop's iterations, and the cycles that the compiler expects of each operation.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
_OF_LOOPS = ("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
# Three forms: {{0,1},{2,3}}, [2,2]<=[4] (groups and their size), and mesh['a'=2,'b'=2] {'b'}, perhaps with a part of
# an axis as 'b':(1)2 (after 1, of 2).
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\](?:, device_ids=\(.*?\)\))? \{([^}]*)\})"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation of a program.

    Attributes:
        name, opcode: as in the text.
        shape: the type of its result, as text.
        operands: names; the value of a constant.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def cycles(self) -> int:
        """The cycles that the compiler expects, 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @property
    def source(self) -> str:
        """The operation of JAX that it comes from, as "jit(update)/UNet/down_0_0/conv_1/conv_general_dilated"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange of arrays between devices.

    Attributes:
        kind: one of COLLECTIVES.
        bytes: that a device sends, at least: of an array of n bytes over g devices, n (g - 1) / g for an all-gather or
            a reduce-scatter, twice that for an all-reduce, n for a permute.
        group: g.
        times: how often it happens.
    """

    kind: str
    bytes: float
    group: int
    times: int


class Program:
    """A compiled program.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str):
        self._computations, self._entry = _parse(text)

    def collectives(self) -> list[Collective]:
        """Return all exchanges between devices."""
        found, channels = [], set()
        for instruction, name, times in self._executed():
            for each, inside in self._with_fused(instruction, name):
                collective = self._collective(each, inside)
                if collective is None:
                    continue
                # One that runs beside other work is in the fusion that starts it and in those that it runs beside.
                # Fusions of a reduce-scatter all have the same channel.
                channel = re.search(r"channel_id=\d+", each.attributes)
                if channel is not None and collective.kind != "reduce-scatter":
                    if (collective.kind, channel[0]) in channels:
                        continue
                    channels.add((collective.kind, channel[0]))
                found.append(dataclasses.replace(collective, times=times))
        return found

    def loop_factor(self) -> float:
        """Return the cycles of all operations, divided by those with each loop counted once.

        The totals of `Compiled.cost_analysis()` are of the latter kind.
        """
        once = whole = 0.0
        for instruction, _, times in self._executed():
            once += instruction.cycles
            whole += instruction.cycles * times
        return whole / once if once else 1.0

    def cycles_by_source(self, depth: int = 3) -> Mapping[str, int]:
        """Return the expected cycles of each part of the network, the largest first.

        depth: how many of the names after the first module a part keeps.
        """
        found: collections.Counter = collections.Counter()
        for instruction, _, times in self._executed():
            if instruction.cycles:
                found[_part(instruction.source, depth)] += instruction.cycles * times
        return dict(found.most_common())

    def _executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, str, int]]:
        """Iterate over the operations that run, with the name of their computation and how often each runs."""
        name = self._entry if name is None else name
        for instruction in self._computations[name].values():
            yield instruction, name, times
            called = []
            if instruction.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)
                called = [(body[1], times * self._iterations(instruction))] if body else []
            elif instruction.opcode == "conditional":
                called = [(branch, times) for branch in self._branches(instruction)]
            elif instruction.opcode in ("call", "async-start"):
                found = re.search(r"(?:to_apply|calls|called_computation)=%?([\w.\-]+)", instruction.attributes)
                called = [(found[1], times)] if found else []
            for inner, count in called:
                if inner in self._computations:
                    yield from self._executed(inner, count)

    def _iterations(self, loop: Instruction) -> int:
        """Return how often a loop runs: as the compiler notes, or up to the constant that JAX's counter stays below."""
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if count:
            return int(count[1])
        named = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        condition = self._computations.get(named[1], {}) if named else {}
        for each in condition.values():
            limit = condition.get(each.operands[1]) if each.opcode == "compare" and len(each.operands) == 2 else None
            if limit is not None and limit.opcode == "constant" and "direction=LT" in each.attributes:
                return int(limit.operands[0])
        return 1

    def _branches(self, instruction: Instruction) -> list[str]:
        """Return the branch of a condition that does the most: a step is planned for the one that updates."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = listed[1].replace("%", "").split(", ") if listed else []
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
        names = [name for name in names if name in self._computations]
        cost = lambda name: sum(each.cycles * times for each, _, times in self._executed(name))  # noqa: E731
        return [max(names, key=cost)] if names else []

    def _with_fused(self, instruction: Instruction, name: str) -> Iterator[tuple[Instruction, str]]:
        """Iterate over an operation and those that are fused into it, with the names of their computations."""
        yield instruction, name
        called = re.search(r"calls=%?([\w.\-]+)", instruction.attributes) if instruction.opcode == "fusion" else None
        for inner in self._computations.get(called[1], {}).values() if called else ():
            yield from self._with_fused(inner, called[1])

    def _collective(self, instruction: Instruction, name: str) -> Collective | None:
        opcode, shape = instruction.opcode, instruction.shape
        kind, group = opcode.removesuffix("-start"), _group(instruction.attributes)
        if kind not in COLLECTIVES:
            return None
        computation = self._computations[name]
        given = sum(_size(computation[operand].shape) for operand in instruction.operands if operand in computation)
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"  # a fusion of an all-reduce and of the slice of its result
        if kind == "reduce-scatter":
            size = given or _size(shape) * group
        elif opcode.endswith("-start"):
            # The result is a tuple of operands, results and what the hardware needs.
            size = given * (group if kind == "all-gather" else 1)
        else:
            size = _size(shape)
        share = (group - 1) / group if group else 0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        return Collective(kind, size * factor, group, 1)


def total_bytes(collectives: list[Collective]) -> float:
    """Return the bytes that a device sends in all."""
    return sum(each.bytes * each.times for each in collectives)


def _part(source: str, depth: int) -> str:
    names = [name for name in source.split("/") if name not in ("", *_OF_LOOPS) and "(" not in name]
    return "/".join(names[:depth]) or "other"


def _size(shape: str) -> int:
    """Return the bytes of all arrays in the text of a type."""
    return sum(
        math.prod(int(side) for side in sides.split(",") if side) * _BYTES[dtype]
        for dtype, sides in _ARRAY.findall(shape)
        if dtype in _BYTES
    )


def _group(attributes: str) -> int:
    """Return the number of devices that exchange with each other."""
    found = _GROUPS.search(attributes)
    if not found:
        return 2 if "source_target_pairs" in attributes else 1
    if found[1] is not None:
        return len(found[1].split(","))
    if found[2]:
        return int(found[3])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[4]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[5])
    return math.prod(int(part or sizes[name]) for name, part in axes)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Return computation -> (name -> instruction), and the name of the first computation to run."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if not line.startswith(" "):
            match = _COMPUTATION.match(line)
            current = {} if match else None
            if match:
                computations[match[2]] = current
                entry = match[2] if match[1] else entry
            continue
        match = _INSTRUCTION.match(line) if current is not None else None
        if match:
            shape, rest = _split(match[2])
            opcode, bracket, rest = rest.partition("(")
            if bracket:
                inside, attributes = _split("(" + rest)
                opcode = opcode.strip()
                operands = (inside[1:-1],) if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside))
                current[match[1]] = Instruction(match[1], opcode, shape, operands, attributes)
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """Split a text after its first word, or after its first pair of brackets."""
    if not text.startswith("("):
        first, _, rest = text.partition(" ")
        return first, rest
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: position + 1], text[position + 1 :].lstrip()
    return text, ""
