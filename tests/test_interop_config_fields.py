"""Fields of config.json: of the right class and type, and of the sizes of the weights, or refused in a sentence."""

import json

import pytest
import test_interop_clip
import test_interop_karlo
from safetensors.numpy import save_file
from test_interop_stable_diffusion import config, directory

from ddpm_jax.interop import ReadError, families, karlo, stable_diffusion
from ddpm_jax.interop.config_fields import (
    KARLO_DECODER,
    KARLO_PRIOR,
    KARLO_SCHEDULERS,
    KARLO_TEXT_PROJ,
    KARLO_UPSAMPLER,
    SCHEDULER_DEFAULTS,
    check_fields,
)
from ddpm_jax.interop.table import ConvertError

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("sd"))


def opened(path, part, **changes):
    """Open the directory with changes to one config, and then undo them."""
    file = path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | changes))
    try:
        return stable_diffusion.read_stable_diffusion(path)
    finally:
        file.write_text(before)


# Of a file with 2 layers of width 24, 12 positions and 300 tokens; U-Net with 3 levels.
WRONG = [("text_encoder", *case) for case in (
    ("num_hidden_layers", 1), ("num_hidden_layers", 3), ("max_position_embeddings", 11), ("vocab_size", 3),
    ("intermediate_size", 7), ("hidden_size", 48), ("num_attention_heads", 5), ("num_attention_heads", "3"),
    ("num_attention_heads", True), ("hidden_act", None), ("hidden_act", ["gelu"]), ("model_type", "bert"),
    ("num_hidden_layers", "2"), ("num_hidden_layers", 2.5),
)]  # fmt: skip
WRONG += [("vae", "scaling_factor", value) for value in (None, "0.2", NAN, 0, INF, -1, True, [0.1])]
WRONG += [("vae", *case) for case in (
    ("layers_per_block", 1.0), ("block_out_channels", "abc"), ("block_out_channels", [33, 66]),
    ("latent_channels", "4"), ("_class_name", "AutoencoderTiny"),
)]  # fmt: skip
WRONG += [("unet", "sample_size", value) for value in ([8, 12], 8.0, "8", True, 7, [8, 8, 8], [])]
WRONG += [("unet", "attention_head_dim", value) for value in (4.0, "4", [4, 4], 5, [4, 4, "4"], [[4, 4, 4]])]
WRONG += [("unet", *case) for case in (
    ("layers_per_block", [1, 1, 1]), ("cross_attention_dim", [24, 24, 24]), ("cross_attention_dim", 32),
    ("block_out_channels", "abc"), ("block_out_channels", 32), ("down_block_types", [["DownBlock2D"]] * 3),
    ("down_block_types", None), ("down_block_types", 3), ("up_block_types", 3), ("use_linear_projection", "false"),
    ("use_linear_projection", True), ("_class_name", "FluxTransformer2DModel"), ("out_channels", "4"),
)]  # fmt: skip
WRONG += [("scheduler", *case) for case in (
    ("rescale_betas_zero_snr", "false"), ("rescale_betas_zero_snr", 1), ("prediction_type", ["epsilon"]),
    ("beta_start", None), ("beta_start", "0.1"), ("beta_end", NAN), ("beta_end", True), ("beta_schedule", ["linear"]),
    ("num_train_timesteps", "1000"), ("num_train_timesteps", 1000.0), ("timestep_spacing", ["leading"]),
    ("set_alpha_to_one", "true"), ("_class_name", "FlowMatchEulerDiscreteScheduler"), ("_class_name", "LCMScheduler"),
    ("_class_name", None), ("_class_name", ["DDIMScheduler"]),
)]  # fmt: skip


@pytest.mark.parametrize("part,field,value", WRONG)
def test_a_field_of_another_type_size_or_class_is_refused(path, part, field, value):
    """When the directory is opened, in one sentence that names the field and says nothing untrue of it."""
    with pytest.raises((ConvertError, ReadError), match=f"{field}=") as caught:
        opened(path, part, **{field: value})
    message = str(caught.value)
    assert "\n" not in message
    assert value is not None or "whole numbers" not in message


def test_the_message_has_both_sizes(path):
    with pytest.raises(ConvertError, match="num_hidden_layers=1 where the weights have 2"):
        opened(path, "text_encoder", num_hidden_layers=1)
    with pytest.raises(ConvertError, match=r"sample_size=\[8, 12\] .*images are square"):
        opened(path, "unet", sample_size=[8, 12])
    with pytest.raises(ConvertError, match="sample_size=7, which must be a multiple of 4"):
        opened(path, "unet", sample_size=7)


@pytest.mark.parametrize(
    "part,changes",
    [
        ("text_encoder", {"projection_dim": 512, "model_type": "clip_text_model"}),  # the file has no projection
        ("unet", {"sample_size": [8, 8], "_class_name": "UNet2DConditionModel"}),
        ("vae", {"scaling_factor": 1, "_class_name": "AutoencoderKL"}),
        ("scheduler", {"trained_betas": None, "_class_name": "DDIMScheduler"}),
    ],
)
def test_what_means_the_same_is_read(path, part, changes):
    read = opened(path, part, **changes)
    assert read.metadata["latent_size"] == 8 and read.models["text"].layers == 2


