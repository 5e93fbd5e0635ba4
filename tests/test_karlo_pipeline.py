"""Karlo's pipeline, opened from a directory in diffusers' layout: programs, samplers, images and options."""

import gc
import weakref

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs import live_bytes, no_compilation
from random_networks import fast_jit
from test_interop_karlo import KEYS, Bytes, D, write_directory

from ddpm_jax import (
    classifier_free,
    ddim_step,
    sample,
    static_threshold,
)
from ddpm_jax.data.transforms import clip_pixels
from ddpm_jax.diffusion.samplers import (
    dpm_solver_step,
    heun_step,
    plms_step,
    predictor_corrector_step,
    reverse_diffusion_step,
    unipc_step,
)
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.errors import LoadError
from ddpm_jax.interop import karlo
from ddpm_jax.pipelines import karlo as karlo_pipeline
from ddpm_jax.pipelines.converted import pipeline_of
from ddpm_jax.pipelines.request import NotFiniteError, batches


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("karlo"))


@pytest.fixture(scope="module")
def opened(directory):
    """The pipeline of the directory, which compiles quickly."""
    compiled = karlo_pipeline._generate
    karlo_pipeline._generate = fast_jit(compiled.__wrapped__)
    yield karlo_pipeline.open_karlo(directory, tokenizer=Bytes())
    karlo_pipeline._generate = compiled


TWO = {"prior_steps": 2, "decoder_steps": 2, "upsampler_steps": 2}


def test_numbers_compile_nothing_new(opened):
    """Scales, thresholds, seeds, the number of prompts and their start are arguments of one program."""
    sample = lambda prompts, **options: opened.generate(prompts, **(TWO | options)).astype(int)
    before = karlo_pipeline._generate._cache_size()  # of other tests in this process
    first, programs = sample(["a cat"]), karlo_pipeline._generate._cache_size()
    scalar = jnp.float32(2.5)  # which is a program of its own
    with no_compilation():
        for options in (
            *(
                {"decoder_scale": 3.0},
                {"prior_scale": scalar},
                {"scale": np.float64(1.5)},
                {"seed": 2**32 - 1},
            ),
            *({"prior_threshold": 0.1}, {"start": 7}, {"negative_prompts": "a tall dog"}),
        ):
            assert np.abs(sample(["a cat"], **options) - first).max() > 1, options
        four = sample(["a cat", "a tall dog", "", "mice"])
        np.testing.assert_array_equal(four[:1], first)
        np.testing.assert_array_equal(sample(["", "mice"], start=2), four[2:])
        np.testing.assert_array_equal(sample(["a cat"], negative_prompts=[""]), first)
        np.testing.assert_array_equal(sample(["a cat"], batch_size=4), first)
    assert karlo_pipeline._generate._cache_size() == programs <= before + 1


def test_batches_have_two_sizes():
    """Ten prompts by four, seven by four: whole batches; of the rest at most half a batch one by one."""
    sizes = lambda count, size: [(len(rows), new) for rows, new in batches(count, size)]
    assert sizes(10, 4) == [(4, 4), (4, 4), (1, 1), (1, 1)] and sizes(7, 4) == [(4, 4), (4, 3)]
    assert sizes(1, 4) == sizes(1, 2**16) == [(1, 1)] and sizes(3, 4) == [(4, 3)]
    for count in range(1, 40):
        for size in range(1, 20):
            found = list(batches(count, size))
            assert {len(rows) for rows, _ in found} <= {1, size} and sum(len(rows) for rows, _ in found) <= 2 * count
            assert [row for rows, new in found for row in rows[:new]] == list(range(count))
            assert all(row == count - 1 for rows, new in found for row in rows[new:])


def test_a_deleted_pipeline_is_freed(directory, opened):
    gc.collect()
    before, tokenizer = live_bytes(), Bytes()
    pipeline = karlo_pipeline.open_karlo(directory, tokenizer=tokenizer)
    with no_compilation():  # the networks are those of another pipeline
        pipeline.generate(["a cat"], **TWO)
    assert live_bytes() - before > 1e5
    gone = weakref.ref(pipeline), weakref.ref(tokenizer)
    del pipeline, tokenizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and live_bytes() == before


STEPS = {
    "ddim": (ddim_step, {"eta": 0.5}),
    "dpm_solver": (dpm_solver_step, {"order": 3}),
    "heun": (heun_step, {}),
    "plms": (plms_step, {}),
    "predictor_corrector": (predictor_corrector_step, {"snr": 0.2}),
    "reverse_diffusion": (reverse_diffusion_step, {}),
    "unipc": (unipc_step, {"order": 3}),
}


