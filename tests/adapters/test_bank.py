"""The bank format: round trips, and every fault refused by name."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters import BackboneInfo, Bank, BankInfo, Geometry
from adapters.bank import FILES, read_info, target_names, tensor_shapes
from tests.adapters.banks import ALL_TARGETS, GEOMETRY, backbone_of, random_bank, same
from tests.tocom_models import small_model
from tocom import BankError


@pytest.fixture
def folder(tmp_path):
    return random_bank().save(tmp_path / "bank")


def edit_info(folder: Path, **changes: object) -> None:
    info = json.loads((folder / "bank.json").read_text())
    (folder / "bank.json").write_text(json.dumps(info | changes))


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "plugins.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "plugins.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("targets", [("q", "v"), ALL_TARGETS, ("fc2",)])
def test_a_saved_bank_loads_as_it_was(tmp_path, dtype, targets):
    bank = random_bank(targets=targets, dtype=dtype)
    loaded = Bank.load(bank.save(tmp_path / "a" / "bank"))
    assert same(bank, loaded)
    assert loaded.info == bank.info
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {dtype}
    assert sorted(path.name for path in (tmp_path / "a" / "bank").iterdir()) == [
        "bank.json",
        "plugins.safetensors",
    ]


def test_names_and_shapes_are_those_of_the_format():
    info = random_bank(targets=("v", "fc1", "fc2")).info
    assert target_names(info)[:3] == ["blocks.0.attn.v", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    shapes = tensor_shapes(info)
    assert len(shapes) == 12
    assert shapes["blocks.1.mlp.fc1.A"] == (3, 2, 4)
    assert shapes["blocks.1.mlp.fc1.B"] == (3, 6, 2)
    assert shapes["blocks.1.mlp.fc2.A"] == (3, 2, 6)
    assert random_bank(targets=("v",)).parameters == 2 * 2 * 3 * 2 * 4


def test_the_digest_is_of_what_decides_an_answer():
    bank = random_bank()
    notes = bank.info.model_copy(update={"evaluation": {"top1": 0.8}})
    assert Bank(notes, bank.tensors).info.digest == bank.info.digest
    scaled = bank.info.model_copy(update={"scale": 0.4, "digest": ""})
    assert Bank(scaled, bank.tensors).info.digest != bank.info.digest
    half = {name: tensor.half() for name, tensor in bank.tensors.items()}
    assert Bank(bank.info.model_copy(update={"digest": ""}), half).info.digest != bank.info.digest


def test_a_bank_keeps_its_own_tensors():
    tensors = {name: tensor.requires_grad_() for name, tensor in random_bank().tensors.items()}
    bank = Bank(random_bank().info, tensors)
    with torch.no_grad():
        tensors["blocks.0.attn.q.A"].zero_()
    assert bank.tensors["blocks.0.attn.q.A"].any()
    assert not bank.tensors["blocks.0.attn.q.A"].requires_grad


def test_nothing_is_overwritten(folder):
    with pytest.raises(BankError, match="exists already"):
        random_bank(seed=1).save(folder)
    assert same(Bank.load(folder), random_bank())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        random_bank().save(tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(folder, part):
    path = folder / "plugins.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(BankError, match=r"plugins\.safetensors is truncated or corrupted"):
        Bank.load(folder)


def test_a_flipped_bit_is_refused(folder):
    path = folder / "plugins.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the least of a mantissa's bits: still a fine number
    path.write_bytes(content)
    with pytest.raises(BankError, match="does not match its digest .* changed or corrupted"):
        Bank.load(folder)


def test_a_tensor_of_a_type_unknown_to_torch_is_refused(folder):
    header = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "plugins.safetensors").write_bytes(content)
    with pytest.raises(BankError, match="unknown type 'F4'"):
        Bank.load(folder)


Q = "blocks.0.attn.q.A"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q: torch.full((3, 2, 4), torch.nan)}, rf"{Q} holds NaN or infinity"),
        ({Q: torch.full((3, 2, 4), -torch.inf)}, rf"{Q} holds NaN or infinity"),
        ({Q: None}, rf"lacks tensor {Q}"),
        ({"blocks.2.attn.q.A": torch.zeros(1)}, r"unknown tensor blocks\.2\.attn\.q\.A"),
        ({Q: torch.zeros(3, 2, 5)}, rf"{Q} must be \[3, 2, 4\], got \[3, 2, 5\]"),
        ({Q: torch.zeros(24)}, rf"{Q} must be \[3, 2, 4\], got \[24\]"),
        ({Q: torch.zeros(3, 2, 4).half()}, r"all fp32 or all fp16, got .*float16.*float32"),
        ({Q: torch.zeros(3, 2, 4, dtype=torch.int32)}, r"all fp32 or all fp16, got .*int32"),
        ({Q: torch.zeros(3, 2, 4)}, "does not match its digest"),
    ],
)
def test_faulty_tensors_are_refused(folder, changes, message):
    edit_tensors(folder, changes)
    with pytest.raises(BankError, match=message):
        Bank.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "bank format 3; this version reads format 1 and 2"),
        ({"format_version": 2}, "a bank of format 2 must say its ladder"),
        ({"method": "magic"}, "the method of the ladder 'tome' is 'tome', not 'magic'"),
        ({"format_version": None}, "bank format None"),
        ({"digest": ""}, "has no digest"),
        ({"digest": "f" * 64}, "says ffffffffffff, is "),
        ({"scale": 0.25}, "does not match its digest"),
        ({"scale": 0}, "scale: .*greater than 0"),
        ({"rank": 4}, rf"{Q} must be \[3, 4, 4\], got \[3, 2, 4\]"),
        ({"rank": 10**12}, "rank: .*less than"),
        ({"max_rate": 0}, "max_rate: .*greater than 0"),
        ({"max_rate": 9999}, "max_rate must be at most 4, the patches of a picture, got 9999"),
        ({"targets": ["q"]}, "unknown tensor blocks.0.attn.v.A"),
        ({"targets": ["q", "q"]}, "each target may stand once"),
        ({"targets": ["w"]}, r"targets\.0: .*'fc2'"),
        ({"name": "../up"}, "name: .*pattern"),
        ({"nonsense": 1}, "nonsense: Extra inputs"),
        ({"backbone": {}}, r"backbone\.architecture: Field required"),
    ],
)
def test_a_faulty_description_is_refused(folder, changes, message):
    edit_info(folder, **changes)
    with pytest.raises(BankError, match=message):
        Bank.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"scale": NaN}',
        b'{"rank": %b}' % (b"9" * 9999),
    ],
    ids=["empty", "cut", "no text", "deep", "NaN", "huge"],
)
def test_what_is_no_json_is_refused(folder, content):
    (folder / "bank.json").write_bytes(content)
    with pytest.raises(BankError, match=r"bank\.json cannot be read"):
        Bank.load(folder)


@pytest.mark.parametrize("content", [b"null", b"[1]", b'"bank"', b"{}"])
def test_json_that_is_no_bank_is_refused(folder, content):
    (folder / "bank.json").write_bytes(content)
    with pytest.raises(BankError, match="has bank format None"):
        Bank.load(folder)


def test_a_bank_is_read_from_the_contents_of_its_files(folder):
    info, plugins = ((folder / name).read_bytes() for name in FILES)
    assert same(Bank.from_bytes(info, plugins), random_bank())
    with pytest.raises(BankError, match=r"^bank\.json cannot be read"):
        Bank.from_bytes(b"{", plugins)
    with pytest.raises(BankError, match=r"^plugins\.safetensors is truncated"):
        Bank.from_bytes(info, plugins[:-1])


def test_a_description_is_read_without_its_tensors(folder):
    (folder / "plugins.safetensors").unlink()
    assert read_info(folder) == random_bank().info
    edit_info(folder, digest="")
    with pytest.raises(BankError, match=r"bank\.json has no digest"):
        read_info(folder)
    (folder / "bank.json").unlink()
    with pytest.raises(BankError, match=r"is no bank: it has no bank\.json"):
        read_info(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(BankError, match=r"is no bank: it has no bank\.json"):
        Bank.load(tmp_path)
    with pytest.raises(BankError, match=r"is no bank: it has no bank\.json"):
        Bank.load(folder / "bank.json")
    (folder / "plugins.safetensors").unlink()
    with pytest.raises(BankError, match=r"has no plugins\.safetensors"):
        Bank.load(folder)
    (folder / "bank.json").unlink()
    (folder / "bank.json").mkdir()
    with pytest.raises(BankError, match="cannot be read"):
        Bank.load(folder)


def test_notes_must_be_storable():
    bank = random_bank()
    notes = bank.info.model_copy(update={"training": {"loss": float("nan")}})
    with pytest.raises(BankError, match="bank 'tiny': training.loss.*finite"):
        Bank(notes, bank.tensors)


def test_a_bank_fits_models_of_its_geometry_only(recwarn):
    backbone = backbone_of(small_model())
    bank = random_bank(BackboneInfo.of(backbone))
    bank.check_fits(backbone)
    assert not recwarn
    with pytest.warns(UserWarning, match="distilled on other weights than tuned has"):
        bank.check_fits(backbone_of(small_model(seed=1), "tuned"))
    with pytest.raises(BankError, match=r"does not fit other: width 192 \(model: 384\), heads 3"):
        bank.check_fits(backbone_of(small_model("vit_small"), "other"))


def test_a_model_that_says_what_it_was_tuned_from_needs_no_warning(recwarn):
    bank = random_bank(BackboneInfo.of(backbone_of(small_model())))
    tuned = backbone_of(small_model(seed=1))
    bank.check_fits(replace(tuned, tuned_from=bank.info.backbone.digest))
    assert not recwarn
    with pytest.warns(UserWarning, match="distilled on other weights"):
        bank.check_fits(replace(tuned, tuned_from=tuned.digest))


def test_geometry_is_read_off_a_model():
    assert Geometry.of(small_model("dinov2_registers")) == Geometry(
        depth=3, width=384, heads=6, hidden=1536, input=(56, 56), patch=(14, 14)
    )


# Fuzzing. Whatever is in the files, loading gives the bank that was saved, or a BankError.

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "truncate"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=4,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def edited(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, value in changes:
        at = int(where * len(content))
        match kind:
            case "flip":
                content = content[:at] + value + content[at + len(value) :]
            case "insert":
                content = content[:at] + value + content[at:]
            case "delete":
                content = content[:at] + content[at + len(value) :]
            case "truncate":
                content = content[:at]
    return content


def load_or_refuse(folder: Path, original: Bank) -> None:
    try:
        loaded = Bank.load(folder)
    except BankError:
        return
    assert same(loaded, original)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    bank = random_bank()
    folder = bank.save(tmp_path_factory.mktemp("fuzz") / "bank")
    return folder, bank, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["bank.json", "plugins.safetensors"])
@settings(max_examples=300, deadline=None)
@given(changes=edits, head=st.booleans())
def test_fuzzed_bytes_never_surprise(fuzzed, name, changes, head):
    folder, bank, files = fuzzed
    # The header decides how the rest is read, so half of the edits go there.
    split = 1200 if head else len(files[name])
    content = edited(files[name][:split], changes) + files[name][split:]
    (folder / name).write_bytes(content)
    try:
        load_or_refuse(folder, bank)
    finally:
        (folder / name).write_bytes(files[name])


@settings(max_examples=300, deadline=None)
@given(entry=st.sampled_from(sorted(BankInfo.model_fields)), value=json_values)
def test_fuzzed_entries_never_surprise(fuzzed, entry, value):
    folder, bank, files = fuzzed
    try:
        edit_info(folder, **{entry: value})
        load_or_refuse(folder, bank)
    finally:
        (folder / "bank.json").write_bytes(files["bank.json"])


@settings(max_examples=200, deadline=None)
@given(entry=st.sampled_from(sorted(Geometry.model_fields)), value=json_values)
def test_fuzzed_geometry_never_surprises(fuzzed, entry, value):
    folder, bank, files = fuzzed
    geometry = GEOMETRY.model_dump(mode="json") | {entry: value}
    try:
        edit_info(
            folder, backbone=bank.info.backbone.model_dump(mode="json") | {"geometry": geometry}
        )
        load_or_refuse(folder, bank)
    finally:
        (folder / "bank.json").write_bytes(files["bank.json"])
