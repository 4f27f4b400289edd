from pathlib import Path

import pytest

from tocom import ConfigError
from training.analysis.config import AnalyseConfig
from training.cascade.config import CascadeConfig
from training.config import (
    DistillConfig,
    ElasticConfig,
    FinetuneConfig,
)
from training.ladders.compare_config import CompareConfig
from training.ladders.search_config import LadderSearchConfig
from training.measuring_config import CalibrateConfig, EvaluateConfig
from training.pictures.config import PicturesConfig
from training.presets import presets, read_recipe
from training.prune.config import PruneConfig
from training.segment.config import EvaluateSegmentConfig, SegmentConfig
from training.vtab.config import VtabConfig

KINDS = {
    "methods": (CompareConfig, ["backbone.name=x", "pictures.path=a.tar"]),
    "half-the-compute": (
        LadderSearchConfig,
        ["backbone.name=x", "pictures=[{path='a.tar'}]"],
    ),
    "elastic-small-data": (ElasticConfig, ["backbone.name=x", "pictures=a.tar"]),
    "prune-deit-tiny-task": (PruneConfig, ["backbone.name=x", "pictures=a.tar"]),
    "deit-tiny-task": (FinetuneConfig, ["pictures.path=a.tar", "test.path=b.tar"]),
    "vtab1k-adaptformer": (FinetuneConfig, ["pictures.path=a.tar", "test.path=b.tar"]),
    "cifar100-full": (FinetuneConfig, ["pictures.path=a.tar", "test.path=b.tar"]),
    "fgvc-full": (FinetuneConfig, ["pictures.path=a.tar", "test.path=b.tar"]),
    "vtab1k": (VtabConfig, ["root=vtab-1k"]),
    "cifar100": (VtabConfig, ["root=data"]),
    "fgvc": (VtabConfig, ["root=data"]),
    "which-tokens": (AnalyseConfig, ["backbone.name=bundled:x", "pictures.path=a.tar"]),
    "every-rate": (EvaluateConfig, ["backbone.name=bundled:x", "pictures.path=a.tar"]),
    "ade20k-segmenter": (SegmentConfig, []),
    "camvid": (SegmentConfig, []),
    "segment-rates": (EvaluateSegmentConfig, ["backbone.name=bundled:x", "task=y"]),
    "cascade": (CascadeConfig, ["backbone.name=bundled:x", "pictures=a.tar"]),
    "multiplier": (
        CalibrateConfig,
        ["backbone.name=bundled:x", "bank=bundled:y", "pictures.path=a.tar"],
    ),
}
DISTILL = (DistillConfig, ["pictures=[{path='a.tar'}]"])


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads(preset: str) -> None:
    kind, overrides = KINDS.get(preset, DISTILL)
    assert isinstance(read_recipe(kind, preset, overrides), kind)


def test_vtab_is_the_papers_recipe() -> None:
    recipe = read_recipe(FinetuneConfig, "vtab1k-adaptformer", KINDS["vtab1k-adaptformer"][1])
    assert (recipe.method, recipe.resize) == ("adaptformer", "squash")
    assert recipe.adaptformer.bottleneck == 32
    assert recipe.search is not None
    assert (recipe.search.key, recipe.search.values) == (
        "adaptformer.scale", (0.01, 0.1, 1.0, 10.0, 100.0),
    )  # fmt: skip
    loop = recipe.loop
    assert (loop.epochs, loop.warmup_epochs, loop.batch_size) == (100, 0, 64)
    assert (loop.learning_rate, loop.weight_decay) == (1e-3, 1e-4)
    assert (recipe.label_smoothing, recipe.drop_path, recipe.augment.crop) == (0, 0.1, "evaluation")
    assert loop.over(1000).steps == 1563


@pytest.mark.parametrize(
    ("preset", "epochs", "batch", "warmup", "rates", "repeats"),
    [
        ("cifar100-full", 100, 1024, 10, [5e-5], 3),
        ("fgvc-full", 30, 64, 5, [5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4], 1),
    ],
)
def test_full_presets_are_the_papers_recipe(
    preset: str, epochs: int, batch: int, warmup: int, rates: list[float], repeats: int
) -> None:
    recipe = read_recipe(FinetuneConfig, preset, KINDS[preset][1])
    loop, augment = recipe.loop, recipe.augment
    assert (loop.epochs, loop.batch_size, loop.warmup_epochs) == (epochs, batch, warmup)
    tried = recipe.search.values if recipe.search else [loop.learning_rate]
    assert list(tried) == pytest.approx([rate * batch / 512 for rate in rates])
    assert (loop.weight_decay, recipe.label_smoothing, recipe.drop_path) == (0.05, 0.1, 0.1)
    assert (augment.auto_augment, augment.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augment.mixup, augment.cutmix) == (0.8, 1.0)
    assert augment.repeats == repeats
    assert (recipe.resize, recipe.crop_pct) == ("crop", 0.875)


@pytest.mark.parametrize("model", ["deit-b", "deit-s", "deit-ti", "deit-b-384", "mae-vit-b"])
def test_imagenet_presets_are_the_papers_recipe(model: str) -> None:
    recipe = read_recipe(DistillConfig, f"imagenet-{model}", DISTILL[1])
    assert (recipe.max_rate, recipe.rank, recipe.targets, recipe.scale) == (16, 2, ("q", "v"), 0.1)
    assert (recipe.dropout, recipe.drop_path, recipe.pairs) == (0.1, 0.1, "uniform")
    assert (recipe.sources, recipe.students, recipe.from_zero, recipe.to_zero) == (1, 1, 0, 0)
    loop, augment = recipe.loop, recipe.augment
    assert loop.steps == 10 * 1281167 // loop.batch_size
    assert (loop.batch_size, loop.learning_rate, loop.weight_decay) == (1024, 2e-3, 0.05)
    assert loop.warmup_steps == 0
    assert (augment.mixup, augment.cutmix, augment.erasing) == (0.8, 1.0, 0.25)
    assert augment.auto_augment == "rand-m9-mstd0.5-inc1"
    assert augment.repeats == 3
    assert (recipe.crop_pct, recipe.proportional) == (0.875, model != "mae-vit-b")


