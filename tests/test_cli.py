"""The commands: what goes wrong ends in one sentence, a status, and nothing half-written."""

import contextlib
import json
import os
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from commands import A_WORD, as_command, assert_one_sentence, listing, small_disk
from tiny_run import train_flags

from ddpm_jax import pipelines
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.storage.lock import lock_workdir


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
