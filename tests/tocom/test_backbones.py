"""Loading backbones: every scheme, its errors, class names, digests."""

import json
import shutil

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from tocom import (
    TOME,
    BackboneError,
    Ladder,
    UnsupportedModelError,
    bundled_folder,
    forward,
    load_backbone,
    trace,
)
from tocom.backbones import weights_digest
from tocom.reduction import ToMe

TINY = {"img_size": 32, "depth": 2, "num_classes": 7}
ARCHITECTURE = "vit_tiny_patch16_224"


def tiny_model(seed=0, **arguments):
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, **(TINY | arguments)).eval()


def save(folder, model, **config):
    arguments = {"img_size": 32, "depth": len(model.blocks), "num_classes": model.num_classes}
    save_for_hf(model, folder, model_config=config, model_args=arguments, safe_serialization=True)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", tiny_model())


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """As HF_HUB_OFFLINE=1, which is read when the hub's library is imported, and no cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# --- folders


def test_a_folder_of_timm(folder):
    images = torch.randn(2, 3, 32, 32)
    for name in (str(folder), f"local-dir:{folder}"):
        backbone = load_backbone(name)
        assert backbone.name == name
        assert backbone.architecture == ARCHITECTURE
        assert backbone.source == 0
        assert backbone.class_names == tuple(f"class {i}" for i in range(7))
        assert tuple(backbone.data_config["mean"]) == (0.5, 0.5, 0.5)
        assert not backbone.model.training
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
        assert torch.equal(forward(backbone.model, images), tiny_model()(images))


def test_device_and_dtype(folder):
    backbone = load_backbone(str(folder), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}


def test_config_json_names_classes_and_source(tmp_path):
    names = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
    path = save(tmp_path / "m", tiny_model(), label_names=names, source_rate=4)
    backbone = load_backbone(str(path))
    assert backbone.class_names == tuple(names)
    assert backbone.source == 4
    assert backbone.calibration is backbone.evaluation is None
    # These are for others to read.
    rewrite(path, calibration=0.1, evaluation={"rows": []})
    backbone = load_backbone(str(path))
    assert (backbone.calibration, backbone.evaluation) == (0.1, {"rows": []})


def test_class_names_by_index_and_descriptions(tmp_path):
    # Both forms are timm's: an index may be missing, a name may be a code that is described.
    labels = {str(i): f"n{i}" for i in range(7) if i != 3}
    path = save(
        tmp_path / "m", tiny_model(), label_names=labels, label_descriptions={"n1": "bee, a bee"}
    )
    assert load_backbone(str(path)).class_names == (
        "n0", "bee, a bee", "n2", "class 3", "n4", "n5", "n6",
    )  # fmt: skip


def test_names_of_other_classes_are_not_taken(tmp_path):
    path = save(tmp_path / "m", tiny_model(), label_names=["ant", "bee"])
    assert load_backbone(str(path)).class_names[:2] == ("class 0", "class 1")


def test_a_thousand_classes_are_imagenets(tmp_path):
    names = load_backbone(str(save(tmp_path / "m", tiny_model(num_classes=1000)))).class_names
    assert len(names) == 1000
    assert names[0].startswith("tench")
    assert names[281].startswith("tabby")
    assert names[999].startswith("toilet tissue")


def test_a_model_without_a_head_has_no_classes(tmp_path):
    backbone = load_backbone(str(save(tmp_path / "m", tiny_model(num_classes=0))))
    assert backbone.class_names == ()
    assert forward(backbone.model, torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("source", [-1, 1.5, "8", True, None])
def test_a_source_that_is_no_rate_is_refused(folder, source):
    rewrite(folder, source_rate=source)
    with pytest.raises(BackboneError, match=rf"source_rate must be a whole .*, got {source!r}"):
        load_backbone(str(folder))


def test_config_json_says_the_ladder_of_its_source(folder):
    assert load_backbone(str(folder)).ladder == TOME
    said = {"name": "x", "method": {"name": "tome"}, "patches": 4, "rungs": [[0, 0], [1, 0]]}
    rewrite(folder, source_rate=1, ladder=said)
    assert load_backbone(str(folder)).ladder == Ladder("x", ToMe(), ((0, 0), (1, 0)), 4)
    for fault, message in (
        ({"rungs": [[1]]}, "rung 0 of the ladder 'x' must be the stock model"),
        ({"rungs": 1}, "TypeError"),
        ({"method": {"name": "magic"}}, "there is no method 'magic'"),
        ({"method": {}}, "KeyError"),
    ):
        rewrite(folder, ladder=said | fault)
        with pytest.raises(BackboneError, match=f"ladder in config.json cannot be .*{message}"):
            load_backbone(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_of_nobody"}, r"Unknown model \(vit_of_nobody\)"),
        ({"architecture": "vit_small_patch16_224"}, "size mismatch for"),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "dist_token"),
        ({"model_args": TINY | {"depth": 3}}, r"Missing key\(s\) .*blocks\.2"),
        ({"model_args": TINY | {"depth": 1}}, r"Unexpected key\(s\) .*blocks\.1"),
        ({"model_args": {"colour": "blue"}}, "unexpected keyword argument 'colour'"),
        ({"model_args": TINY | {"global_pool": "best"}}, r"\(AssertionError: "),
        # timm itself would leave the head at random here, without a word.
        ({"num_classes": 10}, "declares 10 classes, its model_args 7"),
        ({"model_args": TINY | {"num_classes": 10}}, "declares 7 classes, its model_args 10"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(BackboneError, match=rf"(?s){folder}: .*{message}"):
        load_backbone(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "not json"])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=f"{folder}: cannot be loaded"):
        load_backbone(str(folder))


def test_a_folder_without_config_or_weights_is_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="No suitable checkpoints found"):
        load_backbone(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"holds timm's config\.json and model\.safetensors"):
        load_backbone(str(folder))
    with pytest.raises(BackboneError, match=r"holds timm's config\.json"):
        load_backbone(f"local-dir:{tmp_path / 'nowhere'}")


def test_a_truncated_folder_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=r"cannot be loaded \(SafetensorError: "):
        load_backbone(str(folder))


def test_an_unsupported_model_is_refused_at_load(tmp_path):
    # This architecture's own pooling is attention pooling.
    model = timm.create_model("vit_base_patch16_siglip_224", depth=1, img_size=32, num_classes=0)
    path = save(tmp_path / "siglip", model)
    with pytest.raises(UnsupportedModelError, match=r"siglip: attention pooling \(AttentionPool"):
        load_backbone(str(path))


# --- weight files


@pytest.fixture(scope="module")
def whole_model():
    """Of a real geometry, which a bare weights file needs."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()


