"""Cascades with random parameters: what an image depends on, labels and guidance, programs, errors, directories."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from random_networks import fast_jit
from tiny_pipelines import CLASSES, HIGH, LOW, base, cascade, classifier, noised_clip, other, upsampler

from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation import report
from ddpm_jax.pipelines import Cascade, LoadError, load, save
from ddpm_jax.pipelines import cascade as module
from ddpm_jax.pipelines.captions import check_same_process, similarity, tokenized
from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.storage.metadata import freeze, thaw


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    monkeypatch.setattr(module, "_generate", _generate)
    monkeypatch.setattr(module, "_generate_low", _generate_low)


_generate, _generate_low = (fast_jit(program.__wrapped__) for program in (module._generate, module._generate_low))


def with_metadata(model, **metadata):
    return model.replace(metadata=freeze(thaw(model.metadata) | metadata))


def test_an_unconditional_model_alone():
    counts, pipeline = [], cascade()
    images = pipeline.generate(5, report=counts.append)
    assert images.shape == (5, LOW, LOW, 3) and images.dtype == np.uint8 and counts == [4, 1]
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    np.testing.assert_array_equal(images[:4], pipeline.generate(4))
    assert np.abs(images[3:4].astype(int) - pipeline.generate(1, start=3)).max() <= 1
    assert (images[:4] != pipeline.generate(4, seed=1)).any((1, 2, 3)).all()
    assert pipeline.generate().shape == (1, LOW, LOW, 3)


@pytest.mark.parametrize("num_steps,steps", [(1000, 250), (250, 250), (100, 100)])
def test_nothing_said_of_sampling(num_steps, steps):
    """The ancestral sampler in 250 steps, or in all that there are, clipped to the range of images."""
    model = with_metadata(base("unconditional"), diffusion={"schedule": "cosine", "num_steps": num_steps})
    assert dict(Cascade(model).checked().sampling) == {"base": Sampling("ancestral", steps, threshold=1.0).checked()}


def test_labels_are_indices_or_names_one_for_all_or_one_each():
    pipeline = cascade("labels")
    cats = pipeline.generate(4, labels="cat")
    np.testing.assert_array_equal(cats, pipeline.generate(labels=[0] * 4))
    np.testing.assert_array_equal(cats, pipeline.generate(4, labels=np.int64(0)))
    np.testing.assert_array_equal(cats, pipeline.generate(labels=np.zeros(4, np.uint8)))
    mixed = pipeline.generate(labels=["cat", 1, "owl", jnp.int32(0)])
    assert ((mixed != cats).any((1, 2, 3)) == [False, True, True, False]).all()


def test_guidance_leads_away_from_the_null_class():
    """classifier_free(cond, null, scale): at 0 the unconditional model's, which None asks for too."""
    pipeline = cascade("guided")
    unconditional = pipeline.generate(4)
    np.testing.assert_array_equal(unconditional, pipeline.generate(labels=[None] * 4))
    np.testing.assert_array_equal(unconditional, pipeline.generate(4, labels=1, scale=0.0))
    plain, guided = pipeline.generate(4, labels=1), pipeline.generate(4, labels=1, scale=3.0)
    assert (plain != unconditional).any() and (guided != plain).any((1, 2, 3)).all()
    np.testing.assert_array_equal(guided, pipeline.generate(4, labels=1, base_scale=jnp.float32(3.0)))


def test_the_classifier_guides_to_the_label():
    """Its log-probability of the label at the end is larger the larger the scale is, on average."""
    pipeline = cascade("unconditional", guided=True)
    plain = pipeline.generate(8, labels="dog", batch_size=8)
    np.testing.assert_array_equal(plain, cascade().generate(8, batch_size=8))
    logits = jax.jit(lambda x: classifier().apply(x / 127.5 - 1.0, jnp.zeros(8, int)))
    log_prob = lambda x: jax.nn.log_softmax(logits(x))[:, 1].mean()  # noqa: E731
    rising = [log_prob(plain.astype(np.float32))]
    for scale in (20.0, 100.0):
        guided = pipeline.generate(8, labels="dog", batch_size=8, classifier_scale=scale)
        rising.append(log_prob(guided.astype(np.float32)))
    assert rising[0] < rising[1] < rising[2], rising
    ancestral = pipeline.generate(8, labels="dog", batch_size=8, sampler="ancestral", classifier_scale=20.0)
    assert (ancestral != plain).any((1, 2, 3)).all()


