"""A dry run refuses what the run would refuse."""

from pathlib import Path

import pytest

from tests.training.banks import random_bank
from tocom import load_backbone
from training.cli import main

RUNGS = 'ladder={method="topk", steps=4}'
UNSEEN = "unseen=24 pictures cannot be held out of 24"
SEARCH = "search half-the-compute search_on=9 judge_on=9"


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("evaluate every-rate targets=[9]", RUNGS, "rates of the ladder 'topk' are 0 to 4, got 9"),
        ("evaluate every-rate", "ladder=sit", "'sit' runs with weights that are learned"),
        ("evaluate every-rate bank=BANK", RUNGS, "for the ladder 'tome', not for 'topk'"),
        ("evaluate every-rate bank=BANK", "proportional=false", "is for proportional=True"),
        ("evaluate every-rate bank=BANK", "targets=[5]", "target rate must be in 0..4, got 5"),
        ("calibrate multiplier bank=BANK", "targets=[0]", "must not hold the source rate 0"),
        ("calibrate multiplier bank=BANK measure=top1", "pictures=OTHER", "; measure=kl does wit"),
        (SEARCH, "method=magic", "there is no method 'magic'"),
        (SEARCH, "try_options.importance=[-1]", "must be a number of 0 or more"),
        (SEARCH, "start=none.json", "cannot read the ladder"),
        (SEARCH, "search_on=99", "ask for 108 pictures, there are 24"),
        ("calibrate-cascade cascade", "rates=[]", "does not say its highest rate: name the rates"),
        ("calibrate-cascade cascade rates=[9,0]", RUNGS, "'topk' are 0 to 4, got 9"),
        ("calibrate-cascade cascade rates=[9,0]", "bank=BANK", "target rate must be in 0..4, got"),
        ("elastic elastic-small-data", "ladder=dynamicvit", "'dynamicvit' is learned from labels"),
        ("elastic elastic-small-data max_rate=4", "unseen=24", UNSEEN),
        ("prune prune-deit-tiny-task test=PICTURES", "unseen=24", UNSEEN),
        ("prune prune-deit-tiny-task test=OTHER", "unseen=2", "pruning does without `test`"),
        ("compare methods", "pixels=[15]", "pixels: 15 is no multiple of the patches' 8"),
        ("compare methods", "pictures=OTHER", "; labelled=false does without"),
        (
            "finetune deit-tiny-task test=PICTURES",
            "augment.auto_augment=magic",
            "auto_augment is in timm's notation",
        ),
    ],
)
def test_what_the_run_would_refuse_is_told(
    pictures: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    command: str, change: str, message: str,
) -> None:  # fmt: skip
    there = {"BANK": tmp_path / "bank", "OTHER": tmp_path / "other", "PICTURES": pictures}
    random_bank(load_backbone(str(model_folder))).save(there["BANK"])
    for name in ("cat", "dog"):
        (there["OTHER"] / name).mkdir(parents=True)
        picture = (pictures.parent / "red" / "0.png").read_bytes()
        (there["OTHER"] / name / "0.png").write_bytes(picture)
    given = [*command.split(), f"backbone.name={model_folder}", f"pictures={pictures}", change]
    for name, path in there.items():
        given = [each.replace(f"={name}", f"={path}") for each in given]
    run = tmp_path / "run"
    assert main([*given, "--dry-run", "--folder", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()
