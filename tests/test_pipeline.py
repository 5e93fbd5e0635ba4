"""unCLIP with random parameters: what an image depends on, how many programs it takes, errors, and directories."""

import gc
import weakref
from types import SimpleNamespace

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from random_networks import fast_jit, normal
from tiny_pipelines import HIGH, LENGTH, LOW, SIZE, decoder, other, upsampler, zeros
from tiny_pipelines import unclip as tiny

from ddpm_jax import cli
from ddpm_jax.data.transforms import clip_pixels
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.pipelines import unclip
from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.pipelines.stages import kept_in_training
from ddpm_jax.storage.metadata import freeze, thaw
from ddpm_jax.types import to_float, to_uint8

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


def pipeline():
    return tiny()


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    monkeypatch.setattr(unclip, "_generate", _generate)


_generate = fast_jit(unclip._generate.__wrapped__, static_argnames=("embedding", "use_text", "low_res"))


def with_params(**changed):
    """The same pipeline around other parameters; one compiled program serves both."""
    own = changed.pop("upsampler", params_of("upsampler"))
    models = {role: getattr(pipeline(), role).replace(params=params) for role, params in changed.items()}
    return pipeline().replace(upsamplers=(pipeline().upsamplers[0].replace(params=own),), **models).generate


def params_of(part):
    return (pipeline().upsamplers[0] if part == "upsampler" else getattr(pipeline(), part)).params


# -- What an image depends on ----------------------------------------------------------------------------------------


def test_generate_returns_one_image_for_every_prompt():
    counts = []
    out = pipeline().generate(PROMPTS[:5], batch_size=3, report=counts.append)
    assert out.dtype == np.uint8 and out.shape == (5, HIGH, HIGH, 3) and pipeline().image_size == HIGH
    assert counts == [3, 2]
    assert out.std() > 5
    # Same prompt, another index: other noise.
    assert (out[0] != out[3]).any()


def test_an_image_does_not_depend_on_the_batch_size():
    """Up to one grey level: matrix products of another size add in another order."""
    whole = pipeline().generate(PROMPTS, batch_size=8).astype(int)
    for size in (1, 3):
        part = pipeline().generate(PROMPTS, batch_size=size).astype(int)
        assert np.abs(whole - part).max() <= 1
    # Fewer prompts than a batch holds.
    assert np.abs(pipeline().generate(PROMPTS[:3]).astype(int) - whole[:3]).max() <= 1


def test_an_image_does_not_depend_on_the_number_of_devices(monkeypatch):
    """Up to one grey level, as with the batch size; three prompts on two devices fill a batch of four."""
    how = {"batch_size": 3, "embedding": "image", "images": images(n=3)}
    one = pipeline().generate(PROMPTS[:3], **how).astype(int)
    mesh, seen, generate = make_mesh({"data": 2}, devices=jax.devices()[:2]), [], unclip._generate

    def watch(pipeline, seed, *arrays, **options):
        seen.extend(array for array in arrays if array is not None)
        return generate(pipeline, seed, *arrays, **options)

    monkeypatch.setattr(unclip, "_generate", watch)
    two = pipeline().generate(PROMPTS[:3], mesh=mesh, **how).astype(int)
    assert one.shape == two.shape and np.abs(one - two).max() <= 1
    assert len(seen) == 5  # indices, tokens, mask, whether there are words, images
    for array in seen:
        assert array.shape[0] == 4 and len(array.sharding.device_set) == 2
        assert array.sharding.shard_shape(array.shape)[0] == 2


def test_an_image_does_not_depend_on_the_other_prompts_but_on_its_own_and_the_seed():
    ours = pipeline().generate(PROMPTS, batch_size=8)
    theirs = pipeline().generate([PROMPTS[0], *reversed(PROMPTS[1:])], batch_size=8)
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert (ours[1] != theirs[1]).any()
    np.testing.assert_array_equal(ours, pipeline().generate(PROMPTS, batch_size=8, seed=0))
    seeds = pipeline().generate(PROMPTS, batch_size=8, seed=1)
    assert all((a != b).any() for a, b in zip(ours, seeds, strict=True))


def images(seed=0, n=8):
    size = SIZE
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def draw(embedding, *, prompts=PROMPTS, seed=0, **options):
    options |= {"images": images(seed)} if embedding == "image" else {}
    return pipeline().generate(prompts, batch_size=8, embedding=embedding, low_res=True, **options)


