"""Banks on the Hugging Face Hub: its own client, against a hub of ours or none at all."""

import json
import re
from unittest.mock import Mock

import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard, close_session, constants
from safetensors.torch import save_file

from adapters import BackboneInfo, Bank, Geometry, model_card, open_bank, pull_bank, push_bank
from adapters.cli import main
from tests.adapters import fake_hub
from tests.adapters.banks import random_bank, same
from tests.adapters.test_cli import refused
from tocom import BankError

BANK, NEWER = random_bank(), random_bank(seed=1)
COMMIT = "c0ffee" + "0" * 34
BANK_FILES = {"bank.json", "plugins.safetensors"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's, and nobody signed in."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """A hub that the client takes for the real one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_hub.running() as server:
        point_at(server.address, monkeypatch)
        yield server
    close_session()


@pytest.fixture
def folder(tmp_path):
    return BANK.save(tmp_path / "bank")


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    close_session()  # a client made before knows another proxy and another address


def put_in_cache(cache, bank, revision="main", commit=COMMIT):
    """Lay a bank out as the hub's client does."""
    repository = cache / "models--org--bank"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    bank.save(repository / "snapshots" / commit)


# From the cache.


def test_the_cache_serves_without_a_network(cache, tmp_path, monkeypatch):
    put_in_cache(cache, BANK)
    put_in_cache(cache, NEWER, revision="v2", commit="d" * 40)
    assert same(pull_bank("org/bank"), BANK)
    assert same(pull_bank("org/bank", revision="v2"), NEWER)
    assert same(pull_bank("org/bank", revision=COMMIT), BANK)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert same(pull_bank("org/bank", local_files_only=True), BANK)
    cache.rename(tmp_path / "elsewhere")
    elsewhere = {"cache_dir": tmp_path / "elsewhere", "local_files_only": True}
    assert same(pull_bank("org/bank", **elsewhere), BANK)
    with pytest.raises(BankError, match=r"org/bank is not in the hub's cache.*local_files_only"):
        pull_bank("org/bank", local_files_only=True)


def test_every_door_takes_a_reference(cache, capsys):
    put_in_cache(cache, BANK)
    put_in_cache(cache, NEWER, revision="v2", commit="d" * 40)
    assert same(open_bank("hf://org/bank"), BANK)
    assert same(open_bank("hf://org/bank@v2"), NEWER)
    assert same(open_bank(f"hf://org/bank@{'d' * 40}"), NEWER)
    assert main(["verify", "hf://org/bank@v2"]) == 0
    assert capsys.readouterr().out == f"tiny@{NEWER.info.digest[:12]} is whole\n"


@pytest.mark.parametrize(
    "reference", ["hf://bank", "hf://org/bank/file", "hf://org/bank@", "hf://"]
)
def test_a_reference_of_another_form_is_refused(reference):
    with pytest.raises(BankError, match=r"is hf://ORG/NAME\[@REVISION\], got '" + reference):
        open_bank(reference)


@pytest.mark.parametrize("malformed", ["nowhere", "a/b/c", "org/ba nk", "", "hf://org/bank"])
def test_what_is_no_id_is_refused(malformed):
    with pytest.raises(BankError, match="a hub id is ORG/NAME, got "):
        pull_bank(malformed)


def test_an_id_that_the_hub_forbids_is_refused():
    with pytest.raises(BankError, match=r"'org/a--b' is no hub id: Cannot have -- or \.\. in"):
        pull_bank("org/a--b")


def test_without_network_and_cache_is_said():
    message = r"org/bank@v2 is not in the hub's cache.*OfflineModeIsEnabled.*HF_HUB_OFFLINE"
    with pytest.raises(BankError, match=message):
        pull_bank("org/bank", revision="v2")


def test_a_hub_out_of_reach_is_said(monkeypatch, cache):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    point_at("http://127.0.0.1:9", monkeypatch)  # the port where everything is discarded
    with pytest.raises(BankError, match=r"org/bank is not in the hub's cache.*Connect"):
        pull_bank("org/bank")
    with pytest.raises(BankError, match=r"org/bank: the hub's client failed \(Connect"):
        push_bank(BANK, "org/bank")
    put_in_cache(cache, BANK)
    assert same(pull_bank("org/bank"), BANK)
    close_session()


@pytest.mark.parametrize("missing", sorted(BANK_FILES))
def test_a_cached_repository_that_is_no_bank_is_named(cache, missing):
    put_in_cache(cache, BANK)
    (cache / "models--org--bank" / "snapshots" / COMMIT / missing).unlink()
    with pytest.raises(
        BankError, match=f"org/bank@main on the hub is no bank: it has no {missing}"
    ):
        pull_bank("org/bank", revision="main")


def test_a_bank_of_the_hub_is_checked_as_strictly(cache):
    put_in_cache(cache, BANK)
    file = cache / "models--org--bank" / "snapshots" / COMMIT / "bank.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale": 2.0}))
    with pytest.raises(BankError, match="does not match its digest"):
        pull_bank("org/bank")