def test_a_noised_clip_guides_to_the_caption():
    """The similarity that it finds at the end is larger the larger the scale is, on average."""
    pipeline = cascade().replace(noised_clip=noised_clip()).checked()
    prompt = "a red circle"
    plain = pipeline.generate(8, batch_size=8)
    np.testing.assert_array_equal(plain, cascade().generate(8, batch_size=8))
    np.testing.assert_array_equal(plain, pipeline.generate(prompts=[prompt] * 8, batch_size=8))
    log_prob = similarity(pipeline.noised_clip, tokenized(prompt, 8, None, pipeline.noised_clip))
    of_images = jax.jit(lambda x: log_prob(x / 127.5 - 1.0, jnp.zeros(8, int)).mean())
    rising = [of_images(plain.astype(np.float32))]
    for scale in (2.0, 10.0):
        guided = pipeline.generate(8, prompts=prompt, batch_size=8, clip_scale=scale)
        rising.append(of_images(guided.astype(np.float32)))
    assert rising[0] < rising[1] < rising[2], rising
    with pytest.raises(ValueError, match="clip_scale=2.0 needs prompts, which the noised CLIP guides to"):
        pipeline.generate(4, clip_scale=2.0)
    with pytest.raises(ValueError, match="prompts must be one for each of 4 images, got 1"):
        pipeline.generate(4, prompts=["a red circle"])


def test_captions_are_a_condition_with_a_null():
    pipeline = cascade("captions")
    plain, red, blue = (pipeline.generate(2, prompts=p) for p in (None, "a red circle", "a blue circle"))
    assert (red != blue).any() and (red != plain).any()
    np.testing.assert_array_equal(pipeline.generate(2, prompts="a red circle", scale=0.0), plain)
    assert (pipeline.generate(2, prompts="a red circle", scale=3.0) != red).any()
    with pytest.raises(ValueError, match=r"prompts\[0\] = 'a zebra'"):
        pipeline.generate(prompts=["a zebra"])


@pytest.mark.parametrize(
    ("role", "metadata", "message"),
    [
        (
            "classifier",
            {"diffusion": {"schedule": "linear", "num_steps": 1000}},
            "base and classifier were trained with different noise processes: schedule is cosine and linear; train the",
        ),
        (
            "noised_clip",
            {"diffusion": {"schedule": "cosine", "num_steps": 500}},
            "base and noised_clip were trained with different noise processes: num_steps is 1000 and 500; train the",
        ),
        (
            "classifier",
            {"diffusion": {"schedule": "cosine", "num_steps": 1000, "time": "log_snr"}},
            "different noise processes: time is t and log_snr; train the classifier",
        ),
        ("noised_clip", {"image_size": 64}, "base has images of size 8, and noised_clip is for those of size 64"),
    ],
)
def test_what_cannot_guide_a_base(role, metadata, message):
    model = with_metadata({"classifier": classifier, "noised_clip": noised_clip}[role](), **metadata)
    with pytest.raises(ValueError, match=message):
        cascade().replace(**{role: model}).checked()


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (([0.1, 0.2], 2), ([0.1, 0.3], 2), "processes: beta 1 is 0.2 and 0.3; train"),
        (([0.1, 0.2], 2), ([0.1], 1), "processes: number of betas is 2 and 1, num_steps is 2 and 1; train"),
        (([0.1, 0.2], 2), ("cosine", 2), "processes: schedule is own betas and cosine; train"),
        (("vp", 2, "eps", "fixed_small", (0.1, 9)), ("vp", 2), r"span is \(0.1, 9.0\) and the published one; train"),
    ],
)
def test_how_noise_processes_differ(one, other, message):
    models = [with_metadata(base(), diffusion=dataclasses.asdict(Diffusion(*fields))) for fields in (one, other)]
    with pytest.raises(ValueError, match=message):
        check_same_process("classifier", models[1], models[0])
    check_same_process("classifier", models[0], models[0])


def test_a_classifier_of_clean_images_does_not_guide():
    pipeline = cascade("labels").replace(classifier=with_metadata(classifier(), noised=False)).checked()
    np.testing.assert_array_equal(pipeline.generate(4, labels=1), cascade("labels").generate(4, labels=1))
    with pytest.raises(ValueError, match="classifier_scale=2.0 needs a classifier of noised images, and this one was"):
        pipeline.generate(4, labels=1, classifier_scale=2.0)


def test_upsamplers_enlarge_the_image_of_the_stage_before():
    pipeline = cascade(upsamplers=1)
    large = pipeline.generate(4)
    assert large.shape == (4, HIGH, HIGH, 3) and pipeline.image_size == HIGH
    np.testing.assert_array_equal(pipeline.generate(4, low_res=True), cascade().generate(4))
    changed = pipeline.base.replace(params=other(pipeline.base.params))
    assert (pipeline.replace(base=changed).generate(4) != large).any((1, 2, 3)).all()
    assert (pipeline.generate(4, up_16_sampler="ancestral", up_16_steps=2) != large).any((1, 2, 3)).all()


