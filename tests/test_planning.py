"""The planner without the TPU compiler, which `tests/tpu_compile.py` runs: names, texts of programs, sums, tables."""

import dataclasses
import json
import math
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import cli, plan
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.transforms import Select
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.ncsnpp import NCSNpp
from ddpm_jax.models.transformer import Transformer
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.chips import find_chip
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.planning import blocks, report
from ddpm_jax.planning import plan as planning
from ddpm_jax.planning.blocks import find_blocks, measure_blocks
from ddpm_jax.planning.measure import Cost, _fingerprint, _needed_memory
from ddpm_jax.planning.plan import Plan, _least_exchange, default_meshes, parse_mesh
from ddpm_jax.planning.program import Program
from ddpm_jax.planning.topology import parse_topology
from ddpm_jax.training import DiffusionTask, Images, Stage, Training
from ddpm_jax.training.flops import count_flops
from ddpm_jax.training.lowered import LoweredStage, lower_stage

PROGRAM = """HloModule jit_update, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter.2 (input_0: bf16[16,64]) -> bf16[2,64] {
  %input_0 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.11 = bf16[16,64]{1,0:T(8,128)(2,1)} all-reduce(%input_0), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[2,64]{1,0} dynamic-slice(%all-reduce.11), dynamic_slice_sizes={2,64}
}

%fused (v: bf16[2,64]) -> bf16[16,64] {
  %v = bf16[2,64]{1,0} parameter(0)
  ROOT %gathered = bf16[16,64]{1,0} all-gather(%v), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} multiply(%x, %x), backend_config={"window_config":{"estimated_cycles":"100"}}, metadata={op_name="jit(update)/jvp(Net)/block_0/mul"}
  %shared = f32[8]{0} all-reduce(%y), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], f32[8]{0}) tuple(%x, %shared)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (w: bf16[2,64], g: bf16[16,64], s: (s32[], f32[8])) -> bf16[2,64] {
  %w = bf16[2,64]{1,0} parameter(0)
  %g = bf16[16,64]{1,0} parameter(1)
  %s = (s32[], f32[8]{0}) parameter(2)
  %beside = bf16[16,64]{1,0} fusion(%w), kind=kCustom, calls=%fused
  %all-gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), channel_id=2, replica_groups=mesh['axis_0'=1,'axis_2'=8,'axis_4'=8], device_ids=([8,8]T(1,0)) {'axis_2'}, dimensions={0}
  %fusion.3 = bf16[2,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.2
  %start = (bf16[2,64]{1,0}, bf16[2,64]{1,0}, u32[], u32[]) collective-permute-start(%w), source_target_pairs={{0,1},{1,0}}
  %done = bf16[2,64]{1,0} collective-permute-done(%start)
  %loop = (s32[], f32[8]{0}) while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = bf16[2,64]{1,0} add(%w, %fusion.3), backend_config={"window_config":{"estimated_cycles":"300"}}, metadata={op_name="jit(update)/out_conv/add"}
}
"""  # noqa: E501 (as the compiler writes it)


@pytest.mark.parametrize(
    "text,name,chips,accelerator",
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, "v5p-128"),
        ("v5p-128", "v5p:4x4x4", 64, "v5p-128"),
        ("v4-64", "v4:2x4x4", 32, "v4-64"),
        ("v5e-64", "v5e:8x8", 64, "v5litepod-64"),
        ("v5litepod-16", "v5e:4x4", 16, "v5litepod-16"),
        ("v6e:4x8", "v6e:4x8", 32, "v6e-32"),
        ("v5p-512", "v5p:4x8x8", 256, "v5p-512"),
    ],
)
def test_a_slice_has_two_names(text, name, chips, accelerator):
    topology = parse_topology(text)
    assert (topology.name, topology.chips, topology.accelerator_type) == (name, chips, accelerator)


@pytest.mark.parametrize(
    "text", ["v5p:3x3x3", "v5p:4x4", "v5p:8x4x4", "v5e:3x8", "v6e-65", "v9:2x2", "v5p", "", "v5p:4x4x"]
)
def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(text):
    with pytest.raises(ValueError, match=r"does not exist: .*, as (in )?v"):
        parse_topology(text)


def test_the_program_refuses_a_slice_before_any_computation():
    plan.FLAGS(["plan", "--config=configs/unclip.py:smoke", "--topology=v5p:3x3x3"])
    with pytest.raises(cli.UsageError, match="topology 'v5p:3x3x3' does not exist: slices of v5p are 2x2x1"):
        plan.main()


