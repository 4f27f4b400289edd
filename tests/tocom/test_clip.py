"""CLIP's image towers, whose heads are projections; and models of theirs that classify."""

import pytest
import timm
import torch
from timm.models import save_for_hf

from tocom import Backbone, forward, load_backbone

ARCHITECTURE = "vit_xsmall_patch16_clip_224"


def loaded(folder, architecture=ARCHITECTURE, classes=512, **config) -> Backbone:
    model = timm.create_model(architecture, num_classes=classes, img_size=64, depth=1)
    told = {"pretrained_cfg": {"input_size": (3, 64, 64), "num_classes": classes} | config}
    save_for_hf(model, folder, model_config=told, safe_serialization=True)
    return load_backbone(str(folder))


def test_a_tower_projects_to_the_width_of_timms_weights(tmp_path):
    tower = loaded(tmp_path / "tower")
    assert tower.architecture == ARCHITECTURE
    assert tower.projects
    assert forward(tower.model, torch.zeros(1, 3, 64, 64)).shape == (1, 512)


@pytest.mark.parametrize(
    ("architecture", "classes"),
    [
        (ARCHITECTURE, 37),  # no weights of timm have as many
        ("vit_base_patch32_clip_224", 1000),  # some of them have ImageNet's
        ("vit_tiny_patch16_224", 512),  # no tower
    ],
)
def test_other_heads_are_classifiers(tmp_path, architecture, classes):
    assert not loaded(tmp_path / "classifier", architecture, classes).projects


def test_a_head_whose_classes_have_names_is_a_classifier(tmp_path):
    names = [f"bird {i}" for i in range(512)]
    assert not loaded(tmp_path / "birds", label_names=names).projects


def test_names_that_nobody_gave_do_not_count(tmp_path):
    # Trainers write them into the folders of models that they make of a tower.
    assert loaded(tmp_path / "tuned", label_names=[f"class {i}" for i in range(512)]).projects
