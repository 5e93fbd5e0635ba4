"""`train(stage, workdir)`: any task on anyone's arrays; it resumes bit for bit and refuses what changes the result."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.data.transforms import Select
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.errors import LoadError
from ddpm_jax.models.adm import Classifier, ClassUNet
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.storage.checkpoint import CheckpointError, Checkpoints, restore_params
from ddpm_jax.storage.lock import WorkdirInUse, lock_workdir
from ddpm_jax.storage.model_directory import open_model
from ddpm_jax.training import ClassifierTask, ContrastiveTask, DiffusionTask, Images, Labels, Stage, Training, train
from ddpm_jax.training.metrics import read_metrics
from ddpm_jax.training.run import is_trained

N, SIZE, BATCH = 40, 4, 8


def make_images(count=N, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def brightness(images):
    return 2 * images.mean((1, 2, 3)).astype(np.float32) / 255


TARGETS = brightness(make_images())


class Brightness(nn.Module):
    """A linear function of the pixels, after a hidden layer of `channels`."""

    channels: int = 4

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(self.channels, name="hidden")(x.reshape(x.shape[0], -1))
        return nn.Dense(1, name="out")(hidden)[:, 0]


class Crash(Exception):
    """Stands for whatever may go wrong."""


class OwnTask:
    """A user's own task, with no more than the protocol needs: regression of y, with noise on the targets."""

    crash = False  # of the class: no part of what the result depends on

    def __init__(self, network, noise=0.1):
        self.network, self.noise = network, noise

    def init(self, key, batch):
        assert set(batch) == {"image", "y"}, "a text has been left in the batch"
        return self.network.init(key, batch["image"].astype(jnp.float32))

    def prepare(self, frozen, batch):
        return batch

    def loss(self, params, batch, key):
        loss, metrics = self.eval_loss(params, batch, key)
        return loss + self.noise * jax.random.normal(key, loss.shape) * loss, metrics

    def eval_loss(self, params, batch, key):
        predicted = self.network.apply(params, batch["image"].astype(jnp.float32) / 255)
        return (predicted - batch["y"]) ** 2, {}

    def preview(self, params, batch, key):
        if OwnTask.crash:
            raise Crash


class TaskWithModel(OwnTask):
    """The same, so that other stages may need its network."""

    def __init__(self, network, noise=0.1):
        super().__init__(network, noise)
        self.model = network

    def metadata(self):
        return {"image_size": SIZE}


class Student(OwnTask):
    """Learns what the network "teacher" says of the images."""

    def prepare(self, frozen, batch):
        return batch | {"y": frozen["teacher"].apply(batch["image"].astype(jnp.float32) / 255)}


def make_source(seed=0):
    """Records with an image, a text and a number."""
    return ArraySource(make_images(seed=seed), [f"number {i}" for i in range(N)], y=TARGETS)


def make_stage(task=None, *, name="own", source=None, network=None, training=None, **fields):
    options = {"batch_size": BATCH, "num_steps": 6, "learning_rate": 0.01, "checkpoint_every": 2, "log_every": 1}
    options |= {"preview_every": 5, "ema_decay": 0.9, "progress": False}
    return Stage(
        name=name,
        task=task or OwnTask(network or Brightness()),
        source=make_source() if source is None else source,
        training=Training(**(options | (training or {}))),
        **fields,
    )


def run(stages, workdir, **options):
    train(stages, workdir, mesh=make_mesh({"data": -1}, devices=jax.devices()[:1]), **options)


def trees(workdir, step, name="own"):
    checkpoints = Checkpoints(workdir / name, read_only=True)
    assert checkpoints.steps()[-1] == step
    found = {tree: checkpoints.restore_tree(tree)[0] for tree in ("params", "ema_params", "optimizer")}
    checkpoints.close()
    return found


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def losses(workdir, name="own"):
    return [row["loss"] for row in read_metrics(workdir / name)]


