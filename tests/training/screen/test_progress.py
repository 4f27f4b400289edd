import threading

import pytest

from tests.training.screen.terminal import in_a_terminal
from training.screen import progress
from training.screen.progress import Progress, duration, following, say


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_terminal_has_a_bar_with_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_a_terminal(monkeypatch)
    with Progress("training", 4, "step", done=1) as bar:
        bar.note("waiting for the first pictures")
        say("a line")
        for _ in range(3):
            bar.update(note="loss 0.5")
    shown = terminal.getvalue()
    assert "training:  25%" in shown
    assert "waiting for the first pictures" in shown
    assert "a line\n" in shown
    assert "4/4" in shown
    assert "loss 0.5" in shown


def test_a_log_has_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("training", 1000, "step", done=100, clock=clock) as bar:
        for _ in range(9):
            clock.seconds += 10
            bar.update(10, note="loss 0.5")
    said = capsys.readouterr().err
    assert "\r" not in said
    assert said.splitlines() == [
        "training ...",
        "training: 13 % (130 of 1,000); loss 0.5; 14 min left",
        "training: 16 % (160 of 1,000); loss 0.5; 14 min left",
        "training: 19 % (190 of 1,000); loss 0.5; 14 min left",
    ]


def test_large_amounts_are_told_as_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("measuring", 4 * 10**9, "MAC", clock=clock) as bar:
        clock.seconds = 50
        bar.update(10**9)
    assert capsys.readouterr().err == "measuring ...\nmeasuring: 25 %; 2 min left\n"


def test_a_log_hears_nothing_of_what_passes_quickly(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(following(["a", "b"], "unseen pictures", "batch")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_what_passes_leaves_no_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_a_terminal(monkeypatch)
    assert list(following([1, 2], "unseen pictures", "batch")) == [1, 2]
    assert "unseen pictures:   0%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


def test_only_the_first_process_says_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = in_a_terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")  # torchrun and accelerate launch do
    say("a line")
    assert list(following([1, 2], "unseen pictures", "batch")) == [1, 2]
    assert terminal.getvalue() == ""


def test_a_process_can_be_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = in_a_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_silenced", threading.Event())  # put back afterwards
    progress.silence()
    say("a line")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (7500, "2 h 05 min")]
)
def test_spans_of_time_have_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
