"""The commands: what goes wrong ends in one sentence, a status, and nothing half-written."""

import contextlib
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from tiny_run import ROOT, train_flags

from ddpm_jax import pipelines
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.storage.lock import lock_workdir

SMOKE = f"{ROOT / 'configs' / 'shapes.py'}:smoke"
A_WORD = "a small red star on a white background"


@contextlib.contextmanager
def as_command(program, *argv):
    """Run a command in this process; its end is a SystemExit, and what it does to logging does not last."""
    logger = absl_logging.get_absl_logger()
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        patch.setattr(sys, "argv", [program, *map(str, argv)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        yield lambda: runpy.run_module(f"ddpm_jax.{program}", run_name="__main__", alter_sys=True)
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def call(capfd):
    """Return call(program, *flags) -> (status, stdout, stderr)."""

    def run(program, *argv):
        capfd.readouterr()
        status = 0
        with as_command(program, *argv) as command:
            try:
                command()
            except SystemExit as stop:
                status = stop.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return run


def assert_one_sentence(result, status, *parts):
    """The last line of stderr is the only one that is not a warning, and says what is wanted."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == status, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0]


def listing(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@contextlib.contextmanager
def small_disk(path, size):
    """Mount a disk of `size` bytes, where the system lets us."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory):
    """A workdir with a trained CLIP, checkpoints of steps 1 and 2; to be copied, not changed."""
    directory = tmp_path_factory.mktemp("with_clip") / "run"
    with as_command("train", *train_flags(directory), "--stage", "clip") as command:
        command()
    return directory


@pytest.fixture
def clip_run(with_clip, tmp_path):
    return shutil.copytree(with_clip, tmp_path / "clip_run")


@pytest.fixture(scope="module")
def trained(with_clip, tmp_path_factory):
    """A finished run."""
    directory = shutil.copytree(with_clip, tmp_path_factory.mktemp("trained") / "run")
    # Previews too: their networks run on all devices.
    with as_command("train", *train_flags(directory, decoder__training__preview_every=1)) as command:
        command()
    assert (directory / "decoder" / "previews" / "step_000002_ema.png").exists()
    return directory


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
        ({"decoder__drop_image": 1.5}, 2, ["drop=1.5 must lie between 0 and 1"]),
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


@pytest.mark.parametrize("program", ["train", "sample", "evaluate"])
def test_help_lists_the_flags(call, program):
    status, out, err = call(program, "--help")
    assert (status, err) == (0, "")
    assert f"python -m ddpm_jax.{program}" in out
    assert "--workdir: " in out


# ---- Workdirs --------------------------------------------------------------------------------------------------------


def sample_flags(tmp_path, *flags):
    return ["--prompt", A_WORD, "--out", tmp_path / "out.png", *flags]


def test_a_missing_workdir(call, tmp_path):
    result = call("sample", *sample_flags(tmp_path), "--workdir", tmp_path / "nowhere")
    assert_one_sentence(result, 2, f"--workdir={tmp_path}/nowhere does not exist")
    result = call("evaluate", "--workdir", tmp_path / "nowhere")
    assert_one_sentence(result, 2, f"--workdir={tmp_path}/nowhere does not exist")
    assert listing(tmp_path) == []


def test_a_foreign_workdir_is_left_as_it_is(call, tmp_path):
    foreign = tmp_path / "letters"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    result = call("train", *train_flags(foreign))
    assert_one_sentence(result, 1, f"workdir {foreign} is not empty and holds no training run")
    nothing = "holds neither a pipeline (pipeline.json) nor a model (model.json)"
    assert_one_sentence(call("sample", *sample_flags(tmp_path), "--workdir", foreign), 1, nothing)
    assert_one_sentence(call("evaluate", "--workdir", foreign), 1, nothing)
    assert listing(foreign) == ["letter.txt"]
    result = call("train", *train_flags(foreign / "letter.txt"))
    assert_one_sentence(result, 1, "letter.txt is a file, not a directory")
    result = call("sample", *sample_flags(tmp_path), "--workdir", foreign / "letter.txt")
    assert_one_sentence(result, 1, "letter.txt is a file; give a directory")


def test_a_json_file_that_is_cut_short(call, clip_run, tmp_path):
    for name in ("run.json", "pipeline.json"):
        text = (clip_run / name).read_text()
        (clip_run / name).write_text(text[: len(text) // 2])
    result = call("train", *train_flags(clip_run))
    assert_one_sentence(result, 1, "run.json cannot be read as a training run")
    result = call("sample", *sample_flags(tmp_path), "--workdir", clip_run)
    assert_one_sentence(result, 1, "pipeline.json is not the description of a pipeline of this package")


def test_a_workdir_in_use(call, clip_run):
    with lock_workdir(clip_run):
        result = call("train", *train_flags(clip_run))
    assert_one_sentence(result, 1, f"workdir {clip_run} is in use by another run (pid {os.getpid()})")


def test_a_workdir_that_cannot_be_made(call, tmp_path):
    (tmp_path / "file").touch()
    result = call("train", *train_flags(tmp_path / "file" / "run"))
    assert_one_sentence(result, 1, f"{tmp_path}/file/run")


def test_a_stage_before_clip(call, tmp_path):
    result = call("train", *train_flags(tmp_path / "run"), "--stage", "prior")
    assert_one_sentence(result, 1, "stage prior needs a trained clip", "train the stage clip first")
    assert not (tmp_path / "run").exists()  # a refused run claims no directory


def test_a_stage_after_half_a_clip(call, clip_run):
    shutil.rmtree(clip_run / "clip" / "checkpoints" / "2")
    result = call("train", *train_flags(clip_run), "--stage", "decoder")
    assert_one_sentence(result, 1, "stage decoder needs a trained clip")


def test_an_unfinished_run_has_nothing_to_sample_from(call, clip_run, tmp_path):
    result = call("sample", *sample_flags(tmp_path), "--workdir", clip_run)
    assert_one_sentence(result, 1, f"the pipeline of {clip_run} needs prior", "train the stage first")


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def test_another_config(call, clip_run):
    before = listing(clip_run)
    result = call("train", *train_flags(clip_run, clip__training__learning_rate=0.5))
    assert_one_sentence(
        result, 1, "made with other settings: training.learning_rate is", "there and 0.5 here", "another workdir"
    )
    assert listing(clip_run) == before


def test_a_stage_that_has_saved_nothing_may_be_changed(call, clip_run):
    status, _, err = call("train", *train_flags(clip_run, prior__training__learning_rate=0.5), "--stage", "clip")
    assert status == 0, err
    config = json.loads((clip_run / "run.json").read_text())["config"]
    assert config["prior"]["training"]["learning_rate"] == 0.5


def test_a_stage_goes_on_with_its_own_clip_only(call, trained, tmp_path):
    """CLIP was trained again under the stages that were trained with the old one."""
    other = shutil.copytree(trained, tmp_path / "other")
    status, _, err = call("train", *train_flags(tmp_path / "new", seed=3), "--stage", "clip")
    assert status == 0, err
    shutil.rmtree(other / "clip")
    shutil.copytree(tmp_path / "new" / "clip", other / "clip")
    for file in (other / "clip").rglob("config/*"):
        file.write_text(re.sub(r'"seed": ?3', '"seed": 0', file.read_text()))
    result = call("sample", *sample_flags(tmp_path), "--workdir", other)
    assert_one_sentence(result, 1, f"prior of {other} was trained with another clip than the one in {other}/clip")
    status, _, err = call("train", *train_flags(other), "--stage", "prior")
    assert status == 1 and "was made with other settings: needs.clip is" in err.splitlines()[-1]


def cut(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 500 and path.parent.name == "d":
            os.truncate(path, path.stat().st_size // 2)


def test_a_truncated_checkpoint(call, clip_run):
    checkpoints = clip_run / "clip" / "checkpoints"
    cut(checkpoints / "2")
    status, _, err = call("train", *train_flags(clip_run), "--stage", "clip")
    lines = err.splitlines()
    assert status == 0, err
    assert len(lines) == 2 and lines[0].startswith(f"warning: checkpoint {checkpoints}/2 cannot be read"), err
    assert lines[1] == "clip: continues after step 1"
    assert Checkpoints(clip_run / "clip", read_only=True).steps() == [1, 2]


def test_no_checkpoint_can_be_read(call, clip_run):
    for step in ("1", "2"):
        cut(clip_run / "clip" / "checkpoints" / step)
    status, _, err = call("train", *train_flags(clip_run), "--stage", "clip")
    *lines, last = err.splitlines()
    assert status == 1
    assert len(lines) == 2 and all(line.startswith("warning: checkpoint ") for line in lines)
    assert last.startswith("error: none of the checkpoints in")


def test_a_full_disk_before_training(call, tmp_path):
    with small_disk(tmp_path / "disk", 60_000) as disk:
        result = call("train", *train_flags(disk / "run"), "--stage", "clip")
        assert_one_sentence(result, 1, "not enough space for checkpoints in", "are needed and")


def test_a_full_disk_while_training(call, tmp_path, monkeypatch):
    """Somebody else took the room after the run had begun."""
    monkeypatch.setattr(Checkpoints, "check_space", lambda self, state: None)
    with small_disk(tmp_path / "disk", 120_000) as disk:
        result = call("train", *train_flags(disk / "run"), "--stage", "clip")
        assert_one_sentence(result, 1, "could not write the checkpoint of step", "No space left on device")
        assert not [name for name in listing(disk) if "tmp" in name]


def test_a_full_disk_at_the_first_file(call, tmp_path):
    with small_disk(tmp_path / "disk", 4096) as disk:
        result = call("train", *train_flags(disk / "run"))
        assert_one_sentence(result, 1, "No space left on device")
        assert not [name for name in listing(disk) if "tmp" in name]


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


def test_a_directory_that_cannot_be_written(call, trained, tmp_path):
    """Said before anything is loaded, and by trying: for root, permissions say nothing of a read-only disk."""
    with small_disk(tmp_path / "disk", 2**20) as disk:
        (disk / "image.png").touch()
        shutil.copytree(trained, disk / "run", ignore=shutil.ignore_patterns("checkpoints", "embeddings"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for flags in (
            ["sample", "--prompt", A_WORD, "--out", disk / "image.png"],
            ["evaluate", "--out", disk / "results"],
            ["evaluate", "--workdir", disk / "run"],
            ["convert", "--from", "clip", "--src", trained, "--out", disk / "new"],
        ):
            assert_one_sentence(call(*flags), 2, f"={disk}", "cannot be written", "Read-only file system")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        with open(disk / "filler", "wb") as file, contextlib.suppress(OSError):
            file.write(b"x" * 2**20)
        assert_one_sentence(call("evaluate", "--out", disk / "results"), 2, "No space left on device")
        assert "tmp" not in " ".join(listing(disk))
    (tmp_path / "dir.png").mkdir()
    result = call("sample", "--prompt", A_WORD, "--out", tmp_path / "dir.png")
    assert_one_sentence(result, 2, "is a directory; give the name of a file")
    assert_one_sentence(call("evaluate"), 2, "--out is needed, a directory for the results")


def test_an_unknown_word_is_named_before_anything_is_loaded(call, trained, tmp_path):
    flags = ["--prompt", "a small red stat", "--out", tmp_path / "out.png", "--workdir", trained]
    message = 'the word "stat" is not in the vocabulary; the nearest known word is "star"'
    assert_one_sentence(call("sample", *flags), 2, message)
    assert listing(tmp_path) == []


def test_a_long_prompt_is_cut_with_one_warning(call, trained, tmp_path):
    prompt = " ".join(["star"] * 500)
    flags = ["--prompt", prompt, "--prompt", A_WORD, "--out", tmp_path / "out.png", "--workdir", trained]
    status, out, err = call("sample", *flags)
    assert status == 0, err
    assert [line for line in err.splitlines() if "warning" in line] == [
        'warning: the text "star star star star star star star st..." is 502 tokens, cut to 24.'
    ]
    assert f"wrote {tmp_path}/out.png: 2 images of 32 x 32 pixels" in out
    with small_disk(tmp_path / "disk", 8192) as disk:
        (disk / "filler").write_bytes(b"x" * 4096)
        flags = ["--prompt", A_WORD, "--prompt", A_WORD, "--out", disk / "out.png", "--workdir", trained]
        status, _, err = call("sample", *flags)
        last = err.splitlines()[-1]
        assert status == 1
        assert last == f"error: {disk}/out.png: could not write the image: No space left on device"
        assert listing(disk) == ["filler"]


def test_a_network_that_returns_nan_is_a_failure(call, trained, monkeypatch, tmp_path):
    """Not a black image and status 0."""
    pipeline = pipelines.load(trained)
    decoder = jax.tree.map(lambda leaf: leaf * np.nan, pipeline.decoder.params)
    damaged = pipeline.replace(decoder=pipeline.decoder.replace(params=decoder))
    for module in ("pipelines", "pipelines.directory"):
        monkeypatch.setattr(f"ddpm_jax.{module}.load", lambda *_, **__: damaged)
    for flags in (
        ["sample", "--prompt", A_WORD, "--out", tmp_path / "out.png", "--workdir", trained],
        ["evaluate", "--out", tmp_path / "results", "--workdir", trained],
    ):
        status, _, err = call(*flags)
        assert status == 1 and err.splitlines()[-1].startswith("error: the decoder returned values that are not finite")
    assert not [name for name in listing(tmp_path) if name != "results"]


def test_the_table_is_printed_before_files_that_cannot_be_written(call, trained, monkeypatch, tmp_path):
    """The disk filled up in the meantime."""

    def full(path, image):
        raise OSError(28, "could not write the image: No space left on device", str(path))

    monkeypatch.setattr("ddpm_jax.data.image_grid.save_png", full)
    status, out, err = call("evaluate", "--workdir", trained, "--out", tmp_path / "results")
    assert status == 1 and err.splitlines()[-1].startswith(f"error: {tmp_path}/results/samples.png: could not write")
    assert "| one object |" in out


def test_a_finished_run(call, trained):
    """It left its results, and the same command again trains nothing and measures again."""
    assert {"samples.png", "faithfulness.json", "run.json"} <= {path.name for path in trained.iterdir()}
    assert not [name for name in listing(trained) if "tmp" in name]
    metrics = {path: path.read_bytes() for path in trained.glob("*/metrics.jsonl")}
    table = (trained / "faithfulness.json").read_bytes()
    (trained / "faithfulness.json").unlink()
    status, out, err = call("train", *train_flags(trained))
    assert status == 0, err
    for stage in ("clip", "prior", "decoder", "upsampler"):
        assert f"{stage}: is finished after step 2" in err
    assert "| one object |" in out
    assert {path: path.read_bytes() for path in trained.glob("*/metrics.jsonl")} == metrics
    assert (trained / "faithfulness.json").read_bytes() == table


def test_a_bug_keeps_its_traceback(call, monkeypatch, tmp_path):
    """Only what this package's own checks say is shortened: an error inside a library is for a bug report."""
    monkeypatch.setattr("ddpm_jax.training.run.describe", lambda stage: logging.Formatter(style="?"))
    with pytest.raises(ValueError, match="Style must be one of"):
        call("train", *train_flags(tmp_path / "run"))
