"""Banks that models change while serving: what stays whole, and that nobody gets a mixture."""

import gc
import itertools
import math
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from adapters import Bank, Store, compose
from server.banks import catalogue
from server.banks.catalogue import Banks
from server.engine.engine import Engine
from server.errors import UnusableBankError
from server.models import weights as shared
from server.models.loading import load_model
from server.models.served import ServedModel
from server.models.weights import Backbones
from tests.server.banks.conftest import NARROW, attach, files, listed
from tests.server.conftest import MAX_RATE, problem
from tests.server.ladders import CLUSTERS, UNEVEN, on_ladders
from tests.server.works import submit_one
from tocom import FoldedWeights, StoreError, fold, forward


def test_a_bank_is_attached(admin, registry, served, make_bank, swaps):
    bank = make_bank()
    admin.post("/v1/banks", files=files(bank))
    answer = attach(admin, "tiny", bank.info.digest[:8])
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "tiny",
        "old_digest": served.bank.info.digest,
        "new_digest": bank.info.digest,
        "max_rate": MAX_RATE,
        "warning": None,
    }
    assert registry.get("tiny").bank.info == bank.info
    assert registry.get("tiny").backbone is served.backbone
    assert registry.get("bare").bank is None
    assert listed(admin)["new"]["models"] == ["tiny"]
    assert swaps == ["ok"]


def test_a_bank_goes_to_the_ladder_that_it_is_for(
    admin, registry, store, make_bank, tiny, tmp_path, swaps
):
    registry.replace(load_model(on_ladders(tiny, tmp_path, "rings", "tome", "uneven")))
    assert [listed(admin)["tiny"][key] for key in ("ladder", "models")] == ["tome", ["tiny"]]
    bank = make_bank(ladder=UNEVEN, max_rate=3)
    store.publish(bank)
    answer = attach(admin, "tiny", "new").json()
    assert (answer["old_digest"], answer["new_digest"]) == (
        Bank.load(tiny.bank).info.digest,
        bank.info.digest,
    )
    model = registry.get("tiny")
    assert [each.bank_digest for each in model.ladders] == [None, None, bank.info.digest]
    assert [listed(admin)["new"][key] for key in ("ladder", "models")] == ["uneven", ["tiny"]]
    store.publish(make_bank(ladder=CLUSTERS, max_rate=2, name="other"))
    refused = attach(admin, "tiny", "other")
    assert refused.status_code == 422
    assert "is for the ladder 'clusters', on which the model 'tiny' is not served" in problem(
        refused
    )
    admin.delete("/v1/models/tiny/bank")
    assert [each.bank for each in registry.get("tiny").ladders] == [None] * 3
    assert swaps == ["ok", "failed", "ok"]


def test_a_swap_returns_the_memory_that_earlier_banks_left(admin, store, make_bank, monkeypatch):
    returned = []
    monkeypatch.setattr(catalogue, "return_freed_memory", lambda: returned.append(True))
    store.publish(make_bank())
    attach(admin, "tiny", "new")
    admin.delete("/v1/models/tiny/bank")
    assert len(returned) == 2


def test_its_weights_are_folded_before_it_is_seen(admin, registry, store, make_bank, monkeypatch):
    store.publish(make_bank())
    attach(admin, "bare", "new")  # bare was tuned at rate 2
    monkeypatch.setattr(shared, "fold", None)
    for rate in range(MAX_RATE + 1):
        assert registry.get("bare").at(rate, True)(torch.rand(1, 3, 64, 64))


def test_attaching_what_is_attached_changes_nothing(admin, registry, served, swaps):
    answer = attach(admin, "tiny", "tiny").json()
    assert answer["old_digest"] == answer["new_digest"] == served.bank.info.digest
    assert registry.get("tiny") is served
    assert swaps == []


def test_a_model_goes_without_a_bank_and_back_to_its_own(admin, registry, served):
    digest = served.bank.info.digest
    gone = admin.delete("/v1/models/tiny/bank").json()
    assert (gone["old_digest"], gone["new_digest"]) == (digest, None)
    assert registry.get("tiny").bank is None
    assert admin.delete("/v1/models/tiny/bank").json()["old_digest"] is None
    back = attach(admin, "tiny", digest).json()
    assert (back["old_digest"], back["new_digest"]) == (None, digest)
    assert registry.get("tiny").bank.info == served.bank.info


