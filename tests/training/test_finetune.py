import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import TaskModel
from tests.training.pictures.files import write_tar
from tests.training.vtab.lists import write_lists
from tocom import BackboneError, ConfigError, DataError, forward, load_backbone
from training import finetune as module
from training.config import FinetuneConfig
from training.finetune import finetune
from training.loop import run as run_loop
from training.pictures.augment import evaluation_transform


def recipe(pictures: Path, model_folder: Path, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": str(model_folder)},
        "pictures": {"path": str(pictures)},
        "test": {"path": str(pictures)},
        "drop_path": 0.1,
        "augment": {"color_jitter": 0, "scale": [0.8, 1.0]},
        "loop": {
            "epochs": 20,
            "batch_size": 12,
            "learning_rate": 3e-3,
            "workers": 0,
            "save_every": 20,
        },
    }
    return FinetuneConfig.model_validate(values | changes)


@pytest.mark.parametrize("source", [0, 4])
def test_tuned_model_learns_and_is_a_model_folder(
    pictures: Path, model_folder: Path, tmp_path: Path, source: int
) -> None:
    folder = finetune(recipe(pictures, model_folder, source=source), tmp_path / "run")
    backbone = load_backbone(str(folder))
    assert backbone.class_names == ("blue", "green", "red")
    assert backbone.source == source
    assert backbone.tuned_from == load_backbone(str(model_folder)).digest
    said = json.loads((folder / "config.json").read_text())["training"]
    assert said["test_accuracy"] > 0.6  # chance is 1/3; the colours are easy
    assert forward(backbone.model, torch.zeros(1, 3, 32, 32), source).shape == (1, 3)


def test_train_and_test_folders_must_be_the_same_classes(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "blue").mkdir(parents=True)
    source = pictures.parent / "blue" / "0.png"
    (other / "blue" / "0.png").write_bytes(source.read_bytes())
    config = recipe(pictures, model_folder, test={"path": str(other)})
    with pytest.raises(DataError, match="has 3 classes and .* 1; they must be the same"):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["pictures", "test"])
