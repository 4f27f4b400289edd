"""Banks out of the reference implementation's checkpoints."""

import pytest
import torch
from safetensors.torch import save_file

from adapters import BackboneInfo, Bank, import_reference
from tests.adapters.banks import GEOMETRY, random_bank, same
from tocom import BankError

NOBODY = BackboneInfo(architecture="none", geometry=GEOMETRY, digest="0" * 64)


def reference_checkpoint(bank: Bank, prefix: str = "") -> dict[str, torch.Tensor]:
    """Lay a bank out as the reference does: the last step in the first components."""
    checkpoint = {}
    for name, tensor in bank.tensors.items():
        layer, _, factor = name.rpartition(".")
        steps = [*reversed(list(tensor))]
        if factor == "A":
            checkpoint[f"{prefix}{layer}_tocom.adapter_down.weight"] = torch.cat(steps, 0)
        else:
            checkpoint[f"{prefix}{layer}_tocom.adapter_up.weight"] = torch.cat(steps, 1)
    return checkpoint


@pytest.mark.parametrize("form", ["safetensors", "pth", "flat.pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "plugin.", "module.model."])
def test_a_checkpoint_of_the_reference_is_imported(tmp_path, form, prefix):
    bank = random_bank()
    content = reference_checkpoint(bank, prefix) | {"head.weight": torch.zeros(2, 2)}
    path = tmp_path / f"checkpoint.{form}"
    match form:
        case "safetensors":
            save_file(content, path)
        case "pth":  # as the reference saves: parameters under "model"
            parameters = {name: torch.nn.Parameter(value) for name, value in content.items()}
            torch.save({"model": parameters}, path)
        case "flat.pt":
            torch.save(content, path)
    assert same(import_reference(path, "tiny", NOBODY, rank=2, scale=0.5), bank)
    imported = import_reference(path, "tiny", NOBODY, max_rate=3, scale=0.5)
    assert same(imported, bank)
    assert imported.info.training == {"imported_from": path.name}


@pytest.fixture
def checkpoint():
    return reference_checkpoint(random_bank())


DOWN, UP = (f"blocks.1.attn.v_tocom.adapter_{leaf}.weight" for leaf in ("down", "up"))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {}, "6 components, which is not 16 steps of rank 0"),
        ({}, {"rank": 4}, "6 components, which is not 1 steps of rank 4"),
        ({}, {"rank": 0}, "which is not 6 steps of rank 0"),
        ({}, {"max_rate": 0}, "which is not 0 steps of rank 6"),
        ({}, {"max_rate": 3, "rank": 3}, "which is not 3 steps of rank 3"),
        ({}, {"rank": 2, "name": "No Name"}, "the bank's name: .*pattern"),
        ({}, {"rank": 2, "scale": -1.0}, "the bank's scale: .*greater than 0"),
        ({DOWN: None}, {"rank": 2}, f"lacks {DOWN}, which none needs"),
        ({DOWN: torch.zeros(6, 5)}, {"rank": 2}, "must have 6 components of 4 channels, got 6 x 5"),
        ({UP: torch.zeros(4, 4)}, {"rank": 2}, "must have 6 components of 4 channels, got 4 x 4"),
        ({UP: torch.zeros(24)}, {"rank": 2}, r"must be a matrix, got \[24\]"),
        ({UP: torch.full((4, 6), torch.nan)}, {"rank": 2}, "holds NaN or infinity"),
        ({f"module.{UP}": torch.zeros(4, 6)}, {"rank": 2}, f"{UP} twice, under two prefixes"),
        ({UP.replace("1", "2"): torch.zeros(4, 6)}, {"rank": 2}, "more than the 2 blocks"),
    ],
)
def test_a_faulty_checkpoint_is_refused(tmp_path, checkpoint, changes, arguments, message):
    path = tmp_path / "checkpoint.pth"
    content = checkpoint | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    with pytest.raises(BankError, match=message):
        import_reference(path, **({"name": "tiny", "backbone": NOBODY} | arguments))


class Forbidden:
    """What weights_only does not build."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"head.weight": torch.zeros(1)}}, "holds no plug-ins: nothing in it is called"),
        ({"model": {"epoch": 3}}, "holds no tensors by name"),
        ({3: torch.zeros(1)}, "holds no tensors by name"),
        ([torch.zeros(1)], "holds no tensors by name"),
        ({"model": Forbidden()}, r"tensors only \(UnpicklingError\).*you trust it, convert it"),
    ],
)
def test_a_file_without_plugins_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(BankError, match=message):
        import_reference(tmp_path / "checkpoint.pth", "tiny", NOBODY)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_an_unreadable_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"checkpoint.{suffix}"
    with pytest.raises(BankError, match=f"there is no checkpoint .*{suffix}"):
        import_reference(path, "tiny", NOBODY)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BankError, match="cannot be read as tensors only|truncated or corrupted"):
        import_reference(path, "tiny", NOBODY)
