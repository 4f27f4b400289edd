import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import AdaptFormer, BackboneInfo, TaskInfo, TaskModel
from adapters.ladder import LadderPart
from adapters.task import heads_of, tensor_shapes
from tests.adapters.banks import backbone_of
from tests.tocom_models import pictures, small_model
from tocom import TOME, Backbone, Ladder, TaskError, forward
from tocom.reduction import ATME, DPCKNN, DynamicViT, PatchMerger, Sinkhorn, SiT

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "adaptformer": {"rank": 4, "scale": 0.1},
    "lora": {"rank": 2, "layers": ("attn.qkv", "mlp.fc2"), "scale": 0.5},
}


def random_task(backbone: Backbone, method: str = "adaptformer", **changes: Any) -> TaskModel:
    info = TaskInfo.model_validate(
        {
            "name": "colours",
            "method": method,
            "backbone": BackboneInfo.of(backbone),
            "source": 2,
            "class_names": ("blue", "green", "red"),
            "heads": heads_of(backbone.model),
            **METHODS[method],
            **changes,
        }
    )
    torch.manual_seed(4)
    shapes = tensor_shapes(info)
    return TaskModel(info, {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()})


@pytest.fixture(scope="module", params=["vit_tiny", "deit_tiny_distilled", "global_pool"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbone_of(small_model(request.param))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_runs_as_before(backbone: Backbone, method: str, tmp_path: Path) -> None:
    task = random_task(backbone, method)
    loaded = TaskModel.load(task.save(tmp_path / "task"))
    assert loaded.info == task.info
    images = pictures(backbone.model)
    one, other = task.on(backbone), loaded.on(backbone)
    answers = [forward(m.model, images, 2, adapter=m.adapter) for m in (one, other)]
    assert answers[0].shape == (3, 3)
    assert torch.equal(*answers)
    assert (one.source, one.class_names) == (2, ("blue", "green", "red"))
    assert one.tuned_from == backbone.digest


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_the_backbones_own_in_memory(backbone: Backbone, method: str) -> None:
    before = backbone.digest
    task = random_task(backbone, method)
    own = {id(parameter) for parameter in backbone.model.parameters()}
    changed = {
        name
        for name, parameter in task.on(backbone).model.named_parameters()
        if id(parameter) not in own
    }
    expected = {f"{head}.{leaf}" for head in task.info.heads for leaf in ("weight", "bias")}
    expected |= {f"blocks.{i}.{layer}.weight" for i in range(3) for layer in task.info.layers}
    assert changed == expected
    assert backbone_of(backbone.model).digest == before


def test_adaptformers_folder_is_its_module() -> None:
    backbone = backbone_of(small_model())
    tuned = AdaptFormer(3, backbone.model.embed_dim, bottleneck=4, scale=0.3)
    torch.nn.init.normal_(tuned.up, std=0.1)
    task = random_task(backbone, scale=0.3)
    tensors = task.tensors | {"adaptformer.down": tuned.down, "adaptformer.up": tuned.up}
    info = task.info.model_copy(update={"digest": ""})
    on = TaskModel(info, tensors).on(backbone)
    images = pictures(backbone.model)
    assert torch.equal(
        forward(on.model, images, 1, adapter=on.adapter),
        forward(on.model, images, 1, adapter=tuned()),
    )


def test_lora_is_the_weights_plus_the_pairs() -> None:
    backbone = backbone_of(small_model())
    task = random_task(backbone, "lora")
    merged, own = (m.blocks[1].attn.qkv.weight for m in (task.on(backbone).model, backbone.model))
    pair = [task.tensors[f"lora.blocks.1.attn.qkv.{factor}"] for factor in "BA"]
    torch.testing.assert_close(merged, own + 0.5 * pair[0] @ pair[1])


def test_a_task_says_how_much_of_a_picture_it_sees(tmp_path: Path) -> None:
    backbone = backbone_of(small_model())
    task = random_task(backbone, crop_pct=0.875)
    loaded = TaskModel.load(task.save(tmp_path / "task"))
    assert loaded.info == task.info
    seen = loaded.on(backbone).data_config
    assert (seen["crop_pct"], seen["crop_mode"]) == (0.875, "center")
    own = backbone_of(small_model()).data_config["crop_pct"]
    plain = random_task(backbone)
    assert plain.on(backbone).data_config["crop_pct"] == own != 0.875
    assert "crop_pct" not in json.loads((plain.save(tmp_path / "plain") / "task.json").read_text())


def test_what_is_squashed_has_no_share(tmp_path: Path) -> None:
    folder = random_task(backbone_of(small_model()), resize="squash").save(tmp_path / "task")
    said = json.loads((folder / "task.json").read_text())
    for crop, message in ((0.875, "crop_pct is for resize='crop'"), (0, "crop_pct: .*than 0")):
        (folder / "task.json").write_text(json.dumps(said | {"crop_pct": crop}))
        with pytest.raises(TaskError, match=message):
            TaskModel.load(folder)


def test_another_backbone_is_refused() -> None:
    task = random_task(backbone_of(small_model()))
    with pytest.raises(TaskError, match="was tuned on small_vit with the weights"):
        task.on(backbone_of(small_model(seed=1), "other"))


@pytest.mark.parametrize("heads", [("nope",), ("norm",), ("head", "head"), ("head", "head_dist")])
def test_other_heads_than_the_backbones_are_refused(heads: tuple[str, ...]) -> None:
    backbone = backbone_of(small_model())
    task = random_task(backbone, "linear", heads=heads)
    with pytest.raises(TaskError, match=f"are head, got {', '.join(heads)}$"):
        task.on(backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "linear"}, "linear and the rank 4 do not go together"),
        ({"layers": ("attn.qkv",)}, "adaptformer cannot have attn.qkv"),
        ({"method": "lora", "layers": ("attn.x",)}, "lora cannot have attn.x"),
        ({"rank": 5}, r"adaptformer.down must be \[3, 5, 192\], got \[3, 4, 192\]"),
        ({"class_names": ("one",)}, r"head.weight must be \[1, 192\], got \[3, 192\]"),
        ({"scale": 0.2}, "does not match its digest"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], message: str) -> None:
    task = random_task(backbone_of(small_model()))
    with pytest.raises(TaskError, match=message):
        TaskModel(task.info.model_copy(update=change), task.tensors)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "has task format 2; this version reads format 1"),
        ("source", -1, "source: Input should be greater than or equal to 0"),
        ("more", 1, "more: Extra inputs are not permitted"),
        ("digest", "", "has no digest"),
    ],
)
def test_a_faulty_file_is_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = random_task(backbone_of(small_model())).save(tmp_path / "task")
    said = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(said | {key: value}))
    with pytest.raises(TaskError, match=message):
        TaskModel.load(folder)


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    task = random_task(backbone_of(small_model()))
    folder = task.save(tmp_path / "task")
    with pytest.raises(TaskError, match="exists already"):
        task.save(folder)
    file = folder / "task.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TaskError, match="truncated or corrupted"):
        TaskModel.load(folder)
    file.unlink()
    with pytest.raises(TaskError, match="it has no task.safetensors"):
        TaskModel.load(folder)


