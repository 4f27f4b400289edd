"""Models at one rate, as stock runtimes run them."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from timm.models import save_for_hf
from torch import Tensor

from adapters import BackboneInfo, compose, export_model
from adapters.cli import main
from adapters.ladder import LadderInfo, digest, write_ladder
from tests.adapters.banks import backbone_of, random_bank
from tests.adapters.test_peft import bank_of
from tests.adapters.test_task import random_task
from tests.tocom_models import pictures, small_model
from tocom import (
    TOME,
    Backbone,
    BackboneError,
    BankError,
    ConfigError,
    Ladder,
    RateError,
    TocomError,
    forward,
)
from tocom.reduction import ToMe


def small_backbone(kind: str = "vit_tiny", **changes: Any) -> Backbone:
    """Return a model whose configuration says of which size its pictures are."""
    model = small_model(kind)
    model.blocks = model.blocks[:2]  # every block takes the exporter seconds
    height, width = model.patch_embed.img_size
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"input_size": (3, height, width)}
    return replace(backbone_of(model), **changes)


def run(path: Path, images: Tensor) -> dict[str, np.ndarray]:
    """Return what a file answers, by name."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
    answers = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        images.numpy()
    )
    return {output.any_name: answer for output, answer in answers.items()}


def about(path: Path) -> dict[str, Any]:
    """Return what a file says of itself."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return json.loads(session.get_modelmeta().custom_metadata_map["tocom"])
    return json.loads(openvino.Core().read_model(path).get_rt_info(["tocom"]).value)


def assert_agrees(path: Path, expected: Any) -> None:
    """Compare logits of a file with what is `expected` of images, for batches of any size."""
    size = openvino.Core().read_model(path).input("images").partial_shape[2].get_length()
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    for batch in (1, 3, 8):
        logits = torch.from_numpy(run(path, images[:batch])["logits"])
        torch.testing.assert_close(logits, expected(images[:batch]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_both_formats_answer_as_the_forward_with_its_delta(suffix, tmp_path):
    backbone = small_backbone(class_names=tuple(f"Ä {i}" for i in range(10)))
    bank = bank_of(backbone.model, ("q", "v", "fc1"))
    searched = {"bank_digest": bank.info.digest, "source": 1, "multiplier": {"3": 0.75}}
    backbone = replace(backbone, calibration=searched | {"measure": "kl", "pictures": {}})
    path = export_model(backbone, 3, tmp_path / f"new/model.3{suffix}", bank, source=1)
    delta = compose(bank, 1, 3, scale=0.75)
    images = pictures(backbone.model)
    plain = forward(backbone.model, images, 3)
    assert (forward(backbone.model, images, 3, delta) - plain).abs().max() > 1e-2
    assert_agrees(path, lambda images: forward(backbone.model, images, 3, delta))
    assert run(path, images)["features"].shape == (3, 192)
    said = about(path)
    assert (said["model"], said["source"], said["rate"]) == ("small", 1, 3)
    assert said["bank"] == {"name": "tiny", "digest": bank.info.digest, "scale": 0.75}
    assert said["class_names"][9] == "Ä 9"
    assert said["preprocessing"] == json.loads(json.dumps(backbone.data_config))
    files = {file.name for file in path.parent.iterdir()}
    assert files == {path.name, *(["model.3.bin"] if suffix == ".xml" else [])}
    assert all(str(Path.cwd()).encode() not in (path.parent / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [("deit_tiny_distilled", 2), ("global_pool", 4), ("no_prefix", 3)],
)
def test_every_kind_of_model_is_exported(kind, rate, tmp_path):
    backbone = small_backbone(kind)
    path = export_model(backbone, rate, tmp_path / "model.onnx")
    assert_agrees(path, lambda images: forward(backbone.model, images, rate))
    assert about(path)["bank"] is None


def test_the_branches_of_a_task_go_with_it(tmp_path):
    task = random_task(small_backbone()).on(small_backbone())
    path = export_model(task, 3, tmp_path / "model.onnx")
    assert_agrees(path, lambda images: forward(task.model, images, 3, adapter=task.adapter))
    said = about(path)
    assert (said["model"], said["task_digest"]) == ("colours", task.task_digest)
    assert said["class_names"] == ["blue", "green", "red"]


def test_a_model_without_a_head_says_its_features(tmp_path):
    backbone = small_backbone()
    backbone.model.reset_classifier(0)
    images = pictures(backbone.model)
    answers = run(export_model(backbone, 0, tmp_path / "model.onnx"), images)
    assert list(answers) == ["features"]
    expected = forward(backbone.model, images)
    torch.testing.assert_close(torch.from_numpy(answers["features"]), expected, rtol=0, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    backbone, path = small_backbone(), tmp_path / "model.xml"
    bank = bank_of(backbone.model, ("q",))
    with pytest.raises(RateError, match=r"target rate must be in 0\.\.3, got 4"):
        export_model(backbone, 4, path, bank)
    with pytest.raises(RateError, match=r"small: the target rate must be in 0\.\.8, got 9"):
        export_model(backbone, 9, path)
    with pytest.raises(RateError, match=r"source rate must be in 0\.\.8, got -1"):
        export_model(backbone, 4, path, source=-1)
    with pytest.raises(BankError, match="does not fit small: .*heads 6"):
        export_model(backbone, 1, path, bank_of(small_model("vit_small"), ("q",)))
    with pytest.raises(ConfigError, match=r"as \.onnx or \.xml, got 'model\.pt'"):
        export_model(backbone, 1, tmp_path / "model.pt")
    with pytest.raises(BackboneError, match=r"of \(64, 64\) pixels.*says \(224, 224\)"):
        export_model(backbone_of(small_model()), 1, path)
    (tmp_path / "model.bin").touch()
    with pytest.raises(TocomError, match=r"model\.bin exists already and is never overwritten"):
        export_model(backbone, 1, path)
    for suffix, module in ((".xml", "openvino"), (".onnx", "onnxscript")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(TocomError, match=rf"{module}.*pip install 'tocom-serve\[export\]'"):
            export_model(backbone, 1, path.with_suffix(suffix))
    assert [file.name for file in tmp_path.iterdir()] == ["model.bin"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def no_space(*arguments: object, **more: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch.onnx, "export", no_space)
    with pytest.raises(OSError, match="no space left"):
        export_model(small_backbone(), 1, tmp_path / "new" / "model.xml")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_exports_what_it_is_told(tmp_path, capsys):
    backbone = small_backbone()
    kept = {"img_size": 64, "depth": 2, "num_classes": 10}
    save_for_hf(backbone.model, tmp_path / "model", model_args=kept, safe_serialization=True)
    bank = bank_of(backbone.model, ("q", "v"))
    asked = [
        "export-model", tmp_path / "model", tmp_path / "model.onnx",
        "--bank", bank.save(tmp_path / "bank"), "--source", 1,
        "--task", random_task(backbone).save(tmp_path / "task"), "--rate",
    ]  # fmt: skip
    assert main([*map(str, asked), "4"]) == 2
    assert "target rate must be in 0..3, got 4" in capsys.readouterr().err
    assert main([*map(str, asked), "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model.onnx'}\n"
    said = about(tmp_path / "model.onnx")
    assert (said["model"], said["source"], said["rate"]) == ("colours", 1, 3)
    assert said["bank"]["digest"] == bank.info.digest


UNEVEN = Ladder("uneven", ToMe(), ((0, 0), (2, 0), (1, 5)), 16)


def test_a_file_is_on_the_ladder_of_its_bank(tmp_path):
    backbone = small_backbone()
    ladder = replace(UNEVEN, rungs=(*UNEVEN.rungs, (5, 5)))
    bank = random_bank(BackboneInfo.of(backbone), ladder=ladder)
    path = export_model(backbone, 2, tmp_path / "model.onnx", bank)
    delta = compose(bank, 0, 2)
    assert_agrees(path, lambda images: forward(backbone.model, images, 2, delta, ladder=ladder))
    said = about(path)
    assert (said["method"], said["ladder"]) == ("tome", "uneven")
    assert said["ladder_digest"] == digest(ladder)
    with pytest.raises(ConfigError, match="'tiny' is for the ladder 'uneven', not for 'tome'"):
        export_model(backbone, 2, tmp_path / "other.onnx", bank, ladder=TOME)


def test_ladders_that_no_file_can_have_are_refused(tmp_path, monkeypatch):
    backbone = small_backbone()
    path = tmp_path / "model.onnx"
    with pytest.raises(RateError, match=r"target rate must be in 0\.\.2, got 3"):
        export_model(backbone, 3, path, ladder=UNEVEN)
    tuned = replace(backbone, source=1, ladder=UNEVEN)
    with pytest.raises(ConfigError, match="was tuned at rate 1 of the ladder 'uneven', not of"):
        export_model(tuned, 2, path, ladder=TOME)

    def broken(*_, **__):
        raise torch.onnx.OnnxExporterError("no such operator\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "export", broken)
        with pytest.raises(ConfigError, match="cannot export the method 'tome': no such operator$"):
            export_model(tuned, 2, path)
    monkeypatch.setattr(ToMe, "by_picture", True)
    with pytest.raises(ConfigError, match="the method 'tome' decides by picture how many tokens"):
        export_model(tuned, 2, path)
    assert not list(tmp_path.iterdir())


def test_a_ladder_from_the_shell_must_be_for_the_model(tmp_path, capsys):
    write_ladder(LadderInfo.of(UNEVEN), tmp_path / "ladder.json")
    command = ["export-model", "bundled:deit_tiny", str(tmp_path / "model.onnx")]
    assert main([*command, "--rate", "1", "--ladder", str(tmp_path)]) == 2
    assert "'uneven' is for 2 blocks, the model has 12" in capsys.readouterr().err
