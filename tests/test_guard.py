"""Steps that are not finite, and spikes of the loss: skipped, or gone back from, as configured; each is logged."""

import jax
import numpy as np
import pytest
from toy_training import ToyLoader, ToyTask, run, toy_batch

from ddpm_jax.training import guard, loop
from ddpm_jax.training.guard import AVERAGED, SETTLED, Policy
from ddpm_jax.training.loop import Interrupted, TrainingDiverged
from ddpm_jax.training.metrics import read_metrics


class BadLoader(ToyLoader):
    """Batch i is the toy's, except for those in `bad`, {i: what the inputs are multiplied by}."""

    def __init__(self, bad, stop_at=None):
        super().__init__()
        self.bad, self.stop_at = bad, stop_at

    def __next__(self):
        batch = super().__next__()
        if self.position == self.stop_at:
            raise KeyboardInterrupt
        return batch | {"x": batch["x"] * np.float32(self.bad.get(self.position, 1.0))}


class Without(ToyLoader):
    """The toy's batches without some."""

    def __init__(self, left_out):
        super().__init__()
        self.left_out = left_out

    def __next__(self):
        self.position += 1
        while self.position in self.left_out:
            self.position += 1
        return toy_batch(self.position)


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def events(directory):
    rows = [row for row in read_metrics(directory) if "event" in row]
    return [{name: value for name, value in row.items() if name not in ("time", "grad_norm")} for row in rows]


