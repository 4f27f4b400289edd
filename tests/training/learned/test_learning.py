"""Learned methods learn along with the model, go on where they were stopped, and are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import TaskModel
from tocom import BackboneError, ConfigError, Ladder, forward, load_backbone
from tocom.reduction import SiT, method_of
from training import finetune as module
from training.config import DynamicViTConfig, FinetuneConfig
from training.finetune import finetune
from training.learned.dynamicvit import check_teacher
from training.learned.weights import drawn_rung

METHODS: dict[str, dict[str, Any]] = {
    "dynamicvit": {},
    "sit": {},
    "patchmerger": {},
    "sinkhorn": {},
    "dpcknn": {"weighted": True},
    "atme": {"linear": True},
}


def ladder(name: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    rungs = [[0, 0], [0, 1], [1, 1]] if name == "atme" else [[0, 0], [12, 8], [8, 4]]
    method = {"name": name, "options": METHODS.get(name, {}) if options is None else options}
    return {"name": "learned", "method": method, "patches": 16, "rungs": rungs}


def recipe(pictures: Path, model_folder: Path, learns: str, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": str(model_folder)},
        "pictures": {"path": str(pictures)},
        "test": {"path": str(pictures)},
        "ladder": ladder(learns),
        "source": 2,
        "drop_path": 0,
        "augment": {"crop": "evaluation"},
        "loop": {
            "epochs": 4, "batch_size": 12, "learning_rate": 3e-3, "workers": 0, "save_every": 3,
        },
    }  # fmt: skip
    return FinetuneConfig.model_validate(values | changes)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_an_interrupted_run_is_the_same(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # The teacher is of no use, but it takes part.
    more = {"dynamicvit": {"teacher": str(model_folder)}} if name == "dynamicvit" else {}
    config = recipe(pictures, model_folder, name, **more)
    whole = finetune(config, tmp_path / "whole")
    fell = losses(tmp_path / "whole")
    assert sum(fell[-4:]) < sum(fell[:4])
    note = module.loop.RunFolder.note

    def stop(self: Any, line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise KeyboardInterrupt  # as if killed: nothing is saved
        note(self, line)

    with monkeypatch.context() as patched:
        patched.setattr(module.loop.RunFolder, "note", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, tmp_path / "killed")
    resumed = finetune(config, tmp_path / "killed")
    for file in ("model.safetensors", "reduction.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()

    backbone = load_backbone(str(whole))
    assert backbone.ladder.method == method_of(name, METHODS[name])
    assert backbone.learned is not None
    start = backbone.ladder.start(2, 24, (4, 4))
    assert backbone.learned.tensors.keys() == start.keys()
    for rung in range(3):
        answer = forward(
            backbone.model, torch.zeros(1, 3, 32, 32), rung,
            ladder=backbone.ladder, learned=backbone.learned,
        )  # fmt: skip
        assert answer.isfinite().all()
    if name in ("dpcknn", "atme"):  # which start at what they are without learning
        assert any(not torch.equal(x, start[key]) for key, x in backbone.learned.tensors.items())


@pytest.mark.parametrize("method", ["adaptformer", "linear"])
def test_a_task_holds_what_its_method_learned(
    pictures: Path, model_folder: Path, tmp_path: Path, method: str
) -> None:
    loop = {"epochs": 1, "batch_size": 12, "learning_rate": 3e-3, "workers": 0}
    config = recipe(pictures, model_folder, "dynamicvit", method=method, loop=loop)
    task = TaskModel.load(finetune(config, tmp_path / "run"))
    assert {name.split(".")[1] for name in task.tensors if name.startswith("reduction.")} == {
        "0", "1",
    }  # fmt: skip
    tuned = task.on(load_backbone(str(model_folder)))
    assert tuned.learned is not None
    images = torch.zeros(1, 3, 32, 32)
    answer = forward(
        tuned.model, images, 2, adapter=tuned.adapter, ladder=tuned.ladder, learned=tuned.learned
    )
    assert answer.shape == (1, 3)


def test_tuning_begins_with_what_the_backbone_has_learned_on_the_ladder(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    loop = {"epochs": 0.5, "batch_size": 12, "learning_rate": 1e-2, "workers": 0}
    first = finetune(recipe(pictures, model_folder, "sit", loop=loop), tmp_path / "first")
    again = recipe(pictures, first, "sit", method="linear", loop=loop | {"learning_rate": 1e-9})
    task = TaskModel.load(finetune(again, tmp_path / "again"))
    backbone = load_backbone(str(first))
    assert backbone.learned is not None
    for name, tensor in backbone.learned.tensors.items():
        torch.testing.assert_close(task.tensors[f"reduction.{name}"].float(), tensor)


def test_rungs_take_part_at_random_and_the_source_half_of_the_time() -> None:
    rungs = ((0,), (8,), (6,), (4,))
    each = Ladder("l", SiT(), rungs, 16)
    drawn = [drawn_rung(each, 2, 0, micro) for micro in range(400)]
    assert drawn == [drawn_rung(each, 2, 0, micro) for micro in range(400)]
    assert set(drawn) == {1, 2, 3}
    assert 160 < drawn.count(2) < 240
    assert min(drawn.count(1), drawn.count(3)) > 60
    only = Ladder("l", SiT(), rungs[:2], 16)
    assert {drawn_rung(only, 1, 0, micro) for micro in range(9)} == {1}
    plain = Ladder("l", method_of("topk"), rungs, 16)
    assert {drawn_rung(plain, 2, 0, micro) for micro in range(9)} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 0}, "learns nothing at rate 0, the stock model: source must be 1 to 2"),
        (
            {"ladder": ladder("dynamicvit") | {"rungs": [[0, 0], [8, 4], [0, 4]]}},
            "rung 1 of the ladder 'learned' drops tokens in block 0, for which dynamicvit learns",
        ),
    ],
)
def test_what_could_not_learn_is_told_first(
    pictures: Path, model_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(recipe(pictures, model_folder, "dynamicvit", **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_task_is_refused(model_folder: Path) -> None:
    config = DynamicViTConfig(teacher=str(model_folder))
    backbone = load_backbone(str(model_folder))
    check_teacher(config, 3, backbone)
    with pytest.raises(ConfigError, match="knows 3 classes and the pictures have 4: a teacher is"):
        check_teacher(config, 4, backbone)
    with pytest.raises(ConfigError, match="with several give dynamicvit.distillation=0"):
        check_teacher(config, 3, backbone, many=True)
    other = load_backbone(str(model_folder))
    other.model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3)}
    with pytest.raises(ConfigError, match="wants pictures with mean .*, .* with .0.1, 0.2, 0.3"):
        check_teacher(config, 3, other)


# --- the file beside a model


def test_a_faulty_file_of_weights_is_named(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    loop = {"epochs": 0.5, "batch_size": 12, "learning_rate": 1e-3, "workers": 0}
    folder = finetune(recipe(pictures, model_folder, "sinkhorn", loop=loop), tmp_path / "run")
    file = folder / "reduction.safetensors"
    backbone = load_backbone(str(folder))
    assert backbone.digest != load_backbone(str(model_folder)).digest
    good = file.read_bytes()
    tensors = {name: x.half() for name, x in backbone.learned.tensors.items()}  # type: ignore[union-attr]
    name = next(iter(tensors))

    def faulty(changed: dict[str, torch.Tensor]) -> None:
        module.save_file(changed, file)

    for change, message in (
        ({key: x for key, x in tensors.items() if key != name}, f"1 tensors .* such as {name}"),
        (
            tensors | {"9.v": tensors[name].clone()},
            "1 tensors are missing, too many .* such as 9.v",
        ),
        (tensors | {name: tensors[name][:1].clone()}, f"of another shape, such as {name}"),
        (tensors | {name: tensors[name] * torch.nan}, f"{name} must be finite numbers"),
        (tensors | {name: tensors[name].long()}, f"{name} must be finite numbers"),
    ):
        faulty(change)
        with pytest.raises(BackboneError, match=message):
            load_backbone(str(folder))
    file.write_bytes(good[:-3])
    with pytest.raises(BackboneError, match="reduction.safetensors cannot be read"):
        load_backbone(str(folder))
    file.unlink()
    with pytest.raises(BackboneError, match="lacks reduction.safetensors, the weights of the met"):
        load_backbone(str(folder))