def test_a_bank_of_other_weights_is_attached_with_a_warning(admin, store, make_bank):
    store.publish(make_bank(digest="0" * 64))
    assert "was distilled on other weights" in attach(admin, "tiny", "new").json()["warning"]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("tiny", {"geometry": NARROW}, "does not fit .*: width 384 (model: 192)"),
        ("bare", {"max_rate": 1}, "source rate must be in 0..1, got 2"),
    ],
)
def test_a_bank_that_does_not_fit(
    admin, registry, store, make_bank, swaps, model, changes, message
):
    store.publish(make_bank(**changes))
    before = registry.all()
    answer = attach(admin, model, "new")
    assert answer.status_code == 422
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), problem(answer))
    assert registry.all() == before
    assert swaps == ["failed"]


def test_a_bank_that_was_damaged_in_the_store(admin, registry, store, served, make_bank):
    store.publish(make_bank())
    (store.find("new").folder / "plugins.safetensors").write_bytes(b"")
    answer = attach(admin, "tiny", "new")
    assert answer.status_code == 422
    assert "truncated or corrupted" in problem(answer)
    assert registry.get("tiny") is served


def test_a_failure_in_the_middle_keeps_the_old_bank(
    admin, registry, store, served, make_bank, swaps, monkeypatch
):
    store.publish(make_bank())
    gc.collect()  # weights that an earlier handle folded would be taken from it
    calls = []

    def full(model, delta):
        calls.append(delta)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return fold(model, delta)

    monkeypatch.setattr(shared, "fold", full)
    assert attach(admin, "tiny", "new").status_code == 500
    assert registry.get("tiny") is served
    assert attach(admin, "tiny", "new").status_code == 200
    assert swaps == ["failed", "ok"]


@pytest.mark.parametrize("method", ["put", "delete"])
def test_no_such_model(admin, method):
    body = {"json": {"bank": "tiny"}} if method == "put" else {}
    answer = admin.request(method, "/v1/models/nix/bank", **body)
    assert answer.status_code == 404
    assert "there are: tiny, bare" in problem(answer)


@pytest.mark.parametrize("choice", [{}, {"bank": 3}, {"bank": "tiny", "rate": 3}, []])
def test_a_choice_that_is_none(admin, choice):
    answer = admin.put("/v1/models/tiny/bank", json=choice)
    assert answer.status_code == 422
    problem(answer)


@pytest.mark.parametrize(("depth", "status"), [(100, 422), (400, 400), (100_000, 413)])
def test_a_choice_that_is_nested_deeply(admin, depth, status):
    body = b'{"bank":' + b"[" * depth + b"]" * depth + b"}"
    headers = {"Content-Type": "application/json"}
    answer = admin.put("/v1/models/tiny/bank", content=body, headers=headers)
    assert answer.status_code == status
    problem(answer)


@pytest.mark.parametrize("body", [b"", b"bank=tiny", b'{"bank": "tiny"', b'{"bank": "\xff"}'])
def test_a_choice_that_is_no_json(admin, body):
    answer = admin.put("/v1/models/tiny/bank", content=body)
    assert answer.status_code == 400
    assert problem(answer).startswith("the body is not JSON: Invalid JSON")


# What is deleted


def test_a_bank_is_deleted_once_nobody_uses_it(admin, store, make_bank):
    store.publish(make_bank())
    attach(admin, "tiny", "new")
    attach(admin, "bare", "new")
    answer = admin.delete("/v1/banks/new")
    assert answer.status_code == 409
    assert "is in use by tiny, bare" in problem(answer)
    for model in ("tiny", "bare"):
        admin.delete(f"/v1/models/{model}/bank")
    assert admin.delete("/v1/banks/new").status_code == 204
    assert store.versions() == []
    assert admin.delete("/v1/banks/new").status_code == 404


@pytest.mark.parametrize(
    ("bank", "origin"), [("deit_tiny-half", "bundled"), ("tiny", "configuration")]
)
def test_what_is_not_the_stores_stays(admin, bank, origin):
    admin.delete("/v1/models/tiny/bank")
    answer = admin.delete(f"/v1/banks/{bank}")
    assert answer.status_code == 409
    assert f"({origin}): it stays" in problem(answer)
    assert bank in listed(admin)


def test_a_version_that_its_name_stands_for_outlasts_the_others(admin, store, make_bank):
    for seed in (1, 2):
        store.publish(make_bank(seed))
    answer = admin.delete("/v1/banks/new")
    assert answer.status_code == 409
    assert "publish another version first" in problem(answer)
    assert admin.delete(f"/v1/banks/{make_bank(1).info.digest}").status_code == 204
    assert admin.delete("/v1/banks/new").status_code == 204


def test_a_bank_that_another_process_reads_stays(admin, store, make_bank):
    with store.use(store.publish(make_bank())):
        answer = admin.delete("/v1/banks/new")
    assert answer.status_code == 409
    assert "is in use and stays" in problem(answer)