def test_the_program_refuses_a_stage_without_a_sampler_before_any_computation():
    plan.FLAGS.unparse_flags()
    plan.FLAGS["topology"].unparse()
    plan.FLAGS(["plan", "--config=configs/unclip.py:smoke", "--topology=v5p:2x2x1", "--sampler", "--stage=clip"])
    with pytest.raises(cli.UsageError, match="--sampler: stage clip has nothing to sample"):
        plan.main()


def test_collectives_are_read_from_the_text_of_a_program():
    """The bytes of the formulas: an array of 16 x 64 bfloat16 over 8 chips, and 5 times 8 float32 over 4."""
    found = {each.kind: (each.bytes, each.group, each.times) for each in Program(PROGRAM).collectives()}
    assert found == {
        "all-gather": (2048 * 7 / 8, 8, 1),
        "reduce-scatter": (2048 * 7 / 8, 8, 1),
        "collective-permute": (256, 2, 1),
        "all-reduce": (2 * 32 * 3 / 4, 4, 5),
    }


def test_the_cycles_of_a_loop_count_as_often_as_it_runs():
    program = Program(PROGRAM)
    assert program.loop_factor() == (300 + 5 * 100) / 400
    assert program.cycles_by_source() == {"block_0/mul": 500, "out_conv/add": 300}


def test_a_loop_runs_up_to_the_constant_of_its_condition():
    """As libtpu writes the loops of `jax.lax.scan`, without a note."""
    condition = """%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="jit(update)/while/cond/lt"}
}"""
    start = PROGRAM.index("%condition (p")
    text = PROGRAM[:start] + condition + PROGRAM[PROGRAM.index("}\n", start) + 1 :]
    text = text.replace(', backend_config={"known_trip_count":{"n":"5"}}', "").replace(
        "jvp(Net)/block_0", "while/body/closed_call/block_0"
    )
    assert Program(text).cycles_by_source() == {"block_0/mul": 700, "out_conv/add": 300}


def test_a_program_that_is_too_large_says_what_it_needs():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.50G of 15.75G hbm. Exceeded by 9.75G."
    assert _needed_memory(message) == 25.5 * 2**30
    message = "Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G) exceeds available HBM"
    assert _needed_memory(message) == 2**35
    assert _needed_memory("INTERNAL: something else") is None


def test_flops_are_those_of_products_convolutions_and_loops():
    x, w, kernel = jnp.zeros((4, 6)), jnp.zeros((6, 5)), jnp.zeros((3, 3, 6, 7))

    def function(x, w, kernel):
        total = jax.lax.scan(lambda carry, _: (carry + (x @ w).sum(), None), 0.0, length=3)[0]
        image = x.reshape(1, 2, 2, 6)
        convolved = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return total + jax.checkpoint(jnp.sum)(convolved)

    assert count_flops(function, x, w, kernel) == 3 * 2 * 4 * 6 * 5 + 2 * 2 * 2 * 9 * 6 * 7


def test_equal_blocks_of_a_network_are_found():
    """Two levels of two blocks, with attention at the second."""
    unet = UNet(8, 3, (1, 1), 2, (), attention_levels=(1,), head_channels=4, groups=4, remat=True, dtype=jnp.bfloat16)
    x, t = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    params = jax.eval_shape(unet.init, jax.random.key(0), x, t)
    calls = find_blocks(lambda params, x, t: unet.apply(params, x, t), (params, x, t))
    names = [call.name for call in calls]
    assert len(names) == 2 * 2 + 1 + 2 + 2 * 3 + 1 + (2 + 1 + 3)
    by_name = {call.name: call for call in calls}
    assert by_name["down_0_0"].key() == by_name["down_0_1"].key() != by_name["down_1_0"].key()
    assert by_name["down_1_0"].key() == by_name["mid_1"].key()
    assert by_name["down_0_0"].remat is True


def test_the_blocks_of_ncsnpp_are_found():
    """Two levels of one block in the encoder and two in the decoder, one between levels each way, two in the middle."""
    network = NCSNpp(8, channel_mult=(1, 1), num_res_blocks=1, attention_levels=())
    x, t = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), x, t)
    calls = find_blocks(lambda params, x, t: network.apply(params, x, t), (params, x, t))
    kinds = [type(call.module).__name__ for call in calls]
    assert kinds.count("ResBlockPP") == 2 + 4 + 2 + 2 and kinds.count("AttentionBlock") == 1 and len(kinds) == 11


