import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from adapters import TaskModel, compose, open_bank
from server.app import create_app
from server.models.loading import load_model, load_models
from server.models.served import ServedModel
from server.models.weights import Backbones
from server.settings import ModelSettings, Settings
from tests.adapters.banks import backbone_of
from tests.adapters.test_task import random_task
from tests.tocom_models import small_model
from tocom import BackboneError, Delta, FoldedWeights, TaskError, forward, load_backbone


@pytest.fixture(scope="module")
def task_folder(tiny: ModelSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = random_task(load_backbone(tiny.backbone), resize="squash")
    return task.save(tmp_path_factory.mktemp("tasks") / "colours")


@pytest.fixture(scope="module")
def both(tiny: ModelSettings, task_folder: Path) -> Settings:
    task = tiny.model_copy(update={"name": "colours", "task": str(task_folder)})
    twin = task.model_copy(update={"name": "twin"})
    return Settings(models=(tiny, task, twin), device="cpu")


@pytest.fixture(scope="module")
def served(both: Settings) -> list[ServedModel]:
    return load_models(both)


@pytest.mark.parametrize("rate", [0, 2, 5])
def test_a_task_answers_as_its_formula_with_the_bank_from_its_source(
    served: list[ServedModel], tiny: ModelSettings, task_folder: Path, rate: int
) -> None:
    images = torch.randn(2, 3, 64, 64)
    outputs = served[1].at(rate, compensate=True)(images)
    tuned = TaskModel.load(task_folder).on(load_backbone(tiny.backbone))
    assert tiny.bank is not None
    delta = compose(open_bank(tiny.bank), 2, rate)
    expected = forward(tuned.model, images, rate, delta, adapter=tuned.adapter)
    torch.testing.assert_close(
        torch.stack([output.logits for output in outputs]), expected, rtol=1e-4, atol=1e-4
    )


def test_tasks_share_weights_and_what_is_folded(served: list[ServedModel]) -> None:
    stock, task, twin = served
    own = {id(each) for each in stock.backbone.model.parameters()}
    others = [name for name, each in task.backbone.model.named_parameters() if id(each) not in own]
    assert others == ["head.weight", "head.bias"]
    assert task.delta(4) is twin.delta(4)
    assert task.delta(4) is not stock.delta(4)  # of another source


def test_folded_weights_go_with_the_last_who_holds_them(tiny: ModelSettings) -> None:
    model = load_model(tiny)
    model.delta(3)
    assert len(model.deltas._made) == 1
    del model._made[3]
    assert len(model.deltas._made) == 0


def test_lora_has_weights_of_its_own(tiny: ModelSettings, tmp_path: Path) -> None:
    task = random_task(load_backbone(tiny.backbone), "lora").save(tmp_path / "lora")
    models = tiny, tiny.model_copy(update={"name": "lora", "task": str(task), "source": 0})
    stock, lora = load_models(Settings(models=models, device="cpu"))
    name = "blocks.0.attn.qkv"
    assert not torch.equal(stock.delta(3).weights[name], lora.delta(3).weights[name])


@pytest.fixture(scope="module")
def client(both: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(both)) as client:
        yield client


def test_a_request_names_its_task(client: TestClient, task_folder: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(file, "PNG")
    answer = client.post(
        "/v1/classify", params={"model": "colours", "rate": 4}, files={"file": file.getvalue()}
    ).json()
    assert {each["label"] for each in answer["predictions"]} <= {"blue", "green", "red"}
    assert (answer["rate"], answer["compensate"]) == (4, True)
    detail = client.get("/v1/models/colours").json()
    assert detail["crop_mode"] == "squash"
    assert detail["task"]["digest"] == TaskModel.load(task_folder).info.digest
    assert client.get("/v1/models/tiny").json()["task"] is None


def test_a_task_of_another_backbone_is_refused(tiny: ModelSettings, tmp_path: Path) -> None:
    task = random_task(backbone_of(small_model(seed=1))).save(tmp_path / "other")
    with pytest.raises(TaskError, match="was tuned on small_vit"):
        load_model(tiny.model_copy(update={"task": str(task)}))


def test_a_task_is_no_backbone(tiny: ModelSettings, task_folder: Path) -> None:
    with pytest.raises(BackboneError, match="is a task folder: give it as the task of"):
        load_model(tiny.model_copy(update={"backbone": str(task_folder)}))


def test_what_has_no_room_is_added_on_the_fly(tiny: ModelSettings) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ample = load_model(tiny)
    one = ample.delta(5).nbytes
    tight = load_model(tiny, Backbones(max_folded_bytes=2 * one))
    kinds = [type(tight.delta(rate)) for rate in (5, 4, 3, 5)]
    assert kinds == [FoldedWeights, FoldedWeights, Delta, FoldedWeights]
    for rate in (3, 4):
        for a, b in zip(ample.at(rate, True)(images), tight.at(rate, True)(images), strict=True):
            torch.testing.assert_close(a.logits, b.logits)