def test_images_and_options_may_have_any_type():
    """The same image for the same numbers, whatever holds them."""
    size = SIZE
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
def test_numbers_that_are_not_finite_are_no_image(part, value):
    """The last bias of a stage is replaced; a threshold would make an ordinary image of infinity."""
    place = {"clip": ("text_projection", "kernel"), "prior": ("out", "bias")}
    place |= dict.fromkeys(("decoder", "upsampler"), ("unet", "out_conv", "bias"))
    tree = flax.traverse_util.flatten_dict(dict(params_of(part)))
    name = ("params", *place[part])
    tree[name] = tree[name].at[0].set(value)
    generate = with_params(**{part: flax.traverse_util.unflatten_dict(tree)})
    stage = "CLIP model" if part == "clip" else part
    message = rf"^the {stage} returned values that are not finite .* prompts\[0\], .*\[7\]"
    with pytest.raises(NotFiniteError, match=message) as caught:
        generate(PROMPTS, batch_size=8)
    assert cli._sentence(caught.value) == str(caught.value)  # what the commands print


def test_low_res_is_the_decoders_image():
    assert draw("text").shape == (8, LOW, LOW, 3)


def test_every_embedding_gives_another_image():
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
    clip_params, prior_params, decoder_params = map(params_of, ("clip", "prior", "decoder"))
    tower = ("vision", "image_projection")
    clip = {"params": clip_params["params"] | {name: other(clip_params["params"][name]) for name in tower}}
    generate = with_params(prior=other(prior_params), clip=clip)
    options = {"batch_size": 8, "embedding": "none", "low_res": True}
    np.testing.assert_array_equal(draw("none"), generate(PROMPTS, **options))
    # The same change does reach a image that is made from a image, or by the prior.
    assert (draw("image") != generate(PROMPTS, images=images(), **options | {"embedding": "image"})).any()
    assert (draw("prior") != generate(PROMPTS, **options | {"embedding": "prior"})).any()
    # The caption reaches the decoder by a text encoder of its own, and CLIP's text tower by the text embedding alone.
    text_tower = {"params": clip_params["params"] | {"text": other(clip_params["params"]["text"])}}
    np.testing.assert_array_equal(draw("none"), with_params(clip=text_tower)(PROMPTS, **options))
    assert (draw("text") != with_params(clip=text_tower)(PROMPTS, **options | {"embedding": "text"})).any()
    for part in ("text_encoder", "words"):
        changed = {"params": decoder_params["params"] | {part: other(decoder_params["params"][part])}}
        assert (draw("none") != with_params(decoder=changed)(PROMPTS, **options)).any(), part


def test_a_network_trained_without_a_condition_is_sampled_without_it():
    given, mine = jnp.array([True, False]), pipeline().decoder
    metadata = freeze(thaw(mine.metadata) | {"image_embedding": {"drop": 1.0}})
    for keep, expected in ((None, [True, True]), (given, [True, False])):
        np.testing.assert_array_equal(kept_in_training(mine, "image_embedding", keep, 2), expected)
        without = kept_in_training(mine.replace(metadata=metadata), "image_embedding", keep, 2)
        np.testing.assert_array_equal(without, [False, False])


def trained(**drops):
    """The pipeline, its prior and decoder trained with these drops of their conditions."""

    def with_drops(model):
        own = {
            name: {**thaw(model.metadata)[name], "drop": drop} for name, drop in drops.items() if name in model.metadata
        }
        return model.replace(metadata=freeze(thaw(model.metadata) | own))

    return pipeline().replace(prior=with_drops(pipeline().prior), decoder=with_drops(pipeline().decoder))


