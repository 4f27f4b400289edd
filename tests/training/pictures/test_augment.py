import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError

from tests.training.pictures.opened import opened, scramble
from tocom import Backbone, ConfigError
from training.config import AugmentConfig
from training.pictures.augment import evaluation_transform, mixing, posterize, train_transform
from training.pictures.sampler import Draw


def test_erasing_fills_normalised_pictures_with_noise(pictures: Path, backbone: Backbone) -> None:
    images = torch.full((40, 3, 32, 32), 7, dtype=torch.uint8)
    plain = train_transform(backbone, AugmentConfig()).finish("cpu")(images)
    erase = train_transform(backbone, AugmentConfig(erasing=1.0)).finish("cpu")

    def erased(seed: int) -> torch.Tensor:
        scramble()
        random.seed(seed)
        torch.manual_seed(seed)
        return erase(images)

    changed = erased(1) != plain
    for picture in changed.all(dim=1):  # a box of its own in each, through all channels
        assert 0.02 < picture.float().mean() < 0.4
    assert len({tuple(picture.flatten().tolist()) for picture in changed}) == 40
    noise = erased(1)[changed]
    assert noise.mean().abs() < 0.1  # of normalised values
    assert abs(noise.std() - 1) < 0.1
    assert torch.equal(erased(1), erased(1))
    assert not torch.equal(erased(1), erased(2))
    assert images.unique().tolist() == [7]


@pytest.mark.parametrize("kind", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])  # 0.5; ImageNet
def test_bytes_finished_in_a_batch_are_the_values_that_are_measured_with(kind: str) -> None:
    model = timm.create_model(kind, img_size=32, depth=1, embed_dim=24, num_heads=2)
    backbone = Backbone(model, kind, kind, ())
    drawn = np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in drawn]
    transform = train_transform(backbone, AugmentConfig(crop="evaluation", erasing=1.0))
    parts = [transform(image) for image in images]
    assert all(part.dtype == torch.uint8 for part in parts)
    finished = transform.finish("cpu")(torch.stack(parts))
    assert finished.is_contiguous()
    measured = evaluation_transform(backbone)
    assert torch.equal(finished, torch.stack([measured(image) for image in images]))


@pytest.mark.parametrize(("bits", "kept"), [(8, 255), (9, 255), (3, 224), (1, 128), (0, 0)])
def test_posterize_keeps_the_highest_bits_and_none_is_black(bits: int, kept: int) -> None:
    assert posterize(Image.new("RGB", (1, 1), "white"), bits).getpixel((0, 0)) == (kept,) * 3


@pytest.mark.parametrize("policy", ["rand-m10-n4-p1-inc1", "original", "v0r", "augmix-m10-w2"])
def test_strongest_policies_run(pictures: Path, backbone: Backbone, policy: str) -> None:
    sets = opened(pictures, backbone, AugmentConfig(auto_augment=policy))
    for i in range(60):
        assert sets[Draw(0, i % 24, i)][0].shape == (3, 32, 32)


@pytest.mark.parametrize("policy", ["nonsense", "rand-x9"])
def test_unknown_policies_are_named(backbone: Backbone, policy: str) -> None:
    with pytest.raises(ConfigError, match=f"in timm's notation.*got '{policy}'"):
        train_transform(backbone, AugmentConfig(auto_augment=policy))


@pytest.mark.parametrize("scale", [(0.5, 0.2), (0, 1), (0.5, 1.1)])
def test_crops_are_a_range_of_shares(scale: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="from a smallest to a largest share"):
        AugmentConfig(scale=scale)


def test_mixing_is_a_function_of_its_seed() -> None:
    mix = mixing(AugmentConfig(mixup=0.8, cutmix=1.0), classes=5, label_smoothing=0.1)
    assert mix is not None
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5

    def mixed(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        scramble()
        np.random.seed(seed)
        return mix(images.clone(), labels)

    answers = [mixed(seed) for seed in range(8)]
    for seed, (pictures, targets) in enumerate(answers):
        again = mixed(seed)
        assert torch.equal(pictures, again[0])
        assert torch.equal(targets, again[1])
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    assert len({pictures[0].sum().item() for pictures, _ in answers}) == 8


def test_without_alphas_there_is_no_mixing() -> None:
    assert mixing(AugmentConfig(), 5, 0.1) is None
