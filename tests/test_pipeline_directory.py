"""Directories of pipelines: what is saved comes back, and every field of pipeline.json is checked."""

import json
import re

import jax
import numpy as np
import pytest
from tiny_pipelines import unclip as tiny

import ddpm_jax
from ddpm_jax.pipelines import LoadError, UnCLIP, load, save
from ddpm_jax.storage.fingerprint import tree_fingerprint
from ddpm_jax.storage.metadata import freeze, thaw


def pipeline():
    return tiny()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    save(pipeline(), path, dtype=np.float16)
    return path


def test_a_home_directory_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(LoadError, match=re.escape(str(tmp_path / "runs"))):
        load("~/runs")


def test_a_pipeline_comes_back_rounded_to_half_precision(directory):
    ours, theirs = pipeline(), load(directory)
    assert isinstance(theirs, UnCLIP) and theirs.tokenizer.to_config() == ours.tokenizer.to_config()
    assert jax.tree.structure(ours.replace(tokenizer=None)) == jax.tree.structure(theirs.replace(tokenizer=None))
    for a, b in zip(jax.tree.leaves(ours.models), jax.tree.leaves(theirs.models), strict=True):
        assert b.dtype == np.float32 and b.shape == a.shape
        np.testing.assert_allclose(b, a, rtol=2**-11, atol=2**-25)
    assert theirs.sampling == ours.sampling and (theirs.candidates, theirs.batch_size) == (1, 8)
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]
    assert {entry.name for entry in directory.iterdir()} == {"pipeline.json", "clip", "prior", "decoder", "upsampler"}


def test_full_precision_comes_back_bit_for_bit(tmp_path):
    save(tiny(2), tmp_path / "w")
    back = load(tmp_path / "w")
    for a, b in zip(jax.tree.leaves(tiny(2).models), jax.tree.leaves(back.models), strict=True):
        np.testing.assert_array_equal(a, b)
    assert back.names == ("up_16", "up_32") and back.image_size == 32
    with pytest.raises(FileExistsError, match="exists already"):
        save(tiny(2), tmp_path / "w")


def test_parameters_too_large_for_half_precision_are_refused_and_nothing_is_written(tmp_path):
    large = pipeline().prior.replace(params=jax.tree.map(lambda leaf: leaf + 1e6, pipeline().prior.params))
    with pytest.raises(ValueError, match="has values that float16 cannot hold"):
        save(pipeline().replace(prior=large), tmp_path / "w", dtype=np.float16)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="must be a Model, UnCLIP or Cascade, got a dict"):
        save({}, tmp_path / "w")


def refuse(path, *words):
    with pytest.raises(LoadError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


def test_what_is_no_pipeline_is_one_sentence(tmp_path):
    refuse(tmp_path / "missing", "does not exist")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "is a file; give a directory")
    (tmp_path / "a").mkdir()
    refuse(tmp_path / "a", "holds neither a pipeline (pipeline.json) nor a model (model.json)")
    for text in ("{", "[]", '"text"', "\xff", "[" * 10**5, ""):
        (tmp_path / "a" / "pipeline.json").write_text(text, encoding="latin-1")
        refuse(tmp_path / "a", "pipeline.json")


