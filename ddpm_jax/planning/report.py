"""The planner's table, and which sharding it suggests."""

import math
from collections.abc import Sequence

from ddpm_jax.planning.plan import Plan

_COLUMNS = ("stage", "topology", "chips", "mesh", "batch", "HBM a chip, GB", "fits", "roofline", "model")
_COLUMNS += ("step, s", "steps/s", "days", "chip-hours", "sent / least, GB", "by")
FEW_EXAMPLES = 8
"""Below this batch on a chip the TPU's compiler cuts images into parts, and convolves them as if they were examples."""
SPACE_TO_BATCH_OFF = (
    "--xla_tpu_run_space_to_batch=false",
    "--xla_tpu_run_space_to_batch_on_new_platforms=false",
)
"""The flags that keep it from doing so; one alone does not."""


def table(plans: Sequence[Plan]) -> str:
    """Return the plans as a Markdown table, one line each.

    "HBM" is the most that is in use, of what the chip has; "roofline" and "model" are `Plan.roofline_utilization` and
    `Plan.model_utilization`; "sent" is what a chip sends to others in a step, and the least that it has to.
    """
    rows = [_COLUMNS, *(_row(plan) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def suggest(plans: Sequence[Plan]) -> list[Plan]:
    """Return the cheapest plan that fits of each stage: of the fewest chip-hours an image, then of the fewest days.

    With one batch size those are the fewest chip-hours of the run.
    """
    best: dict[str, Plan] = {}
    for plan in plans:
        if plan.fits and plan.step_seconds > 0:
            best[plan.stage] = min(best.get(plan.stage, plan), plan, key=_price)
    return list(best.values())


def _price(plan: Plan) -> tuple[float, float]:
    return plan.chip_hours_of_an_image, plan.days


def suggestions(plans: Sequence[Plan]) -> str:
    """Return a sentence for each stage: the cheapest sharding that fits, or that none does."""
    found = {plan.stage: plan for plan in suggest(plans)}
    lines = []
    for stage in dict.fromkeys(plan.stage for plan in plans):
        plan = found.get(stage)
        if plan is None:
            need = min(each.peak for each in plans if each.stage == stage)
            lines.append(
                f"{stage}: nothing of this fits; the least is {need / 1e9:.1f} GB a chip. Try a larger slice, more of "
                "the mesh along fsdp, a smaller batch, or accumulate"
            )
            continue
        if plan.method == "sampler":
            lines.append(
                f"{stage}: cheapest that fits is {plan.topology} ({plan.accelerator_type}) at batch size "
                f"{plan.batch_size}: {plan.batch_size / plan.step_seconds:,.3g} samples/s, "
                f"{1e6 * plan.chip_hours_of_an_image:,.3g} chip-hours for a million{_flags(plan)}"
            )
            continue
        mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in plan.mesh.items())
        several = len({each.batch_size for each in plans if each.stage == stage}) > 1
        images = f" for {plan.num_steps * plan.batch_size:,} images, the fewest an image" if several else ""
        lines.append(
            f"{stage}: cheapest that fits is {plan.topology} ({plan.accelerator_type}) with {mesh} at batch size "
            f"{plan.batch_size}: {plan.days:.1f} days, {plan.chip_hours:,.0f} chip-hours{images}{_flags(plan)}"
        )
    return "\n".join(lines)


def notes(plans: Sequence[Plan]) -> str:
    """Return a line for each stage, slice and batch on a chip that is so small that the compiler cuts images up."""
    off = " ".join(SPACE_TO_BATCH_OFF)
    lines = [
        f"note: {plan.stage} on {plan.topology}: a batch of {plan.examples} on each chip at a time. Below "
        f"{FEW_EXAMPLES} the compiler cuts images into parts before it convolves (space to batch), which slows U-Nets "
        f'down. LIBTPU_INIT_ARGS="{off}" turns it off, here and for the run (docs/performance.md, "Few images a chip")'
        for plan in plans
        if plan.convolves and plan.examples < FEW_EXAMPLES
        if not set(SPACE_TO_BATCH_OFF) <= set(plan.compiler_flags.split())
    ]
    return "\n".join(dict.fromkeys(lines))


def details(plan: Plan) -> str:
    """Return what the table has no room for: operations, exchanges, and the parts that take longest."""
    exchanges = ", ".join(f"{count} {kind} ({size / 1e9:.3f} GB)" for kind, (count, size) in plan.collectives.items())
    parts = ", ".join(f"{part} {share:.0%}" for part, share in list(plan.parts.items())[:8])
    cycles = "" if math.isnan(plan.cycles) else f" and {plan.cycles / 1e6:.1f}M cycles"
    return (
        f"{plan.stage} on {plan.topology}, {_mesh(plan)}, batch size {plan.batch_size}, {plan.parameters / 1e6:.1f}M "
        f"parameters: {plan.arguments / 1e9:.2f} GB of arguments and {plan.temporaries / 1e9:.2f} GB of temporaries; "
        f"{plan.flops / 1e12:.2f} TFLOP a chip and step ({plan.model_flops / 1e12:.2f} without recomputation); "
        f"{plan.compiler_seconds:.4f} s{cycles} by the compiler, {plan.link_seconds:.4f} s of links, "
        f"{plan.frozen_seconds:.4f} s of frozen networks; exchanges: {exchanges or 'none'}; time by part: "
        f"{parts or 'unknown'}"
    )


def _flags(plan: Plan) -> str:
    return f', with LIBTPU_INIT_ARGS="{plan.compiler_flags}"' if plan.compiler_flags else ""


def _row(plan: Plan) -> tuple[str, ...]:
    known = plan.step_seconds > 0 and plan.step_seconds == plan.step_seconds
    number = lambda value, form: format(value, form) if known else "-"  # noqa: E731
    return (
        plan.stage,
        plan.topology,
        str(plan.chips),
        _mesh(plan),
        str(plan.batch_size),
        f"{plan.peak / 1e9:.1f} of {plan.hbm / 1e9:.0f}",
        "yes" if plan.fits else "no",
        number(plan.roofline_utilization, ".2f"),
        number(plan.model_utilization, ".2f"),
        number(plan.step_seconds, ".3g"),
        number(1 / plan.step_seconds if known else 0.0, ".3g"),
        number(plan.days, ".1f"),
        number(plan.chip_hours, ",.0f"),
        f"{plan.sent / 1e9:.3g} / {plan.minimum / 1e9:.3g}" if known else "-",
        plan.method,
    )


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1 chip"