def test_a_weights_file_stored_in_fp16_becomes_fp32(tmp_path, whole_model):
    file = tmp_path / "w.safetensors"
    save_file({k: v.half() for k, v in whole_model.state_dict().items()}, file)
    backbone = load_backbone(str(file), architecture="vit_tiny_patch16_224")
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert backbone.model.num_classes == 5  # counted in the file
    assert len(backbone.class_names) == 5
    assert (backbone.architecture, backbone.source) == ("vit_tiny_patch16_224", 0)
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, whole_model.state_dict()[name].half().float()), name


def test_a_weights_file_without_a_head_gives_features(tmp_path, whole_model):
    weights = {k: v for k, v in whole_model.state_dict().items() if not k.startswith("head.")}
    save_file(weights, tmp_path / "w.safetensors")
    backbone = load_backbone(str(tmp_path / "w.safetensors"), "vit_tiny_patch16_224")
    assert backbone.class_names == ()
    assert forward(backbone.model, torch.zeros(1, 3, 224, 224)).shape == (1, 192)


def test_the_digest_is_of_the_values_and_not_of_their_storage(tmp_path, whole_model):
    half = {k: v.half() for k, v in whole_model.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({k: v.float() for k, v in half.items()}, tmp_path / "full.safetensors")
    save_file(whole_model.state_dict(), tmp_path / "other.safetensors")
    digests = [
        load_backbone(str(tmp_path / f"{name}.safetensors"), "vit_tiny_patch16_224").digest
        for name in ("half", "full", "other")
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert all(len(digest) == 64 for digest in digests)


def test_the_digest_sees_every_value_and_name():
    model = tiny_model()
    before = weights_digest(model)
    assert weights_digest(tiny_model()) == before
    with torch.no_grad():
        model.head.bias[6] = torch.nextafter(model.head.bias[6], torch.tensor(1.0))
    assert weights_digest(model) != before
    half = tiny_model().bfloat16()
    assert weights_digest(half) == weights_digest(half.float()) != before
    # Equal values under another name, and in another shape, are other weights.
    weights = {"head.weight": torch.ones(2, 3)}
    digests = set()
    for state in (weights, {"head.bias": torch.ones(2, 3)}, {"head.weight": torch.ones(3, 2)}):
        model.state_dict = lambda state=state: state
        digests.add(weights_digest(model))
    assert len(digests) == 3


def test_a_weights_file_needs_a_known_architecture(tmp_path, whole_model):
    file = tmp_path / "w.safetensors"
    save_file(whole_model.state_dict(), file)
    with pytest.raises(BackboneError, match="say which timm architecture they are of"):
        load_backbone(str(file))
    with pytest.raises(BackboneError, match="timm knows no architecture 'vit_of_nobody'"):
        load_backbone(str(file), architecture="vit_of_nobody")
    with pytest.raises(BackboneError, match=r"of vit_small_patch16_224: \d+ tensors .* cls_"):
        load_backbone(str(file), architecture="vit_small_patch16_224")
    with pytest.raises(BackboneError, match=r"(?s)deit_tiny_distilled_.*: .*dist_token"):
        load_backbone(str(file), architecture="deit_tiny_distilled_patch16_224")
    with pytest.raises(UnsupportedModelError, match="resnet10t: the class ResNet is not supported"):
        load_backbone(str(file), architecture="resnet10t")


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(BackboneError, match=r"there is no weights file .*nowhere\.safetensors"):
        load_backbone(str(tmp_path / "nowhere.safetensors"), ARCHITECTURE)


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_weights_file_is_refused(tmp_path, whole_model, keep):
    file = tmp_path / "w.safetensors"
    save_file(whole_model.state_dict(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BackboneError, match=r"w\.safetensors does not hold the weights of vit_ti"):
        load_backbone(str(file), ARCHITECTURE)


# --- timm's names


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name",
    [
        "timm/deit_tiny_patch16_224.fb_in1k",
        "hf-hub:timm/deit_tiny_patch16_224.fb_in1k",
        "deit_tiny_patch16_224.fb_in1k",
    ],
)
def test_what_is_not_cached_cannot_be_loaded_offline(name):
    with pytest.raises(BackboneError, match=rf"timm cannot load '{name}' .* need the network once"):
        load_backbone(name)


@pytest.mark.usefixtures("offline")
def test_an_unsupported_architecture_is_no_matter_of_the_network():
    with pytest.raises(UnsupportedModelError, match="resnet10t.c3_in1k: the class ResNet is not"):
        load_backbone("resnet10t.c3_in1k")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_of_nobody", r"Unknown model \(vit_of_nobody\)"),
        ("deit_tiny_patch16_224.nobody", r"Invalid pretrained tag \(nobody\)"),
        ("s3:bucket", "timm cannot load 's3:bucket'"),
        ("no/such/folder", "timm cannot load 'no/such/folder'"),
    ],
)
def test_an_unknown_name_says_which_names_there_are(name, message):
    with pytest.raises(BackboneError, match=rf"{message}.*bundled:NAME, a model folder or a"):
        load_backbone(name)