# --- what a learned method adds

LEARNED = [DynamicViT(), SiT(), PatchMerger(), Sinkhorn(), DPCKNN(weighted=True), ATME(linear=True)]


def tuned_with(method: Any, kind: str = "adaptformer") -> TaskModel:
    rungs = ((0, 0, 1), (1, 0, 1)) if method.name == "atme" else ((0, 9, 0), (0, 6, 4))
    ladder = Ladder("learned", method, ((0, 0, 0), *rungs), 16)
    said = LadderPart.describe(ladder).model_dump(mode="json")
    return random_task(backbone_of(small_model()), kind, ladder=said)


@pytest.mark.parametrize("method", LEARNED, ids=repr)
def test_a_task_runs_at_every_rung_with_what_was_saved(method: Any, tmp_path: Path) -> None:
    task = tuned_with(method)
    loaded = TaskModel.load(task.save(tmp_path / "task"))
    backbone = backbone_of(small_model())
    images = pictures(backbone.model)
    one, other = task.on(backbone), loaded.on(backbone)
    assert other.ladder.method == method
    for rung in range(3):
        answers = [
            forward(m.model, images, rung, adapter=m.adapter, ladder=m.ladder, learned=m.learned)
            for m in (one, other)
        ]
        assert torch.equal(*answers)
        assert answers[0].isfinite().all()
    assert one.digest != backbone.digest


def test_weights_are_of_those_blocks_that_act_and_count_in_the_digest() -> None:
    task = tuned_with(SiT(), "linear")
    shapes = {
        name.removeprefix("reduction."): tuple(tensor.shape)
        for name, tensor in task.tensors.items()
        if name.startswith("reduction.")
    }
    assert {name.partition(".")[0] for name in shapes} == {"1", "2"}
    assert shapes["1.weight.3.weight"] == (9, 96)  # for the rung that leaves the most
    changed = task.tensors | {"reduction.1.scale": 2 * task.tensors["reduction.1.scale"]}
    again = TaskModel(task.info.model_copy(update={"digest": ""}), changed)
    assert again.info.digest != task.info.digest
    with pytest.raises(TaskError, match="does not match its digest"):
        TaskModel(task.info, changed)


def test_a_task_on_a_ladder_that_learns_nothing_is_what_it_was(tmp_path: Path) -> None:
    backbone = backbone_of(small_model())
    task = random_task(backbone)
    assert task.ladder == TOME
    assert not any(name.startswith("reduction.") for name in task.tensors)
    assert task.on(backbone).learned is None
    said = json.loads((task.save(tmp_path / "task") / "task.json").read_text())
    assert "ladder" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction.1.v": None}, "lacks tensor reduction.1.v"),
        ({"reduction.0.v": torch.zeros(9, 192)}, "has an unknown tensor reduction.0.v"),
        (
            {"reduction.1.v": torch.zeros(8, 192)},
            r"reduction.1.v must be \[9, 192\], got \[8, 192\]",
        ),
        ({"reduction.2.v": torch.full((4, 192), torch.nan)}, "reduction.2.v holds NaN or infin"),
        ({"reduction.2.v": torch.zeros(4, 192).half()}, "must be all fp32 or all fp16"),
    ],
)
def test_what_is_not_its_weights_is_refused(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    task = tuned_with(Sinkhorn())
    tensors = {k: v for k, v in (task.tensors | change).items() if v is not None}
    with pytest.raises(TaskError, match=message):
        TaskModel(task.info, tensors)