def test_negative_prompts_have_no_influence_where_captions_were_always_dropped():
    """Without a caption the networks' outputs do not depend on it, see test_tasks.py and test_models.py."""
    text = unclip.Text(np.ones((2, 4)), np.ones((2, 3, 4)), np.ones((2, 3), bool))
    spy = lambda drop: SimpleNamespace(
        network=SimpleNamespace(text_encoder=None),
        metadata={"caption": {"drop": drop}},
        apply_traced=lambda *given: given,
    )
    negative, seen = (text, np.ones((2, 3), np.int32), np.array([True, False])), []
    for drop, expected in ((1.0, [False, False]), (0.1, [True, False])):
        of = pipeline().replace(decoder=spy(drop), prior=spy(drop))
        _, away = of.denoisers(text.z, text, negative[1], negative=negative)
        np.testing.assert_array_equal(away(None, None)[-1], expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unclip.UnCLIP, "_by_diffusion", lambda *given: seen.append(given[-1]) or (lambda i: text.z))
            of.sample_embedding(text, negative[1], None, negative=negative)
        np.testing.assert_array_equal(seen[-1][2], expected)


def test_null_conditions_that_were_never_trained_are_not_sampled():
    always, captioned, seen = trained(caption=0.0, image_embedding=0.0), trained(caption=0.0), []
    some = {"decoder_scale": 1.0}
    for of, options, message in (
        (
            always,
            {"prior_scale": 3, "decoder_scale": 1},
            r"^prior_scale=3.0 needs a network with a null condition \(drop",
        ),
        (always, {}, r"^decoder_scale=1.5 needs a network with a null condition"),
        (always, {"negative_prompts": "a ring"}, r"^decoder_scale=1.5 needs a network with a null condition"),
        (captioned, {"negative_prompts": ""}, r"^decoder_scale=1.5 needs a network with a null condition"),
        (
            always,
            some | {"embedding": "none"},
            "^embedding='none' leaves out the image embedding of the decoder, which",
        ),
        (
            always,
            some | {"use_text": False},
            "^use_text=False leaves out the caption of the decoder, which was trained",
        ),
        (
            always,
            some | {"prompts": [""]},
            '^the prompt "" leaves out the caption of the prior, which was trained with',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            of.generate(**{"prompts": PROMPTS, "batch_size": 8, "low_res": True} | options)
    with pytest.MonkeyPatch.context() as patch:  # without running it: what is trained is accepted
        patch.setattr(unclip, "in_batches", lambda *arguments, **options: seen.append(options))
        captioned.generate(PROMPTS, negative_prompts="a ring")
        always.generate(PROMPTS, **some)
    assert len(seen) == 2


def test_guidance_scales_reach_their_stage():
    base = draw("prior")
    assert (base != draw("prior", decoder_scale=1.0)).any()
    assert (base != draw("prior", prior_scale=3.0)).any()


def test_the_upsampler_starts_from_the_decoders_image():
    large = pipeline().generate(PROMPTS, batch_size=8)
    assert (large != with_params(upsampler=other(params_of("upsampler")))(PROMPTS, batch_size=8)).any()
    assert (large != with_params(decoder=other(params_of("decoder")))(PROMPTS, batch_size=8)).any()


# -- Stages -----------------------------------------------------------------------------------------------------------


class Echo:
    """A prior that says the embedding of the caption plus a part of the noise that it sees."""

    text_encoder = None

    def apply(self, params, zt, t, z_text, hidden, mask, keep):
        return 2.0 * z_text + zt


def test_of_several_embeddings_the_one_nearest_to_the_caption_is_taken():
    n, d = 6, 4
    text = unclip.Text(normalize(normal(0, n, d)), normal(1, n, 2, d), np.ones((n, 2), bool))
    keys, metadata = jax.random.split(jax.random.key(0), n), thaw(pipeline().prior.metadata)
    metadata["embedding"]["scale"] = 2.0
    echo = pipeline().prior.replace(network=Echo(), metadata=freeze(metadata))
    one, four = (
        np.asarray(
            pipeline()
            .replace(prior=echo, candidates=count, sampling={"prior": Sampling("ddim", 2)})
            .sample_embedding(text, zeros(n, 2, dtype=np.int32), keys)
        )
        for count in (1, 4)
    )
    for z in (one, four):
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1.0, atol=1e-6)
    before, after = ((z * np.asarray(text.z)).sum(1) for z in (one, four))
    assert (after >= before - 1e-6).all() and after.mean() > before.mean()


def test_images_survive_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)
    floats = np.asarray(to_float(levels))
    assert floats.min() == -1.0 and floats.max() == 1.0
    np.testing.assert_array_equal(to_uint8(floats), levels)
    np.testing.assert_array_equal(to_uint8(np.float32([-3.0, 3.0])), [0, 255])
    with pytest.raises(ValueError, match="^images 1, 2 have values that are not finite"):
        to_uint8(np.float32([[0.0], [np.nan], [np.inf]]))


