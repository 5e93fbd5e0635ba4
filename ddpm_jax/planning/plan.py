"""A stage on a topology with a sharding: does it fit, how fast is it, how long does the run take."""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.parallel.mesh import batch_shards, make_mesh
from ddpm_jax.parallel.sharding import used_dtypes
from ddpm_jax.planning.blocks import UPDATE_BYTES, find_blocks, measure_blocks
from ddpm_jax.planning.measure import Cost, measure
from ddpm_jax.planning.topology import Topology, topology_devices
from ddpm_jax.training.flops import count_flops
from ddpm_jax.training.lowered import LoweredStage, lower_stage
from ddpm_jax.training.stage import Stage
from ddpm_jax.training.state import count_parameters

SECONDS_OF_DAY = 86_400
AUTO_BLOCKS = 8
_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One line of the table.

    Attributes:
        stage, topology, accelerator_type, chips: what runs where.
        mesh: devices along each axis.
        batch_size, num_steps: of the stage.
        examples: of the batch that a chip computes at a time: the batch over the data and fsdp axes and `accumulate`.
        convolves: whether a parameter is the kernel of a convolution of 3 x 3.
        compiler_flags: the value of LIBTPU_INIT_ARGS, with which this was planned.
        method: "whole" if the step was compiled as it is run, "blocks" if its blocks were and their costs added up.
        parameters: numbers that are trained.
        arguments, temporaries, peak, hbm: bytes of HBM of a chip; hbm is what it has.
        fits: whether peak is at most hbm.
        flops: of a chip in a step, recomputed ones included.
        model_flops: of a chip in a step: three times those of the loss; once those of a sampler.
        compiler_seconds: of a step, as the compiler expects them: arithmetic and HBM.
        cycles: that the compiler expects of the operations of a step, see `measure.Cost`; NaN of a sum of blocks.
        link_seconds: bytes sent over the bandwidth of the chip's links, as if nothing else ran meanwhile.
        frozen_seconds: of what frozen networks compute before the step.
        roofline_utilization: flops over the chip's peak and the compiler's seconds.
        model_utilization: model_flops over the chip's peak and all seconds.
        collectives: kind -> (how many, bytes sent).
        sent, minimum: bytes that a chip sends, and the least that the sharding allows.
        compile_seconds: that planning took.
        parts: part of the network -> share of the time.
    """

    stage: str
    topology: str
    accelerator_type: str
    chips: int
    mesh: Mapping[str, int]
    batch_size: int
    num_steps: int
    examples: int
    convolves: bool
    compiler_flags: str
    method: str
    parameters: int
    arguments: float
    temporaries: float
    peak: float
    hbm: float
    fits: bool
    flops: float
    model_flops: float
    compiler_seconds: float
    cycles: float
    link_seconds: float
    frozen_seconds: float
    roofline_utilization: float
    model_utilization: float
    collectives: Mapping[str, tuple[int, float]]
    sent: float
    minimum: float
    compile_seconds: float
    parts: Mapping[str, float]

    @property
    def step_seconds(self) -> float:
        """All seconds of a step, none of them at the same time as others."""
        return self.compiler_seconds + self.link_seconds + self.frozen_seconds

    @property
    def chip_hours_of_an_image(self) -> float:
        """Of all chips for an example of a batch."""
        return self.step_seconds * self.chips / 3600 / self.batch_size

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.num_steps * self.step_seconds / SECONDS_OF_DAY

    @property
    def chip_hours(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.chips

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data; what is not known is None."""
        derived = {"step_seconds": self.step_seconds, "days": self.days, "chip_hours": self.chip_hours}
        derived["steps_per_second"] = 1 / self.step_seconds if self.step_seconds else math.nan
        found = dataclasses.asdict(self) | derived
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}


