"""Stages: every field out of its range is refused in one sentence that names the stage, the field and its value."""

import math

import numpy as np
import pytest
import test_train
from toy_training import ToyTask

from ddpm_jax.storage.checkpoint import CheckpointError
from ddpm_jax.training import Stage, Training, train
from ddpm_jax.training.records import SomeRecords, example_batch
from ddpm_jax.training.stage import apply_transforms

GOOD = {"batch_size": 16, "num_steps": 10, "learning_rate": 0.1}


def make_stage(training=None, **fields):
    options = {"name": "toy", "task": ToyTask(), "source": [{"x": np.zeros(3)}]} | fields
    return Stage(training=Training(**(GOOD | (training or {}))), **options)


def refused(message, make):
    """Assert that `make()` is refused in one sentence, which contains all of `message`."""
    with pytest.raises(ValueError) as error:
        make()
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in message), text


POSITIVE = ("batch_size", "num_steps", "accumulate", "checkpoint_every", "max_to_keep", "log_every", "eval_batches")
COUNTS = ("warmup_steps", "preview_every", "num_previews", "eval_every", "evaluate_every", "num_workers")
NUMBERS = ("learning_rate", "final_fraction", "weight_decay", "b1", "b2", "eps", "ema_decay")


@pytest.mark.parametrize("name", POSITIVE)
def test_counts_are_integers_of_at_least_one(name):
    for bad, meaning in {0: "at least 1", -3: "at least 1", 2.0: "an integer", True: "an integer"}.items():
        refused(("stage toy", f"{name}={bad!r} must be {meaning}"), lambda bad=bad: make_stage({name: bad}))
    for bad in ("2", None):
        refused(("stage toy", f"{name}={bad!r} must be an integer"), lambda bad=bad: make_stage({name: bad}))
    refused(("stage toy", f"{name}=an integer of thousands of digits"), lambda: make_stage({name: 10**5000}))


@pytest.mark.parametrize("name", COUNTS)
def test_other_counts_are_integers_of_at_least_zero(name):
    refused(("stage toy", f"{name}=-1 must be at least 0"), lambda: make_stage({name: -1}))
    refused(("stage toy", f"{name}=0.5 must be an integer"), lambda: make_stage({name: 0.5}))


@pytest.mark.parametrize("name", (*NUMBERS, "clip_norm", "muon_learning_rate"))
@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", True], ids=repr)
def test_numbers_are_finite(name, bad):
    refused(("stage toy", f"{name}={bad!r} must be a finite number"), lambda: make_stage({name: bad}))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_needed(name):
    refused(("stage toy", f"{name}=None must be a finite number"), lambda: make_stage({name: None}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed=-1 must lie in [0, 2**32)"),
        ({"seed": 2**32}, "seed=4294967296 must lie in [0, 2**32)"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
        ({"ema_decay": 1}, "ema_decay=1 must be in [0, 1), or the average never leaves the first parameters"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1 must be in [0, 1)"),
        ({"accumulate": 3}, "batch_size=16 must be a multiple of accumulate=3"),
        ({"eval_every": 5}, "eval_every=5 needs an eval_source"),
        ({"evaluate_every": 5}, "evaluate_every=5 needs evaluate, an object such as SampleQuality(...), got None"),
    ],
)
def test_other_ranges_of_training(fields, message):
    refused(("stage toy", message), lambda: make_stage(fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a positive number"),
        ({"warmup_steps": 11}, "warmup_steps=11 must be between 0 and"),
        ({"decay": "steps"}, "decay='steps' must be one of"),
        ({"final_fraction": 1.5}, "final_fraction=1.5 must be between 0 and 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be 0 or more"),
        ({"b1": 1.0}, "b1=1.0"),
        ({"b2": -0.5}, "b2=-0.5"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"optimizer": "adam"}, "optimizer='adam' must be one of"),
        ({"optimizer": "muon"}, "muon_learning_rate=None must be a positive number"),
    ],
)
def test_the_optimizer_is_checked_before_anything_is_computed(tmp_path, fields, message):
    refused(("stage toy", message), lambda: train(make_stage(fields), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "a.b", None, 3], ids=repr)
def test_a_name_that_is_no_directory(name):
    refused((f"name={name!r} of a stage must be letters",), lambda: make_stage(name=name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"examples_per_record": 3}, "batch_size=16 must be a multiple of the 3 examples of a record"),
        ({"examples_per_record": 0}, "examples_per_record=0 must be at least 1"),
        ({"examples_per_record": 2.0}, "examples_per_record=2.0 must be an integer"),
    ],
)
def test_other_fields_of_a_stage(fields, message):
    refused(("stage toy", message), lambda: make_stage(**fields))


def test_training_of_another_type_is_refused():
    with pytest.raises(ValueError, match="training of stage toy must be a Training, got dict"):
        Stage(name="toy", task=ToyTask(), source=[], training=GOOD)


def test_an_unknown_field_of_training_is_python_s_own_error():
    with pytest.raises(TypeError, match="batch_sise"):
        Training(**GOOD, batch_sise=3)


def test_replace_checks_again():
    stage = make_stage()
    assert stage.replace(name="other").name == "other" and stage.name == "toy"
    refused(("stage toy", "examples_per_record=0"), lambda: stage.replace(examples_per_record=0))


def test_transforms_are_applied_in_order_and_random_ones_get_the_generator():
    class Add:
        def random_map(self, record, rng):
            return record | {"x": record["x"] + rng.integers(100)}

    number = np.random.default_rng(7).integers(100)
    found = apply_transforms({"x": 1}, (lambda record: {"x": 10 * record["x"]}, Add()), np.random.default_rng(7))
    assert found == {"x": 10 + number}


class Endless:
    """A source whose records are a function of their number, also of numbers past its length."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.read.append(int(index))
        return {"x": np.full(3, float(index)), "caption": "a text"}


def test_the_examples_of_previews_are_the_first_records_and_no_others():
    stage = make_stage({"num_previews": 3}, source=Endless())
    batch = example_batch(stage, stage.source)
    assert stage.source.read == [0, 1, 2]
    assert list(batch) == ["x"] and batch["x"].tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert len(list(SomeRecords(stage, [{"x": np.zeros(3)}] * 9, range(2)))) == 2


class Learner(test_train.TaskWithModel):
    """The same, so that it has a model.json."""

    prepare = test_train.Student.prepare


def test_a_refused_run_leaves_model_json_as_it_is(tmp_path):
    """It says which models the checkpoint was trained with, by which loading finds others."""

    def stages(num_steps):
        training = {"preview_every": 0, "num_steps": num_steps}
        first = test_train.make_stage(
            test_train.TaskWithModel(test_train.Brightness()), name="teacher", training=training
        )
        second = test_train.make_stage(Learner(test_train.Brightness()), name="student", needs={"teacher": "teacher"})
        return [first, second]

    test_train.run(stages(6), tmp_path / "run")
    path = tmp_path / "run" / "student" / "model.json"
    before = path.read_bytes()
    test_train.run(stages(7), tmp_path / "run", names=["teacher"])
    with pytest.raises(CheckpointError, match="needs.teacher"):
        test_train.run(stages(7), tmp_path / "run", names=["student"])
    assert path.read_bytes() == before
