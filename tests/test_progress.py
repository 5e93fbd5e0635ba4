"""Progress where stderr is no terminal: a line for every tenth of the work or every 30 s, and the last."""

import pytest

from ddpm_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last number is the time."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def run(clock, capsys, total, seconds, **options):
    """Do `total` things that take `seconds` each. Returns the lines."""
    with progress.progress_bar(total, description="sample", unit="image", **options) as bar:
        for _ in range(total - options.get("initial", 0)):
            clock.append(clock[-1] + seconds)
            bar.update()
    err = capsys.readouterr().err
    assert "\r" not in err
    return err.splitlines()


def test_lines(clock, capsys):
    tenths = [f"sample: {n}% ({n}/100 images), {n} s, 1 images/s, {100 - n} s left" for n in range(10, 100, 10)]
    assert run(clock, capsys, 100, 1.0) == [*tenths, "sample: 100% (100/100 images), 100 s, 1 images/s"]
    assert run(clock, capsys, 1000, 0.001) == ["sample: 100% (1000/1000 images), 1 s, 1000 images/s"]
    slow = [f"sample: {n // 10}% ({n}/1000 images), {n} s, 1 images/s, {1000 - n} s left" for n in range(30, 1000, 30)]
    assert run(clock, capsys, 1000, 1.0) == [*slow, "sample: 100% (1000/1000 images), 1000 s, 1 images/s"]


def test_what_was_done_before_and_what_is_not_shown(clock, capsys):
    assert run(clock, capsys, 4, 2.0, initial=3) == ["sample: 100% (4/4 images), 2 s, 0.5 images/s"]
    assert run(clock, capsys, 4, 1.0, initial=4) == []
    assert run(clock, capsys, 4, 1.0, shown=False) == []


def test_a_text_at_the_end_of_the_lines_and_an_end_before_all_is_done(clock, capsys):
    with pytest.raises(KeyError), progress.progress_bar(4, description="clip", unit="step") as bar:
        clock.append(1.0)
        bar.update()
        bar.set_postfix_str("loss 0.5")
        raise KeyError
    assert capsys.readouterr().err == "clip: 25% (1/4 steps), 1 s, 1 steps/s, 3 s left, loss 0.5\n"


class Full:
    """A stream on a full disk, or one whose reader has gone."""

    def isatty(self):
        return False

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [Full(), None])
def test_a_stderr_that_cannot_be_written_does_not_end_the_work(clock, capsys, monkeypatch, stream):
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with progress.progress_bar(1, description="sample", unit="image") as bar:
        bar.update()
    assert capsys.readouterr().out == ""
