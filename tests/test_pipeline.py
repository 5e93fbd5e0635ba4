"""The whole pipeline with random parameters: what a picture depends on, errors, and weights files."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from PIL import Image
from random_networks import fast_jit, normal, random_params
from safetensors.numpy import save_file as save_arrays

import ddpm_jax
from ddpm_jax import build, cli
from ddpm_jax.diffusion.process import make_process
from ddpm_jax.diffusion.schedules import cosine_betas
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.pipelines import LoadError, UnCLIP, load, save_file, stages, unclip
from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.pipelines.weights import RUN_FILE, read_run
from ddpm_jax.train import plain

PROMPTS = [
    "a small red circle",
    "a large blue star",
    "a green square",
    "a small red circle",
    "a large yellow ring",
    "a red star",
    "a small blue square",
    "a large green circle",
]


@functools.cache
def smoke_config():
    spec = importlib.util.spec_from_file_location("shapes", Path(__file__).parents[1] / "configs" / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = plain(module.get_config("smoke").to_dict())
    # One level each: compiling is what takes the time here.
    config["decoder"] |= {"channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [4]}
    config["upsampler"] |= {"channel_mult": [1], "num_res_blocks": 1}
    return config


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@functools.cache
def pipeline():
    """The pipeline of the smoke config, every parameter random."""
    config = smoke_config()
    tokenizer = build.make_tokenizer(config)
    words, length, d = tokenizer.vocab_size, config["text"]["length"], config["clip"]["embed_dim"]
    size, up, t = config["clip"]["image_size"], config["upsampler"], zeros(1, dtype=np.int32)
    tokens, mask = zeros(1, length, dtype=np.int32), np.ones((1, length), bool)
    hidden, low = zeros(1, length, config["clip"]["text"]["width"]), config["decoder"]["image_size"]
    clip, decoder = build.make_clip(config, words), build.make_decoder(config, words)
    text = (zeros(1, d), hidden, mask)
    params = {
        "clip": random_params(clip.init, zeros(1, size, size, 3), tokens, mask),
        "prior": random_params(build.make_prior(config, words).init, zeros(1, d), t, *text),
        "decoder": random_params(decoder.init, zeros(1, low, low, 3), t, zeros(1, d), zeros(1, d), tokens, mask),
        "upsampler": random_params(
            build.make_upsampler(config).init,
            zeros(1, up["image_size"], up["image_size"], 3),
            t,
            zeros(1, low, low, 3),
        ),
    }
    return UnCLIP.from_config(config, params, tokenizer.to_config())


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    monkeypatch.setattr(unclip, "_generate", _generate)


_generate = fast_jit(unclip._generate.__wrapped__, static_argnums=0)


def with_params(**changed):
    """The same pipeline around other parameters; one compiled program serves both."""
    p = pipeline()

    def generate(*args, **options):
        original = dict(p.params)
        object.__setattr__(p, "params", original | changed)
        try:
            return p.generate(*args, **options)
        finally:
            object.__setattr__(p, "params", original)

    return generate


def other(tree):
    return jax.tree.map(lambda leaf: leaf + 0.5, tree)


# -- What a picture depends on ----------------------------------------------------------------------------------------


def test_generate_returns_one_picture_for_every_prompt():
    counts = []
    out = pipeline().generate(PROMPTS[:5], batch_size=3, report=counts.append)
    assert out.dtype == np.uint8 and out.shape == (5, 64, 64, 3) and pipeline().image_size == 64
    assert counts == [3, 2]
    assert out.std() > 5
    # Same prompt, another index: other noise.
    assert (out[0] != out[3]).any()


def test_a_picture_does_not_depend_on_the_batch_size():
    """Up to one grey level: matrix products of another size add in another order."""
    whole = pipeline().generate(PROMPTS, batch_size=8).astype(int)
    for size in (1, 3):
        part = pipeline().generate(PROMPTS, batch_size=size).astype(int)
        assert np.abs(whole - part).max() <= 1
    # Fewer prompts than a batch holds.
    assert np.abs(pipeline().generate(PROMPTS[:3]).astype(int) - whole[:3]).max() <= 1


def test_a_picture_does_not_depend_on_the_number_of_devices(monkeypatch):
    """Up to one grey level, as with the batch size; three prompts on two devices fill a batch of four."""
    how = {"batch_size": 3, "embedding": "image", "images": images(n=3)}
    one = pipeline().generate(PROMPTS[:3], **how).astype(int)
    mesh, seen, generate = make_mesh({"data": 2}, devices=jax.devices()[:2]), [], unclip._generate

    def watch(options, params, *arrays):
        seen.extend(arrays)
        return generate(options, params, *arrays)

    monkeypatch.setattr(unclip, "_generate", watch)
    two = pipeline().generate(PROMPTS[:3], mesh=mesh, **how).astype(int)
    assert one.shape == two.shape and np.abs(one - two).max() <= 1
    assert len(seen) == 4
    for array in seen:
        assert array.shape[0] == 4 and len(array.sharding.device_set) == 2
        assert array.sharding.shard_shape(array.shape)[0] == 2


def test_a_picture_does_not_depend_on_the_other_prompts_but_on_its_own_and_the_seed():
    ours = pipeline().generate(PROMPTS, batch_size=8)
    theirs = pipeline().generate([PROMPTS[0], *reversed(PROMPTS[1:])], batch_size=8)
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert (ours[1] != theirs[1]).any()
    np.testing.assert_array_equal(ours, pipeline().generate(PROMPTS, batch_size=8, seed=0))
    seeds = pipeline().generate(PROMPTS, batch_size=8, seed=1)
    assert all((a != b).any() for a, b in zip(ours, seeds, strict=True))


def images(seed=0, n=8):
    size = smoke_config()["clip"]["image_size"]
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def draw(embedding, *, prompts=PROMPTS, seed=0, **options):
    options |= {"images": images(seed)} if embedding == "image" else {}
    return pipeline().generate(prompts, batch_size=8, embedding=embedding, low_res=True, **options)


def test_images_and_options_may_have_any_type():
    """The same picture for the same numbers, whatever holds them."""
    size = smoke_config()["clip"]["image_size"]
    wide = np.random.default_rng(0).integers(0, 256, (8, size, 2 * size, 3)).astype(np.uint8)
    middle = wide[:, :, size // 2 : size // 2 + size]
    plain = pipeline().generate(
        PROMPTS, batch_size=8, embedding="image", low_res=True, images=middle, decoder_scale=2.0
    )
    opaque = np.concatenate([middle, np.full_like(middle[..., :1], 255)], axis=-1)
    for given in ([Image.fromarray(x) for x in wide], middle / 255.0, opaque):
        options = {"decoder_scale": np.float64(2), "batch_size": np.int64(8), "seed": jnp.int32(0)}
        same = pipeline().generate(iter(PROMPTS), embedding="image", low_res=True, images=given, **options)
        np.testing.assert_array_equal(same, plain)


@pytest.mark.parametrize("part", ["clip", "prior", "decoder", "upsampler"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_no_picture(part, value):
    """The last bias of a stage is replaced; a threshold would make an ordinary picture of infinity."""
    place = {"clip": ("text_projection", "kernel"), "prior": ("out", "bias")}
    place |= dict.fromkeys(("decoder", "upsampler"), ("unet", "out_conv", "bias"))
    tree = flax.traverse_util.flatten_dict(dict(pipeline().params[part]))
    name = ("params", *place[part])
    tree[name] = tree[name].at[0].set(value)
    generate = with_params(**{part: flax.traverse_util.unflatten_dict(tree)})
    stage = "CLIP model" if part == "clip" else part
    message = rf"^the {stage} returned values that are not finite .* prompts\[0\], .*\[7\]"
    with pytest.raises(NotFiniteError, match=message) as caught:
        generate(PROMPTS, batch_size=8)
    assert cli._sentence(caught.value) == str(caught.value)  # what the commands print


def test_low_res_is_the_decoders_picture():
    assert draw("text").shape == (8, 16, 16, 3)


def test_every_embedding_gives_another_picture():
    drawn = {name: draw(name) for name in unclip.EMBEDDINGS}
    names = sorted(drawn)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (drawn[a] != drawn[b]).any((1, 2, 3)).all(), (a, b)


def test_without_text_only_the_embedding_matters():
    backwards = PROMPTS[::-1]
    of_image = draw("image", use_text=False)
    np.testing.assert_array_equal(of_image, draw("image", use_text=False, prompts=backwards))
    assert (of_image != draw("image", use_text=False, seed=1)).any((1, 2, 3)).all()
    assert (of_image != draw("image")).any((1, 2, 3)).all()


def test_without_an_embedding_the_prior_and_clips_image_tower_have_no_influence():
    params = pipeline().params
    tower = ("vision", "image_projection")
    clip = {"params": params["clip"]["params"] | {name: other(params["clip"]["params"][name]) for name in tower}}
    generate = with_params(prior=other(params["prior"]), clip=clip)
    options = {"batch_size": 8, "embedding": "none", "low_res": True}
    np.testing.assert_array_equal(draw("none"), generate(PROMPTS, **options))
    # The same change does reach a picture that is made from a picture, or by the prior.
    assert (draw("image") != generate(PROMPTS, images=images(), **options | {"embedding": "image"})).any()
    assert (draw("prior") != generate(PROMPTS, **options | {"embedding": "prior"})).any()
    # The caption reaches the decoder by a text encoder of its own, and CLIP's text tower by the text embedding alone.
    text_tower = {"params": params["clip"]["params"] | {"text": other(params["clip"]["params"]["text"])}}
    np.testing.assert_array_equal(draw("none"), with_params(clip=text_tower)(PROMPTS, **options))
    assert (draw("text") != with_params(clip=text_tower)(PROMPTS, **options | {"embedding": "text"})).any()
    for part in ("text_encoder", "words"):
        changed = {"params": params["decoder"]["params"] | {part: other(params["decoder"]["params"][part])}}
        assert (draw("none") != with_params(decoder=changed)(PROMPTS, **options)).any(), part


def test_guidance_scales_reach_their_stage():
    base = draw("prior")
    assert (base != draw("prior", decoder_scale=1.0)).any()
    assert (base != draw("prior", prior_scale=3.0)).any()


def test_the_upsampler_starts_from_the_decoders_picture():
    params = pipeline().params
    large = pipeline().generate(PROMPTS, batch_size=8)
    assert (large != with_params(upsampler=other(params["upsampler"]))(PROMPTS, batch_size=8)).any()
    assert (large != with_params(decoder=other(params["decoder"]))(PROMPTS, batch_size=8)).any()


# -- Stages -----------------------------------------------------------------------------------------------------------


class Echo:
    """A prior that says the embedding of the caption plus a part of the noise that it sees."""

    def apply(self, params, zt, t, z_text, hidden, mask, keep):
        return 2.0 * z_text + zt


def test_of_several_draws_the_one_nearest_to_the_caption_is_kept():
    n, d = 6, 4
    text = stages.Text(normalize(normal(0, n, d)), normal(1, n, 2, d), np.ones((n, 2), bool))
    keys = jax.random.split(jax.random.key(0), n)
    process, sampling = make_process(cosine_betas(20)), stages.Sampling("2", 0.0)
    options = {"sampling": sampling, "embed_scale": 2.0}
    one, four = (
        np.asarray(stages.draw_embedding(Echo(), {}, process, text, keys, candidates=c, **options)) for c in (1, 4)
    )
    for z in (one, four):
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1.0, atol=1e-6)
    before, after = ((z * np.asarray(text.z)).sum(1) for z in (one, four))
    assert (after >= before - 1e-6).all() and after.mean() > before.mean()


def test_pictures_survive_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)
    floats = np.asarray(stages.to_float(levels))
    assert floats.min() == -1.0 and floats.max() == 1.0
    np.testing.assert_array_equal(stages.to_uint8(floats), levels)
    np.testing.assert_array_equal(stages.to_uint8(np.float32([-3.0, 3.0])), [0, 255])
    with pytest.raises(ValueError, match="^images 1, 2 have values that are not finite"):
        stages.to_uint8(np.float32([[0.0], [np.nan], [np.inf]]))


def test_encoders_return_unit_vectors():
    p = pipeline()
    tokens, mask = p.tokenizer(PROMPTS[:2], p.config["text"]["length"])
    z_text = fast_jit(lambda params: stages.encode_text(p.clip, params, tokens, mask).z)(p.params["clip"])
    pixels = stages.to_float(images(n=2))
    z_image = fast_jit(lambda params: stages.encode_image(p.clip, params, pixels))(p.params["clip"])
    direct = fast_jit(lambda params: p.clip.apply(params, pixels, method=CLIP.encode_image))(p.params["clip"])
    np.testing.assert_allclose(np.linalg.norm(z_text, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(z_image, direct / np.linalg.norm(direct, axis=1, keepdims=True), atol=1e-5)


# -- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts,options,message",
    [
        ([], {}, "prompts must hold at least one caption"),
        (["a red circle", " "], {}, "the text is empty"),
        (["a red circel"], {}, '"circel" is not in the vocabulary; the nearest known word is "circle"'),
        (["a red circle"], {"embedding": "clip"}, "embedding='clip' must be one of prior, text, image, none"),
        (["a red circle"], {"embedding": "image"}, 'images are needed for embedding="image"'),
        (["a red circle"], {"images": zeros(1, 32, 32, 3, dtype=np.uint8)}, 'images are needed for embedding="image"'),
        (["a red circle"], {"embedding": "image", "images": zeros(2, 32, 32, 3, dtype=np.uint8)}, "got 2 and 1"),
        (
            ["a red circle"],
            {"embedding": "image", "images": zeros(1, 32, 32, 3) - 1},
            "images[0] has float values from -1",
        ),
        (
            ["a red circle"],
            {"embedding": "image", "images": zeros(1, 32, 32, 3) + np.nan},
            "images[0] has values that are",
        ),
        (["a red circle", 3], {}, "prompts[1] must be a string, got 3"),
        (["a red circle", "a red circel"], {}, "prompts[1] = 'a red circel': the word"),
        (["a red circle"], {"seed": 2**32}, "seed=4294967296 must be at most 4294967295"),
        (["a red circle"], {"decoder_scale": float("nan")}, "decoder_scale=nan must be a finite number"),
        (["a red circle"], {"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_generate_names_what_is_wrong(prompts, options, message):
    with pytest.raises(ValueError) as caught:
        pipeline().generate(prompts, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_generate_refuses_one_string():
    with pytest.raises(TypeError, match="put it into a list"):
        pipeline().generate("a red circle")


def test_a_prompt_too_long_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match="cut to 24"):
        cut = draw("image", use_text=False, prompts=["a red circle " * 200, *PROMPTS[1:]])
    assert cut.shape == (8, 16, 16, 3)


# -- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(pipeline(), path)
    return path


def read(path):
    with safetensors.safe_open(str(path), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_a_weights_file_comes_back_rounded_to_half_precision(weights):
    ours, theirs = pipeline(), load(weights)
    assert theirs.config == ours.config and theirs.tokenizer.to_config() == ours.tokenizer.to_config()
    assert jax.tree.structure(dict(ours.params)) == jax.tree.structure(dict(theirs.params))
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        assert b.dtype == np.float32 and b.shape == a.shape
        np.testing.assert_allclose(b, a, rtol=2**-11, atol=2**-25)
    assert dataclasses.replace(theirs, params=ours.params).sampling == ours.sampling
    assert [entry.name for entry in weights.parent.iterdir()] == [weights.name]


def test_a_weights_file_says_what_it_holds(weights):
    arrays, meta = read(weights)
    assert all(array.dtype == np.float16 for array in arrays.values())
    assert {name.split("/")[0] for name in arrays} == set(build.STAGES)
    assert meta["version"] == ddpm_jax.__version__
    assert json.loads(meta["config"]) == pipeline().config
    assert json.loads(meta["tokenizer"]) == pipeline().tokenizer.to_config()


def test_full_precision_comes_back_bit_for_bit(tmp_path):
    save_file(pipeline(), tmp_path / "w.safetensors", dtype=np.float32)
    for a, b in zip(
        jax.tree.leaves(pipeline().params), jax.tree.leaves(load(tmp_path / "w.safetensors").params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_weights_too_large_for_half_precision_are_refused_and_nothing_is_written(tmp_path):
    params = dict(pipeline().params)
    params["prior"] = jax.tree.map(lambda leaf: leaf + 1e6, params["prior"])
    with pytest.raises(ValueError, match=r"^prior/.* has values that float16 cannot hold"):
        save_file(dataclasses.replace(pipeline(), params=params), tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def refuse(path, *words):
    with pytest.raises(LoadError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


def test_a_file_that_is_not_a_pipeline_is_one_sentence(weights, tmp_path):
    refuse(tmp_path / "missing.safetensors", "does not exist")
    bad = tmp_path / "bad.safetensors"
    bad.write_text("these are not weights, but a text that is long enough to be mistaken for a header")
    refuse(bad, "cannot be read")
    bad.write_bytes(b"")
    refuse(bad, "cannot be read")
    whole = weights.read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        refuse(bad, "cannot be read")
    save_arrays({"a": zeros(2)}, str(bad))
    refuse(bad, "is not a weights file of this package")


def test_a_file_without_a_stage_or_with_another_config_is_one_sentence(weights, tmp_path):
    arrays, meta = read(weights)
    bad = tmp_path / "bad.safetensors"
    save_arrays({name: a for name, a in arrays.items() if not name.startswith("prior/")}, str(bad), metadata=meta)
    refuse(bad, "lacks the stage prior")
    save_arrays(arrays, str(bad), metadata=meta | {"config": "{"})
    refuse(bad, "cannot be read")
    save_arrays(arrays, str(bad), metadata=meta | {"config": '{"text": {}}'})
    refuse(bad, "config")
    save_arrays(arrays, str(bad), metadata=meta | {"tokenizer": "[]"})
    refuse(bad)
    save_arrays(arrays, str(bad), metadata={name: text for name, text in meta.items() if name != "config"})
    refuse(bad, "cannot be read")


def test_parameters_of_another_shape_are_named(weights, tmp_path):
    arrays, meta = read(weights)
    bad = tmp_path / "bad.safetensors"
    arrays["clip/params/text_projection/kernel"] = zeros(3, 3, dtype=np.float16)
    save_arrays(arrays, str(bad), metadata=meta)
    with pytest.raises(ValueError, match="the parameters do not fit the networks.*kernel") as caught:
        load(bad).generate(["a red circle"])
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_not_a_run_is_one_sentence(tmp_path):
    with pytest.raises(LoadError, match="does not exist"):
        read_run(tmp_path / "missing")
    refuse(tmp_path, "holds no training run")
    for text in ("{", "[]", '{"config": {}}', '"text"', "\xff"):
        (tmp_path / RUN_FILE).write_text(text, encoding="latin-1")
        refuse(tmp_path, "cannot be read as a training run")


def test_a_run_without_a_trained_stage_names_it(tmp_path):
    p = pipeline()
    run = {"version": ddpm_jax.__version__, "config": p.config, "tokenizer": p.tokenizer.to_config()}
    (tmp_path / RUN_FILE).write_text(json.dumps(run))
    assert read_run(tmp_path) == run
    refuse(tmp_path, "stage clip")


def test_the_bundled_weights_draw():
    pipeline = load()
    images = pipeline.generate(["a small red star in the center on white"], low_res=True)
    size = pipeline.config["decoder"]["image_size"]
    assert images.shape == (1, size, size, 3)
    assert images[0, 0].mean() > 200  # the background is what even an early state follows