def test_overrides_reach_into_tables_and_read_toml() -> None:
    overrides = [
        "pictures=[{path='a.tar', times=3}]",
        "loop.steps=7",
        "name=mine",
        "targets=['q','fc1']",
    ]
    config = read_recipe(DistillConfig, "deit-tiny-small-data", overrides)
    assert (config.loop.steps, config.name, config.targets) == (7, "mine", ("q", "fc1"))
    assert config.pictures[0].times == 3


@pytest.mark.parametrize(
    "override",
    [
        "pictures=a.tar",
        "pictures=['a.tar']",
        "pictures={path='a.tar'}",
        "pictures=[{path='a.tar'}]",
        "pictures.path=a.tar",
    ],
)
@pytest.mark.parametrize("preset", ["deit-tiny-small-data", "half-the-compute", "every-rate"])
def test_pictures_are_named_alike_everywhere(preset: str, override: str) -> None:
    kind, _ = KINDS.get(preset, DISTILL)
    config = read_recipe(kind, preset, ["backbone.name=x", override])
    assert isinstance(config, DistillConfig | LadderSearchConfig | EvaluateConfig)
    several = config.pictures if isinstance(config.pictures, tuple) else (config.pictures,)
    assert several == (PicturesConfig(path="a.tar"),)


def test_several_sets_of_pictures() -> None:
    both = ["backbone.name=x", "pictures=['a.tar', {path='b', times=2}]"]
    config = read_recipe(DistillConfig, "deit-tiny-small-data", both)
    assert config.pictures == (PicturesConfig(path="a.tar"), PicturesConfig(path="b", times=2))
    with pytest.raises(ConfigError, match="pictures: this is one set of pictures, got 2"):
        read_recipe(EvaluateConfig, "every-rate", both)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.stepz=3", r"there is no key 'stepz' in loop, did you mean steps\?"),
        ("stepz=3", r"there is no key 'stepz'; there are: name, backbone, pictures, "),
        ("pictures={pth='a'}", r"there is no key 'pth' in pictures\.0, did you mean path\?"),
        ("pictures=3", r"pictures must be a list, got 3"),
        (
            "pictures=[3]",
            r"pictures\.0: pictures are a path or a table of path, .*, got 3",
        ),
        ("backbone=3", r"backbone must be a table of keys and values, got 3"),
        ("loop.steps=0", r"loop\.steps must be more than 0, got 0"),
        ("loop.steps=many", r"loop\.steps must be a whole number, got 'many'"),
        ("name=My Bank", r"name must match the pattern \^\[a-z0-9\].*got 'My Bank'"),
        ("name.deeper=1", "name is a value, not a table"),
        ("loop", "an override is key=value, got 'loop'"),
        ("loop.learning_rate=inf", r"loop\.learning_rate must be a number, got inf"),
        ("loop.seed=-1", r"loop\.seed must be at least 0, got -1"),
        ("targets=[]", r"targets must have at least 1 of them"),
        ("targets=['q','v','q']", r"targets: each target may stand once, got q, v, q"),
        ("scale=inf", r"scale must be a number, got inf"),
        ("targets=['z']", r"targets\.0 must be 'q', 'k', .* or 'fc2', got 'z'"),
    ],
)
def test_bad_overrides_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(DistillConfig, "deit-tiny-small-data", ["pictures=[{path='a'}]", override])


def test_unknown_recipe_names_the_presets() -> None:
    with pytest.raises(ConfigError, match="no preset 'nope'.*presets lists them"):
        read_recipe(DistillConfig, "nope")
    with pytest.raises(ConfigError, match="'deit-tiny', did you mean deit-tiny-task?"):
        read_recipe(DistillConfig, "deit-tiny")


def test_broken_toml(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml cannot be read"):
        read_recipe(DistillConfig, str(tmp_path / "broken.toml"))


def test_a_compiled_forward_does_not_run_blocks_again() -> None:
    changes = ["loop.compile=true", "loop.recompute_blocks=true"]
    kind, overrides = KINDS["deit-tiny-task"]
    with pytest.raises(ConfigError, match="compile and recompute_blocks exclude each other"):
        read_recipe(kind, "deit-tiny-task", [*overrides, *changes])


def test_distilling_is_not_compiled() -> None:
    kind, overrides = DISTILL
    with pytest.raises(ConfigError, match="there is no key 'compile' in loop"):
        read_recipe(kind, "deit-tiny-small-data", [*overrides, "loop.compile=true"])


def test_too_many_epochs_are_named() -> None:
    kind, overrides = KINDS["deit-tiny-task"]
    recipe = read_recipe(kind, "deit-tiny-task", [*overrides, "loop.epochs=1e6"])
    assert isinstance(recipe, FinetuneConfig)
    size = recipe.loop.batch_size
    message = rf"loop\.epochs=1e\+06 of {size} pictures, {size} a step, are 1,000,000 steps"
    with pytest.raises(ConfigError, match=message):
        recipe.loop.over(size)
