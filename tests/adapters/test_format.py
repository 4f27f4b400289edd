"""What bank and task folders have in common: digests that stay, and files that do no harm."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save

from adapters import (
    BackboneInfo,
    Bank,
    BankInfo,
    Geometry,
    TaskInfo,
    TaskModel,
    import_reference,
    open_bank,
    open_task,
)
from adapters.bank import read_info, tensor_shapes
from adapters.format import parse_tensors
from adapters.task import tensor_shapes as task_shapes
from tests.adapters.banks import ALL_TARGETS, GEOMETRY
from tocom import BankError, TaskError

BACKBONE = BackboneInfo(architecture="none", geometry=GEOMETRY, digest="0" * 64)


def bank_of(info: BankInfo) -> Bank:
    return Bank(info, {name: torch.ones(shape) for name, shape in tensor_shapes(info).items()})


def task_of(info: TaskInfo) -> TaskModel:
    return TaskModel(info, {name: torch.ones(shape) for name, shape in task_shapes(info).items()})


BANK = BankInfo(name="tiny", backbone=BACKBONE, max_rate=3, rank=2, targets=ALL_TARGETS, scale=0.5)
TASK = TaskInfo(
    name="colours",
    method="lora",
    backbone=BACKBONE,
    source=2,
    class_names=("blue", "grün"),
    rank=2,
    layers=("attn.qkv", "mlp.fc2"),
    scale=0.5,
)


def test_digests_of_what_there_is_never_change():
    assert open_bank("bundled:deit_tiny_bank").info.digest == (
        "c0277977f0c4810bd3916fe484004b90c2b5146e8ac170b39ef9d848fca80a43"
    )
    assert open_task("bundled:deit_tiny_textures").info.digest == (
        "83986bb473debdb2c4d4d1e5d141085f7d476c1c89bfdfce5da6a7c11089e398"
    )
    assert bank_of(BANK).info.digest == (
        "e8bfa413e4000669db8cd3b5adbf0a0d9af21a5f05890dc38ad9b1669b876bc5"
    )
    assert task_of(TASK).info.digest == (
        "aed2f186b79ecb3ee9996471c365b0dc05dfb1a91a57465552a03e9901e023f3"
    )


def test_several_classes_are_said_only_where_there_are(tmp_path):
    plain, many = TASK, TASK.model_copy(update={"multi_label": True})
    assert "multi_label" not in (task_of(plain).save(tmp_path / "a") / "task.json").read_text()
    folder = task_of(many).save(tmp_path / "b")
    assert json.loads((folder / "task.json").read_text())["multi_label"] is True
    assert TaskModel.load(folder).info.digest != task_of(plain).info.digest


@pytest.mark.parametrize(("make", "info"), [(bank_of, BANK), (task_of, TASK)])
def test_proportional_attention_is_said_only_where_it_is_off(tmp_path, make, info):
    for proportional in (True, False):
        made = make(info.model_copy(update={"proportional": proportional}))
        folder = made.save(tmp_path / str(proportional))
        said = json.loads(next(folder.glob("*.json")).read_text())
        assert said.get("proportional", "absent") == ("absent" if proportional else False)
        loaded = type(made).load(folder)
        assert loaded.info == made.info
        assert loaded.info.proportional is proportional


class NewGeometry(Geometry):
    pooling: str = "token"


class NewBackboneInfo(BackboneInfo):
    geometry: NewGeometry
    licence: str = "unknown"


class NewBankInfo(BankInfo):
    backbone: NewBackboneInfo
    reviewed: bool = True


class NewTaskInfo(TaskInfo):
    backbone: NewBackboneInfo
    reviewed: bool = True


def test_an_entry_that_comes_later_changes_no_digest():
    bank = NewBankInfo.model_validate(BANK.model_dump())
    assert bank.model_dump().keys() > BANK.model_dump().keys()
    assert bank_of(bank).info.digest == bank_of(BANK).info.digest
    task = NewTaskInfo.model_validate(TASK.model_dump())
    assert task_of(task).info.digest == task_of(TASK).info.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"max_rate": 4},
        {"rank": 1},
        {"targets": ALL_TARGETS[:-1]},
        {"scale": 0.25},
        {"proportional": False},
        {"backbone": BACKBONE.model_copy(update={"architecture": "other"})},
        {"backbone": BACKBONE.model_copy(update={"digest": "1" * 64})},
        *(
            {
                "backbone": BACKBONE.model_copy(
                    update={"geometry": GEOMETRY.model_copy(update={entry: value})}
                )
            }
            for entry, value in {
                "depth": 3,
                "width": 8,
                "heads": 1,
                "hidden": 8,
                "input": (8, 16),
                "patch": (2, 2),
            }.items()
        ),
    ],
    ids=str,
)
def test_what_decides_a_banks_answers_decides_its_digest(changes: dict[str, Any]):
    changed = bank_of(BANK.model_copy(update=changes))
    assert changed.info.digest != bank_of(BANK).info.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"method": "linear", "rank": None, "layers": ()},
        {"source": 1},
        {"class_names": ("blue", "green")},
        {"rank": 1},
        {"layers": ("attn.qkv",)},
        {"scale": 0.25},
        {"resize": "squash"},
        {"crop_pct": 0.875},
        {"proportional": False},
        {"heads": ("head", "head_dist")},
        {"backbone": BACKBONE.model_copy(update={"digest": "1" * 64})},
    ],
    ids=str,
)
def test_what_decides_a_tasks_answers_decides_its_digest(changes: dict[str, Any]):
    changed = task_of(TASK.model_copy(update=changes))
    assert changed.info.digest != task_of(TASK).info.digest


def test_a_header_that_is_too_large_is_not_parsed(tmp_path):
    bank, task = bank_of(BANK).save(tmp_path / "bank"), task_of(TASK).save(tmp_path / "task")
    checkpoint = tmp_path / "checkpoint.safetensors"
    header = b"{}".ljust(2**20 + 1)
    for file in (bank / "plugins.safetensors", task / "task.safetensors", checkpoint):
        file.write_bytes(struct.pack("<Q", len(header)) + header)
    message = r"safetensors is truncated .*: its header has 1,048,577 bytes, 1,048,576 are allowed"
    with pytest.raises(BankError, match=message):
        Bank.load(bank)
    with pytest.raises(TaskError, match=message):
        TaskModel.load(task)
    with pytest.raises(BankError, match=message):
        import_reference(checkpoint, "tiny", BACKBONE)


@pytest.mark.parametrize("shape", [[0, 2**64 - 1], [0, 2**62, 2**62], [0, 2**63]], ids=str)
def test_a_shape_that_no_tensor_can_have_is_refused(shape):
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(BankError, match="x.safetensors is truncated or corrupted: "):
        parse_tensors(struct.pack("<Q", len(header)) + header, Path("x.safetensors"), BankError)


def test_a_header_of_a_large_model_is_read():
    deep = GEOMETRY.model_copy(update={"depth": 200})
    backbone = BACKBONE.model_copy(update={"geometry": deep})
    bank = bank_of(BANK.model_copy(update={"backbone": backbone}))
    plugins = save(bank.tensors)
    assert int.from_bytes(plugins[:8], "little") > 100_000
    read = parse_tensors(plugins, Path("plugins.safetensors"), BankError)
    assert read.keys() == bank.tensors.keys()


def nested(depth: int) -> dict[str, Any]:
    """Return notes of so many levels."""
    value: Any = {}
    for i in range(depth - 2):
        value = {"inner": value} if i % 2 else [value]
    return {"inner": value}


@pytest.mark.parametrize(
    ("make", "info", "fault", "entry"),
    [
        (bank_of, BANK, BankError, "training"),
        (bank_of, BANK, BankError, "evaluation"),
        (task_of, TASK, TaskError, "training"),
        (task_of, TASK, TaskError, "evaluation"),
        (task_of, TASK, TaskError, "calibration"),
    ],
)
def test_notes_are_nested_32_deep_and_no_deeper(tmp_path, make, info, fault, entry):
    sound = make(info.model_copy(update={entry: nested(32)}))
    folder = sound.save(tmp_path / "sound")
    assert type(sound).load(folder).info == sound.info
    message = f"{entry}: .*lists and objects may be nested 32 deep"
    with pytest.raises(fault, match=message):
        make(info.model_copy(update={entry: nested(33)}))
    file = next(folder.glob("*.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: nested(190)}))
    with pytest.raises(fault, match=message):
        type(sound).load(folder)


def test_notes_that_no_file_can_hold_are_refused():
    with pytest.raises(TaskError, match=r"task 'colours': training\.loss.*finite"):
        task_of(TASK.model_copy(update={"training": {"loss": float("nan")}}))


def test_a_description_that_is_too_large_is_refused(tmp_path):
    message = r"bank\.json is larger than the 1,048,576 bytes that are allowed"
    with pytest.raises(BankError, match=message):
        bank_of(BANK.model_copy(update={"training": {"said": "x" * 2**20}}))
    folder = bank_of(BANK).save(tmp_path / "bank")
    file = folder / "bank.json"
    said = file.read_bytes()
    file.write_bytes(said.ljust(2**20))
    assert Bank.load(folder).info == read_info(folder)
    file.write_bytes(said.ljust(2**20 + 1))
    for read in (Bank.load, read_info):
        with pytest.raises(BankError, match=message):
            read(folder)


@pytest.mark.parametrize(("info", "entry"), [(BANK, "targets"), (TASK, "class_names")])
def test_one_fault_of_a_long_list_is_enough(info, entry):
    with pytest.raises(ValidationError, match=f"{entry}.0") as caught:
        type(info).model_validate(info.model_dump() | {entry: [0] * 1000})
    assert caught.value.error_count() <= 2


@pytest.mark.parametrize(
    "changes", [{"format_version": "x" * 5000}, {"x" * 5000: 1}], ids=["version", "entry"]
)
def test_a_message_does_not_repeat_all_that_came(tmp_path, changes):
    folder = bank_of(BANK).save(tmp_path / "bank")
    file = folder / "bank.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(BankError, match="x{10}") as caught:
        Bank.load(folder)
    tensors = bank_of(BANK).tensors | {"x" * 5000: torch.zeros(1)}
    with pytest.raises(BankError, match="has an unknown tensor x{200}$"):
        Bank(BANK, tensors)
    assert len(str(caught.value)) < 1000


def test_a_task_may_have_as_many_classes_as_there_are(tmp_path):
    names = tuple(f"a name of some fifty letters for the class {i:>9}" for i in range(21_841))
    task = task_of(TASK.model_copy(update={"class_names": names}))
    assert TaskModel.load(task.save(tmp_path / "task")).info == task.info