def test_the_noise_level_reaches_the_low_resolution_image_and_the_network():
    sampling = {"base": Sampling("ddim", 2, threshold=1.0), "up": Sampling("ddim", 2, threshold=1.0)}
    how = {"names": ("up",), "sampling": sampling, "batch_size": 4}
    blind = Cascade(base(), (upsampler(noise=0.5),), **how)
    seeing = Cascade(base(), (upsampler(noise=0.5, noise_level_input=True),), **how)
    before = blind.generate(4)
    assert (blind.generate(4, up_noise_level=0.25) != before).any((1, 2, 3)).all()
    np.testing.assert_array_equal(blind.generate(4, up_noise_level=0.0), before)
    levels = [seeing.generate(4, up_noise_level=level) for level in (0.0, 0.25, 0.5)]
    np.testing.assert_array_equal(levels[0], seeing.generate(4))
    assert (levels[0] != levels[1]).any() and (levels[1] != levels[2]).any()
    np.testing.assert_array_equal(levels[1], seeing.replace(noise_levels={"up": 0.25}).generate(4))
    with pytest.raises(ValueError, match="up_noise_level=0.75 must be at most 0.5, the largest level up was trained"):
        seeing.generate(4, up_noise_level=0.75)


def test_numbers_labels_seeds_and_counts_need_no_new_program():
    pipeline = cascade("guided")
    pipeline.generate(5, labels=1, scale=3.0)
    before = _generate._cache_size()
    for count, changes in enumerate(({"scale": 2.5}, {"seed": 7, "labels": 2}, {"start": 9}, {"threshold": 0.8}), 1):
        pipeline.generate(count, **({"labels": 0, "scale": jnp.float32(1.5)} | changes))
    assert _generate._cache_size() == before