# From the hub.


def test_a_bank_is_downloaded_once_and_alone(hub, folder, monkeypatch):
    hub.add("org/bank", folder, **{"README.md": b"# Page", "code.py": b"raise SystemExit"})
    assert same(pull_bank("org/bank"), BANK)
    assert hub.downloaded() == sorted(BANK_FILES)
    hub.asked.clear()
    assert same(open_bank("hf://org/bank"), BANK)
    assert hub.downloaded() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(pull_bank("org/bank"), BANK)


def test_what_the_hub_refuses_is_explained(hub, folder, capsys):
    with pytest.raises(BankError, match=r"no repository org/bank, or a private one: .*sign in"):
        pull_bank("org/bank")
    hub.add("org/bank", folder)
    with pytest.raises(BankError, match=r"org/bank has no revision 'v9': name a branch, a tag"):
        pull_bank("org/bank", revision="v9")
    hub.gated.add("org/bank")
    with pytest.raises(BankError, match=r"org/bank is gated: ask for access .*sign in"):
        pull_bank("org/bank")
    assert "org/bank is gated" in refused(capsys, "inspect", "hf://org/bank")
    hub.branches["org/other"] = {"main": {"README.md": b"# Page"}}
    with pytest.raises(BankError, match=r"org/other on the hub is no bank: it has no bank\.json"):
        pull_bank("org/other")
    with pytest.raises(BankError, match=r"org/bank: the hub's client failed \(LocalTokenNotFound"):
        pull_bank("org/bank", token=True)


# To the hub.


def test_what_is_pushed_loads_again(hub, tmp_path):
    plot = tmp_path / "evaluation.png"
    plot.write_bytes(b"a picture")
    url = push_bank(BANK, "org/bank", plots=[plot], license="apache-2.0")
    files = hub.branches["org/bank"]["main"]
    assert set(files) == BANK_FILES | {"README.md", "evaluation.png"}
    assert files["evaluation.png"] == b"a picture"
    card = model_card(BANK, "org/bank", plots=[plot], license="apache-2.0")
    assert files["README.md"].decode() == str(card)
    assert url == f"{hub.address}/org/bank/commit/{fake_hub.commit_of(files)}"
    assert hub.commits == [("org/bank", "main", f"Bank tiny@{BANK.info.digest[:12]}")]
    assert "org/bank" not in hub.private
    assert same(pull_bank("org/bank"), BANK)


def test_a_push_can_be_private_and_on_a_branch(hub):
    push_bank(BANK, "org/bank", private=True)
    push_bank(NEWER, "org/bank", private=True, revision="v2", commit_message="Better")
    push_bank(NEWER, "org/bank", revision="v2", commit_message="Again")
    assert hub.private == {"org/bank"}
    assert [commit[1:] for commit in hub.commits[1:]] == [("v2", "Better"), ("v2", "Again")]
    assert same(pull_bank("org/bank"), BANK)
    assert same(pull_bank("org/bank", revision="v2"), NEWER)