WRONG = [
    ("format", "ddpm_jax pipeline 9", "has the format 'ddpm_jax pipeline 9'"),
    ("version", -1, "version=-1 must be a version"),
    ("class", "os.system", "class='os.system' must be one of 'UnCLIP', 'Cascade'"),
    ("class", "Cascade", "models has no part 'clip'; it has base, classifier, noised_clip, upsamplers"),
    ("models", {"clip": "clip"}, "models lacks 'prior', which UnCLIP needs"),
    ("models.clip", 3, "models.clip=3 must be the directory of a model"),
    ("models.clip", "missing", "missing is not a model directory of this package"),
    ("models.prior", "decoder", "prior must be a DiffusionPrior or AutoregressivePrior, got a Decoder"),
    ("models.upsamplers", "up", "models.upsamplers='up' must be a list"),
    ("models.upsamplers", ["a"] * 10**5, "must be a list of at most 16 directories"),
    ("models.upsamplers", ["../x y"], "must be directories with different names"),
    ("sampling.prior.steps", 10**9, "prior_steps=1000000000"),
    ("sampling.prior.steps", -1, "sampling.prior.steps=-1 must be at least 1"),
    ("sampling.prior.steps", "exotic", "prior_steps='exotic'"),
    ("sampling.decoder.scale", float("nan"), "sampling.decoder.scale=nan must be a finite number"),
    ("sampling.decoder.scale", 1e30, "sampling.decoder.scale=1e+30 must be in [0, 10000]"),
    ("sampling.decoder.threshold", -1.0, "sampling.decoder.threshold=-1.0 must be in (0, 1e+06]"),
    ("sampling.decoder.eta", -0.5, "sampling.decoder.eta=-0.5 must be in [0, 1]"),
    ("sampling.decoder.sampler", "magic", "sampling.decoder.sampler='magic' must be one of"),
    ("sampling.decoder.speed", 1, "sampling.decoder has no option 'speed'"),
    ("sampling.prior", {"scale": 3.0, "order": 2}, "order=2 is no option of sampler='ancestral'"),
    ("sampling.base", {}, "sampling has no part 'base'; it has prior, decoder, upsampler"),
    ("options.candidates", 10**9, "options.candidates=1000000000 must be an integer in [1, 1000]"),
    ("options.candidates", 0, "options.candidates=0 must be an integer"),
    ("options.batch_size", -3, "options.batch_size=-3 must be an integer"),
    ("options.speed", 1, "options has no part 'speed'"),
    ("options.noise_levels", {"upsampler": 3}, "options.noise_levels.upsampler=3 must be a number in [0, 1]"),
    ("more", 1, "has no field 'more' in this version"),
]


def changed(value, path, new):
    first, _, rest = path.partition(".")
    return value | {first: changed(value[first], rest, new) if rest else new}


def linked(directory, place):
    """Return a copy of a directory whose models are links, and what its pipeline.json says."""
    place.mkdir(exist_ok=True)
    for entry in directory.iterdir():
        if entry.is_dir():
            (place / entry.name).symlink_to(entry)
    return json.loads((directory / "pipeline.json").read_text())


@pytest.mark.parametrize("path,value,message", WRONG, ids=[f"{path}={value!r:.20}" for path, value, _ in WRONG])
def test_a_wrong_field_is_one_sentence_that_names_it(directory, tmp_path, path, value, message):
    described = linked(directory, tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps(changed(described, path, value)))
    refuse(tmp_path, message)


def test_a_clip_that_the_other_stages_were_not_trained_with_is_refused(tmp_path):
    """By name, and whatever the precision on disk; the averages and not the raw parameters count."""
    needs = {"clip": tree_fingerprint(pipeline().clip.params)}
    trained = pipeline().prior.replace(metadata=freeze(thaw(pipeline().prior.metadata) | {"needs": needs}))
    for dtype in (np.float32, np.float16):
        save(pipeline().replace(prior=trained), tmp_path / np.dtype(dtype).name, dtype=dtype)
        load(tmp_path / np.dtype(dtype).name)
    place = tmp_path / "float32"
    described = json.loads((place / "prior" / "model.json").read_text())
    described["metadata"]["needs"]["clip"] = "0" * 64
    (place / "prior" / "model.json").write_text(json.dumps(described))
    refuse(place, "prior of", "was trained with another clip than the one in", "train prior again")


def test_a_clip_of_another_format_is_not_answered_with_train_prior_again(directory, tmp_path):
    described = linked(directory, tmp_path)
    (tmp_path / "clip").unlink()
    (tmp_path / "clip").mkdir()
    model = json.loads((directory / "clip" / "model.json").read_text())
    (tmp_path / "clip" / "model.json").write_text(json.dumps(model | {"format": "ddpm_jax model 9"}))
    (tmp_path / "pipeline.json").write_text(json.dumps(described))
    refuse(tmp_path, "has the format 'ddpm_jax model 9'", "open it with the version of ddpm_jax that wrote it")


def test_the_bundled_pipeline_generates():
    pipeline = ddpm_jax.load()
    images = pipeline.generate(["a small red star in the center on white"], low_res=True)
    size = pipeline.decoder.metadata["image_size"]
    assert images.shape == (1, size, size, 3)
    assert images[0, 0].mean() > 200  # the background is what even an early state follows
