"""The commands: a wrong flag, config, recipe or request is one sentence and status 2, before anything is computed."""

import logging
import os

import pytest
from commands import A_WORD, SMOKE, assert_one_sentence, listing
from tiny_run import train_flags

from ddpm_jax import cli

# ---- Flags and config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,parts",
    [
        (
            ["--config.decoder.training.batch_sise=3"],
            ["no field decoder.training.batch_sise; did you mean decoder.training.batch_size?"],
        ),
        (
            ["--config.decodr.training.batch_size=3"],
            ["no field decodr.training.batch_size; did you mean decoder.training.batch_size?"],
        ),
        (["--config.sed=3"], ["no field sed; did you mean seed?"]),
        (
            ["--config.decoder.training.batch_size=many"],
            ["--config.decoder.training.batch_size=many is not a whole number"],
        ),
        (
            ["--config.decoder.training.batch_size=2.5"],
            ["--config.decoder.training.batch_size=2.5 is not a whole number"],
        ),
        (
            ["--config.decoder.training.learning_rate=fast"],
            ["--config.decoder.training.learning_rate=fast is not a number"],
        ),
        (["--config.progress=perhaps"], ["--config.progress=perhaps is neither true nor false"]),
        (["--confg=3"], ["Unknown command line flag 'confg'"]),
        (["--nonsense", "3"], ["Unknown command line flag 'nonsense'"]),
        (["word"], ["unknown argument 'word'"]),
        (["--stage", "encoder"], ["--stage=encoder is not a stage of this recipe", "clip, prior, decoder, upsampler"]),
    ],
)
def test_a_wrong_flag(call, tmp_path, flags, parts):
    workdir = tmp_path / "new"
    assert_one_sentence(call("train", "--config", SMOKE, "--workdir", workdir, *flags), 2, *parts)
    assert not workdir.exists()


def test_a_wrong_config_file(call, tmp_path):
    result = call("train", "--config", tmp_path / "nowhere.py", "--workdir", tmp_path / "new")
    assert_one_sentence(result, 2, f"--config={tmp_path}/nowhere.py: there is no file")
    result = call("train", f"--config={SMOKE}y", "--workdir", tmp_path / "new")
    assert_one_sentence(result, 2, "variant must be one of", "'smokey'")
    (tmp_path / "odd.py").write_text("def get_config():\n    return nothing\n")
    result = call("train", "--config", tmp_path / "odd.py", "--workdir", tmp_path / "new")
    assert_one_sentence(result, 2, "odd.py does not work: NameError: name 'nothing' is not defined, line 2")
    (tmp_path / "odd.py").write_text("x = (\n")
    assert_one_sentence(call("train", "--config", tmp_path / "odd.py", "--workdir", tmp_path / "new"), 2, "SyntaxError")
    assert_one_sentence(call("train", "--workdir", tmp_path / "new"), 2, "--config is needed")
    assert_one_sentence(call("train", "--config.seed=3"), 2, "--config is needed, before --config.seed")
    assert_one_sentence(call("train", "--config", SMOKE), 2, "--workdir is needed")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "fields,status,parts",
    [
        ({"decoder__training__num_steps": 0}, 2, ["stage decoder: num_steps=0 must be at least 1"]),
        ({"clip__training__num_steps": -3}, 2, ["stage clip: num_steps=-3 must be at least 1"]),
        (
            {"decoder__unet__patch": 3},
            1,
            ["stage decoder cannot work: image size 16 cannot be halved by this U-Net", "multiple of 3"],
        ),
        ({"decoder__image_size": 20}, 2, ["upsampler.image_size=32 must be a multiple of decoder.image_size=20"]),
        ({"upsampler__crop": 20}, 1, ["stage upsampler cannot work: image size 20 cannot be halved"]),
        ({"upsampler__crop": 40}, 1, ["stage upsampler cannot work: size must be at most"]),
        (
            {"decoder__training__batch_size": 12},
            1,
            ["stage decoder: batch_size=12 must be a multiple of 8 = 8 (devices)"],
        ),
        (
            {"decoder__training__accumulate": 4},
            1,
            ["decoder: batch_size=8 must be a multiple of 32 = 8 (devices) x 4 (accumulate)"],
        ),
        (
            {"upsampler__training__warmup_steps": 5},
            1,
            ["stage upsampler cannot work: warmup_steps=5 must be between"],
        ),
        ({"decoder__diffusion__prediction": "noise"}, 2, ["prediction='noise' must be one of 'eps', 'x0', 'v'"]),
        ({"decoder__diffusion__schedule": "sine"}, 2, ["schedule='sine' must be one of 'linear', 'cosine'"]),
        ({"decoder__diffusion__num_steps": 10**9}, 2, ["num_steps=1000000000 must be between 1 and 100000"]),
        ({"sample__decoder__steps": "few"}, 2, ["steps='few' must be like"]),
        ({"sample__decoder__sampler": "dimm"}, 2, ["sample.decoder.sampler='dimm' must be one of", "'ddim'"]),
        ({"sample__batch_size": 0}, 2, ["batch_size=0 must be an integer in [1, 65536]"]),
        ({"seed": 2**32}, 2, ["seed=4294967296 must lie in [0, 2**32)"]),
        ({"evaluation__seed": -1}, 2, ["evaluation.seed=-1 must lie in [0, 2**32)"]),
        ({"evaluation__num_captions": 0}, 2, ["evaluation.num_captions=0 must be at least 1"]),
        (
            {"decoder__training__learning_rate": "nan"},
            2,
            ["decoder.training.learning_rate=nan must be a finite number"],
        ),
        ({"sample__decoder__scale": "inf"}, 2, ["sample.decoder.scale=inf must be a finite number"]),
        ({"cpu_devices": -1}, 2, ["cpu_devices=-1 must be at least 0"]),
        ({"decoder__supersample": 32}, 2, ["resolution must lie between 16 and 256, got 512"]),
        ({"decoder__supersample": 0}, 2, ["resolution must lie between 16 and 256, got 0"]),
        ({"decoder__cond_map_channels": 0}, 1, ["stage decoder cannot work: cond_map_heads=8 needs cond_map_channels"]),
        (
            {"decoder__cond_map_channels": 0, "decoder__cond_map_heads": 0},
            1,
            ["stage decoder cannot work: modulate=True of the U-Net needs cond_map_channels"],
        ),
        ({"decoder__text_encoder__kind": "lstm"}, 2, ["decoder.text_encoder.kind='lstm' must be"]),
        ({"prior__training__optimizer": "sgd"}, 1, ["stage prior cannot work: optimizer='sgd' must be"]),
        (
            {"decoder__drop_image": 1.5},
            2,
            ["ImageEmbedding.drop=1.5 must lie between 0 and 1 (here --config.decoder.drop_image=1.5)"],
        ),
        (
            {"decoder__drop_text": "0.0"},
            2,
            ["Captions.drop=0.0, and sampling.scale=1.5 guides away from a null condition, which training learns at"],
        ),
        ({"decoder__unet__patch": 0}, 2, ["decoder.unet.patch=0 must be at least 1"]),
        ({"clip__embed_dim": -2}, 2, ["Embeddings.size=-2 must be at least 1 (here --config.clip.embed_dim=-2)"]),
    ],
)
def test_a_config_that_cannot_work_stops_before_anything_is_trained(call, tmp_path, fields, status, parts):
    workdir = tmp_path / "new"
    assert_one_sentence(call("train", *train_flags(workdir, **fields)), status, *parts)
    assert not workdir.exists()