def test_a_step_that_is_not_finite_is_skipped_as_if_its_batch_was_not_there(tmp_path):
    """A skipped step changes nothing, so noise, schedule and parameters are those of a run without its batch."""
    policy = Policy(nonfinite="skip")
    state = run(tmp_path / "a", loader=BadLoader({5: np.nan, 6: np.nan}), num_steps=12, policy=policy)
    assert bits(state) == bits(run(tmp_path / "b", loader=Without({5, 6}), num_steps=10))
    assert events(tmp_path / "a") == [{"step": 6, "event": "skip", "bad_step": step, "loss": None} for step in (5, 6)]
    rows = [row for row in read_metrics(tmp_path / "a") if "event" not in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_too_many_in_a_row_stop_the_run(tmp_path):
    bad = dict.fromkeys(range(5, 10), np.nan)
    with pytest.raises(TrainingDiverged, match=r"toy: step 8 is not finite .*, 4 in a row are bad, and training"):
        run(tmp_path, loader=BadLoader(bad), policy=Policy(nonfinite="skip", max_bad_steps=3))


@pytest.mark.parametrize("interrupted", [False, True])
def test_going_back_leaves_out_the_data_up_to_the_bad_step(tmp_path, interrupted):
    """Checkpoint 4 and bad step 6, seen at step 6: batches 5 and 6 are left out, and so by a run that is killed."""
    policy = Policy(nonfinite="roll_back")
    if interrupted:  # after the checkpoint of the new step 8
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", loader=BadLoader({6: np.nan}, stop_at=12), policy=policy)
    state = run(tmp_path / "a", loader=BadLoader({6: np.nan}), num_steps=12, policy=policy)
    assert bits(state) == bits(run(tmp_path / "b", loader=Without({5, 6}), num_steps=12))
    expected = {"step": 4, "event": "roll_back", "rollback": 1, "last_step": 6, "bad_step": 6, "loss": None}
    assert events(tmp_path / "a") == [expected]
    rows = [row["step"] for row in read_metrics(tmp_path / "a") if "event" not in row]
    assert rows == [2, 4, 6, 8, 10, 12]


SPIKE = {"spike_factor": 4.0}


@pytest.mark.parametrize(
    "bad, policy, skipped, sentence",
    [
        ({23: 10.0, 26: np.nan}, Policy(spike="skip", **SPIKE), [23], r"step 26 is not finite \(loss nan.*\) and tr"),
        ({23: np.nan, 26: 10.0}, Policy(nonfinite="skip", **SPIKE), [23], r"step 26 is a spike .*\) and training st"),
        (
            {21: 10.0, 23: np.nan, 25: np.nan, 26: np.nan},
            Policy("skip", "skip", max_bad_steps=1, **SPIKE),
            [21, 23, 25],
            "step 26 is not finite .*, 2 in a row are bad",
        ),
    ],
)
def test_each_bad_step_of_a_window_is_judged_by_its_own_policy(tmp_path, bad, policy, skipped, sentence):
    with pytest.raises(TrainingDiverged, match=sentence):
        run(tmp_path, loader=BadLoader(bad), num_steps=30, log_every=15, checkpoint_every=30, policy=policy)
    assert [(event["step"], event["bad_step"]) for event in events(tmp_path)] == [(30, step) for step in skipped]


def test_going_back_without_a_checkpoint_begins_again(tmp_path, caplog):
    """A spike before the step to go back for is skipped; the data after the window follow, from the first state."""
    policy, bad = Policy("roll_back", "skip", **SPIKE), {22: 10.0, 24: np.nan}
    with caplog.at_level("WARNING"):
        state = run(
            tmp_path / "a", loader=BadLoader(bad), num_steps=25, log_every=25, checkpoint_every=25, policy=policy
        )
    assert bits(state) == bits(run(tmp_path / "b", loader=Without(set(range(1, 26))), num_steps=25))
    said = [record.getMessage() for record in caplog.records]
    assert sum("step 22 is a spike" in each and "was skipped" in each for each in said) == 1
    assert sum("; going back to the beginning of the stage, with the data after step 25" in each for each in said) == 1


def test_steps_that_are_undone_are_not_in_a_row_with_those_that_follow(tmp_path):
    policy = Policy("roll_back", "skip", max_bad_steps=1, **SPIKE)
    run(tmp_path, loader=BadLoader({24: np.nan, 25: 10.0}), num_steps=24, policy=policy)
    assert [(event["event"], event["bad_step"]) for event in events(tmp_path)] == [("roll_back", 24), ("skip", 21)]


def test_a_window_holds_all_of_its_bad_steps(tmp_path, monkeypatch):
    """A window is read before it has more bad steps than it holds, however rarely the log is written."""
    for module in (guard, loop):
        monkeypatch.setattr(module, "MOST", 4)
    bad = dict.fromkeys((1, 2, 4, 5, 7, 8), np.nan)
    run(tmp_path, loader=BadLoader(bad), num_steps=9, log_every=1000, policy=Policy("skip"))
    assert [event["bad_step"] for event in events(tmp_path)] == list(bad)


def test_going_back_again_and_again_ends(tmp_path):
    bad = dict.fromkeys(range(6, 100), np.nan)
    with pytest.raises(TrainingDiverged, match="after 2 times back and training stopped; the last good checkpoint is"):
        run(tmp_path, loader=BadLoader(bad), policy=Policy(nonfinite="roll_back", max_bad_steps=2))
    assert [event["rollback"] for event in events(tmp_path)] == [1, 2]


def test_a_spike_is_measured_by_the_running_mean(tmp_path):
    """With log_every=1 the losses are those of metrics.jsonl: the mean of the last ones says which step is a spike."""
    bad, factor = {40: 10.0}, 4.0
    policy = Policy(spike="skip", spike_factor=factor)
    run(tmp_path / "a", loader=BadLoader(bad), num_steps=45, log_every=1, policy=policy)
    rows = read_metrics(tmp_path / "a")
    losses = [row["loss"] for row in rows if "event" not in row and row["step"] != 40]
    mean = 0.0
    for number, loss in enumerate(losses, 1):
        if number > SETTLED:
            assert loss <= factor * mean
        if number == 40:
            break
        mean += (loss - mean) / min(number, AVERAGED)
    (event,) = events(tmp_path / "a")
    assert (event["step"], event["bad_step"]) == (40, 40)
    assert event["loss"] > factor * mean
    # The same without the policy is no fault.
    run(tmp_path / "b", loader=BadLoader(bad), num_steps=45)
    assert events(tmp_path / "b") == []


def test_a_stop_in_an_evaluation_or_before_a_preview_makes_it_when_the_run_continues(tmp_path):
    """The line of the step has the loss of the uninterrupted run's evaluation, and its previews are there."""
    import signal

    class Signalling(ToyTask):
        armed = True

        def preview(self, params, batch, key):
            if Signalling.armed:
                Signalling.armed = False
                signal.raise_signal(signal.SIGTERM)
            return super().preview(params, batch, key)

    def batches():
        if Signalling.armed:
            signal.raise_signal(signal.SIGTERM)
        return iter([toy_batch(100), toy_batch(101)])

    def options(number):
        previews = {"preview_every": 6, "eval_every": 6, "eval_batches": batches, "num_steps": 9, "log_every": 3}
        return previews | {"task": Signalling(), "workdir": tmp_path / number}

    Signalling.armed = False
    run(**options("a"))
    for _ in range(2):  # in the evaluation of step 6, and after its first preview
        Signalling.armed = True
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step 6 of 9"):
            run(**options("b") | ({"eval_batches": lambda: iter([toy_batch(100), toy_batch(101)])} if _ else {}))
    Signalling.armed = False
    run(**options("b"))
    rows = [
        [
            (row["step"], row["loss"], row.get("eval_loss"), row.get("eval_loss_ema"))
            for row in read_metrics(tmp_path / n)
        ]
        for n in "ab"
    ]
    assert rows[0] == rows[1]
    names = [sorted(path.name for path in (tmp_path / n / "previews").iterdir()) for n in "ab"]
    assert names[0] == names[1]
