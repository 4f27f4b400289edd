from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.training.pictures.opened import opened, scramble
from tocom import Backbone, ConfigError
from training.config import AugmentConfig
from training.pictures.augment import mixing, posterize, train_transform
from training.pictures.sampler import Draw


def test_erasing_fills_with_noise(pictures: Path, backbone: Backbone) -> None:
    plain = AugmentConfig(color_jitter=0, hflip=0, scale=(1, 1))
    draw = Draw(0, 0, 0)
    image = opened(pictures, backbone, plain)[draw][0]
    erased = opened(pictures, backbone, plain.model_copy(update={"erasing": 1.0}))[draw][0]
    noise = erased[image != erased]
    assert 0.02 < noise.numel() / image.numel() < 0.4
    assert len(noise.unique()) > 0.9 * noise.numel()


@pytest.mark.parametrize(("bits", "kept"), [(8, 255), (9, 255), (3, 224), (1, 128), (0, 0)])
def test_posterize_keeps_the_highest_bits_and_none_is_black(bits: int, kept: int) -> None:
    assert posterize(Image.new("RGB", (1, 1), "white"), bits).getpixel((0, 0)) == (kept,) * 3


@pytest.mark.parametrize("policy", ["rand-m10-n4-p1-inc1", "original", "v0r", "augmix-m10-w2"])
def test_strongest_policies_run(pictures: Path, backbone: Backbone, policy: str) -> None:
    sets = opened(pictures, backbone, AugmentConfig(auto_augment=policy))
    for i in range(60):
        assert torch.isfinite(sets[Draw(0, i % 24, i)][0]).all()


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