def refused(error, message, make):
    """Assert that `make()` raises one sentence that contains all of `message`."""
    with pytest.raises(error) as found:
        make()
    text = str(found.value)
    assert "\n" not in text and all(part in text for part in message), text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, stage) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    run(make_stage(), workdir, config={"a": 1})
    return workdir


# ---- A run -----------------------------------------------------------------------------------------------------------


def test_a_task_of_the_user_s_own_trains(trained):
    """Without `model` and `metadata` there is no model.json; texts of the records do not reach the task."""
    assert sorted(path.name for path in trained.iterdir()) == [".lock", "own", "run.json"]
    assert sorted(path.name for path in (trained / "own").iterdir()) == ["checkpoints", "metrics.jsonl"]
    document = json.loads((trained / "run.json").read_text())
    assert document["stages"] == ["own"] and document["config"] == {"a": 1} and document["version"]
    assert [row["step"] for row in read_metrics(trained / "own")] == [1, 2, 3, 4, 5, 6]
    assert losses(trained)[-1] < losses(trained)[0]
    params, config = restore_params(trained / "own")
    assert_same_bits(params, trees(trained, 6)["ema_params"])
    assert (
        config["training"]["learning_rate"] == 0.01 and config["source"]["fingerprint"] == make_source().fingerprint()
    )
    assert is_trained(make_stage(), trained) and not is_trained(make_stage(training={"num_steps": 7}), trained)


def test_it_resumes_after_a_crash_with_the_bits_of_an_uninterrupted_run(tmp_path, trained, monkeypatch):
    """The preview of step 5 breaks; the checkpoint before it is of step 4."""
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(OwnTask, "crash", True)
        run(make_stage(), tmp_path / "run")
    assert trees(tmp_path / "run", 4)
    run(make_stage(), tmp_path / "run")
    assert_same_bits(trees(tmp_path / "run", 6), trees(trained, 6))
    assert losses(tmp_path / "run") == losses(trained)


def test_a_finished_stage_resumes_when_more_steps_are_given(tmp_path, trained):
    run(make_stage(training={"num_steps": 4}), tmp_path / "run")
    before = (tmp_path / "run" / "own" / "metrics.jsonl").read_text()
    # Finished: nothing is done.
    run(make_stage(training={"num_steps": 4}), tmp_path / "run")
    assert (tmp_path / "run" / "own" / "metrics.jsonl").read_text() == before
    run(make_stage(), tmp_path / "run")
    assert_same_bits(trees(tmp_path / "run", 6), trees(trained, 6))