def test_the_costs_of_blocks_are_added_up(monkeypatch):
    """Of 3 equal layers, whose two programs, forward and backward, take 1 and 1 s; half of the batch is on a chip."""
    seen = []

    def measured(lowered, chip, *, cache, fast):
        assert not fast
        seen.append([leaf.shape for leaf in jax.tree.leaves(lowered.in_avals) if len(leaf.shape) == 3])
        return Cost(temporaries=100.0, peak=0.0, flops=10.0, bytes=20.0, seconds=1.0, compile_seconds=5.0)

    monkeypatch.setattr(blocks, "measure", measured)
    network = Transformer(3, 2, remat=True)
    x = jax.ShapeDtypeStruct((4, 5, 8), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), x)
    cost, by_name = measure_blocks(
        lambda params, x: network.apply(params, x).sum(),
        (params, x),
        jax.devices()[0],
        find_chip("TPU v5"),
        batch_size=4,
        shards=2,
    )
    assert seen == [[(2, 5, 8)], [(2, 5, 8)] * 2]  # the backward program also has the gradient of the result
    assert list(by_name) == ["block_0"] and by_name["block_0"][0] == 3
    assert (cost.seconds, cost.flops, cost.bytes, cost.compile_seconds) == (6.0, 60.0, 120.0, 10.0)
    assert cost.temporaries == 3 * (2 * 5 * 8 * 4) + 100  # the inputs of all blocks, and what one needs


def test_a_scanned_transformer_is_one_block():
    network = Transformer(3, 2, scan=True)
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), x)
    calls = find_blocks(lambda params, x: network.apply(params, x), (params, x))
    assert [type(call.module) for call in calls] == [Transformer]
    assert isinstance(calls[0].module, nn.Module)