@pytest.mark.parametrize(
    "lines,parts",
    [
        (["    return {'seed': 0}"], ["get_config must return an ml_collections ConfigDict, got dict"]),
        (["    return None"], ["get_config must return an ml_collections ConfigDict, got NoneType"]),
        (["    return ConfigDict({'seed': 0})"], ["has no function stages(config)"]),
        (
            ["    return ConfigDict({'seed': 0})", "def stages(config):", "    return config"],
            ["stages(config) of ", "must return a tuple of Stage objects, got ConfigDict"],
        ),
        (
            ["    return ConfigDict({'seed': 0})", "def stages(config):", "    return config.decoder"],
            ["odd.py does not work: AttributeError", "decoder", "line 5"],
        ),
    ],
)
def test_a_recipe_that_returns_something_else(call, tmp_path, lines, parts):
    (tmp_path / "odd.py").write_text("\n".join(["from ml_collections import ConfigDict", "def get_config():", *lines]))
    assert_one_sentence(call("train", "--config", tmp_path / "odd.py", "--workdir", tmp_path / "new"), 2, *parts)
    assert not (tmp_path / "new").exists()


def test_a_number_under_another_name_is_that_of_the_command_line():
    """Of the fields that it sets, those with the value in the message, unless the message names them."""
    name = lambda message, *argv: cli._with_overrides(message, "config", list(argv)).removeprefix(message)
    assert name("drop=2.0 must be less", "--config.drop_label=2") == " (here --config.drop_label=2)"
    assert name("validation must be less, got 0", "--config.held_out", "0") == " (here --config.held_out=0)"
    assert name("kind='gru' is none", "--config.encoder=gru", "--seed=3") == " (here --config.encoder=gru)"
    assert name("size=16 must be less", "--config.a=1", "--config.b=6", "--config.c=160", "--config.d=.1") == ""
    assert name("n=0 is none", "--config.a=0", "--config.b=0") == " (here --config.a=0 or --config.b=0)"
    assert name("n=0 is none", "--config.a=0", "--config.b=0", "--config.c=0") == ""
    assert name("stage x: size=0 must be more", "--config.every=0", "--config.x.size=0") == ""
    assert name("stage x: num_steps=0 must be more", "--config.x.num_steps=0") == ""