@pytest.mark.parametrize("sampler", STEPS)
def test_every_sampler_can_be_chosen(opened, sampler):
    """The same embedding as by calling the sampler; of the prior, whose network is small."""
    make, options = STEPS[sampler]
    encode = lambda given: opened.encode_text(*map(jnp.asarray, given))
    text, null = encode(Bytes()(["a cat"], 12)), encode(Bytes().null(12))

    @fast_jit
    def both(karlo, keys):
        found = karlo.sample_embedding(text, null, keys, sampler=sampler, steps=4, scale=2.0, threshold=3.0, **options)
        network = lambda text: (
            lambda zt, t: karlo.prior.apply({"params": karlo.params["prior"]}, zt, t, text.z, text.hidden, text.mask)
        )
        how = {"step": make(**options), "prediction": "x0", "x0_transform": static_threshold(3.0)}
        process = Sampling(steps=4).process(karlo_pipeline.DIFFUSION["prior"])
        x0 = sample(process, classifier_free(network(text), network(null), 2.0), keys, (D,), **how)
        mean, std = karlo.statistics
        return found, x0 * std[None] + mean[None]

    np.testing.assert_allclose(*both(opened, KEYS), atol=1e-5)


def test_a_network_that_returns_nan_makes_no_image(opened):
    """The first broken stage is named, and the prompt that reaches it."""
    flat = flax.traverse_util.flatten_dict(dict(opened.params))
    places = {
        "text encoder": ("text", "text", "token", "embedding"),
        "prior": ("prior", "out", "bias"),
        "decoder": ("decoder", "unet", "out_conv", "bias"),
        "upsampler": ("last", "unet", "out_conv", "bias"),
    }
    for stage, place in places.items():
        broken = np.array(flat[place])
        broken[ord("d") if stage == "text encoder" else 0] = np.inf
        karlo = opened.replace(params=flax.traverse_util.unflatten_dict(flat | {place: broken}))
        which = r"prompts\[1\]" if stage == "text encoder" else r"prompts\[0\], prompts\[1\]"
        with pytest.raises(NotFiniteError, match=rf"^the {stage} returned values .* not finite .* for {which}:"):
            karlo.generate(["a cat", "a tall dog"], batch_size=2, **TWO)


@pytest.fixture
def asked(opened, monkeypatch):
    """Return what the compiled program is given, which runs no network: pixels and options."""

    class Enough(Exception):
        pass

    def ask(method, *args, **options):
        found = []

        def spy(karlo, seed, index, tokens, mask, negative, negative_mask, pixels):
            found.extend([pixels, karlo.sampling, seed])
            raise Enough

        monkeypatch.setattr(karlo_pipeline, "_generate", spy)
        with pytest.raises(Enough):
            getattr(opened, method)(*args, **options)
        return found

    return ask


IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
FORMS = {
    "uint8": [IMAGE],
    "one image": IMAGE,
    "PIL": Image.fromarray(IMAGE),
    "floats": IMAGE / 255.0,
    "opaque": np.dstack([IMAGE, np.full((40, 30), 255, np.uint8)]),
    "prepared": clip_pixels([IMAGE], 16),
    "prepared, in a list": list(clip_pixels([IMAGE], 16)),
    "JAX": jnp.asarray(IMAGE),
}


@pytest.mark.parametrize("form", FORMS)
def test_variations_take_images_in_every_form(asked, opened, form):
    wanted = clip_pixels([IMAGE], 16)  # compared with transformers' in test_interop_clip.py
    pixels, options, _ = asked("variations", FORMS[form])
    np.testing.assert_array_equal(pixels, wanted)
    if form in ("uint8", "PIL"):
        other = asked("variations", FORMS[form], seed=np.int64(3), batch_size=jnp.int32(2), decoder_steps=None)
        assert other[1] == options == karlo_pipeline.default_sampling() and other[2] == 3


def test_the_images_that_variations_refuse(opened):
    for pixels, message in {
        "range": (2.0 * IMAGE / 255 - 1, r"images\[0\] has float values from -1 to 1; they must be in \[0, 1\]"),
        "raw": (IMAGE.astype(np.float32), r"give those of \[0, 255\] as uint8"),
        "none": ([], "images must hold at least one image"),
        "nan": (np.full((2, 16, 16, 3), np.nan), r"images\[0\] has values that are not finite"),
    }.values():
        with pytest.raises(ValueError, match=message):
            opened.variations(pixels)
    with pytest.raises(ValueError, match=r"pixels with prepared=True must be float32\[N, 16, 16, 3\].*uint8\[1, 40"):
        opened.variations(IMAGE[None], prepared=True)


def test_pixels_of_another_preprocessing(asked):
    own = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(asked("variations", own, prepared=True, batch_size=2)[0], own)