def test_numbers_may_be_traced_and_counts_say_that_they_may_not():
    pipeline, keys, y = cascade("guided"), example_keys(jax.random.key(0), 2), jnp.array([0, 1])
    sampled = lambda **how: pipeline.replace(sampling={"base": Sampling(**how)}).sample_base(keys, y)  # noqa: E731
    scaled = lambda scale: sampled(sampler="ddim", steps=2, scale=scale, threshold=1.0)  # noqa: E731
    swept = fast_jit(jax.vmap(scaled))(jnp.array([2.0, 3.0]))
    np.testing.assert_allclose(swept[1], fast_jit(scaled)(3.0), atol=1e-5)
    for make, message in (
        (lambda v: sampled(sampler="ddim", steps=v), "^steps must be known outside of jit, since it is the length"),
        (lambda v: Sampling("dpm_solver", 2, order=v).checked(), "^order must be known outside of jit"),
        (lambda v: Sampling("dpm_solver", 2, sde=v).checked(), "^sde must be known outside of jit"),
        (lambda v: pipeline.generate(labels=[0], scale=v), "^scale is traced: generate runs compiled programs"),
        (lambda v: pipeline.generate(labels=[0], seed=v), "^seed must be a concrete value"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.jit(make)(jnp.int32(2))


@pytest.mark.parametrize(
    "kind,args,options,message",
    [
        ("unconditional", (0,), {}, "num_images=0 must be at least 1"),
        ("unconditional", (2.5,), {}, "num_images=2.5 must be an integer"),
        ("unconditional", (10**12,), {}, "num_images=1000000000000 must be at most 2147483647"),
        ("unconditional", (10**5000,), {}, "num_images=an integer of thousands of digits must be at most 2147483647"),
        (
            "unconditional",
            (1,),
            {"prompts": ["cat"]},
            "prompts is no argument of this pipeline, which generates images",
        ),
        ("unconditional", (1,), {"negative_prompts": "cat"}, "negative_prompts is no argument of this pipeline"),
        (
            "unconditional",
            (1,),
            {"clasifier_scale": 2.0},
            "'clasifier_scale' (did you mean 'classifier_scale'?)",
        ),
        ("unconditional", (1,), {"guidance_scale": 2.0}, "'guidance_scale' (did you mean 'scale'?)"),
        ("unconditional", (1,), {"num_inference_steps": 2}, "'num_inference_steps' (did you mean 'steps'?)"),
        ("unconditional", (1,), {"scale": 10**400}, "... must be a finite number"),
        ("unconditional", (1,), {"sampler": ["ddim"]}, "sampler=['ddim'] must be one of"),
        ("unconditional", (1,), {"seed": jax.random.key(0)}, "must be an integer"),
        ("unconditional", (1,), {"mesh": 2}, 'mesh=2 must be a Mesh with an axis "data"'),
        ("unconditional", (1,), {"report": True}, "report=True must be a function"),
        ("unconditional", (1,), {"labels": [0]}, "labels=[0]: no model of this pipeline has classes"),
        ("unconditional", (1,), {"scale": 2.0}, "scale=2.0 needs a network with a null condition"),
        ("unconditional", (1,), {"classifier_scale": 2.0}, "classifier_scale=2.0 needs a classifier"),
        ("unconditional", (1,), {"decoder_steps": 2}, "there is no option 'decoder_steps'"),
        ("unconditional", (1,), {"steps": 2000}, "base_steps=2000"),
        ("unconditional", (1,), {"order": 2}, "order=2 is no option of sampler='ddim'"),
        ("labels", (1,), {}, "labels is needed: base is class-conditional, and was trained without a null class"),
        ("labels", (), {"labels": []}, "labels must hold at least one label"),
        ("labels", (3,), {"labels": [0, 1]}, "labels must be one label or one for each of 3 images, got 2"),
        ("labels", (1,), {"labels": CLASSES}, "labels=3 must be the index of a class, in [0, 3), or its name"),
        ("labels", (), {"labels": [0, -1]}, "labels[1]=-1 must be the index of a class"),
        ("labels", (), {"labels": [True]}, "labels[0]=True must be the index of a class"),
        ("labels", (), {"labels": ["cat", "dgo"]}, "labels[1]='dgo' is none of the 3 classes; did you mean 'dog'?"),
        ("labels", (), {"labels": 0, "seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_generate_names_what_is_wrong(kind, args, options, message):
    with pytest.raises(ValueError) as caught:
        cascade(kind).generate(*args, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_classifier_guidance_needs_labels():
    with pytest.raises(ValueError, match="classifier_scale=2.0 needs the label of every image"):
        cascade("guided", guided=True).generate(4, classifier_scale=2.0)


def test_models_that_do_not_fit_are_one_sentence():
    two = {"num_classes": 2, "null": None, "names": None}
    other_process = thaw(classifier().metadata["diffusion"]) | {"num_steps": 10}
    for pipeline, message in (
        (Cascade(upsampler()), "base is an upsampler: it is conditioned on low_resolution"),
        (Cascade(base(), (base(),)), "upsampler is of size 8 as base is"),
        (
            Cascade(with_metadata(base(), conditions=["caption"])),
            "base is conditioned on caption, which a Cascade",
        ),
        (Cascade(base("labels"), classifier=with_metadata(classifier(), labels=two)), "base has 3, classifier has 2"),
        (Cascade(base(), classifier=with_metadata(classifier(), image_size=16)), "base has 8, classifier has 16"),
        (Cascade(base(), classifier=with_metadata(classifier(), diffusion=other_process)), "different noise processes"),
        (Cascade(base(), sampling={"decoder": Sampling()}), "sampling has no stage 'decoder'; there are base"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.checked()


def test_what_is_not_finite_is_no_image():
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, base().params)
    message = r"^the base returned values that are not finite .* images\[0\], images\[1\]"
    with pytest.raises(NotFiniteError, match=message):
        cascade().replace(base=base().replace(params=params)).generate(4)


def test_a_pipeline_comes_back(tmp_path):
    pipeline = cascade("guided", upsamplers=1, guided=True)
    save(pipeline, tmp_path / "run")
    back = load(tmp_path / "run")
    assert jax.tree.structure(back) == jax.tree.structure(pipeline)
    jax.tree.map(np.testing.assert_array_equal, back, pipeline)
    described = json.loads((tmp_path / "run" / "pipeline.json").read_text())
    assert described["models"] == {"base": "base", "classifier": "classifier", "upsamplers": ["up_16"]}
    assert described["sampling"]["base"] == {"sampler": "ddim", "steps": 2, "threshold": 1.0}


def test_the_workdir_of_one_stage_is_a_pipeline_and_its_directory_a_model(tmp_path):
    """A stage that generates images needs no pipeline.json; one that generates none is a model."""
    save(base(), tmp_path / "run" / "base")
    pipeline, model = load(tmp_path / "run"), load(tmp_path / "run" / "base")
    assert isinstance(pipeline, Cascade) and pipeline.sampling["base"].threshold == 1.0
    np.testing.assert_array_equal(cascade().generate(4), pipeline.generate(4, sampler="ddim", steps=2, batch_size=4))
    assert model.network == base().network
    save(upsampler(), tmp_path / "run" / "up")
    with pytest.raises(LoadError, match="it holds the models base, up, each of which can be opened alone"):
        load(tmp_path / "run")


def test_a_grid_of_samples_shows_the_classes_in_turn(tmp_path):
    said = []
    report.write_samples(cascade("labels"), tmp_path, num_images=4, progress=False, show=said.append)
    assert said == [f"wrote {tmp_path}/samples.png: 4 images"]
    assert np.asarray(Image.open(tmp_path / "samples.png")).std() > 5