@pytest.mark.parametrize(
    "lines,parts",
    [
        (["import nowhere_to_be_found"], ["odd.py, line 1: there is no module nowhere_to_be_found; is it installed?"]),
        (["", "from ddpm_jax.nowhere import x"], ["odd.py, line 2: there is no module ddpm_jax.nowhere"]),
        (
            ["from ddpm_jax import nowhere"],
            ["odd.py does not work: ImportError: cannot import name", "line 1"],
        ),
    ],
)
def test_a_recipe_that_imports_what_is_not_there(call, tmp_path, lines, parts):
    (tmp_path / "odd.py").write_text("\n".join(lines))
    assert_one_sentence(call("train", "--config", tmp_path / "odd.py", "--workdir", tmp_path / "new"), 2, *parts)


@pytest.mark.parametrize("program", ["train", "sample", "evaluate"])
def test_help_lists_the_flags(call, program):
    status, out, err = call(program, "--help")
    assert (status, err) == (0, "")
    assert f"python -m ddpm_jax.{program}" in out
    assert "--workdir: " in out


# ---- Prompts and images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,parts",
    [
        (
            ["--prompt", A_WORD, "--prompt", "a stat", "--out", "x.png"],
            ['--prompt "a stat" (2 of 2): the word "stat" is not'],
        ),
        (
            ["--prompt", "a stat", "--out", "x.png"],
            ['--prompt "a stat": the word "stat" is not', 'word is "star"'],
        ),
        # An accent as a character of its own, and bytes in a locale that does not know them.
        (["--prompt", "e\u0301toile", "--out", "x.png"], ['--prompt "e\u0301toile": the word "\xe9toile" is not']),
        (["--prompt", "\udcc3\udca9toile", "--out", "x.png"], ['--prompt "\xe9toile": the word "\xe9toile" is not']),
        (["--prompt", "\udce9toile", "--out", "x.png"], ["--prompt='\\udce9toile' is not UTF-8"]),
        (["--prompt", A_WORD], ["--out is needed, a PNG file to write"]),
        (["--out", "x.png"], ["--prompt is needed: the bundled pipeline generates images of captions"]),
        (["--prompt", A_WORD, "--out", "/dev/full"], ["--out=/dev/full must end in .png"]),
        (["--prompt", A_WORD, "--out", "/dev/full/x.png"], ["/dev/full is not a directory"]),
        (["--prompt", A_WORD, "--out", "/proc/x.png"], ["--out=/proc/x.png cannot be written: /proc: "]),
        (["--prompt", A_WORD, "--out", "x.png", "--count", "0"], ["--count=0: 0 is not a positive integer"]),
        (["--prompt", A_WORD, "--out", "x.png", "--seed", "one"], ["--seed=one is not a whole number"]),
        (["--prompt", A_WORD, "--out", "x.png", "--seed", "9" * 20], [f"--seed={'9' * 20}", "range [0, 4294967295]"]),
        (["--prompt", A_WORD, "--out", "x.png", "--seed", str(2**32)], ["is not an integer in the range"]),
        (["--prompt", A_WORD, "--out", "x.png", "--scale", "nan"], ["--scale=nan: nan is not a finite number"]),
        (["--prompt", A_WORD, "--out", "x.png", "--prior_scale=-inf"], ["-inf is not a finite number"]),
        (
            ["--prompt", A_WORD, "--out", "x.png", "--scale", "1e39"],
            ["1e39 is not a finite number of single precision"],
        ),
        (
            ["--prompt", A_WORD, "--out", "x.png", "--clasifier_scale", "2"],
            ["there is no option 'clasifier_scale' (did you mean 'classifier_scale'?)"],
        ),
        (
            ["--prompt", A_WORD, "--out", "x.png", "--steps", "ddim" + "9" * 5000],
            ["decoder_steps='ddim999", "has a number of ten or more digits"],
        ),
        (["--prompt", A_WORD, "--out", "x.png", "--seed", "9" * 5000], ["--seed=999", " is too large"]),
        (["--prompt", A_WORD, "--out", "n" * 300 + ".png"], ["--out=nnn", "cannot be written: File name too long"]),
    ],
)
def test_a_wrong_request(call, tmp_path, monkeypatch, flags, parts):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(call("sample", *flags), 2, *parts)
    assert listing(tmp_path) == []


def test_a_pipe_in_place_of_a_file(call, tmp_path):
    """Opening one waits for a reader."""
    os.mkfifo(tmp_path / "pipe.png")
    result = call("sample", "--prompt", A_WORD, "--out", tmp_path / "pipe.png")
    assert_one_sentence(result, 2, f"--out={tmp_path}/pipe.png cannot be written", "is not a regular file")


def test_a_bug_keeps_its_traceback(call, monkeypatch, tmp_path):
    """Only what this package's own checks say is shortened: an error inside a library is for a bug report."""
    monkeypatch.setattr("ddpm_jax.training.run.describe", lambda stage: logging.Formatter(style="?"))
    with pytest.raises(ValueError, match="Style must be one of"):
        call("train", *train_flags(tmp_path / "run"))