def test_what_a_model_is_served_with_stays_for_other_processes_too(
    registry, store, served, make_bank
):
    configured = store.publish(served.bank)
    banks, other = Banks(registry, store), Store(store.root)
    with pytest.raises(StoreError, match="is in use"):
        other.delete(configured)
    reference = store.publish(make_bank())
    banks.attach("tiny", "new")
    with pytest.raises(StoreError, match="is in use"):
        other.delete(reference)
    other.delete(configured)
    banks.detach("tiny")
    other.delete(reference)


def test_a_failed_change_keeps_the_hold_on_the_old_bank_alone(registry, store, make_bank):
    banks, other = Banks(registry, store), Store(store.root)
    reference = store.publish(make_bank())
    misfit = store.publish(make_bank(name="misfit", geometry=NARROW))
    banks.attach("tiny", "new")
    with pytest.raises(UnusableBankError):
        banks.attach("tiny", "misfit")
    other.delete(misfit)
    with pytest.raises(StoreError, match="is in use"):
        other.delete(reference)


# While serving


def test_a_hundred_changes_leave_no_handles_behind(registry, store, make_bank, monkeypatch):
    banks = Banks(registry, store)
    for seed in (1, 2):
        store.publish(make_bank(seed, name=f"bank{seed}"))
    store.publish(make_bank(name="misfit", geometry=NARROW))
    handles = []
    with_bank, folds = ServedModel.with_bank, itertools.count(1)

    def watched(self, bank):
        handle = with_bank(self, bank)
        handles.append(weakref.ref(handle))
        return handle

    def failing(model, delta):
        if next(folds) % 17 == 0:
            raise RuntimeError("out of memory")
        return fold(model, delta)

    monkeypatch.setattr(ServedModel, "with_bank", watched)
    monkeypatch.setattr(shared, "fold", failing)
    failed = 0
    gc.collect()
    gc.disable()  # nothing may be left that only the collector would find
    try:
        for i in range(100):
            name = "misfit" if i % 5 == 4 else f"bank{1 + i % 2}"
            try:
                banks.attach("tiny", name)
            except (UnusableBankError, RuntimeError):
                failed += 1
        assert 20 < failed < 60
        assert [handle() for handle in handles if handle()] == [registry.get("tiny")]
    finally:
        gc.enable()


def test_changes_come_one_after_the_other(registry, store, served, make_bank):
    banks = Banks(registry, store)
    for seed in range(3):
        store.publish(make_bank(seed, name=f"bank{seed}"))
    with ThreadPoolExecutor(4) as pool:
        changes = list(pool.map(lambda i: banks.attach("tiny", f"bank{i % 3}"), range(24)))
    # Each began where another ended: together they are one path.
    begun = [change.old for change in changes] + [registry.get("tiny").bank.info.digest]
    ended = [served.bank.info.digest] + [change.model.bank.info.digest for change in changes]
    assert sorted(begun) == sorted(ended)


def test_no_answer_is_a_mixture(admin, registry, served, make_bank):
    """Images at mixed rates while banks change: each answer is that of the bank it names."""
    known = {bank.info.digest: bank for bank in (served.bank, make_bank(1), make_bank(2, "other"))}
    for bank in known.values():
        admin.post("/v1/banks", files=files(bank))
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    engine = Engine(max_batch=4, max_queue=1000)
    engine.start()

    def ask(i: int):
        work = registry.get("tiny").at(i % (MAX_RATE + 1), compensate=True)
        return submit_one(engine, work, partial(images.__getitem__, i % 8), deadline=math.inf)

    futures = []
    for i in range(24):
        futures += [ask(8 * i + j) for j in range(8)]
        assert attach(admin, "tiny", list(known)[i % 3]).status_code == 200
    answers = [future.result() for future in futures]
    engine.stop()

    model, seen = served.backbone.model, set()
    for i, answer in enumerate(answers):
        digest, rate = answer.work.model.bank.info.digest, i % (MAX_RATE + 1)
        seen.add(digest)
        assert answer.work.rate == rate
        delta = compose(known[digest], 0, rate)
        expected = forward(model, images[i % 8][None], rate, delta)[0]
        torch.testing.assert_close(answer.output.logits, expected, atol=1e-3, rtol=1e-3)
    assert seen == known.keys()


def test_a_bank_that_replaces_another_finds_room(tiny, make_bank):
    one = load_model(tiny).delta(5).nbytes
    model = load_model(tiny, Backbones(max_folded_bytes=one))
    assert isinstance(model.delta(5), FoldedWeights)
    assert isinstance(model.with_bank(make_bank(2)).delta(5), FoldedWeights)
