"""The pipeline of Stable Diffusion, opened from a directory: programs, samplers, captions, steps and options."""

import gc
import weakref

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import live_bytes, no_compilation
from random_networks import fast_jit
from test_interop_stable_diffusion import directory

from ddpm_jax import RecordedNoise, classifier_free, cosine_betas, example_keys, make_process, respace, sample
from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.diffusion.samplers import dpm_solver_step, heun_step, plms_step, unipc_step
from ddpm_jax.diffusion.samplers.loop import initial_noise
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.pipelines import stable_diffusion as pipelines
from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.pipelines.stable_diffusion import open_stable_diffusion
from ddpm_jax.types import Step


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A pipeline with a tokenizer of letters, which compiles quickly."""
    tokenizer = CompactTokenizer([chr(c) for c in range(97, 123)])
    compiled = pipelines._generate
    pipelines._generate = fast_jit(compiled.__wrapped__)
    yield open_stable_diffusion(directory(tmp_path_factory.mktemp("sd")), tokenizer=tokenizer)
    pipelines._generate = compiled


def drawn(pipeline, prompts, **options):
    return pipeline.generate(prompts, **{"steps": 2} | options).astype(int)


def test_images_of_captions(opened):
    """An image does not depend on the others in its batch, nor on the devices that share it, and eta adds noise."""
    both = opened.generate(["a b", "c"], steps=2)
    assert both.shape == (2, 16, 16, 3) and both.dtype == np.uint8
    assert np.abs(drawn(opened, ["a b", "c"], batch_size=2) - both).max() <= 1
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    assert np.abs(drawn(opened, ["a b", "c"], mesh=mesh) - both).max() <= 1
    noisy = drawn(opened, ["a b", "c"], eta=1.0)
    assert np.abs(noisy - both).max() > 1
    with no_compilation():
        assert np.abs(drawn(opened, ["a b", "c"], eta=0.5) - noisy).max() > 1


def test_numbers_compile_nothing_new(opened):
    """Scales, seeds, the number of prompts and their start are arguments of one program, of any numeric type."""
    both = drawn(opened, ["a b", "c"])
    # Making a JAX scalar is a program of its own.
    scalar, same = jnp.float32(2.5), {"steps": 2, "batch_size": 1, "seed": 0}
    kinds = [{name: kind(n) for name, n in same.items()} for kind in (np.int64, jnp.int32, np.array)]
    with no_compilation():
        for options in (
            *({"negative_prompts": "d"}, {"decoder_scale": 3.0}, {"scale": scalar}, {"seed": 2**32 - 1}),
            *({"start": 5}, {"seed": 1}),
        ):
            assert np.abs(drawn(opened, ["a b", "c"], **options) - both).max() > 1, options
        for options in kinds:
            again = drawn(opened, np.array(["a b", "c"]), decoder_scale=np.float64(7.5), **options)
            np.testing.assert_array_equal(again, both)
        four = drawn(opened, ["a b", "c", "", "d"])
        np.testing.assert_array_equal(four[:2], both)
        for start in range(4):
            np.testing.assert_array_equal(drawn(opened, [["a b", "c", "", "d"][start]], start=start), four[start:][:1])


def test_a_deleted_pipeline_is_freed(opened, tmp_path):
    drawn(opened, ["a b"])
    gc.collect()
    before, tokenizer = live_bytes(), CompactTokenizer(["a"])
    pipeline = open_stable_diffusion(directory(tmp_path), tokenizer=tokenizer)
    with no_compilation():  # the networks are those of another pipeline
        drawn(pipeline, ["a"])
    assert live_bytes() - before > 1e5
    gone = weakref.ref(pipeline), weakref.ref(tokenizer)
    del pipeline, tokenizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and live_bytes() == before


class Linear:
    """A network of one line, which returns NaN behind the last timestep."""

    def apply(self, params, xt, t, label, context):
        return jnp.where((t >= 0)[:, None, None, None], 0.5 * xt + context.mean((1, 2))[:, None, None, None], jnp.nan)


@pytest.mark.parametrize("make", [dpm_solver_step, heun_step, plms_step, unipc_step])
def test_every_sampler_can_be_chosen(opened, make):
    """It ends at the data, also where DDIM ends at the noise of t = 0."""
    unet = Linear()
    pipeline, sampler = opened.replace(unet=unet, set_alpha_to_one=False), make.__name__.removesuffix("_step")
    process, keys = respace(pipeline.process, pipeline.timesteps(3)), example_keys(jax.random.key(0), 2)
    context = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 12, pipeline.text.width)), jnp.float32)

    @fast_jit
    def both(keys):
        found = pipeline.sample_latents(process, *context, keys, sampler=sampler, scale=2.0)
        network = lambda context: lambda xt, t: unet.apply({}, xt, t, None, context)
        guided, shape = classifier_free(network(context[0]), network(context[1]), 2.0), found.shape[1:]
        return found, sample(process, guided, keys, shape, step=make(), x_init=initial_noise(process, keys, shape))

    np.testing.assert_allclose(*both(keys), rtol=1e-4, atol=1e-4)


def test_one_step_starts_from_noise_at_its_timestep(opened):
    """The leading timesteps of one step are [1], in the published pipelines too."""
    one = drawn(opened, ["a b", "c"], steps=1)
    assert one.shape == (2, 16, 16, 3) and one.std() > 1
    assert np.abs(drawn(opened, ["a b", "c"], steps=1, seed=1) - one).max() > 1


@pytest.mark.parametrize("recorded", [False, True])
def test_the_initial_noise_is_that_of_sample(recorded):
    process, shape = respace(make_process(cosine_betas(10)), [0, 9]), (2, 2, 1)
    keys = example_keys(jax.random.key(0), 3)
    noise = RecordedNoise(jax.random.normal(jax.random.key(1), (3, 3, *shape))) if recorded else keys
    still = Step(lambda predict_fn, keys, xt, here, there, carry: (xt, carry), lambda x: None)
    start = sample(process, lambda xt, t: xt, noise, shape, step=still)
    np.testing.assert_array_equal(initial_noise(process, noise, shape), start)


def test_captions_without_words_and_negative_captions(opened):
    """Guidance from the unconditional caption to itself changes nothing, so that the scale does not matter."""
    empty = drawn(opened, ["", " "], decoder_scale=1.0)
    assert np.abs(drawn(opened, iter(("", " "))) - empty).max() <= 1
    away = [drawn(opened, ["a b", "c"], negative_prompts=text) for text in ("d", "e")]
    wanted = np.stack([away[0][0], away[1][1]])
    assert np.abs(drawn(opened, ["a b", "c"], negative_prompts=("d", "e")) - wanted).max() <= 1
    none = drawn(opened, ["a b", "c"])
    for negative in (None, "", [" "]):
        np.testing.assert_array_equal(drawn(opened, ["a b", "c"], negative_prompts=negative), none)


FOUR = [1, 251, 501, 751]  # diffusers' DDIMScheduler of version 1: 4 steps with stride 1000 // 4 and steps_offset 1
STEPS = [(4, FOUR), (np.int64(4), FOUR), (np.uint8(4), FOUR), (np.array(4), FOUR), ("4", FOUR), (" 4 ", FOUR)]
STEPS += [("jax", FOUR), (np.str_("4"), FOUR), ("ddim4", [0, 250, 500, 750]), ("1,2", [0, 500, 999])]
STEPS += [(list_of([3, 700]), [3, 700]) for list_of in (list, tuple, np.array)]


@pytest.mark.parametrize("steps,timesteps", STEPS, ids=repr)
def test_steps_mean_the_same_in_every_type(opened, monkeypatch, steps, timesteps):
    class Enough(Exception):
        pass

    def spy(pipeline, process, *rest):
        np.testing.assert_array_equal(process.timestep_map, timesteps)
        raise Enough

    monkeypatch.setattr(pipelines, "_generate", spy)
    with pytest.raises(Enough):
        opened.generate(["a"], steps=jnp.int32(4) if isinstance(steps, str) and steps == "jax" else steps)


WRONG = [("steps", value, "steps=.* must be a number of steps") for value in (True, 4.0, [], [1.5], {4}, b"4", "")]
WRONG += [("steps", float("nan"), "must be a number of steps"), ("steps", "4.0", "steps='4.0' must be like")]
WRONG += [("steps", value, f"steps={value} must be at least 1") for value in (0, -1)]
WRONG += [("steps", 1000, "steps=1000 must be between 1 and 999"), ("decoder_steps", 0, "^decoder_steps=0 must be")]
WRONG += [("steps", "0", "steps='0' must be at least 1"), ("steps", [7, 3], r"steps=\(7, 3\) must be strictly")]
WRONG += [("steps", [0, 1000], r"steps=\(0, 1000\) must lie in \[0, 1000\)")]
WRONG += [("steps", [3, 7], "sampling cannot start from pure noise: the process ends at 0.8% of the steps")]
WRONG += [("batch_size", value, "batch_size=.* must be an integer") for value in (2.0, "2", True)]
WRONG += [("batch_size", 0, "batch_size=0 must be at least 1"), ("seed", -1, "seed=-1 must be at least 0")]
WRONG += [("batch_size", 2**20, "batch_size=1048576 must be at most 65536"), ("start", 1.0, "start=1.0 must be an int")]
WRONG += [("sampler", "euler", "sampler='euler' must be one of 'ancestral'")]
WRONG += [("order", 2, "order=2 is no option of sampler='ddim'"), ("sampler", "analytic", "needs the second moments")]
WRONG += [("prior_scale", 1.0, "there is no option 'prior_scale': this pipeline has the stages decoder")]
WRONG += [
    ("churn", 0.1, "churn=0.1 is no option of sampler='ddim'"),
    ("negative", "b", "'negative' .did you mean 'negative_prompts'"),
]
WRONG += [("seed", 2**32, "seed=4294967296 must be at most"), ("seed", 0.0, "seed=0.0 must be an integer")]
WRONG += [("decoder_scale", value, "decoder_scale=.* must be a finite number") for value in (np.nan, np.inf, "7", True)]
WRONG += [("eta", np.float32(1.5), r"eta=1.5 must be in \[0, 1\]"), ("eta", np.nan, "eta=nan must be a finite number")]
WRONG += [("prompts", "a", "prompts must be a sequence of at least one caption, got one string")]
WRONG += [("prompts", [], "prompts must hold at least one caption"), ("prompts", 3, "prompts must be a sequence")]
WRONG += [("prompts", ["a", 3], r"prompts\[1\] must be a string, got 3")]
WRONG += [("prompts", ["a", "a zz"], r"prompts\[1\] = 'a zz': the word \"zz\" is not in the vocabulary")]
WRONG += [("negative_prompts", ["b", "c"], "negative_prompts must be one caption, got 2")]
WRONG += [("negative_prompts", "zz", r"negative_prompts\[0\] = 'zz': the word")]
WRONG += [("negative_prompts", 3, "negative_prompts must be a caption or a sequence of captions, got 3")]


@pytest.mark.parametrize("name,value,message", WRONG)
def test_wrong_options_are_refused_in_a_sentence(opened, name, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        opened.generate(**{"prompts": ["a"], name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_no_image(opened, value):
    """Of two prompts the one that reaches the broken number is named."""
    places = {
        "text encoder": ("text", "token", "embedding"),
        "U-Net": ("unet", "out_conv", "bias"),
        "autoencoder": ("autoencoder", "decoder", "out_conv", "bias"),
    }
    flat = flax.traverse_util.flatten_dict(opened.params)
    for stage, place in places.items():
        broken = np.array(flat[place])
        broken[opened.tokenizer.ids("q")[0] if stage == "text encoder" else 0] = value
        pipeline = opened.replace(params=flax.traverse_util.unflatten_dict(flat | {place: broken}))
        which = r"prompts\[1\]" if stage == "text encoder" else r"prompts\[0\], prompts\[1\]"
        with pytest.raises(NotFiniteError, match=rf"^the {stage} returned values .* not finite .* for {which}:"):
            drawn(pipeline, ["a b", "q"], batch_size=2)
