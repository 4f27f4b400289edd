"""`tocom-bank`, command by command."""

import json

import pytest
import timm
from safetensors.torch import save_file

from adapters import BackboneInfo, Bank, Geometry, Store
from adapters.cli import main
from tests.adapters.banks import random_bank, same
from tests.adapters.test_reference import reference_checkpoint

BANK = random_bank()
REFERENCE = f"tiny@{BANK.info.digest[:12]}"


@pytest.fixture
def folder(tmp_path):
    return BANK.save(tmp_path / "bank")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCOM_STORE", str(tmp_path / "store"))
    return Store()


@pytest.fixture
def published(store, folder):
    store.publish(folder)
    return store


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; return its one line."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tocom-bank: ")
    assert err.count("\n") == 1
    return err


def test_inspect_prints_a_table(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bank                tiny",
        f"digest              {BANK.info.digest}",
        "backbone            none, weights 000000000000",
        "geometry            2 blocks, width 4, 2 heads, hidden 6, input 8 x 8 px, patch 4 x 4 px",
        "rates               0..3 of tome",
        "rank                2 a step",
        "targets             q, v",
        "scale               0.5",
        "parameters          192",
        "size                0.00 MB as float32",
        "training.samples    12",
        "training.recipe.lr  0.001",
    ]


def test_inspect_shows_what_would_steer_the_terminal(tmp_path, capsys):
    info = BANK.info.model_copy(update={"training": {"a\nb": "red \x1b[31m\u2028"}})
    assert main(["inspect", str(Bank(info, BANK.tensors).save(tmp_path / "bank"))]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == r"training.a\nb  red \x1b[31m\u2028"


def test_inspect_prints_json(published, capsys):
    assert main(["inspect", "tiny", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["digest"] == BANK.info.digest
    assert info["backbone"]["geometry"]["width"] == 4
    assert (info["parameters"], info["bytes"]) == (192, 768)


def test_publish_list_verify_delete(store, folder, tmp_path, capsys):
    def run(*arguments: object) -> str:
        assert main([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    assert run("list") == ""
    assert run("publish", folder) == f"{REFERENCE}\n"
    assert run("list") == f"{REFERENCE}  current\n"
    newer = store.publish(random_bank(seed=1))
    assert sorted(run("list").splitlines()) == sorted([REFERENCE, f"{newer}  current"])
    assert run("verify") == "2 published, 0 faults\n"
    assert run("verify", REFERENCE) == f"{REFERENCE} is whole\n"
    assert run("publish", REFERENCE) == f"{REFERENCE}\n"  # a step back
    assert run("delete", newer) == f"{newer} is deleted\n"
    assert run("list") == f"{REFERENCE}  current\n"
    elsewhere = tmp_path / "elsewhere"
    assert run("publish", folder, "--store", elsewhere) == f"{REFERENCE}\n"
    assert run("delete", "--store", elsewhere, "tiny") == f"{REFERENCE} is deleted\n"
    assert same(store.get("tiny"), BANK)


def test_verify_names_the_faulty(published, capsys):
    (published.find("tiny").folder / "bank.json").write_text("{}")
    assert main(["verify"]) == 1
    out, err = capsys.readouterr()
    assert out == "1 published, 1 faults\n"
    assert err.startswith(f"{REFERENCE}: ")
    assert "bank format None" in refused(capsys, "verify", "tiny")


def test_what_cannot_be_done_is_one_line(published, folder, tmp_path, capsys):
    assert "no bank 'nobody' in" in refused(capsys, "inspect", "nobody")
    assert "a reference is NAME, NAME@DIGEST" in refused(capsys, "delete", "../tiny")
    assert "is no bank" in refused(capsys, "publish", tmp_path)
    assert "there is no folder no/where" in refused(capsys, "publish", "no/where")
    assert "nothing bundled is called" in refused(capsys, "inspect", "bundled:nobody")
    assert "nothing is published" in refused(capsys, "verify", "--store", tmp_path / "nowhere")
    assert "Not a directory" in refused(capsys, "publish", folder, "--store", folder / "bank.json")
    with published.use("tiny"):
        assert f"{REFERENCE} is in use" in refused(capsys, "delete", "tiny")
    rates = ("--source", 0, "--target", 9)
    assert "must be in 0..3, got 9" in refused(capsys, "export", "tiny", tmp_path / "x", *rates)
    with pytest.raises(SystemExit, match="2"):
        main(["polish"])
    assert "there is no 'polish', did you mean publish?" in capsys.readouterr().err


def test_export_writes_a_lora(published, tmp_path, capsys):
    lora = tmp_path / "lora"
    assert main(["export", "tiny", str(lora), "--source", "0", "--target", "3"]) == 0
    assert capsys.readouterr().out == f"{lora}\n"
    assert {path.suffix for path in lora.iterdir()} == {".json", ".safetensors"}


def test_import_makes_a_bank(tmp_path, capsys):
    architecture = "test_vit"  # timm's smallest
    model = timm.create_model(architecture)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    described = BackboneInfo(architecture="-", geometry=Geometry.of(model), digest="-")
    bank = random_bank(described)
    save_file(reference_checkpoint(bank), tmp_path / "tocom.safetensors")
    asked = [
        "import", tmp_path / "tocom.safetensors", tmp_path / "imported",
        "--name", "tiny", "--backbone", tmp_path / "model.safetensors",
        "--architecture", architecture, "--scale", "0.5",
    ]  # fmt: skip
    assert "6 components, which is not 16 steps" in refused(capsys, *asked)
    assert main([*map(str, asked), "--rank", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'imported'}\n"
    imported = Bank.load(tmp_path / "imported")
    assert imported.info.backbone.architecture == architecture
    assert (imported.info.max_rate, imported.info.scale) == (3, 0.5)
    for name, tensor in bank.tensors.items():
        assert imported.tensors[name].equal(tensor)