def test_a_timm_name_takes_timms_weights(monkeypatch, folder):
    # Without a network: what timm is asked for, and that its model is used as it is.
    asked, model = [], tiny_model(num_classes=1000)

    def create(name, pretrained):
        asked.append((name, pretrained))
        return model

    monkeypatch.setattr("tocom.backbones.timm.create_model", create)
    backbone = load_backbone("timm/vit_tiny_patch16_224.some_tag")
    load_backbone("vit_tiny_patch16_224.some_tag")
    assert asked == [
        ("hf-hub:timm/vit_tiny_patch16_224.some_tag", True),
        ("vit_tiny_patch16_224.some_tag", True),
    ]
    assert backbone.name == "timm/vit_tiny_patch16_224.some_tag"
    assert backbone.architecture == ARCHITECTURE
    assert backbone.class_names[0].startswith("tench")


# --- what is bundled


def test_an_unknown_bundled_name_lists_what_there_is():
    for name in ("nobody", "", "..", "samples/.."):
        with pytest.raises(BackboneError, match=rf"bundled is called '{name}'; .*samples"):
            bundled_folder(name)
    with pytest.raises(BackboneError, match=r"nothing bundled is called 'nobody'; there are: "):
        load_backbone("bundled:nobody")


def test_the_samples_are_bundled_and_no_model():
    assert bundled_folder("samples").is_dir()
    with pytest.raises(BackboneError, match=r"bundled:samples: a model folder holds timm's config"):
        load_backbone("bundled:samples")


def test_a_bundled_folder_loads_by_its_name(monkeypatch, tmp_path, folder):
    shutil.copytree(folder, tmp_path / "package" / "bundled" / "mine")
    monkeypatch.setattr("tocom.backbones.resources.files", lambda _: tmp_path / "package")
    rewrite(tmp_path / "package" / "bundled" / "mine", source_rate=8)
    backbone = load_backbone("bundled:mine")
    assert (backbone.name, backbone.source) == ("bundled:mine", 8)
    assert backbone.digest == load_backbone(str(folder)).digest


def bundled_model():
    try:
        return bundled_folder("deit_tiny")
    except BackboneError:
        return None


@pytest.mark.skipif(bundled_model() is None, reason="the bundled model is not in this checkout")
@pytest.mark.usefixtures("offline")
def test_the_bundled_model_is_what_its_card_says():
    backbone = load_backbone("bundled:deit_tiny")
    assert backbone.architecture == "deit_tiny_patch16_224"
    assert backbone.source == 0
    assert len(backbone.class_names) == backbone.model.num_classes == 1000
    assert not any(name.startswith("class ") for name in backbone.class_names)
    assert tuple(backbone.data_config["input_size"]) == (3, 224, 224)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}

    stored = load_file(bundled_model() / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    traced = trace(backbone.model, torch.zeros(1, 3, 224, 224), 16)
    assert traced.logits.isfinite().all()
    assert traced.plan.tokens[-1] == 11
