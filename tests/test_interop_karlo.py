"""Karlo in diffusers' layout: diffusers' own outputs of networks and of whole pipelines, and the way back."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights
from safetensors.numpy import save_file

from ddpm_jax import (
    RecordedNoise,
    example_keys,
)
from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.interop import ReadError, karlo
from ddpm_jax.interop.clip import end_mask, load_clip
from ddpm_jax.interop.families import FAMILIES, Options
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.clip import normalize
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines import karlo as karlo_pipeline
from ddpm_jax.pipelines.decoding import KarloDecoding, Words

REFERENCE = np.load(Path(__file__).parent / "data" / "karlo.npz")
D, KEYS = 32, example_keys(jax.random.key(0), 1)
SMALL = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}
DECODER = Decoder(UNet(32, 6, attention_levels=(1,), head_channels=16, **SMALL), D, 40)
UPSAMPLER = Upsampler(UNet(32, 3, attention_levels=(), scale_shift=False, mid_attention=False, **SMALL))


def weights(name, seed=0):
    return random_weights(json.loads(str(REFERENCE[f"shapes/{name}"])), seed)


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


def test_the_prior():
    reference = weights("prior")
    prior = karlo.load_prior(reference, heads=2)
    run = fast_jit(lambda p, *inputs: prior.model.apply({"params": p}, *inputs))
    predict = lambda z_text: run(prior.params, given("zt"), given("t"), z_text, given("hidden"), given("mask"))
    z_text = given("z_text")  # as CLIP's projection gives it, which is how diffusers' network takes it
    np.testing.assert_allclose(predict(z_text / D**0.5), REFERENCE["out/prior"], atol=2e-5)
    for other in (z_text, normalize(z_text)):
        assert np.abs(predict(other) - REFERENCE["out/prior"]).max() > 0.05
    same(karlo.export_prior(prior), reference)
    np.testing.assert_array_equal(prior.std, reference["clip_std"][0])


def test_the_decoder_with_and_without_an_image():
    unet, text_proj = weights("decoder"), weights("text_proj")
    params = karlo.load_decoder(unet, text_proj, DECODER, image_size=16)
    run = fast_jit(lambda p, *inputs: DECODER.apply({"params": p}, *inputs))
    z_image, z_text = (given(name) / D**0.5 for name in ("z_image", "z_text"))
    text = z_text, given("hidden"), given("mask")
    for half, keep in enumerate((False, True)):
        ours = run(params, given("xt"), given("t"), z_image, *text, jnp.full(2, keep))
        theirs = REFERENCE["out/decoder"][2 * half : 2 * half + 2].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for other in (lambda z: z, normalize):  # the scales that are documented as wrong
        text = other(given("z_text")), given("hidden"), given("mask")
        ours = run(params, given("xt"), given("t"), other(given("z_image")), *text, jnp.full(2, True))
        assert np.abs(ours - theirs).max() > 0.05
    back = karlo.export_decoder(params, DECODER, image_size=16)
    same(back[0], unet)
    same(back[1], text_proj)


def test_the_upsampler():
    reference = weights("upsampler")
    params = karlo.load_upsampler(reference, UPSAMPLER, image_size=32)
    run = fast_jit(lambda p, *inputs: UPSAMPLER.apply({"params": p}, *inputs))
    ours = run(params, given("large"), given("t"), given("small"))
    np.testing.assert_allclose(ours, REFERENCE["out/upsampler"].transpose(0, 2, 3, 1), atol=2e-5)
    same(karlo.export_upsampler(params, UPSAMPLER, image_size=32), reference)


@pytest.fixture(scope="module")
def pipeline():
    prior = karlo.load_prior(weights("prior"), heads=2)
    text, image = (load_clip(weights(name), head_width=(8, 16)) for name in ("text", "vision"))
    params = {
        "text": text.params,
        "image": image.params,
        "prior": prior.params,
        "decoder": karlo.load_decoder(weights("decoder"), weights("text_proj"), DECODER, image_size=16),
        "first": karlo.load_upsampler(weights("upsampler"), UPSAMPLER, image_size=32),
        "last": karlo.load_upsampler(weights("upsampler", 1), UPSAMPLER, image_size=32),
    }
    return karlo_pipeline.Karlo(
        params=params,
        statistics=(jnp.asarray(prior.mean), jnp.asarray(prior.std)),
        text=text.model,
        image=image.model,
        prior=prior.model,
        decoder=DECODER,
        upsampler=UPSAMPLER,
        sizes=(16, 32),
    )


def recorded(which):
    """Return the noise of every stage: what diffusers drew at its start and in its transitions, none in the last."""
    files = [
        REFERENCE[f"noise/{which}/{i}"] for i in range(sum(f.startswith(f"noise/{which}/") for f in REFERENCE.files))
    ]
    stages = [np.stack([*files[i : i + 3], np.zeros_like(files[i])], axis=1) for i in range(0, len(files), 3)]
    stages = [np.moveaxis(stage, 2, -1) if stage.ndim == 5 else stage for stage in stages]
    return [RecordedNoise(jnp.asarray(stage)) for stage in stages]


@pytest.fixture(autouse=True, scope="module")
def rounded_as_diffusers_does():
    """diffusers keeps its tables in float32, where 1 - alpha_bar of the first step is off by a thousandth."""
    exact, f = Sampling.process, np.float32

    def rounded(self, diffusion):
        process = exact(self, diffusion)
        at = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.array([min(1 - at(t + 1) / at(t), 0.999) for t in range(1000)]).astype(f)
        alpha_bar = np.cumprod(1 - betas, dtype=np.float64).astype(f)
        t = np.asarray(process.timestep_map)
        here, before = alpha_bar[t], np.append(f(1), alpha_bar[t[:-1]])
        beta = 1 - here / before
        beta[0] = betas[0]  # the step before is t = -1
        variance = (1 - before) / (1 - here) * beta
        return process.replace(
            alpha=jnp.asarray(np.sqrt(here)),
            sigma=jnp.asarray(np.sqrt(1 - here)),
            posterior_coef_x0=jnp.asarray(np.sqrt(before) * beta / (1 - here)),
            posterior_coef_xt=jnp.asarray(np.sqrt(1 - beta) * (1 - before) / (1 - here)),
            posterior_log_variance=jnp.asarray(np.log(np.maximum(variance, f(1e-20)))),
            log_betas=jnp.asarray(np.log(beta)),
        )

    Sampling.process = rounded
    yield
    Sampling.process = exact


def text_of(pipeline, captions):
    rows = [[298, *caption.encode(), 299] for caption in captions]
    tokens = jnp.asarray([row + [299] * (12 - len(row)) for row in rows], jnp.int32)
    return pipeline.encode_text(tokens, end_mask(tokens, 299))


def drawn(pipeline, z_image, text, empty, noise):
    images = pipeline.decode(z_image, text, empty, noise[0], steps=3)
    return pipeline.upsample(images, noise[1], steps=3) / 2 + 0.5


def test_the_pipeline_from_captions(pipeline):
    @fast_jit
    def run(noise):
        text, empty = text_of(pipeline, ["a cat", "a tall dog"]), text_of(pipeline, ["", ""])
        z_image = pipeline.sample_embedding(text, empty, noise[0], steps=3)
        return drawn(pipeline, z_image, text, empty, noise[1:])

    images = run(recorded("text"))
    assert REFERENCE["pipeline/text"].std() > 0.1
    np.testing.assert_allclose(images, REFERENCE["pipeline/text"], atol=2e-3)


def test_variations_of_an_image(pipeline):
    """By the interface of the manipulations, which `pipelines.manipulation.variations` samples with."""
    steps = {stage: sampling.with_options(steps=3) for stage, sampling in pipeline.sampling.items()}
    decoding = KarloDecoding(pipeline.replace(sampling=steps))
    tokens = jnp.asarray([[298] + 11 * [299]] * 2, jnp.int32)
    empty = Words(tokens, end_mask(tokens, 299), jnp.ones(2, bool))

    @fast_jit
    def run(noise):
        z_image = decoding.embed(given("picture"))
        images = decoding.decode(z_image, jnp.ones(2, bool), empty, empty, noise[0])
        return decoding.pipeline.upsample(images, noise[1]) / 2 + 0.5

    np.testing.assert_allclose(run(recorded("image")), REFERENCE["pipeline/image"], atol=2e-3)


class Bytes(CompactTokenizer):
    """The tokenizer that the reference implementation was given."""

    pad, sot, eot, vocab_size = 299, 298, 299, 300

    def __init__(self):
        pass

    def ids(self, text):
        return list(text.encode())


PARTS = {
    "text_encoder": "text",
    "image_encoder": "vision",
    "super_res_first": "upsampler",
    "super_res_last": "upsampler",
}
PARTS |= {name: name for name in ("prior", "decoder", "text_proj")}
CONFIGS = {part: json.loads(str(REFERENCE[f"config/{reference}"])) for part, reference in PARTS.items()}
# Parts without weights: what their files are called.
SETTINGS = dict.fromkeys(("prior_scheduler", "decoder_scheduler", "super_res_scheduler"), "scheduler_config.json")
SETTINGS |= {"feature_extractor": "preprocessor_config.json"}


def write_directory(place):
    """Write a directory as diffusers saves one."""
    for name, config in CONFIGS.items():
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text(json.dumps(config))
        file = "model.safetensors" if "encoder" in name else "diffusion_pytorch_model.safetensors"
        save_file(weights(PARTS[name], int(name == "super_res_last")), place / name / file)
    for name, file in SETTINGS.items():
        (place / name).mkdir()
        (place / name / file).write_text(str(REFERENCE[f"config/{name}"]))
    return place


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("karlo"))


def test_a_broken_directory_is_refused(directory, tmp_path):
    with pytest.raises(ReadError, match="it has neither prior nor image_encoder"):
        karlo.read_karlo(tmp_path)
    place = shutil.copytree(directory, tmp_path / "copy")
    (place / "super_res_last" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ReadError, match="super_res_last has no weights; they would be called diffusion_pytorch_model"):
        karlo.read_karlo(place)
    (place / "decoder" / "config.json").write_text(json.dumps({"sample_size": 16}))
    with pytest.raises(ReadError, match="is not of Karlo: it lacks block_out_channels, layers_per_block"):
        karlo.read_karlo(place)
    (place / "decoder" / "config.json").unlink()
    with pytest.raises(ReadError, match="decoder cannot be read as a part of Karlo"):
        karlo.read_karlo(place)


@pytest.mark.parametrize(
    "part,changes",
    [
        ("prior", {"norm_in_type": "layer", "time_embed_act_fn": "gelu", "additional_embeddings": 3}),
        ("prior", {"attention_head_dim": 8}),
        ("text_encoder", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-6}),
        ("image_encoder", {"layer_norm_eps": 1e-6, "num_attention_heads": 5, "use_head": True}),
        ("decoder", {"norm_num_groups": 16, "resnet_out_scale_factor": 1.5, "freq_shift": 1, "act_fn": "mish"}),
        ("decoder", {"class_embed_type": None, "up_block_types": ["ResnetUpsampleBlock2D"] * 2}),
        ("super_res_first", {"add_attention": True, "mid_block_scale_factor": 2, "flip_sin_to_cos": False}),
        ("super_res_last", {"norm_eps": 1e-6, "in_channels": 3, "resnet_time_scale_shift": "spatial"}),
        ("text_proj", {"dropout": 0.1}),
        ("prior_scheduler", {"clip_sample": False, "prediction_type": "epsilon", "clip_sample_range": 0}),
        ("decoder_scheduler", {"clip_sample_range": 2.0, "variance_type": "fixed_small_log"}),
        ("super_res_scheduler", {"beta_schedule": "linear", "num_train_timesteps": 500, "thresholding": True}),
        ("feature_extractor", {"resample": 2, "do_normalize": False, "image_mean": [0.5] * 3, "crop_size": 8}),
    ],
)
def test_every_field_of_a_config_is_used_or_refused(directory, tmp_path, part, changes):
    """Fields that would change numbers and no shapes are refused by name, one at a time."""
    place = shutil.copytree(directory, tmp_path / "copy")
    file = place / part / SETTINGS.get(part, "config.json")
    config = json.loads(file.read_text())
    for field, value in changes.items():
        file.write_text(json.dumps(config | {field: value}))
        with pytest.raises(ConvertError, match=f"{field}="):
            karlo.read_karlo(place)


@pytest.mark.parametrize("changes,bound", [({}, 5.0), ({"clip_sample_range": 10}, 10.0), (None, 1.0)])
def test_the_bound_of_the_prior_is_that_of_its_scheduler(directory, tmp_path, changes, bound):
    """1 is diffusers' own value where the field is missing."""
    place = shutil.copytree(directory, tmp_path / "copy")
    file = place / "prior_scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | (changes or {})
    if changes is None:
        del config["clip_sample_range"]
    file.write_text(json.dumps(config))
    assert karlo.read_karlo(place).metadata["prior_clip"] == bound
    assert FAMILIES["karlo"].read(place, Options()).converted.metadata["prior_clip"] == bound