CHANGED = {
    "learning_rate": (
        lambda: make_stage(training={"learning_rate": 0.02}),
        "training.learning_rate is 0.01 there and 0.02 here",
    ),
    "batch_size": (lambda: make_stage(training={"batch_size": 16}), "training.batch_size is 8 there and 16 here"),
    "seed": (lambda: make_stage(training={"seed": 1}), "training.seed is 0 there and 1 here"),
    "network": (lambda: make_stage(network=Brightness(5)), "task.network.channels is 4 there and 5 here"),
    "task": (lambda: make_stage(OwnTask(Brightness(), 0.2)), "task.noise is 0.1 there and 0.2 here"),
    "source": (lambda: make_stage(source=make_source(1)), "source.fingerprint is "),
    "transforms": (lambda: make_stage(transforms=(Select(("image", "y")),)), "transforms is [] there and [{"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_settings_that_change_the_result_are_refused_by_name(trained, what):
    make, message = CHANGED[what]
    refused(
        CheckpointError,
        ("was made with other settings", message, "give the same settings or another workdir"),
        lambda: run(make(), trained),
    )
    assert trees(trained, 6)


def test_settings_that_do_not_change_the_result_are_accepted(trained):
    other = {"log_every": 3, "checkpoint_every": 3, "max_to_keep": 5, "preview_every": 0, "num_previews": 2}
    run(make_stage(training=other | {"eval_every": 2}, eval_source=make_source(1)), trained)


# ---- Stages that need others -----------------------------------------------------------------------------------------


def teacher_and_student(**training):
    teacher = make_stage(TaskWithModel(Brightness()), name="teacher", training={"num_steps": 2} | training)
    student = make_stage(Student(Brightness()), name="student", training={"num_steps": 2}, needs={"teacher": "teacher"})
    return teacher, student


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "school"
    run(teacher_and_student(), workdir)
    return workdir


def test_a_stage_learns_from_the_averaged_parameters_of_another(school):
    """The first loss of the student, by hand."""
    described = json.loads((school / "teacher" / "model.json").read_text())
    assert described["networks"]["model"] == {"class": "test_train.Brightness", "channels": 4}
    assert described["metadata"]["image_size"] == SIZE
    config = restore_params(school / "student")[1]
    assert set(config["needs"]) == {"teacher"} and len(config["needs"]["teacher"]) == 64


def test_another_model_that_is_needed_is_refused_by_name(tmp_path, school):
    shutil.copytree(school, tmp_path / "run")
    message = ("was made with other settings", "needs.teacher is ", "give the same settings or another workdir")
    refused(CheckpointError, message, lambda: run(teacher_and_student(num_steps=3), tmp_path / "run"))


@pytest.mark.parametrize("home", [False, True])
def test_a_stage_may_need_a_model_directory_by_its_path(tmp_path, school, monkeypatch, home):
    """It is loaded, so its network must be of this package: a stage's directory of `Brightness` cannot be."""
    _, student = teacher_and_student()
    monkeypatch.setenv("HOME", str(school))
    needed = "~/teacher" if home else str(school / "teacher")
    refused(LoadError, ("Brightness",), lambda: run(student.replace(needs={"teacher": needed}), tmp_path / "run"))


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            {"teacher": "nothing"},
            "stage student needs 'nothing' as teacher, which is neither an earlier stage (teacher)",
        ),
        ({"teacher": "student"}, "stage student needs student as teacher, which must come before it"),
        ({}, "stage student cannot work: its task needs a model for the role 'teacher'"),
        ({"other": "teacher"}, "stage student cannot work: its task needs a model for the role 'teacher'"),
    ],
)
def test_needs_that_cannot_be_met(tmp_path, needs, message):
    teacher, student = teacher_and_student()
    refused(ValueError, (message,), lambda: run((teacher, student.replace(needs=needs)), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_wrong_order_is_refused(tmp_path):
    message = "stage student needs teacher as teacher, which must come before it"
    refused(ValueError, (message,), lambda: run(teacher_and_student()[::-1], tmp_path / "run"))


def test_a_stage_that_was_not_trained_is_named(tmp_path):
    message = f"stage student needs a trained teacher in {tmp_path}; train the stage teacher first"
    refused(ValueError, (message,), lambda: run(teacher_and_student(), tmp_path, names=["student"]))


def test_a_task_without_a_model_cannot_be_needed(tmp_path):
    stages = make_stage(name="teacher"), teacher_and_student()[1]
    message = "stage student needs teacher as teacher, whose task OwnTask has no model and metadata"
    refused(ValueError, (message,), lambda: run(stages, tmp_path / "run"))


def test_names_of_stages(tmp_path):
    two = make_stage(), make_stage()
    refused(ValueError, ("two stages have the name 'own'",), lambda: run(two, tmp_path / "run"))
    refused(ValueError, ("there is no stage to train",), lambda: run((), tmp_path / "run"))
    message = "there is no stage 'owns'; there are own"
    refused(ValueError, (message,), lambda: run(make_stage(), tmp_path / "run", names=["owns"]))
    assert not (tmp_path / "run").exists()


# ---- Records that do not fit -----------------------------------------------------------------------------------------


def small_unet():
    return UNet(8, 3, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), groups=4, mid_attention=False)


def diffusion_stage(source, **fields):
    task = DiffusionTask(
        model=ClassUNet(small_unet(), 4),
        diffusion=Diffusion("cosine", 20),
        x0=Images(SIZE),
        conditions=(Labels(3, drop=0.2, names=("a", "b", "c")),),
        sampling=Sampling("ddim", 2, scale=2.0, threshold=1.0),
    )
    return make_stage(task, name="base", source=source, **fields)


def test_records_without_an_entry_are_refused_with_what_they_have(tmp_path):
    source = ArraySource(make_images(), y=TARGETS)
    message = ("stage base: its task or transforms read 'label', and the records of its source have image, y",)
    refused(ValueError, message, lambda: run(diffusion_stage(source), tmp_path / "run"))
    selected = ("stage base cannot work", "no label, only image, y")
    select = (Select(("image", "label")),)
    refused(ValueError, selected, lambda: run(diffusion_stage(source, transforms=select), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_entry_that_only_the_loss_reads_is_refused_before_the_start(tmp_path):
    classifier = ClassifierTask(
        model=Classifier(8, 3, SIZE, (1,), 1, (), 8, pool="adaptive", groups=4),
        diffusion=Diffusion("cosine", 20),
        x0=Images(SIZE),
    )
    clip = CLIP(VisionTransformer(SIZE, 2, 8, 1, 2), TextEncoder(5, 3, 8, 1, 2), 4)
    missing = {"label": classifier, "tokens": ContrastiveTask(clip, CompactTokenizer(("a", "b")))}
    for name, task in missing.items():
        message = (
            f"stage own: its task or transforms read '{name}', and the records of its source have image, caption, y"
        )
        refused(ValueError, (message,), lambda task=task: run(make_stage(task), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_records_of_different_shapes_are_refused(tmp_path):
    """With the stage, the entry and the shapes, and what helps."""
    for number, where in enumerate((1, N)):  # among the examples of the previews, and after them
        images = [*make_images()]
        images.insert(where, np.zeros((5, 6, 3), np.uint8))
        source = ArraySource(images, y=np.zeros(N + 1, np.float32))
        message = ("stage own", "'image' of the records has different shapes, (4, 4, 3) and (5, 6, 3)", "CenterCrop")
        refused(ValueError, message, lambda s=source, n=number: run(make_stage(source=s), tmp_path / f"run_{n}"))


def test_records_of_different_entries_are_refused(tmp_path):
    class Some:
        def __len__(self):
            return N

        def __getitem__(self, index):
            record = make_source()[index]
            return record | {"extra": np.float32(0)} if index > 20 else record

    message = ("stage own: the records have different entries, image, y and image, y, extra",)
    refused(ValueError, message, lambda: run(make_stage(source=Some()), tmp_path / "run"))


def test_a_label_that_is_no_class_is_refused(tmp_path):
    classifier = ClassifierTask(
        model=Classifier(8, 3, SIZE, (1,), 1, (), 8, pool="adaptive", groups=4),
        diffusion=Diffusion("cosine", 20),
        x0=Images(SIZE),
    )
    source = ArraySource(make_images(), labels=np.arange(N) % 4)
    message = ("stage own: label 3 of a record must be in [0, 3), the classes of the network",)
    refused(ValueError, message, lambda: run(make_stage(classifier, source=source), tmp_path / "run"))


# ---- Directories -----------------------------------------------------------------------------------------------------


def test_a_foreign_directory_is_left_as_it_is(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    refused(
        LoadError, (f"workdir {foreign} is not empty and holds no training run",), lambda: run(make_stage(), foreign)
    )
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    message = f"workdir {foreign / 'thesis.txt'} is a file, not a directory"
    refused(LoadError, (message,), lambda: run(make_stage(), foreign / "thesis.txt"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "null", '{"stages"'])
def test_a_run_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    refused(LoadError, ("run.json cannot be read as a training run",), lambda: run(make_stage(), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_two_runs_in_one_directory_are_refused(tmp_path):
    with lock_workdir(tmp_path):
        refused(WorkdirInUse, ("is in use by another run",), lambda: run(make_stage(), tmp_path))


def test_a_pipeline_is_written_beside_the_stages(tmp_path):
    class Pipeline:
        models = {"base": "own", "upsamplers": ["own"]}

        def write(self, workdir):
            (workdir / "pipeline.json").write_text("{}")

    run(make_stage(training={"num_steps": 1}), tmp_path / "run", pipeline=Pipeline())
    assert (tmp_path / "run" / "pipeline.json").exists()


# ---- Held-out records ------------------------------------------------------------------------------------------------


def held_out():
    """24 records: three batches, so that an evaluation sees every one of them once."""
    rng = np.random.default_rng(9)
    return make_images(24, seed=5), rng.normal(size=24).astype(np.float32)


def expected_loss(params):
    """The mean squared error over the held-out records, in numpy and float64."""
    images, y = held_out()
    x = images.reshape(24, -1) / 255
    for layer in ("hidden", "out"):
        x = x @ np.asarray(params["params"][layer]["kernel"], np.float64) + np.asarray(params["params"][layer]["bias"])
    return ((x[:, 0] - y) ** 2).mean()


def test_the_loss_of_held_out_records_is_logged(tmp_path, trained):
    """At every second step and the last; both sets of parameters; and the training is not touched by it."""
    images, y = held_out()
    training = {"num_steps": 5, "eval_every": 2, "eval_batches": 3, "checkpoint_every": 1, "max_to_keep": 5}
    run(make_stage(training=training, eval_source=ArraySource(images, y=y)), tmp_path / "run")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run" / "own")}
    assert [step for step, row in rows.items() if "eval_loss" in row] == [2, 4, 5]
    assert [row["loss"] for row in rows.values()] == losses(trained)[:5]
    for step in (2, 4, 5):
        kept = tmp_path / f"step_{step}" / "checkpoints"
        shutil.copytree(tmp_path / "run" / "own" / "checkpoints" / str(step), kept / str(step))
        for name, ema in {"eval_loss": False, "eval_loss_ema": True}.items():
            params, _ = restore_params(kept.parent, ema=ema)
            assert rows[step][name] == pytest.approx(expected_loss(params), rel=1e-5)
    assert rows[2]["eval_loss"] != rows[2]["eval_loss_ema"]


def test_held_out_records_that_do_not_fit_are_refused_at_once(tmp_path):
    bad = ArraySource(make_images(24))
    stage = diffusion_stage(
        ArraySource(make_images(), labels=np.arange(N) % 3), training={"eval_every": 2}, eval_source=bad
    )
    refused(
        ValueError,
        ("stage base: its task or transforms read 'label', and the records of its eval_source have image",),
        lambda: run(stage, tmp_path / "run"),
    )
    assert not (tmp_path / "run").exists()


# ---- A diffusion model -----------------------------------------------------------------------------------------------


def test_a_class_conditional_diffusion_model_of_arrays_in_memory(tmp_path):
    """Trained with previews and held-out losses; its directory opens as a network that computes what was trained."""
    labels = np.arange(N) % 3
    source = ArraySource(make_images(), labels=labels)
    stage = diffusion_stage(
        source,
        training={"num_steps": 2, "preview_every": 2, "num_previews": 3, "eval_every": 2, "eval_batches": 1},
        eval_source=source,
    )
    run(stage, tmp_path / "run")
    previews = sorted(path.name for path in (tmp_path / "run" / "base" / "previews").iterdir())
    assert previews == ["step_000002_ema.png", "step_000002_raw.png"]
    row = read_metrics(tmp_path / "run" / "base")[-1]
    assert np.isfinite([row["loss"], row["eval_loss"], row["eval_loss_ema"]]).all()
    model = open_model(tmp_path / "run" / "base")
    assert model.network == stage.task.model and model.diffusion == Diffusion("cosine", 20)
    assert model.metadata["labels"]["null"] == 3 and tuple(model.metadata["labels"]["names"]) == ("a", "b", "c")
    assert_same_bits(model.params, restore_params(tmp_path / "run" / "base")[0])
