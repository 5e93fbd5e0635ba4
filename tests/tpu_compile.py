"""Check the planner with the TPU's compiler: `python tests/tpu_compile.py [CHECK ...]`, with ddpm_jax[plan].

It needs no TPU, and is not a part of the suite, since libtpu is large and compiling takes minutes. Checks that FSDP
compiles to all-gathers, reduce-scatters and all-reduces, which send at most 1.15 times the least; that whole step and
sum of blocks agree; that a program that is too large is reported with what it needs; that a sampler takes longer the
more steps it makes; and that every mesh of a slice can be made. A check is named as in `CHECKS`; all by default.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")

from ddpm_jax.diffusion.sampling import Sampling  # noqa: E402 (after the choice of the platform)
from ddpm_jax.parallel.mesh import make_mesh  # noqa: E402
from ddpm_jax.planning.measure import measure  # noqa: E402
from ddpm_jax.planning.plan import lower_for, plan_sampler, plan_training  # noqa: E402
from ddpm_jax.planning.topology import parse_topology, topology_devices  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "configs"))
import adm  # noqa: E402


def stages(size: int, channels: int, blocks: int = 2):
    """Return the stages of ADM with one level and no patches."""
    config = adm.get_config()
    config.data.path = f"zeros:image={size}x{size},labels=10"
    config.image_size = size
    config.base.unet.update(channels=channels, channel_mult=(1,), num_res_blocks=blocks)
    config.base.attention_resolutions = config.classifier.attention_resolutions = (size,)
    config.classifier.channel_mult = (1,)
    return adm.stages(config)


def check_meshes() -> None:
    for name in ("v5p:4x4x4", "v4:2x4x4", "v5e:8x8", "v6e:4x8"):
        topology = parse_topology(name)
        devices = topology_devices(topology)
        assert len(devices) == topology.chips
        for fsdp in (2, 4, 8, 16, topology.chips):
            assert make_mesh({"data": -1, "fsdp": fsdp, "tensor": 1}, devices=devices).shape["fsdp"] == fsdp


def check_fsdp() -> None:
    topology = parse_topology("v5p:4x4x4")
    lowered = lower_for(stages(8, 256), "base", topology, [{"data": 4, "fsdp": 16}], 64)[0]
    plan = plan_training(lowered, topology, method="whole", show=print)
    print(f"collectives {plan.collectives}: {plan.sent / plan.minimum:.3f} of the least")
    assert set(plan.collectives) <= {"all-gather", "reduce-scatter", "all-reduce"}, plan.collectives
    assert "reduce-scatter" in plan.collectives
    assert plan.sent <= 1.15 * plan.minimum


def check_blocks() -> None:
    topology = parse_topology("v5p:2x2x1")
    lowered = lower_for(stages(16, 128, 1), "base", topology, [{"data": 4}], 32)[0]
    whole, blocks = (plan_training(lowered, topology, method=method, show=print) for method in ("whole", "blocks"))
    for name in ("compiler_seconds", "flops", "peak"):
        a, b = getattr(whole, name), getattr(blocks, name)
        print(f"{name}: whole {a:.4g}, blocks {b:.4g}, {b / a - 1:+.1%}")
        assert abs(b / a - 1) < (1.0 if name == "peak" else 0.35)


def check_too_large() -> None:
    topology = parse_topology("v5e:2x2")
    device = topology_devices(topology)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32, sharding=place)
    cost = measure(jax.jit(lambda x: x + 1).lower(x), topology.chip)
    print(dataclasses.replace(cost, parts={}))
    assert not cost.fits and cost.peak >= 2 * 2**34


def check_sampler() -> None:
    topology = parse_topology("v5p:2x2x1")
    lowered = lower_for(stages(16, 64, 1), "base", topology, [{"data": 4}], 32)[0]
    few, many = (plan_sampler(lowered, topology, Sampling("ddim", steps), show=print) for steps in ("5", "50"))
    print(f"5 steps {few.compiler_seconds:.3g} s, 50 steps {many.compiler_seconds:.3g} s; FLOPs {many.flops:.4g}")
    assert 5 < many.compiler_seconds / few.compiler_seconds < 11
    assert abs(many.flops / many.model_flops - 1) < 0.25


CHECKS = {"meshes": check_meshes, "too_large": check_too_large, "sampler": check_sampler}
CHECKS |= {"fsdp": check_fsdp, "blocks": check_blocks}

if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        print(name, flush=True)
        begin = time.perf_counter()
        CHECKS[name]()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