def test_nothing_private_goes_to_a_public_repository(hub, folder):
    hub.add("org/bank", folder)
    with pytest.raises(BankError, match="org/bank is on the hub already and public: make it priv"):
        push_bank(NEWER, "org/bank", private=True)
    assert hub.commits == []


def test_a_push_can_be_a_pull_request(hub, folder, monkeypatch):
    hub.add("org/bank", folder)
    # The client has opened them in two ways so far; both begin here.
    upload = Mock(return_value=Mock(commit_url="the commit"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert push_bank(NEWER, "org/bank", create_pr=True) == "the commit"
    assert upload.call_args.kwargs["create_pr"] is True
    assert list(hub.branches["org/bank"]) == ["main"]


def test_a_push_that_cannot_be_is_explained(hub, tmp_path):
    with pytest.raises(BankError, match="a hub id is ORG/NAME, got 'bank'"):
        push_bank(BANK, "bank")
    with pytest.raises(BankError, match="there is no plot nowhere.png"):
        push_bank(BANK, "org/bank", plots=["nowhere.png"])
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(BankError, match=r"cannot be added: the bank has a file README\.md already"):
        push_bank(BANK, "org/bank", plots=[tmp_path / "README.md"])
    hub.read_only = True
    with pytest.raises(BankError, match=r"org/bank: .*403.* sign in .* with the right to do this"):
        push_bank(BANK, "org/bank")
    assert hub.branches == {}


def test_push_from_the_shell(hub, folder, tmp_path, capsys):
    plot = tmp_path / "evaluation.png"
    plot.write_bytes(b"a picture")
    asked = ["push", folder, "org/bank", "--private", "--revision", "v1", "--plot", plot]
    assert main([*map(str, asked)]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.address}/org/bank/commit/")
    assert set(hub.branches["org/bank"]["v1"]) == BANK_FILES | {"README.md", "evaluation.png"}
    assert hub.private == {"org/bank"}
    assert "a hub id is ORG/NAME, got 'bank'" in refused(capsys, "push", folder, "bank")


# The card.


def noted(bank: Bank, **notes: object) -> Bank:
    return Bank(bank.info.model_copy(update=notes), bank.tensors)


def result(*sources: int) -> dict[str, object]:
    plain = {"top1": 82.125, "agreement": 100.0, "kl": 0.0}
    bank = {"top1": 82.5, "agreement": 99.0, "kl": 0.01234}
    return {
        "model": "A|B",
        "pictures": {"name": "photos.tar", "count": 7},
        "rows": [
            {"source": s, "target": t, "gmacs": 1.25, "tokens": 9, "plain": plain}
            | ({"bank": bank} if s != t else {})
            for s in sources
            for t in (0, 2)
        ],
    }


def test_a_card_says_what_a_bank_is():
    card = model_card(BANK, "org/bank")
    assert card.data.to_dict() == {
        "library_name": "tocom-serve",
        "tags": [
            "tocom",
            "token-merging",
            "token-compensation",
            "vision-transformer",
            "low-rank",
        ],
    }
    for line in (
        "# tiny",
        f"| digest | {BANK.info.digest} |",
        "| rank | 2 a step |",
        "| targets | q, v |",
        "| scale | 0.5 |",
        "| parameters | 192 |",
        "| recipe.lr | 0.001 |",
        'bank = open_bank("hf://org/bank")',
        "tocom-serve --model my-model=none,bank=hf://org/bank",
    ):
        assert line in card.text.splitlines()
    assert "What was measured" not in card.text
    # The client reads its own form back.
    assert str(ModelCard(str(card))) == str(card)


def test_a_card_without_notes_has_no_empty_sections():
    text = model_card(noted(BANK, training={}), "org/bank").text
    headings = re.findall("^#+ .+", text, re.MULTILINE)
    assert headings == ["# tiny", "## How to use it", "## What it is"]
    assert text.endswith("|\n")


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("timm/vit_tiny.in1k", "timm/vit_tiny.in1k"),
        ("hf-hub:org/vit@v1", "org/vit"),
        ("hf-hub:vit", None),
        ("runs/model", None),
        ("vit_tiny.in1k", None),
    ],
)
def test_a_card_names_a_backbone_of_the_hub(named, base):
    card = model_card(noted(BANK, training={"backbone": named}), "org/bank", license="mit")
    assert card.data.license == "mit"
    assert card.data.base_model == base
    assert card.data.to_dict().get("base_model_relation") == (base and "adapter")
    assert f'load_backbone("{named if base else "none"}")' in card.text