def test_encoders_return_unit_vectors():
    p = pipeline()
    tokens, mask = p.tokenizer(PROMPTS[:2], LENGTH)
    p = p.replace(tokenizer=None)
    z_text = fast_jit(lambda p: p.encode_text(tokens, mask).z)(p)
    pixels = to_float(images(n=2))
    z_image = fast_jit(lambda p: p.encode_image(pixels))(p)
    direct = fast_jit(lambda clip: clip.apply(pixels, method=CLIP.encode_image))(p.clip)
    np.testing.assert_allclose(np.linalg.norm(z_text, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(z_image, direct / np.linalg.norm(direct, axis=1, keepdims=True), atol=1e-5)


def test_a_public_clip_sees_normalised_pixels():
    """As `clip_pixels` prepares images for it."""
    public = pipeline().replace(clip=pipeline().clip.replace(family="clip"), tokenizer=None)
    given = images(n=2)
    ours = fast_jit(lambda p, x: p.encode_image(x))(public, to_float(given))
    direct = fast_jit(lambda p, x: normalize(p.clip.apply(x, method=CLIP.encode_image)))(
        public, clip_pixels(given, SIZE)
    )
    np.testing.assert_allclose(ours, direct, atol=1e-5)


def test_any_number_of_upsamplers():
    """Each enlarges what the one before it returns."""
    none, one, two = (tiny(count).generate(PROMPTS[:1], batch_size=1) for count in (0, 1, 2))
    assert (none.shape, one.shape, two.shape) == ((1, 8, 8, 3), (1, 16, 16, 3), (1, 32, 32, 3))
    first, second = tiny(2).upsamplers
    first = first.replace(params=other(first.params))
    assert (two != tiny(2).replace(upsamplers=(first, second)).generate(PROMPTS[:1], batch_size=1)).any()


def test_models_that_do_not_fit_are_one_sentence():
    wrong = lambda model, **metadata: model.replace(metadata=freeze(thaw(model.metadata) | metadata))  # noqa: E731
    for changes, message in (
        ({"prior": decoder()}, "prior must be a DiffusionPrior or AutoregressivePrior, got a Decoder"),
        ({"decoder": wrong(decoder(), image_size=4)}, "upsampler enlarges images of size 8, and decoder returns size"),
        ({"upsamplers": (upsampler(),) * 2}, r"names=\('upsampler',\) must be one for each of the 2 upsamplers"),
        ({"clip": wrong(pipeline().clip, length=12)}, "length 12 by clip's metadata, and prior reads 24 tokens"),
        ({"clip": wrong(pipeline().clip, tokenizer={"kind": "compact", "vocab": ["a"]})}, "the tokenizer has 4 ids"),
        ({"prior": wrong(pipeline().prior, embedding=None)}, "the metadata of prior lacks 'embedding'"),
        ({"sampling": {"base": Sampling()}}, "sampling has no stage 'base'; there are prior, decoder, upsampler"),
        ({"sampling": {"prior": Sampling("ddim", 2000)}}, "prior_steps=2000"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline().replace(tokenizer=None, **changes).checked()


# -- Programs ---------------------------------------------------------------------------------------------------------


def test_numbers_seeds_and_counts_need_no_new_program():
    """A program has a batch size, and guidance or none; batches of one finish what is less than half a batch."""
    options = {"batch_size": 8, "low_res": True, "embedding": "none"}
    pipeline().generate(PROMPTS, **options)
    pipeline().generate(PROMPTS[:1], **options)
    before = _generate._cache_size()
    for count, changes in enumerate(
        ({"seed": 3}, {"scale": jnp.float32(2.0), "start": 7}, {"scale": np.float64(3.0)}, {"threshold": 2}), 3
    ):
        pipeline().generate(PROMPTS[:count], **options, **changes)
    copy = jax.tree.map(lambda leaf: leaf, pipeline())  # as one that was loaded again
    copy.generate(PROMPTS, **options)
    assert _generate._cache_size() == before


def test_a_deleted_pipeline_leaves_memory():
    def use():
        copy = pipeline().replace(prior=pipeline().prior.replace(params=other(pipeline().prior.params)))
        copy.generate(PROMPTS[:1], batch_size=1, low_res=True, embedding="none")
        return weakref.ref(jax.tree.leaves(copy.prior.params)[0])

    leaf = use()
    gc.collect()
    assert leaf() is None


# -- Prompts ----------------------------------------------------------------------------------------------------------


def test_the_empty_prompt_drops_the_condition():
    """As if the network were asked for its null condition: nothing of the tokens' parameters reaches the image."""
    ours = draw("none", prompts=[""] * 8)
    params = params_of("decoder")
    words = {name: other(params["params"][name]) for name in ("words", "text_encoder")}
    changed = with_params(decoder={"params": params["params"] | words})
    np.testing.assert_array_equal(ours, changed([""] * 8, batch_size=8, embedding="none", low_res=True))
    assert (ours != draw("none")).any()
    mixed = draw("prior", prompts=["", *PROMPTS[1:]])
    np.testing.assert_array_equal(mixed[1:], draw("prior")[1:])
    np.testing.assert_array_equal(mixed[0], draw("prior", prompts=[" ."] * 8)[0])


def test_negative_prompts_take_the_place_of_the_null_condition():
    plain = draw("prior", prior_scale=2.0)
    np.testing.assert_array_equal(plain, draw("prior", prior_scale=2.0, negative_prompts=""))
    one = draw("prior", prior_scale=2.0, negative_prompts="a blue star")
    assert (one != plain).any((1, 2, 3)).all()
    listed = draw("prior", prior_scale=2.0, negative_prompts=["a blue star"] * 7 + [""])
    np.testing.assert_array_equal(listed, np.concatenate([one[:7], plain[7:]]))


def test_start_samples_one_image_of_a_larger_batch_again():
    whole = pipeline().generate(PROMPTS, batch_size=8).astype(int)
    for i in (2, 5):
        again = pipeline().generate(PROMPTS[i : i + 1], start=i, batch_size=8).astype(int)
        assert np.abs(again - whole[i : i + 1]).max() <= 1
        assert (pipeline().generate(PROMPTS[i : i + 1], batch_size=8) != whole[i]).any()


def test_samplers_can_be_chosen_for_every_stage():
    options = {"sampler": "dpm_solver", "order": 2, "quantile": 0.9, "prior_sampler": "unipc", "prior_steps": 3}
    assert (draw("prior", **options) != draw("prior")).any((1, 2, 3)).all()


# -- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts,options,message",
    [
        ([], {}, "prompts must hold at least one caption"),
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
        (["a red circle"], {"batch_size": 2**40}, "batch_size=1099511627776 must be at most 65536"),
        (["a red circle"], {"start": -1}, "start=-1 must be at least 0"),
        (["a red circle"], {"decoder_scle": 2.0}, "no option 'decoder_scle' (did you mean 'decoder_scale'?)"),
        (["a red circle"], {"scale": 2.0, "decoder_scale": 2.0}, "scale and decoder_scale are the same option"),
        (["a red circle"], {"upsampler_scale": 2.0}, "upsampler_scale=2.0 needs a network with a null condition"),
        (["a red circle"], {"classifier_scale": 2.0}, "classifier_scale=2.0 needs a classifier"),
        (["a red circle"], {"prior_order": 2}, "prior_order=2 is no option of sampler='ancestral'"),
        (["a red circle"], {"prior_steps": "ddim999"}, 'prior_steps="ddim999" is impossible'),
        (["a red circle"], {"upsampler_noise_level": 2.0}, "upsampler_noise_level=2.0 must be in [0, 1]"),
        (
            ["a red circle"],
            {"negative_prompts": ["a", "a"]},
            "must be one caption, got 2",
        ),
        (["a red circle"], {"negative_prompts": "a catt"}, "negative_prompts[0] = 'a catt': the word"),
    ],
)
def test_generate_names_what_is_wrong(prompts, options, message):
    with pytest.raises(ValueError) as caught:
        pipeline().generate(prompts, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_generate_refuses_one_string():
    with pytest.raises(ValueError, match="put it into a list"):
        pipeline().generate("a red circle")


def test_a_prompt_too_long_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match="cut to 24"):
        cut = draw("image", use_text=False, prompts=["a red circle " * 200, *PROMPTS[1:]])
    assert cut.shape == (8, LOW, LOW, 3)