@pytest.fixture(scope="module")
def lowered():
    """A stage of a network with one large weight, on 2 x 4 devices, which split the weight 4 ways."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, xt, t, *, train=False):
            h = nn.Dense(1024, dtype=jnp.bfloat16, name="wide")(xt.reshape(len(xt), -1))
            return h[:, : 4 * 4 * 3].reshape(xt.shape).astype(jnp.float32)

    stage = Stage(
        name="toy",
        task=DiffusionTask(model=Network(), diffusion=Diffusion("cosine", 10), x0=Images(4)),
        source=open_source("zeros:image=4x4"),
        transforms=(Select(("image",)),),
        training=Training(batch_size=16, num_steps=10, learning_rate=1e-3),
    )
    return lower_stage((stage,), "toy", make_mesh({"data": 2, "fsdp": 4}))


def test_the_step_of_a_stage_is_lowered_without_computing_it(lowered):
    text = lowered.lower_step().as_text()
    assert "jax.buffer_donor" in text or "tf.aliasing_output" in text
    assert lowered.lower_prepare() is None
    assert count_flops(*lowered.loss()[:1], *lowered.loss()[1]) == 2 * 16 * 48 * 1024
    with pytest.raises(ValueError, match="stage toy has no sampler"):
        lowered.lower_sampler(None)


def test_the_operations_of_a_sampler_are_those_of_all_its_steps(lowered):
    sample, args = lowered.sampler(Sampling("ddim", "5"))
    assert count_flops(sample, *args) == 5 * 2 * 16 * 48 * 1024
    assert "while" in lowered.lower_sampler(Sampling("ddim", "5")).as_text()


def test_the_least_exchange_is_that_of_each_weight_once(lowered):
    """48 x 1024 bfloat16 in 4 parts, of which there are 2 copies each; 1024 biases are whole on 8 chips."""
    weight, bias = 48 * 1024 * 2, 1024 * 2
    assert _least_exchange(lowered) == {
        "all-gather": (1, weight * 3 / 4),
        "reduce-scatter": (1, weight * 3 / 4),
        "all-reduce": (2, 2 * weight / 4 * 1 / 2 + 2 * bias * 7 / 8),
    }


@pytest.mark.parametrize("accumulate", [1, 4])
def test_micro_batches_in_the_sum_of_blocks(lowered, monkeypatch, accumulate):
    """Each of them gathers weights and sums gradients; a block has a part of one, and the frozen networks stay."""
    seen, topology = [], parse_topology("v5p:2x2x2")
    training = dataclasses.replace(lowered.stage.training, accumulate=accumulate)
    frozen = {"clip": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    lowered = dataclasses.replace(lowered, stage=lowered.stage.replace(training=training), frozen=frozen)

    def measured(loss, args, device, chip, *, batch_size, shards, **options):
        seen.append((batch_size, shards))
        return Cost(temporaries=100.0, flops=10.0, bytes=20.0, seconds=1.0, compile_seconds=5.0), {}

    monkeypatch.setattr(planning, "measure_blocks", measured)
    monkeypatch.setattr(LoweredStage, "lower_prepare", lambda self: None)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a=1")
    found = planning.plan_training(lowered, topology, method="blocks")
    least = _least_exchange(lowered)
    assert seen == [(lowered.stage.training.batch_size, 8 * accumulate)]
    assert found.examples == lowered.stage.training.batch_size // (8 * accumulate)
    assert not found.convolves and found.compiler_flags == "--a=1"
    assert found.flops == 10.0 * accumulate and found.compiler_seconds >= accumulate
    assert found.collectives == {kind: (accumulate * n, accumulate * size) for kind, (n, size) in least.items()}
    state = found.arguments - 4000
    assert state == sum(planning._local_size(leaf) for leaf in jax.tree.leaves((lowered.state, lowered.batch)))
    assert found.peak == found.arguments + found.temporaries


def test_results_of_another_topology_are_not_taken(monkeypatch):
    """Exchanges of the same program depend on the torus."""
    monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
    program, chip = jax.jit(lambda x: x + 1).lower(1.0), find_chip("TPU v5")
    keys = {_fingerprint(program, chip, False, name) for name in ("", "v5p:4x4x16", "v5p:4x8x8")}
    assert len(keys) == 3


def test_results_of_other_flags_of_the_compiler_are_not_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
    program, chip = jax.jit(lambda x: x + 1).lower(1.0), find_chip("TPU v5")
    keys = set()
    for libtpu, xla in (("", ""), ("--a=false", ""), ("--a=true", ""), ("", "--a=false")):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", libtpu)
        monkeypatch.setenv("XLA_FLAGS", xla)
        keys.add(_fingerprint(program, chip, False))
    assert len(keys) == 4
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert _fingerprint(program, chip, False) in keys  # as without flags


def a_plan(**changes):
    chip = find_chip("TPU v5")
    fields = {"stage": "base", "topology": "v5p:4x4x4", "accelerator_type": "v5p-128", "chips": 64}
    fields |= {"mesh": {"data": 4, "fsdp": 16}, "batch_size": 2048, "num_steps": 864_000, "method": "whole"}
    fields |= {"examples": 32, "convolves": True, "compiler_flags": "", "cycles": math.nan}
    fields |= {"parameters": 10**9, "arguments": 1e10, "temporaries": 2e10, "peak": 3e10, "hbm": chip.hbm_bytes}
    fields |= {"fits": True, "flops": 2e14, "model_flops": 1.5e14, "compiler_seconds": 0.8, "link_seconds": 0.2}
    fields |= {"frozen_seconds": 0.0, "roofline_utilization": 0.5, "model_utilization": 0.4, "collectives": {}}
    fields |= {"sent": 1e9, "minimum": 9e8, "compile_seconds": 60.0, "parts": {"unet/up_0_0": 0.25}}
    return Plan(**fields | changes)


def test_days_and_chip_hours():
    found = a_plan()
    assert (found.step_seconds, found.days, found.chip_hours) == (1.0, 10.0, 10 * 24 * 64)
    assert json.loads(json.dumps(found.to_json()))["days"] == 10.0


def test_few_examples_of_a_chip_are_noted():
    plans = [a_plan(), a_plan(examples=4), a_plan(examples=4, mesh={"data": 64}), a_plan(stage="up", examples=7)]
    lines = report.notes([*plans, a_plan(examples=8), a_plan(examples=1, convolves=False)]).splitlines()
    assert [line.partition(" at a time")[0] for line in lines] == [
        "note: base on v5p:4x4x4: a batch of 4 on each chip",
        "note: up on v5p:4x4x4: a batch of 7 on each chip",
    ]
    off = [f"--xla_tpu_run_space_to_batch{end}=false" for end in ("", "_on_new_platforms")]
    assert f'LIBTPU_INIT_ARGS="{" ".join(off)}"' in lines[0]
    noted = lambda flags: report.notes([a_plan(examples=4, compiler_flags=flags)]) != ""  # noqa: E731
    assert not noted(f"{off[1]} --a=1 {off[0]}")
    assert noted(off[0]) and noted(off[1])  # one of them alone changes nothing
    assert noted(" ".join(off).replace("false", "true"))


def test_flags_of_the_compiler_are_a_part_of_the_suggestion():
    (line,) = report.suggestions([a_plan(compiler_flags="--a=1")]).splitlines()
    assert line.endswith(', with LIBTPU_INIT_ARGS="--a=1"')
    assert "LIBTPU" not in report.suggestions([a_plan()])


def test_the_cheapest_plan_that_fits_is_suggested():
    plans = [
        a_plan(topology="cheap but too small", compiler_seconds=0.1, fits=False),
        a_plan(topology="v5p:4x4x8", chips=128, compiler_seconds=0.5),
        a_plan(topology="v5p:4x4x4"),
        a_plan(stage="other", fits=False, peak=2e11),
        a_plan(stage="unknown", compiler_seconds=math.nan, fits=False),
    ]
    assert [each.topology for each in report.suggest(plans)] == ["v5p:4x4x4"]
    text = report.suggestions(plans)
    assert "base: cheapest that fits is v5p:4x4x4 (v5p-128) with --config.mesh.data=4 --config.mesh.fsdp=16" in text
    assert "other: nothing of this fits; the least is 200.0 GB a chip" in text


def test_the_cheapest_sampler_is_that_of_the_fewest_chip_hours_an_image():
    small = a_plan(method="sampler", num_steps=1, batch_size=64, compiler_seconds=0.8)  # and 0.2 of links
    large = dataclasses.replace(small, batch_size=256, compiler_seconds=1.8)
    assert report.suggest([small, large]) == [large]
    # 256 images in 2 s on 64 chips
    assert "at batch size 256: 128 samples/s, 139 chip-hours for a million" in report.suggestions([small, large])


def test_batch_sizes_are_compared_by_the_price_of_an_image():
    small = a_plan(batch_size=64, compiler_seconds=0.8)
    large = dataclasses.replace(small, batch_size=256, compiler_seconds=1.8)  # 4 times the images in twice the time
    assert report.suggest([small, large]) == [large]
    assert f"for {large.num_steps * 256:,} images, the fewest an image" in report.suggestions([small, large])


def test_the_table_has_a_line_for_each_plan():
    lines = report.table([a_plan(), a_plan(compiler_seconds=math.nan, fits=False)]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "data 4 x fsdp 16" in lines[2] and " 10.0 " in lines[2] and " no " in lines[3]
    assert "unet/up_0_0 25%" in report.details(dataclasses.replace(a_plan()))
    assert "0.8000 s by the compiler" in report.details(a_plan())
    assert "0.8000 s and 66.2M cycles by the compiler" in report.details(a_plan(cycles=66_155_288.0))


def test_meshes():
    assert parse_mesh("data=-1,fsdp=16") == {"data": -1, "fsdp": 16}
    for wrong in ("model=4", "data=--1", "data=²", "data=0", "data=4,data=2", "data"):
        with pytest.raises(ValueError, match="must name axes out of data, fsdp, tensor"):
            parse_mesh(wrong)
    topology = parse_topology("v5p:2x4x4")
    assert default_meshes({"data": -1, "fsdp": 1, "tensor": 1}, topology) == [
        {"data": 32, "fsdp": 1},
        {"data": -1, "fsdp": 8},
        {"data": -1, "fsdp": 16},
        {"data": -1, "fsdp": 32},
    ]
    assert default_meshes({"data": -1, "fsdp": 4}, topology) == [{"data": -1, "fsdp": 4}]


def test_records_of_zeros():
    source = open_source("zeros:image=4x6,labels=3,captions,z_image=float32[2,5]")
    record = source[7]
    assert record["image"].shape == (4, 6, 3) and record["image"].dtype == np.uint8 and not record["image"].any()
    assert record["label"] == 0 and record["caption"] == "an image" and source.class_names == ("0", "1", "2")
    assert record["z_image"].shape == (2, 5) and record["z_image"].dtype == np.float32
    with pytest.raises(IndexError):
        source[len(source)]
    assert source.fingerprint() != open_source("zeros:image=4x4").fingerprint()


@pytest.mark.parametrize(
    "spec", ["", "labels=3", "image=4", "image=4x4,labels=0", "image=4x4,z=number[3]", "image=4x4,x"]
)
def test_records_of_zeros_need_a_form(spec):
    with pytest.raises(ValueError, match="an example is zeros:image=256x256"):
        open_source(f"zeros:{spec}")
