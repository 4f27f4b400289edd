"""An analysis: what is observed is what traces say, and pairs differ in one thing."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from adapters.ladder import LadderInfo, write_ladder
from tocom import ConfigError, Ladder, forward_features, load_backbone, trace
from tocom.reduction import method_of
from training.analysis.analyse import analyse
from training.analysis.config import AnalyseConfig
from training.analysis.drawn import plot_depth, plot_proxies
from training.analysis.pairs import kind_of, proxies
from training.ladders.chosen import usual_ladder
from training.pictures.batches import evaluation_batches

ARGUMENTS = {
    "patch_size": 8, "img_size": 32, "depth": 4, "embed_dim": 12, "num_heads": 2, "num_classes": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of fewer channels than there are pictures."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    folder = tmp_path_factory.mktemp("narrow")
    save_for_hf(
        model, str(folder), model_config={"label_names": ["blue", "green", "red"]},
        model_args=ARGUMENTS, data_config={"input_size": (3, 32, 32)}, safe_serialization=True,
    )  # fmt: skip
    return folder


def config(pictures: Path, model: Path, **changes: Any) -> AnalyseConfig:
    said = {
        "backbone": {"name": str(model)},
        "pictures": {"path": str(pictures)},
        "entries": [{"method": "topk"}, {"method": "tome"}, {"method": "dpcknn"}],
        "shares": [0.8, 0.6],
        "near": 0.1,
        "batch_size": 9,
        "workers": 0,
    }
    return AnalyseConfig.model_validate(said | changes)


def test_what_is_observed_is_what_traces_say(pictures: Path, narrow: Path, tmp_path: Path) -> None:
    asked = config(pictures, narrow)
    path = analyse(asked, tmp_path / "run")
    result = json.loads(path.read_text())
    assert result["blocks"] == [1, 2, 3]
    rows, pairs = result["rows"], result["pairs"]
    backbone = load_backbone(str(narrow))
    ((images, _),) = evaluation_batches(backbone, [asked.pictures])
    ladder = usual_ladder(method_of("topk"), backbone.model, (0.8, 0.6), "topk")
    first, second = (trace(backbone.model, images, rung, ladder=ladder) for rung in (1, 2))
    one, two = (each.source[:, 1:] >= 0 for each in (first, second))
    (pair,) = (
        each for each in pairs
        if each["kind"] == "rungs" and rows[each["dearer"]]["method"] == "topk"
    )  # fmt: skip
    assert (rows[pair["dearer"]]["rung"], rows[pair["cheaper"]]["rung"]) == (1, 2)
    iou = ((one & two).sum(1) / (one | two).sum(1)).mean()
    assert pair["blocks"]["iou"][-1] == pytest.approx(iou.item())
    ioa = ((one & two).sum(1) / two.sum(1)).mean()
    assert pair["blocks"]["ioa"][-1] == pytest.approx(ioa.item())
    assert pair["measures"]["nmi"] is None  # Top-K joins nothing
    row = rows[pair["cheaper"]]
    assert len(row["depth"]) == len(row["depth"][0]) == 4
    never = two.double().mean(dim=0).reshape(4, 4)
    assert (torch.tensor(row["depth"]) >= 4 * never - 1e-3).all()
    answer, stock = first.logits, forward_features(backbone.model, images)[:, 0]
    top = backbone.model.head(stock).argmax(-1) == answer.argmax(-1)
    assert rows[pair["dearer"]]["agreement"] == pytest.approx(100 * top.double().mean().item())


def test_pairs_of_every_kind_have_their_measures_and_proxies(
    pictures: Path, narrow: Path, tmp_path: Path
) -> None:
    other = {"backbone": {"name": str(narrow)}, "method": "tome", "name": "tome elsewhere"}
    entries = [{"method": "tome"}, {"method": "dpcknn"}, other]
    path = analyse(config(pictures, narrow, entries=entries, labelled=False), tmp_path / "run")
    result = json.loads(path.read_text())
    by_kind = {pair["kind"] for pair in result["pairs"]}
    assert by_kind == {"stock", "rungs", "methods"}
    pair = next(pair for pair in result["pairs"] if pair["kind"] == "methods")
    assert 0 < pair["measures"]["nmi"] <= 1
    assert all(0 <= value <= 1 + 1e-9 for value in pair["blocks"]["mean_cca"])
    assert pair["measures"]["depth_emd"] >= 0
    said = {(each["kind"], each["measure"]): each for each in result["proxies"]}
    assert said["rungs", "cka"]["pairs"] == 3
    assert said["methods", "nmi"]["mean"] == pytest.approx(
        sum(each["measures"]["nmi"] for each in result["pairs"] if each["kind"] == "methods")
        / said["methods", "nmi"]["pairs"]
    )
    text = path.with_suffix(".md").read_text()
    assert "| clusters: NMI |" in text
    assert "agreement with rung 0 differs" in text


@pytest.mark.rendered
def test_an_analysis_is_drawn(tmp_path: Path) -> None:
    rows = [row(rung=rung) | {"depth": [[rung, 2], [3, 4]]} for rung in (0, 1)]
    pairs = [{"kind": "stock", "difference": 2.0, "measures": {"iou": 0.5, "nmi": None}}]
    result = {"model": "a", "pictures": {"name": "b"}, "rows": rows, "pairs": pairs}
    result["proxies"] = [{"kind": "stock", "measure": "iou"}]
    plot_proxies(result, tmp_path)
    plot_depth(result, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"analysis.svg", "analysis.png", "depth.svg", "depth.png"}


def row(model: str = "a", method: str = "m", rung: int = 1, share: float = 0.7) -> dict[str, Any]:
    return {"model": model, "method": method, "rung": rung, "share": share, "bank": False}


@pytest.mark.parametrize(
    ("second", "kind"),
    [
        (row(rung=2, share=0.5), "rungs"),
        (row(rung=0, method="stock", share=1), "stock"),
        (row(method="n", share=0.68), "methods"),
        (row(method="n", share=0.5), None),
        (row(model="b"), "models"),
        (row(model="b", method="n"), None),
        (row(model="b", rung=0, method="stock", share=1), None),
        (row(), None),
    ],
)
def test_pairs_differ_in_one_thing(second: dict[str, Any], kind: str | None) -> None:
    assert kind_of(row(), second, 0.05) == kind


def test_a_proxy_is_the_correlation_with_the_difference() -> None:
    pairs = [
        {"kind": "rungs", "difference": each, "measures": {"iou": 1 - each / 10, "nmi": None}}
        for each in (1.0, 2.0, 5.0)
    ]
    (proxy,) = proxies(pairs)
    assert proxy["measure"] == "iou"
    assert proxy["pairs"] == 3
    assert proxy["spearman"] == pytest.approx(-1)
    assert proxy["kendall"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [4]}, "has the blocks 0 to 3, got 4"),
        ({"shares": [0.01]}, "none of the entries can be made as cheap"),
        ({"limit": 12}, r"features of 12 channels .* need more pictures than that .* got 12"),
    ],
)
def test_what_cannot_be_analysed_is_refused(
    pictures: Path, narrow: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        analyse(config(pictures, narrow, **changes), tmp_path)


def test_a_ladder_that_changed_meanwhile_is_noticed(
    pictures: Path, narrow: Path, tmp_path: Path
) -> None:
    def written(last: int) -> str:
        rungs = ((0, 0, 0, 0), (0, 4, 0, last))
        info = LadderInfo.of(Ladder("mine", method_of("tome"), rungs, 16))
        return str(write_ladder(info, tmp_path / "ladder.json"))

    asked = config(pictures, narrow, entries=[{"ladder": written(0)}])
    path = analyse(asked, tmp_path / "run")
    assert analyse(asked, tmp_path / "run") == path
    written(2)
    with pytest.raises(ConfigError, match=r"other models, tasks, ladders or banks of mine; choose"):
        analyse(asked, tmp_path / "run")