# Of the signatures in diffusers 0.42; a pipeline of Stable Diffusion replaces steps_offset=0 by 1.
SPACED = {"DDIM": "leading", "PNDM": "leading", "DDPM": "leading"} | dict.fromkeys(
    ("LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep",
     "UniPCMultistep", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep"), "linspace",
)  # fmt: skip


def test_a_missing_field_of_a_scheduler_has_the_default_of_its_class():
    assert set(SCHEDULER_DEFAULTS) == {f"{name}Scheduler" for name in SPACED}
    bare = {k: v for k, v in config("scheduler").items() if k not in ("set_alpha_to_one", "steps_offset")}
    for name, spacing in SPACED.items():
        found = stable_diffusion.sampling_of(bare | {"_class_name": f"{name}Scheduler"})
        wanted = {"timestep_spacing": spacing, "steps_offset": 1, "set_alpha_to_one": name != "PNDM"}
        assert found == wanted, name
        said = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
        assert stable_diffusion.sampling_of(bare | said | {"_class_name": f"{name}Scheduler"}) == said


@pytest.mark.parametrize("fields,field,value", [
    (KARLO_PRIOR, "num_layers", "2"), (KARLO_PRIOR, "_class_name", "FluxPrior"), (KARLO_PRIOR, "embedding_dim", None),
    (KARLO_DECODER, "attention_head_dim", [16, 16]), (KARLO_DECODER, "sample_size", 16.0),
    (KARLO_DECODER, "_class_name", "UNet2DModel"), (KARLO_UPSAMPLER, "block_out_channels", 32),
    (KARLO_UPSAMPLER, "_class_name", "UNet2DConditionModel"), (KARLO_TEXT_PROJ, "time_embed_dim", True),
    (KARLO_TEXT_PROJ, "_class_name", "CLIPTextModel"),
    *((KARLO_SCHEDULERS["prior_scheduler"], "clip_sample_range", value) for value in (0, NAN, INF, "5", True, None)),
    (KARLO_SCHEDULERS["decoder_scheduler"], "_class_name", "DDIMScheduler"),
])  # fmt: skip
def test_the_fields_of_karlo_have_kinds_too(fields, field, value):
    with pytest.raises(ConvertError, match=f"it has {field}="):
        check_fields({field: value}, fields, "it is not one of Karlo")


@pytest.fixture(scope="module")
def karlo_path(tmp_path_factory):
    return test_interop_karlo.write_directory(tmp_path_factory.mktemp("karlo"))


@pytest.mark.parametrize("part,field,value", [
    *(("text_encoder", name, 3) for name in ("num_hidden_layers", "vocab_size", "max_position_embeddings")),
    ("text_encoder", "projection_dim", 999), ("text_encoder", "hidden_size", 64), ("image_encoder", "image_size", 24),
    ("image_encoder", "num_hidden_layers", 2), ("prior", "num_layers", 1), ("prior", "embedding_dim", 7),
    ("prior", "time_embed_dim", 7), ("text_proj", "cross_attention_dim", 41), ("text_proj", "time_embed_dim", 7),
    ("decoder", "cross_attention_dim", 41), ("decoder", "sample_size", 15), ("text_encoder", "model_type", "bert"),
])  # fmt: skip
def test_the_sizes_of_karlo_are_those_of_its_weights(karlo_path, part, field, value):
    file = karlo_path / part / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {field: value}))
    try:
        with pytest.raises(ConvertError, match=f"{field}="):
            karlo.read_karlo(karlo_path)
    finally:
        file.write_text(before)


def test_the_sizes_of_a_clip_are_those_of_its_weights(tmp_path):
    """The width of both projections is the one at the top: transformers does not read those of the towers."""
    save_file(test_interop_clip.weights("hf"), tmp_path / "model.safetensors")
    text, vision = ({"hidden_size": n, "num_attention_heads": 4, "projection_dim": 7} for n in (32, 48))
    for changes, message in (
        ({}, None), ({"projection_dim": 999}, "projection_dim=999"),
        ({"text_config": text | {"num_hidden_layers": 9}}, "the text tower .*num_hidden_layers=9 where"),
        ({"vision_config": vision | {"hidden_size": 32}}, "the vision tower .*hidden_size=32 where .* 48"),
        ({"vision_config": vision | {"patch_size": 7}}, "the vision tower .*patch_size=7 where"),
    ):  # fmt: skip
        whole = {"model_type": "clip", "text_config": text, "vision_config": vision} | changes
        (tmp_path / "config.json").write_text(json.dumps(whole))
        if message is None:
            families.FAMILIES["clip"].read(tmp_path, families.Options())
            continue
        with pytest.raises(ConvertError, match=message):
            families.FAMILIES["clip"].read(tmp_path, families.Options())