def parse_mesh(text: str) -> dict[str, int]:
    """Read a mesh, as "data=4,fsdp=16"; one size may be -1, which takes the chips that are left.

    Raises:
        ValueError: if the text is not of this form, or names an axis twice.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    valid = all(name in _AXES and re.fullmatch(r"-1|[1-9][0-9]{0,8}", size) for name, _, size in pairs)
    if not valid or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"mesh {text!r} must name axes out of {', '.join(_AXES)} with their sizes, as data=4,fsdp=16")
    return {name: int(size) for name, _, size in pairs}


def default_meshes(configured: Mapping[str, int], topology: Topology) -> list[dict[str, int]]:
    """Return the meshes that are worth trying on a topology: the recipe's, if it chose one, or data alone and FSDP.

    FSDP is tried over the rings and planes of the torus that have at least 8 chips, and over all chips.
    """
    if any(configured.get(axis, 1) not in (1, -1) for axis in _AXES):
        return [dict(configured)]
    subsets = itertools.chain(*(itertools.combinations(topology.shape, n) for n in range(1, len(topology.shape))))
    sizes = sorted({math.prod(subset) for subset in subsets if math.prod(subset) >= 8} | {topology.chips})
    return [{"data": topology.chips, "fsdp": 1}] + [{"data": -1, "fsdp": size} for size in sizes if size > 1]


def lower_for(
    stages: Sequence[Stage],
    name: str,
    topology: Topology,
    meshes: Sequence[Mapping[str, int]],
    batch_size: int | None = None,
) -> list[LoweredStage]:
    """Find the shapes of a stage on a topology, for each of several meshes; nothing is compiled.

    Args:
        stages: of a recipe.
        name: of the stage.
        topology: the slice.
        meshes: axis -> devices along it, for `parallel.mesh.make_mesh`.
        batch_size: in place of the stage's.

    Raises:
        ValueError: for a stage, a mesh or a batch size that `train` would refuse.
    """
    devices = topology_devices(topology)
    stages = _with_batch_size(stages, name, batch_size)
    return [lower_stage(stages, name, make_mesh(mesh, devices=devices)) for mesh in meshes]


def plan_training(
    lowered: LoweredStage,
    topology: Topology,
    *,
    method: str = "auto",
    cache: Path | None = None,
    fast: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan the training of a stage.

    Args:
        lowered: from `lower_for`.
        topology: of its mesh.
        method: "whole", "blocks", or "auto": blocks if the network has more than AUTO_BLOCKS different ones.
        cache: a directory for results of the compiler.
        fast: compile with little effort, see `measure.measure`.
        show: is called with lines about the progress.

    Raises:
        ValueError: for method="blocks" on a mesh with tensor parallelism.
    """
    chip = topology.chip
    loss, args = lowered.loss()
    training = lowered.stage.training
    model_flops = 3 * training.gradients * count_flops(lambda *args: loss(*args), *args) / topology.chips
    least = _least_exchange(lowered)
    if method == "auto":
        method = "whole" if _is_small(lowered) or not can_add_up(lowered) else "blocks"
    if method == "whole":
        cost = measure(lowered.lower_step(), chip, cache=cache, fast=fast, topology=topology.name)
        show(f"compiled in {cost.compile_seconds:.0f} s" if cost.fits else "does not fit")
    else:
        # Each micro-batch gathers the weights and sums its gradients, for each gradient.
        times = training.accumulate * training.gradients
        sent = {kind: (times * count, times * size) for kind, (count, size) in least.items()}
        cost = dataclasses.replace(_add_up(lowered, topology, cache, fast, show), collectives=sent)
    prepare = lowered.lower_prepare()
    frozen = Cost(seconds=0.0, compile_seconds=0.0)
    if prepare is not None:
        frozen = measure(prepare, chip, cache=cache, fast=fast, topology=topology.name)
    return _as_plan(lowered, topology, method, cost, frozen, model_flops, least)