def test_encode_image_prepares_what_is_no_float_array(opened):
    wanted = opened.encode_image(clip_pixels([IMAGE], 16))
    for images in ([IMAGE], IMAGE[None], Image.fromarray(IMAGE)):
        np.testing.assert_array_equal(opened.encode_image(images), wanted)
    with pytest.warns(UserWarning, match="images has values up to 255, which images that clip_pixels normalised do"):
        opened.encode_image(IMAGE[None, :16, :16].astype(np.float32))


def test_options_mean_the_same_in_every_type(asked):
    wanted = asked("generate", ["a"], prior_steps=7, decoder_scale=3.0, seed=5)[1:]
    for prior_steps in ("7", " 7", np.int64(7), jnp.int32(7), np.array(7)):
        same = {"decoder_scale": np.float32(3), "seed": np.int64(5), "prior_scale": None}
        assert asked("generate", np.array(["a"]), prior_steps=prior_steps, **same)[1:] == wanted
    for steps in ([1, 5], (1, 5), np.array([1, 5]), iter([1, 5]), jnp.array([1, 5])):
        assert asked("generate", ["a"], decoder_steps=steps)[1]["decoder"].steps == (1, 5)
    assert asked("generate", ["a"], steps=[1, 5])[1]["decoder"].steps == (1, 5)


@pytest.mark.parametrize(
    "name,value,message",
    [("prior_steps", value, "prior_steps=.* must be a number of steps") for value in (True, 2.0, [], [0.5], {3})]
    + [("upsampler_steps", "1001", "upsampler_steps=1001 selects 1001 steps where there are only 1000")]
    + [("decoder_steps", value, "decoder_steps=.* must be at least 1") for value in (0, -3)]
    + [("seed", 2**40, "seed=.* at most"), ("start", -1, "start=-1 must be at least 0")]
    + [("start", 2**31 - 1, "start=2147483647 must be at most 2147483646"), ("batch_size", 10**9, "batch_size=.* most")]
    + [("decoder_scale", np.nan, "decoder_scale=nan must be a finite number"), ("batch_size", 0, "at least 1")]
    + [("prior_scale", 1e9, r"prior_scale=1000000000.0 must be in \["), ("scale", np.inf, "scale=inf must be a finite")]
    + [
        ("prior_eta", 0.5, "prior_eta=0.5 is no option of sampler='ancestral'"),
        ("prior_sampler", "euler", "must be one"),
    ]
    + [("upsampler_scale", 2.0, "upsampler_scale=2.0 needs a network with a null condition")]
    + [("classifier_scale", 2.0, "classifier_scale=2.0 needs a classifier"), ("prior_sampler", "analytic", "moments")]
    + [("decoder_scal", 2.0, "there is no option 'decoder_scal' .did you mean 'decoder_scale'")]
    + [("prompts", ["a", None], r"prompts\[1\] must be a string, got None"), ("prompts", "a", "got one string")]
    + [("negative_prompts", ["a", 3], r"negative_prompts\[1\] must be a string, got 3")]
    + [("negative_prompts", ["a", "b"], "must be one caption, got 2")],
)
def test_wrong_options_are_refused_in_a_sentence(opened, name, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        opened.generate(**{"prompts": ["a"], name: value})
    assert "\n" not in str(caught.value)


def test_numbers_of_a_model_directory_are_checked(directory):
    """Nothing is built of what a model.json cannot mean; the field is named."""
    read = karlo.read_karlo(directory)
    models, params = read.models, read.params
    for metadata, message in (
        ({"prior_clip": -1.0}, r"metadata.prior_clip=-1.0 must be a number in \[1e-06, 1e\+06"),
        ({"prior_clip": True}, "metadata.prior_clip=True must be a number"),
        ({"sizes": [16, 10**9]}, r"metadata.sizes\[1\]=1000000000 must be an integer in \[1, 16384"),
        ({"sizes": 16}, "metadata.sizes=16 must be two sizes"),
        ({"tokenizer": None}, "metadata lacks the field tokenizer"),
    ):
        with pytest.raises(LoadError, match=message):
            pipeline_of(read._replace(metadata=read.metadata | metadata))
    for change, message in (
        ({"models": models | {"decoder": models["first"]}}, "networks.decoder .* must be a Decoder, got Upsampler"),
        ({"models": {"text": models["text"]}}, "networks.decoder of a karlo pipeline must be a Decoder, got none"),
        ({"params": params | {"statistics": {"mean": np.zeros(3)}}}, "must be a mean and a std of 32 numbers, got"),
    ):
        with pytest.raises(LoadError, match=message):
            pipeline_of(read._replace(**change))