def test_pictures_count_once(pictures: Path, model_folder: Path, tmp_path: Path, part: str) -> None:
    config = recipe(pictures, model_folder)
    thrice = getattr(config, part).model_copy(update={"times": 3})
    config = config.model_copy(update={part: thrice})
    with pytest.raises(ConfigError, match="times is 3, and every picture .* counts once"):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shards_are_tuned_on_by_the_numbers_of_their_classes(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    for part, classes in (("train", 3), ("test", 2)):  # the small set lacks the last
        (tmp_path / part).mkdir()
        files = {}
        for label, colour in enumerate(("blue", "green", "red")[:classes]):
            files[f"{label}.png"] = (pictures.parent / colour / "0.png").read_bytes()
            files[f"{label}.cls"] = str(label).encode()
        write_tar(tmp_path / part / "000000.tar", files)
    config = recipe(
        tmp_path / "train", model_folder, test={"path": str(tmp_path / "test")}, method="linear",
        loop={"epochs": 1, "batch_size": 3, "learning_rate": 1e-3, "workers": 0},
    )  # fmt: skip
    assert TaskModel.load(finetune(config, tmp_path / "run")).info.class_names == ("0", "1", "2")


@pytest.mark.parametrize("method", ["full", "linear"])
def test_the_crop_of_a_recipe_is_kept_with_what_was_tuned(
    pictures: Path, model_folder: Path, tmp_path: Path, method: str
) -> None:
    loop = {"epochs": 1, "batch_size": 12, "learning_rate": 3e-3, "workers": 0}
    config = recipe(pictures, model_folder, method=method, crop_pct=0.8, loop=loop)
    folder = finetune(config, tmp_path / "run")
    stock = load_backbone(str(model_folder))
    tuned = load_backbone(str(folder)) if method == "full" else TaskModel.load(folder).on(stock)
    seen = tuned.data_config
    assert (seen["crop_pct"], seen["crop_mode"]) == (0.8, "center")
    assert evaluation_transform(tuned).transforms[0].size == 40  # of which the middle 32 are seen


def test_what_is_squashed_is_not_cropped(pictures: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="crop_pct is for resize='crop'; .* got 0.875"):
        recipe(pictures, model_folder, resize="squash", crop_pct=0.875)


METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "adaptformer": {"adaptformer": {"bottleneck": 4, "scale": 1.0}},
    "lora": {"lora": {"rank": 2, "layers": ["attn.qkv", "mlp.fc1"]}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_task_learns_and_leaves_its_backbone_alone(
    pictures: Path, model_folder: Path, tmp_path: Path, method: str
) -> None:
    config = recipe(pictures, model_folder, method=method, source=3, **METHODS[method])
    folder = finetune(config, tmp_path / "run")
    task = TaskModel.load(folder)
    assert task.info.training["test_accuracy"] > 0.6
    assert (task.info.source, task.info.class_names) == (3, ("blue", "green", "red"))
    tuned = task.on(load_backbone(str(model_folder)))  # the digest is still that of the folder
    assert forward(tuned.model, torch.zeros(1, 3, 32, 32), 3, adapter=tuned.adapter).shape == (1, 3)
    kept = task.tensors.keys() - {"head.weight", "head.bias"}
    assert all(task.tensors[name].any() for name in kept)  # what started at zero has learned
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    sizes = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert sizes < 4 * 3 * task.parameters * len(names)  # a checkpoint holds what is tuned alone


@pytest.mark.parametrize("key", ["recompute_blocks", "compile"])
def test_blocks_that_run_again_and_compiled_forwards_make_the_same_model(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    compiled, compiler = list[Any](), torch.compile

    def quickly(forward: Any) -> Any:
        compiled.append(forward)
        return compiler(forward, backend="eager")

    monkeypatch.setattr(torch, "compile", quickly)
    loop = {"epochs": 0.25, "batch_size": 6, "learning_rate": 1e-3, "workers": 0}
    for name, more in (("plain", {}), ("other", {key: True})):
        config = recipe(pictures, model_folder, method="full", source=3, loop=loop | more)
        finetune(config, tmp_path / name)
    assert len(compiled) == (key == "compile")
    plain, other = (load_backbone(str(tmp_path / name / "model")) for name in ("plain", "other"))
    assert plain.digest == other.digest != load_backbone(str(model_folder)).digest


def test_a_search_takes_the_best_value_and_can_be_gone_on_with(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"key": "loop.learning_rate", "values": [1e-9, 3e-3], "share": 0.25}
    config = recipe(pictures, model_folder, method="linear", search=search)
    folder = finetune(config, tmp_path / "run")
    tried = json.loads((tmp_path / "run/search/loop.learning_rate=0.003/result.json").read_text())
    assert tried["top1"] > 0.5
    said = TaskModel.load(folder).info.training["recipe"]
    assert said["loop"]["learning_rate"] == 3e-3
    longer = recipe(pictures, model_folder, method="linear", search=search, label_smoothing=0.2)
    with pytest.raises(ConfigError, match=r"another recipe: label_smoothing .* there, .* here"):
        finetune(longer, tmp_path / "run")
    trained: list[int] = []
    monkeypatch.setattr(module.loop, "run", lambda *a: trained.append(len(a[5])) or run_loop(*a))
    for part in ("task", "checkpoints", "metrics.jsonl"):
        path = tmp_path / "run" / part
        path.rename(tmp_path / f"away-{part}")
    (tmp_path / "run" / "config.json").rename(tmp_path / "away-config")
    with pytest.raises(
        ConfigError, match=r"search/.*another recipe: label_smoothing .* there, .* here"
    ):
        finetune(longer, tmp_path / "run")
    again = finetune(config, tmp_path / "run")
    assert trained == [24]  # not the searches, which are done
    assert TaskModel.load(again).info.digest == TaskModel.load(tmp_path / "away-task").info.digest


def test_labels_of_test_pictures_are_read_once_at_the_end(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_lists(tmp_path / "data", "colours", pictures)
    steps: list[str] = []
    opened = module.open_pictures
    real = module.evaluation_batches

    def note(part: Any, *rest: Any, **more: Any) -> Any:
        steps.append(f"open {part.list}")
        return opened(part, *rest, **more)

    def measure(backbone: Any, parts: Any, *rest: Any, **more: Any) -> Any:
        steps.append(f"measure {parts[0].list}")
        return real(backbone, parts, *rest, **more)

    def train(*arguments: Any) -> None:
        steps.append(f"train {arguments[4].parts[0].reader.samples[0][0]}")
        run_loop(*arguments)

    monkeypatch.setattr(module, "open_pictures", note)
    monkeypatch.setattr("training.pictures.batches.open_pictures", note)
    monkeypatch.setattr(module, "evaluation_batches", measure)
    monkeypatch.setattr(module.loop, "run", train)

    def part(name: str) -> dict[str, str]:
        return {"path": str(root / "colours"), "list": name}

    search = {
        "key": "adaptformer.scale",
        "values": [0.1, 1.0],
        "train": part("train800.txt"),
        "validation": part("val200.txt"),
    }
    config = recipe(pictures, model_folder, method="adaptformer", search=search)
    config = FinetuneConfig.model_validate(
        config.model_dump() | {"pictures": part("train800val200.txt"), "test": part("test.txt")}
    )
    finetune(config, tmp_path / "run")
    assert [step for step in steps if "test.txt" in step] == ["measure test.txt", "open test.txt"]
    assert steps[-2:] == ["measure test.txt", "open test.txt"]
    measured = [step for step in steps if step.startswith("measure")]
    assert measured == ["measure val200.txt", "measure val200.txt", "measure test.txt"]


@pytest.mark.parametrize("method", ["full", "adaptformer", "lora"])
def test_an_interrupted_run_resumes_to_the_same_result(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    loop = {"epochs": 3, "batch_size": 12, "learning_rate": 3e-3, "workers": 0, "save_every": 2}
    config = recipe(pictures, model_folder, method=method, loop=loop)
    whole = finetune(config, tmp_path / "whole")
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
    name = "model.safetensors" if method == "full" else "task.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"classes": 2}, DataError, "has 3 classes and the head 2"),
        ({"backbone": {"name": "nowhere.safetensors"}}, BackboneError, "no weights file nowhere"),
        ({"test": {"path": "nowhere", "list": "test.txt"}}, DataError, "no nowhere to test on"),
    ],
)
def test_what_cannot_be_trained_is_told_first(
    pictures: Path, model_folder: Path, tmp_path: Path, change: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    config = recipe(pictures, model_folder, method="linear", **change)
    with pytest.raises(error, match=message):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_search_of_what_is_not_there_is_refused(pictures: Path, model_folder: Path) -> None:
    search = {"key": "adaptformer.scal", "values": [1.0]}
    with pytest.raises(ValueError, match=r"the recipe has no adaptformer\.scal"):
        recipe(pictures, model_folder, search=search)


def test_a_test_class_that_the_head_lacks_is_told(
    pictures: Path, model_folder: Path, tmp_path: Path
) -> None:
    root = write_lists(tmp_path / "data", "colours", pictures)
    folder = root / "colours"
    (folder / "test.txt").write_text("images/red/7.png 3\n")
    test = {"path": str(folder), "list": "test.txt"}
    config = recipe(pictures, model_folder, method="linear", test=test)
    with pytest.raises(DataError, match="test.txt has the class 3; the model has 3, from 0"):
        finetune(config, tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "adaptformer"])
def test_a_test_that_fails_loses_nothing_of_the_run(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    loop = {"epochs": 1, "batch_size": 12, "learning_rate": 3e-3, "workers": 0}
    config = recipe(pictures, model_folder, method=method, loop=loop)
    with monkeypatch.context() as patched:
        patched.setattr(module, "evaluation_batches", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(config, tmp_path / "run")
    (tensors,) = tmp_path.glob("run/*/*.safetensors")
    written = tensors.read_bytes()
    monkeypatch.setattr(module.loop, "run", lambda *_: pytest.fail("trained again"))
    folder = finetune(config, tmp_path / "run")
    assert tensors.read_bytes() == written
    said = json.loads((folder / ("config.json" if method == "full" else "task.json")).read_text())
    assert "test_accuracy" in said["training"]
    monkeypatch.setattr(module, "evaluation_batches", lambda *_, **__: pytest.fail("tested again"))
    assert finetune(config, tmp_path / "run") == folder


def test_what_is_tested_is_what_was_written(
    pictures: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    measure = module._quality

    def note(backbone: Any, *rest: Any) -> float:
        seen.append({name: weight.clone() for name, weight in backbone.model.state_dict().items()})
        return measure(backbone, *rest)

    monkeypatch.setattr(module, "_quality", note)
    loop = {"epochs": 1, "batch_size": 12, "learning_rate": 3e-3, "workers": 0}
    folder = finetune(recipe(pictures, model_folder, loop=loop), tmp_path / "run")
    ((tested),) = seen
    written = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.float16}
    for name, weight in written.items():
        assert torch.equal(tested[name], weight.float())
    said = json.loads((folder / "config.json").read_text())["training"]
    assert said["test_precision"] == "fp16 weights, fp32 forward"