def plan_sampler(
    lowered: LoweredStage,
    topology: Topology,
    sampling: Sampling | None,
    *,
    cache: Path | None = None,
    fast: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan the sampling of one batch, every chip with whole parameters and a part of the batch.

    Args:
        lowered: from `lower_for`.
        topology: of its mesh, whose chips are all along "data".
        sampling: how it is sampled; None takes that of the stage's previews.
        cache, fast, show: see `plan_training`.

    Raises:
        ValueError: for a stage that cannot be sampled.
    """
    sample, args = lowered.sampler(sampling)
    model_flops = count_flops(sample, *args) / topology.chips
    lowered_sampler = lowered.lower_sampler(sampling)
    cost = measure(lowered_sampler, topology.chip, cache=cache, fast=fast, topology=topology.name)
    show(f"compiled in {cost.compile_seconds:.0f} s" if cost.fits else "does not fit")
    return _as_plan(lowered, topology, "sampler", cost, Cost(seconds=0.0, compile_seconds=0.0), model_flops, {})


def _with_batch_size(stages: Sequence[Stage], name: str, batch_size: int | None) -> list[Stage]:
    def changed(stage: Stage) -> Stage:
        if stage.name != name or batch_size is None:
            return stage
        return stage.replace(training=dataclasses.replace(stage.training, batch_size=batch_size))

    return [changed(stage) for stage in stages]


def _as_plan(
    lowered: LoweredStage,
    topology: Topology,
    method: str,
    cost: Cost,
    frozen: Cost,
    model_flops: float,
    least: Mapping[str, tuple[int, float]],
) -> Plan:
    chip, training = topology.chip, lowered.stage.training
    accumulate = 1 if method == "sampler" else training.accumulate
    if method != "sampler":  # frozen networks stay on every chip while the step runs
        held = lowered.frozen_bytes()
        cost = dataclasses.replace(cost, arguments=cost.arguments + held, peak=cost.peak + held)
    link_seconds = cost.sent / chip.link_bandwidth
    return Plan(
        stage=lowered.stage.name,
        topology=topology.name,
        accelerator_type=topology.accelerator_type,
        chips=topology.chips,
        mesh=dict(lowered.mesh.shape),
        batch_size=training.batch_size,
        num_steps=1 if method == "sampler" else training.num_steps,
        examples=training.batch_size // (accumulate * batch_shards(lowered.mesh)),
        convolves=any(leaf.shape[-4:-2] == (3, 3) for leaf in jax.tree.leaves(lowered.state.params)),
        compiler_flags=os.environ.get("LIBTPU_INIT_ARGS", ""),
        method=method,
        parameters=count_parameters(lowered.state.params),
        arguments=cost.arguments,
        temporaries=cost.temporaries,
        peak=cost.peak,
        hbm=chip.hbm_bytes,
        fits=cost.fits and frozen.fits and max(cost.peak, _number(frozen.peak)) <= chip.hbm_bytes,
        flops=cost.flops,
        model_flops=model_flops,
        compiler_seconds=cost.seconds,
        cycles=cost.cycles,
        link_seconds=link_seconds,
        frozen_seconds=frozen.seconds,
        roofline_utilization=cost.flops / cost.seconds / chip.peak_flops,
        model_utilization=model_flops / (cost.seconds + link_seconds + frozen.seconds) / chip.peak_flops,
        collectives=cost.collectives,
        sent=cost.sent,
        minimum=sum(size for _, size in least.values()),
        compile_seconds=cost.compile_seconds + frozen.compile_seconds,
        parts=cost.parts,
    )


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def can_add_up(lowered: LoweredStage) -> bool:
    """Return whether every chip computes whole layers, so that blocks can be added up."""
    return batch_shards(lowered.mesh) == lowered.mesh.size


def _is_small(lowered: LoweredStage) -> bool:
    return len({call.key() for call in find_blocks(*lowered.loss())}) <= AUTO_BLOCKS


def _add_up(
    lowered: LoweredStage, topology: Topology, cache: Path | None, fast: bool, show: Callable[[str], None]
) -> Cost:
    """Return the cost of the step as the sum of its blocks and of the update."""
    loss, args = lowered.loss()
    chip, training = topology.chip, lowered.stage.training
    shards, parts = batch_shards(lowered.mesh), training.accumulate
    times = parts * training.gradients
    if not can_add_up(lowered):
        raise ValueError(
            f"mesh {dict(lowered.mesh.shape)} computes with parts of layers, which adding up blocks does not know; "
            "compile the whole (--method whole)"
        )
    device = lowered.mesh.devices.flat[0]
    cost, _ = measure_blocks(
        loss,
        args,
        device,
        chip,
        batch_size=training.batch_size,
        shards=shards * parts,  # a chip's part of a micro-batch
        cache=cache,
        fast=fast,
        show=show,
    )
    local = jax.tree.map(_local_size, (lowered.state, lowered.batch))
    arguments = sum(jax.tree.leaves(local))
    if not cost.fits:
        return dataclasses.replace(cost, peak=cost.peak + arguments)
    numbers = sum(jax.tree.leaves(jax.tree.map(lambda leaf: _local_size(leaf) / 4, lowered.state.params)))
    dtypes = used_dtypes(lambda params: loss(params, *_zeros(args[1:])), lowered.state.params)
    # The weights as they are used and their gradients are whole for a while; the rest of the state stays in parts.
    whole = jax.tree.map(lambda leaf, dtype: 2 * leaf.size * dtype.itemsize, lowered.state.params, dtypes)
    temporaries = cost.temporaries + sum(jax.tree.leaves(whole))
    update = numbers * UPDATE_BYTES
    if parts > 1:  # the sum of the gradients, which is read and written with each
        temporaries += 4 * numbers
        update += 8 * numbers * parts
    if training.gradients > 1:  # the parameters at which the second gradient is taken
        temporaries += 4 * numbers
        update += 12 * numbers * parts
    return dataclasses.replace(
        cost,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries,
        flops=cost.flops * times,
        seconds=cost.seconds * times + update / chip.hbm_bandwidth,
        bytes=cost.bytes * times + update,
    )


def _least_exchange(lowered: LoweredStage) -> Mapping[str, tuple[int, float]]:
    """Return the least that a chip has to send: each weight is gathered once, each gradient summed once.

    Both are in the dtype in which the network uses the weight. A weight that is split n ways is gathered and its
    gradient scattered, (n - 1) / n of its bytes each; then the m replicas of a part are summed, 2 (m - 1) / m of it.
    """
    loss, args = lowered.loss()
    dtypes = used_dtypes(lambda params: loss(params, *_zeros(args[1:])), lowered.state.params)
    shards = batch_shards(lowered.mesh)
    found = {"all-gather": [0, 0.0], "reduce-scatter": [0, 0.0], "all-reduce": [0, 0.0]}
    for leaf, dtype in zip(jax.tree.leaves(lowered.state.params), jax.tree.leaves(dtypes), strict=True):
        axes = [a for entry in leaf.sharding.spec for a in (entry if isinstance(entry, tuple) else (entry,)) if a]
        parts = {a: lowered.mesh.shape[a] for a in axes}
        tensor, split = parts.get("tensor", 1), parts.get("fsdp", 1)
        size, replicas = leaf.size * dtype.itemsize / tensor, shards // split
        if split > 1:
            for kind in ("all-gather", "reduce-scatter"):
                found[kind][0] += 1
                found[kind][1] += size * (split - 1) / split
        if replicas > 1:
            found["all-reduce"][0] += 1
            found["all-reduce"][1] += 2 * size / split * (replicas - 1) / replicas
    return {kind: (count, size) for kind, (count, size) in found.items() if count}


def _local_size(leaf: Any) -> float:
    """Return the bytes of an array that one device has."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _zeros(args: tuple) -> tuple:
    """Return zeros, and any key, in place of shapes: for a trace, in which nothing of them is computed."""

    def zero(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zero, args)
