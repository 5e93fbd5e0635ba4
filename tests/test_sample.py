"""`python -m ddpm_jax.sample`: every kind of pipeline, every option of a stage, and errors in one sentence."""

import numpy as np
import pytest
from commands import assert_one_sentence, listing
from PIL import Image
from tiny_pipelines import HIGH, LOW, cascade, clip, unclip, upsampler

from ddpm_jax.pipelines import save

A_WORD = "a small red star"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories of an UnCLIP, of cascades, and of a model alone."""
    place = tmp_path_factory.mktemp("pipelines")
    save(unclip(), place / "unclip")
    save(cascade("guided", upsamplers=1, guided=True), place / "classes")
    save(cascade("labels"), place / "labels")
    save(cascade(), place / "ddpm")
    save(upsampler(), place / "model")
    save(clip(), place / "clip")
    return place


def sampled(call, place, out, *flags):
    status, said, err = call("sample", "--workdir", place, "--out", out, *flags)
    assert status == 0, err
    return said, np.asarray(Image.open(out))


def test_captions(call, places, tmp_path):
    said, image = sampled(call, places / "unclip", tmp_path / "a.png", "--prompt", A_WORD, "--prompt", "", "--count=2")
    assert said.endswith(f"a.png: 4 images of {HIGH} x {HIGH} pixels\n") and image.std() > 5
    flags = ["--prompt", A_WORD, "--negative_prompt", "a blue star", "--scale=2", "--prior_steps=3"]
    flags += ["--prior_sampler=unipc", "--prior_order=2", "--upsampler_eta=0.5", "--quantile=0.9", "--start=3"]
    flags += ["--prior_l2_clamp", "--prior_threshold=10", "--candidates=2", "--embedding=prior", "--nouse_text"]
    _, other = sampled(call, places / "unclip", tmp_path / "b.png", *flags)
    assert other.std() > 5


def test_labels_and_numbers(call, places, tmp_path):
    ddpm, classes = places / "ddpm", places / "classes"
    said, image = sampled(call, ddpm, tmp_path / "a.png", "--num_images=3", "--seed=4", "--columns=3")
    assert said.endswith(f"a.png: 3 images of {LOW} x {LOW} pixels\n")
    # One of them again.
    _, one = sampled(call, ddpm, tmp_path / "b.png", "--start=2", "--seed=4")
    width = one.shape[1]
    assert np.abs(image[:, -width:].astype(int) - one).max() <= 1
    flags = ["--label=cat", "--label=2", "--count=2", "--scale=1.5", "--classifier_scale=2", "--up_16_steps=2"]
    said, _ = sampled(call, classes, tmp_path / "c.png", *flags, "--sampler=dpm_solver", "--steps=3", "--nosde")
    assert f"4 images of {HIGH} x {HIGH}" in said
    _, alone = sampled(call, ddpm / "base", tmp_path / "e.png", "--start=2", "--seed=4", "--sampler=ddim", "--steps=2")
    np.testing.assert_array_equal(alone, one)
    said, low = sampled(call, classes, tmp_path / "f.png", "--label=dog", "--low_res", "--threshold=inf")
    assert f"1 image of {LOW} x {LOW}" in said
    said, _ = sampled(call, classes, tmp_path / "d.png", "--label=dog", "--num_images=3", "--up_16_sampler=ancestral")
    assert "3 images" in said


@pytest.mark.parametrize(
    "where,flags,parts",
    [
        ("ddpm", ["--prompt", A_WORD], ["--prompt is not used: --workdir=", "is a Cascade, which takes --label"]),
        ("ddpm", ["--negative_prompt", "x"], ["--negative_prompt is not used"]),
        ("ddpm", ["--label=cat"], ["labels=['cat']: no model of this pipeline has classes"]),
        ("ddpm", ["--scale=2"], ["scale=2.0 needs a network with a null condition"]),
        ("ddpm", ["--classifier_scale=2"], ["classifier_scale=2.0 needs a classifier"]),
        ("ddpm", ["--order=2"], ["order=2 is no option of sampler='ddim'"]),
        ("ddpm", ["--prior_steps=2"], ["there is no option 'prior_steps'"]),
        ("ddpm", ["--steps=few"], ["base_steps='few' must be like"]),
        ("ddpm", ["--sampler=magic"], ["--sampler=magic: value should be one of"]),
        ("ddpm", ["--eta=2"], ["eta=2.0 must be in [0, 1]"]),
        ("ddpm", ["--eta=nan"], ["--eta=nan: nan is not a finite number"]),
        ("ddpm", ["--num_images=0"], ["--num_images=0: 0 is not a positive integer"]),
        ("ddpm", ["--stepps=3"], ["Unknown command line flag 'stepps'"]),
        ("labels", [], ["labels is needed: base is class-conditional"]),
        ("labels", ["--label=-2"], ["labels[0]=-2 must be the index of a class, in [0, 3)"]),
        ("labels", ["--label=dgo"], ["labels[0]='dgo' is none of the 3 classes; did you mean 'dog'?"]),
        ("labels", ["--label=3"], ["labels[0]=3 must be the index of a class, in [0, 3), or its name"]),
        ("labels", ["--label=1", "--label=2", "--num_images=4"], ["--num_images is for one --label"]),
        ("classes", ["--classifier_scale=2"], ["classifier_scale=2.0 needs the label of every image"]),
        ("classes", ["--up_16_noise_level=2"], ["up_16_noise_level=2.0 must be in [0, 1]"]),
        ("unclip", [], ["--prompt is needed: --workdir="]),
        ("unclip", ["--num_images=2"], ["--num_images is not used"]),
        ("unclip", ["--prompt", "a red stat"], ['--prompt "a red stat": the word "stat" is not in the vocabulary']),
        ("unclip", ["--prompt", A_WORD, "--negative_prompt", "stat"], ["negative_prompts[0] = 'stat': the word"]),
        ("unclip", ["--prompt", A_WORD, "--upsampler_scale=2"], ["upsampler_scale=2.0 needs a network with a null"]),
        ("unclip", ["--prompt", A_WORD, "--decoder_scale=2", "--scale=2"], ["are the same option; give one of them"]),
        ("unclip", ["--prompt", A_WORD, "--l2_clamp"], ["l2_clamp=True is for a diffusion prior"]),
        (
            "unclip",
            ["--prompt", A_WORD, "--embedding=none", "--candidates=4"],
            ["--candidates is not used with --embedding=none"],
        ),
        (
            "unclip",
            ["--prompt", A_WORD, "--embedding=text", "--prior_steps=7"],
            ["--prior_steps is not used with --emb"],
        ),
        (
            "unclip",
            ["--prompt", A_WORD, "--low_res", "--upsampler_steps=7"],
            ["--upsampler_steps is not used with --low"],
        ),
        ("ddpm", ["--embedding=text"], ["--embedding is not used: it is for unCLIP, and this is a Cascade"]),
        ("clip", ["--prompt", A_WORD], ["holds the network CLIP alone, which generates no images"]),
        ("model", ["--num_images=2"], ["cannot be sampled alone: base is an upsampler"]),
    ],
)
def test_what_does_not_fit_is_one_sentence(call, places, tmp_path, where, flags, parts):
    result = call("sample", "--workdir", places / where, "--out", tmp_path / "x.png", *flags)
    assert_one_sentence(result, 2, *parts)
    assert listing(tmp_path) == []