def test_a_card_shows_what_was_measured():
    evaluated = noted(BANK, evaluation={"results": [result(0, 2), result(2)]})
    text = model_card(evaluated, "org/bank", plots=["runs/a b.svg"]).text
    assert "![a b](a%20b.svg)" in text
    assert r"A\|B, 7 pictures of photos.tar. Agreement" in text
    assert "photos.tar, a model tuned at rate 2. Agreement" in text
    assert re.findall(r"^\| \d.*", text, re.MULTILINE) == [
        "| 0 | 1.250 | 82.1 | - | 100.0 | - | 0.0000 | - |",
        "| 2 | 1.250 | 82.1 | 82.5 | 100.0 | 99.0 | 0.0000 | 0.0123 |",
        "| 0 | 1.250 | 82.1 | 82.5 | 100.0 | 99.0 | 0.0000 | 0.0123 |",
        "| 2 | 1.250 | 82.1 | - | 100.0 | - | 0.0000 | - |",
    ]


def test_a_card_shows_what_was_measured_without_labels():
    unlabelled = result(0)
    for row in unlabelled["rows"]:
        for figures in ("plain", "bank"):
            row[figures] = {k: v for k, v in row.get(figures, {}).items() if k != "top1"}
        if not row["bank"]:
            del row["bank"]
    text = model_card(noted(BANK, evaluation={"results": [unlabelled]}), "org/bank").text
    assert "| 2 | 1.250 | - | - | 100.0 | 99.0 | 0.0000 | 0.0123 |" in text


@pytest.mark.parametrize("notes", [{"top1": 81}, {"results": [{"rows": []}]}])
def test_a_card_shows_notes_of_another_form_as_they_are(notes):
    text = model_card(noted(BANK, evaluation=notes), "org/bank").text
    assert json.loads(re.search("```json\n(.*?)```", text, re.DOTALL)[1]) == notes


def test_the_program_of_a_card_runs(cache, tmp_path):
    architecture = "test_vit"  # timm's smallest
    model = timm.create_model(architecture)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    geometry = Geometry.of(model)
    bank = random_bank(BackboneInfo(architecture="backbone", geometry=geometry, digest="-"))
    put_in_cache(cache, bank)
    program = re.search("```python\n(.*?)```", model_card(bank, "org/bank").text, re.DOTALL)[1]
    mine = f'"{tmp_path / "model.safetensors"}", "{architecture}"'
    names: dict[str, torch.Tensor] = {}
    with pytest.warns(UserWarning, match="was distilled on other weights"):
        exec(program.replace('"backbone"', mine), names)
    assert names["logits"].shape == (1, 1000)


def test_card_from_the_shell(folder, capsys):
    assert main(["card", str(folder), "org/bank", "--license", "mit", "--plot", "a.png"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{model_card(BANK, 'org/bank', license='mit', plots=['a.png'])}\n"
    assert main(["card", str(folder)]) == 0
    assert 'open_bank("hf://ORG/tiny")' in capsys.readouterr().out
