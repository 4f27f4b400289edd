import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.training.jobs import Brightness, run_job
from training.loop_config import LoopConfig
from training.plot import plot_curves
from training.screen.curves import Curves, Watched

pytestmark = pytest.mark.rendered


class Measured(Brightness):
    """Measures something on unseen pictures."""

    def watch(self) -> dict[str, float]:
        return {"unseen_kl_4_plain": 0.5, "unseen_kl_4_bank": 0.25, "unseen_kl_8_bank": 1.0}


def run(job: Brightness, pictures: Path, model_folder: Path, folder: Path, steps: int = 4) -> None:
    config = LoopConfig(
        steps=steps, batch_size=6, learning_rate=0.1, workers=0, watch_every=2, save_every=2
    )
    run_job(job, config, pictures, model_folder, folder)


def test_figures_of_a_line_are_told_by_rate() -> None:
    line = {"step": 2, "loss": 1.0, "unseen_kl_4_plain": 0.5, "unseen_kl_4_bank": 0.25}
    assert Watched.of(line) == Watched(2, "KL", {4: 0.25}, {4: 0.5})
    line = {"step": 2, "loss": 1.0, "unseen_error_0": 0.0, "unseen_error_8": 0.5}
    assert Watched.of(line) == Watched(2, "error", {0: 0.0, 8: 0.5}, {})
    assert Watched.of({"step": 1, "loss": 1.0}) is None


def test_a_run_tells_what_it_measured(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Measured(), pictures, model_folder, tmp_path)
    said = capsys.readouterr().err
    figures = "unseen KL at rate 4: 0.250 (plain 0.500), 8: 1.00; loss "
    assert f"step 2 of 4; {figures}" in said
    assert f"step 4 of 4; {figures}" in said
    assert "learning rate " in said
    assert " left\n" in said


def test_a_run_without_unseen_pictures_tells_its_loss(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Brightness(), pictures, model_folder, tmp_path)
    assert "step 2 of 4; loss 1." in capsys.readouterr().err


def test_the_loss_that_is_told_is_the_mean_since_it_was_told_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    curves = Curves.of([{"step": 1, "loss": 9.0, "learning_rate": 1.0}])
    for step, loss in ((2, 1.0), (3, 2.0)):
        curves.add({"step": step, "loss": loss, "learning_rate": 0.01})
    curves.tell(1000, "3 min left")
    curves.add({"step": 4, "loss": 0.5, "learning_rate": 0.01})
    curves.tell(1000, "")
    assert capsys.readouterr().err.splitlines() == [
        "step 3 of 1,000; loss 1.50; learning rate 1.00e-02; 3 min left",
        "step 4 of 1,000; loss 0.500; learning rate 1.00e-02",
    ]


def test_a_run_draws_its_curves_and_goes_on_with_them(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of the fixture for all others
    drawn: list[tuple[int, list[int]]] = []

    def keep(losses: list[tuple[int, float]], watched: list[Watched], path: Path) -> None:
        drawn.append((len(losses), [each.step for each in watched]))
        plot_curves(losses, watched, path)

    monkeypatch.setattr("training.plot.plot_curves", keep)
    run(Measured(), pictures, model_folder, tmp_path)
    assert drawn == [(2, [2]), (4, [2, 4])]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
    for file in (tmp_path / "checkpoints" / "step-000004").iterdir():
        file.unlink()
    run(Measured(), pictures, model_folder, tmp_path)
    assert drawn[2:] == [(4, [2, 4])]
    assert not list(tmp_path.glob(".curves*"))


@pytest.mark.parametrize("plain", [{}, {4: 0.5}])
def test_curves_are_drawn_with_and_without_what_was_measured(
    tmp_path: Path, plain: dict[int, float]
) -> None:
    losses = [(step, 1 / step) for step in range(1, 201)]
    plot_curves(losses, [], tmp_path / "loss.png")
    watched = [Watched(step, "KL", {4: 0.3, 8: 1 / step}, plain) for step in (100, 200)]
    plot_curves(losses, watched, tmp_path / "both.png")
    with Image.open(tmp_path / "loss.png") as one, Image.open(tmp_path / "both.png") as two:
        assert one.width < two.width


def test_without_matplotlib_a_run_says_so_once(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "training.plot")  # it is there after the import above
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(Brightness(), pictures, model_folder, tmp_path)
    said = capsys.readouterr().err
    assert said.count("curves.png is not drawn: matplotlib is not installed") == 1
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_that_cannot_be_written_does_not_end_a_run(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr("training.plot.plot_curves", full)
    run(Brightness(), pictures, model_folder, tmp_path)
    assert "curves.png cannot be written ([Errno 28] No space left on device)" in caplog.text