def test_other_files_are_refused():
    with pytest.raises(ConvertError, match="not of a PriorTransformer: it lacks positional_embedding"):
        karlo.load_prior(weights("upsampler"))
    with pytest.raises(ConvertError, match="does not fit: it has, unknown to this network, down_blocks"):
        karlo.load_upsampler(weights("decoder"), UPSAMPLER, image_size=32)
    silent = Decoder(DECODER.unet, D, 40, text_embedding=False)
    with pytest.raises(ConvertError, match="not one that this layout holds: null_text, text_emb/bias, text_emb/kernel"):
        karlo.load_decoder(weights("decoder"), weights("text_proj"), silent, image_size=16)
    with pytest.raises(ConvertError, match="of another shape"):
        karlo.load_decoder(
            weights("decoder") | {"conv_in.weight": np.zeros((32, 4, 3, 3))},
            weights("text_proj"),
            DECODER,
            image_size=16,
        )


def test_the_published_networks_have_a_table():
    """Every parameter of the full size has its entry; the reference has none for what only the paper drops."""
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    upsampler = karlo.UPSAMPLER()
    inputs = spec(1, 256, 256, 3), spec(1), spec(1, 64, 64, 3)
    shapes = jax.eval_shape(upsampler.init, jax.random.key(0), *inputs)["params"]
    table = karlo.unet_table(upsampler.unet, 256, "unet/", "")
    decoder = karlo.DECODER()
    text = {"encoder_hidden_states_proj.weight": np.zeros((1536, 768))}
    for params, entries, without in (
        (shapes, table, []),
        (karlo._decoder_shapes(decoder, text, 64), karlo.decoder_table(decoder, 64), ["null_text"]),
    ):
        flat = ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        assert sorted(flat) == sorted(entry.ours for entry in entries)
        assert [entry.ours for entry in entries if not entry.theirs] == without
