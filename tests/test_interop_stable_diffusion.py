"""Stable Diffusion in diffusers' layout: diffusers' own outputs of networks and pipelines, and the way back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights
from safetensors.numpy import save_file

from ddpm_jax import RecordedNoise, respace
from ddpm_jax.data.tokenizer import ClipTokenizer
from ddpm_jax.errors import LoadError
from ddpm_jax.interop import ReadError, stable_diffusion
from ddpm_jax.interop.diffusers_layout import OLD_NAMES
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.pipelines.converted import pipeline_of
from ddpm_jax.pipelines.stable_diffusion import StableDiffusion, open_stable_diffusion

REFERENCE = np.load(Path(__file__).parent / "data" / "stable_diffusion.npz")
AUTOENCODER = Autoencoder(32, (1, 2), 1, scale=0.2)


def weights(name):
    return random_weights(json.loads(str(REFERENCE[f"shapes/{name}"])))


def config(name):
    return json.loads(str(REFERENCE[f"config/{name}"]))


def given(name):
    array = REFERENCE[name]
    return jnp.asarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


def same(one, other):
    assert set(one) == set(other)
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array, err_msg=name)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def test_the_autoencoder():
    reference = weights("autoencoder")
    assert stable_diffusion.autoencoder_of(config("autoencoder")) == AUTOENCODER
    params = stable_diffusion.load_autoencoder(reference, AUTOENCODER)
    run = lambda method: fast_jit(lambda p, x: AUTOENCODER.apply({"params": p}, x, method=method))
    mean, std = run("encode")(params, given("picture"))
    np.testing.assert_allclose(mean, given("out/mean"), atol=2e-5)
    np.testing.assert_allclose(std, given("out/std"), atol=2e-5)
    np.testing.assert_allclose(run("decode")(params, given("z")), given("out/decode"), atol=2e-5)
    same(stable_diffusion.export_autoencoder(params, AUTOENCODER), reference)
    with pytest.raises(
        ValueError, match=r"images have shape \(1, 15, 16, 3\); height and width must be multiples of 2"
    ):
        jax.eval_shape(AUTOENCODER.init, jax.random.key(0), jnp.zeros((1, 15, 16, 3)))


@pytest.mark.parametrize("flat", [True, False])
def test_the_old_names_of_its_attention(flat):
    """As dense layers (diffusers before 0.17) and as convolutions."""
    reference, old = weights("autoencoder"), {}
    for name, array in reference.items():
        for before, now in OLD_NAMES.items():
            if f"attentions.0.{now}." in name:
                name = name.replace(f".{now}.", f".{before}.")
                array = array if flat or array.ndim == 1 else array[..., None, None]
        old[name] = array
    assert set(old) != set(reference)
    params = stable_diffusion.load_autoencoder(old, AUTOENCODER)
    same(stable_diffusion.export_autoencoder(params, AUTOENCODER), reference)


@pytest.mark.parametrize("name", ["unet1", "unet2"])
def test_the_unet(name):
    """With equal heads and convolutions around attention, as version 1 has it, and as version 2 has it."""
    reference = weights(name)
    model = stable_diffusion.unet_of(config(name))
    assert (model.heads, model.head_channels) == ((4, 8) if name == "unet1" else (None, 16))
    params = stable_diffusion.load_unet(reference, model, context_width=24)
    run = fast_jit(lambda p, xt, t, context: model.apply({"params": p}, xt, t, None, context))
    ours = run(params, given("xt"), given("t"), given("context"))
    np.testing.assert_allclose(ours, given(f"out/{name}"), atol=2e-5)
    same(stable_diffusion.export_unet(params, model, linear_projection=name == "unet2"), reference)


@pytest.mark.parametrize("prefix", [True, False])
def test_the_text_encoder(prefix):
    """With the names of published files, and of transformers 5."""
    reference = weights("text")
    file = {name if prefix else name.removeprefix("text_model."): array for name, array in reference.items()}
    file["text_model." * prefix + "embeddings.position_ids"] = np.arange(12)[None]
    model, params = stable_diffusion.load_text_encoder(file, head_width=8)
    ours = fast_jit(lambda p, tokens: model.apply({"params": p}, tokens))(params, given("tokens"))
    np.testing.assert_allclose(ours, given("out/text"), atol=2e-5)
    same(stable_diffusion.export_text_encoder(params, model), reference)


def directory(path, name="unet1", **schedule):
    """Write a directory as diffusers does."""
    parts = {"vae": "autoencoder", "unet": name, "text_encoder": "text"}
    for part, reference in parts.items():
        (path / part).mkdir(parents=True)
        save_file(weights(reference), path / part / "diffusion_pytorch_model.safetensors")
        text = config({"vae": "autoencoder", "unet": name}.get(part, part))
        (path / part / "config.json").write_text(json.dumps(text))
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config("scheduler") | schedule))
    return path


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": False}


@pytest.mark.parametrize("drawn", ["unet1", "unet2", "zero"])
def test_the_pipeline(tmp_path, drawn):
    """Five steps with guidance from recorded noise, the first version predicting eps and the second v.

    The third time from pure noise, at trailing timesteps, ending at the noise of t = 0.
    """
    name = "unet1" if drawn == "unet1" else "unet2"
    kind = "epsilon" if name == "unet1" else "v_prediction"
    schedule = {"prediction_type": kind} | (ZERO_SNR if drawn == "zero" else {})
    pipeline = open_stable_diffusion(directory(tmp_path, name, **schedule))
    assert (pipeline.image_size, pipeline.prediction) == (16, "eps" if name == "unet1" else "v")
    noise = jnp.zeros((2, 6, *given("noise").shape[1:])).at[:, 0].set(given("noise"))
    process = respace(pipeline.process, pipeline.timesteps(5))

    @fast_jit
    def draw(params, keys):
        p = pipeline.replace(params=params)
        text, nothing = p.encode_text(given("tokens")), p.encode_text(given("empty"))
        return p.decode(p.sample_latents(process, text, nothing, keys, scale=3.0))

    ours = draw(pipeline.params, RecordedNoise(noise)) / 2 + 0.5
    theirs = REFERENCE[f"drawn/{drawn}"]
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize("case", [name for name in REFERENCE.files if name.startswith("timesteps/")])
def test_timesteps_are_those_of_the_scheduler(case):
    _, spacing, offset, steps = case.split("/")
    schedule = config("scheduler") | {"timestep_spacing": spacing, "steps_offset": int(offset)}
    pipeline = empty_pipeline(stable_diffusion.process_of(schedule), **stable_diffusion.sampling_of(schedule))
    assert pipeline.timesteps(int(steps)) == REFERENCE[case][::-1].tolist()


def empty_pipeline(process, **options):
    return StableDiffusion(params={}, process=process, text=None, unet=None, autoencoder=None, **options)


def test_the_betas_of_the_scheduler():
    """Rescaled to zero terminal SNR as diffusers does, in float32 there; and given as a list."""
    process = stable_diffusion.process_of(config("scheduler") | {"rescale_betas_zero_snr": True})
    np.testing.assert_allclose(process.alpha_bar, REFERENCE["alpha_bar/zero"], atol=2e-6)
    assert process.alpha_bar[-1] == 0
    betas = np.linspace(1e-4, 0.01, 1000)
    process = stable_diffusion.process_of(config("scheduler") | {"trained_betas": betas.tolist()})
    np.testing.assert_allclose(process.alpha_bar, np.cumprod(1 - betas), rtol=1e-6)
    for changes, message in (
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas has shape \(2,\) for num_train_timesteps=1000"),
        ({"trained_betas": [2.0] * 1000}, "the scheduler's betas do not fit: betas must be inside"),
        ({"trained_betas": "linear"}, "the scheduler's betas do not fit: "),
    ):
        with pytest.raises(ConvertError, match=message):
            stable_diffusion.process_of(config("scheduler") | changes)


@pytest.mark.parametrize(
    "part,field,value",
    [
        *(("autoencoder", *case) for case in (
            ("norm_num_groups", 16), ("act_fn", "gelu"), ("shift_factor", 0.1), ("latents_mean", [0.0] * 4),
            ("latents_std", [1.0] * 4), ("mid_block_add_attention", False), ("use_quant_conv", False),
            ("out_channels", 4), ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        )),
        *(("unet1", *case) for case in (
            ("norm_num_groups", 16), ("center_input_sample", True), ("mid_block_scale_factor", 2), ("freq_shift", 1),
            ("downsample_padding", 0), ("flip_sin_to_cos", False), ("resnet_skip_time_act", True),
            ("resnet_out_scale_factor", 2.0), ("time_embedding_act_fn", "gelu"), ("timestep_post_act", "silu"),
            ("cross_attention_norm", "layer_norm"), ("attention_type", "gated"), ("only_cross_attention", [True] * 3),
            ("up_block_types", ["UpBlock2D"] * 3), ("mid_block_type", None), ("in_channels", 9),
            ("a_new_option", 3), ("conv_in_kernel", 1), ("down_block_types", ["AttnDownBlock2D"] * 3),
        )),
        *(("scheduler", *case) for case in (
            ("thresholding", True), ("clip_sample", True), ("timestep_spacing", "karras"), ("steps_offset", -1),
            ("steps_offset", 1.0), ("set_alpha_to_one", 0), ("use_flow_sigmas", True), ("timestep_scaling", 10.0),
        )),
    ],
)  # fmt: skip
def test_every_field_of_a_config_is_used_or_refused(part, field, value):
    """Fields that would change numbers and no shapes are refused by name."""
    make = {
        "autoencoder": stable_diffusion.autoencoder_of,
        "unet1": stable_diffusion.unet_of,
        "scheduler": lambda config: (stable_diffusion.process_of(config), stable_diffusion.sampling_of(config)),
    }[part]
    make(config(part) | {"a_new_option": False, "_private": 1})
    with pytest.raises(ConvertError, match=f"{field}="):
        make(config(part) | {field: value})


def test_a_network_for_inpainting_is_refused_when_it_is_opened(tmp_path):
    path = directory(tmp_path)
    tensors = weights("unet1")
    kernel = tensors["conv_in.weight"]
    save_file(
        tensors | {"conv_in.weight": np.concatenate([kernel, kernel, kernel[:, :1]], axis=1)},
        path / "unet" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(ConvertError, match="it sees in_channels=9 channels, as U-Nets for inpainting do, and"):
        stable_diffusion.read_stable_diffusion(path)


def test_the_padding_of_the_tokenizer(tmp_path):
    path = directory(tmp_path)
    assert open_stable_diffusion(path).tokenizer.pad == ClipTokenizer.eot
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert open_stable_diffusion(path).tokenizer.pad == 0


def test_numbers_of_a_model_directory_are_checked(tmp_path):
    read = stable_diffusion.read_stable_diffusion(directory(tmp_path))
    schedule = read.metadata["schedule"]
    for change, message in (
        ({"latent_size": 10**9}, "metadata.latent_size=1000000000 must be an integer in"),
        ({"latent_size": 0}, "metadata.latent_size=0 must be an integer in"),
        ({"prediction": "score"}, "metadata.prediction='score' must be 'eps', 'v' or 'x0'"),
        ({"prediction": None}, "metadata lacks the field prediction"),
        ({"schedule": []}, "metadata.schedule must be an object with .* it lacks num_train_timesteps"),
        ({"schedule": schedule | {"num_train_timesteps": 10**9}}, "num_train_timesteps=1000000000 .it must be a whole"),
        ({"schedule": schedule | {"beta_end": -1}}, "metadata.schedule: the scheduler's betas do not fit"),
        ({"schedule": schedule | {"steps_offset": -1}}, "metadata.schedule: .* steps_offset=-1, which must be"),
    ):
        with pytest.raises(LoadError, match=message):
            pipeline_of(read._replace(metadata=read.metadata | change))
    older = {"kind" if name == "prediction" else name: value for name, value in read.metadata.items()}
    assert pipeline_of(read._replace(metadata=older)).prediction == "eps"


def test_what_is_refused(tmp_path):
    path = directory(tmp_path)
    unet = stable_diffusion.unet_of(config("unet1"))
    with pytest.raises(ConvertError, match=r"it lacks mid_block\.attentions\.0\.norm\.bias; it has, unknown .* extra"):
        file = {k: v for k, v in weights("unet1").items() if k != "mid_block.attentions.0.norm.bias"}
        stable_diffusion.load_unet(file | {"extra": np.zeros(3)}, unet, context_width=24)
    with pytest.raises(ConvertError, match="it has class_embed_type='timestep'"):
        stable_diffusion.unet_of(config("unet1") | {"class_embed_type": "timestep"})
    with pytest.raises(ConvertError, match="beta_schedule='cosine' and prediction_type='epsilon'"):
        stable_diffusion.process_of(config("scheduler") | {"beta_schedule": "cosine"})
    with pytest.raises(ConvertError, match="the file is not of CLIP's text encoder: it lacks text_model.emb"):
        stable_diffusion.load_text_encoder(weights("autoencoder"))
    for field, value in (("layers_per_block", 10**7), ("sample_size", None), ("block_out_channels", [])):
        (path / "vae" / "config.json").write_text(json.dumps(config("autoencoder") | {field: value}))
        wanted = "vae" if field != "sample_size" else "unet"
        (path / "unet" / "config.json").write_text(json.dumps(config("unet1") | {field: value}))
        with pytest.raises(
            ReadError, match=f"{wanted}.config.json has {field}=.*, (where whole numbers are between 1|which must have)"
        ):
            stable_diffusion.read_stable_diffusion(path)
        (path / "unet" / "config.json").write_text(json.dumps(config("unet1")))
    (path / "vae" / "config.json").write_text(json.dumps(config("autoencoder")))
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ReadError, match="vae has no weights; they would be called diffusion_pytorch_model.safetensors"):
        stable_diffusion.read_stable_diffusion(path)
    (path / "unet" / "config.json").write_text("{}")
    (path / "vae" / "config.json").write_text("[")
    with pytest.raises(ReadError, match="vae cannot be read as a part of Stable Diffusion"):
        stable_diffusion.read_stable_diffusion(path)


# Millions of parameters: of version 1.5's three files (facts of the released models' configs).
PARAMETERS = {"unet": 859_520_964, "autoencoder": 83_653_863, "text": 123_060_480}


def test_the_published_networks_have_a_table():
    unet, autoencoder = stable_diffusion.UNET(), stable_diffusion.AUTOENCODER()
    text = stable_diffusion.TEXT()
    shapes = {
        "unet": stable_diffusion.unet_shapes(unet, 768),
        "autoencoder": stable_diffusion.autoencoder_shapes(autoencoder),
        "text": stable_diffusion.text_encoder_shapes(text),
    }
    tables = {
        "unet": stable_diffusion.unet_table(unet),
        "autoencoder": stable_diffusion.autoencoder_table(autoencoder),
        "text": stable_diffusion.text_encoder_table(text.layers),
    }
    for name, table in tables.items():
        flat = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes[name])}
        assert sorted(flat) == sorted(entry.ours for entry in table)
        names = [key for entry in table for key in entry.theirs]
        assert len(names) == len(set(names))
        assert sum(leaf.size for leaf in flat.values()) == PARAMETERS[name]
