"""Recipes: what each command takes, validated by pydantic."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from training.ladders.choice import LadderChoice
from training.pictures.config import PicturesConfig, PictureSets
from training.recipe import Recipe

#: Of what is made: banks and tasks have their names in paths and addresses.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")]
_Rate = Annotated[int, Field(ge=0)]
_Multiplier = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BackboneConfig(Recipe):
    """Which model."""

    name: str = Field(description="as for tocom.load_backbone: a timm name, bundled:NAME, a path")
    architecture: str | None = Field(None, description="timm's name, for a bare weights file")


class AugmentConfig(Recipe):
    """timm's training transform, and its mixing of pictures."""

    crop: Literal["random", "evaluation"] = Field(
        "random", description="evaluation: as for measuring, and nothing else of this table"
    )
    scale: tuple[float, float] = Field((0.08, 1.0), description="random crop, share of the area")
    hflip: float = Field(0.5, ge=0, le=1)
    color_jitter: float = Field(0.4, ge=0, description="unused where there is auto_augment")
    auto_augment: str | None = Field(None, description="timm's notation: rand-m9-mstd0.5-inc1")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of erasing a box, with noise")
    interpolation: Literal["random", "bilinear", "bicubic"] | None = Field(
        None, description="of the crop; default: what the backbone was trained with"
    )
    mixup: float = Field(0.0, ge=0, description="alpha; 0: none")
    cutmix: float = Field(0.0, ge=0, description="alpha; 0: none")
    mix_probability: float = Field(1.0, ge=0, le=1, description="that a batch is mixed")
    mix_switch: float = Field(0.5, ge=0, le=1, description="share of cutmix where there are both")
    repeats: int = Field(1, ge=1, description="draws of a picture in a row, each augmented anew")

    @field_validator("scale")
    @classmethod
    def _a_range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("a crop is from a smallest to a largest share of the area, in (0, 1]")
        return scale


class _LoopConfig(Recipe):
    """What every training run has, but for its length."""

    batch_size: int = Field(gt=0, description="pictures a step, over all processes")
    accumulation: int = Field(1, gt=0, description="micro-batches a step, in each process")
    learning_rate: float = Field(gt=0, description="peak, as it is: not scaled by the batch")
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Accelerate's mixed precision"
    )
    seed: int = 0
    workers: int = Field(1, ge=0, description="processes that decode pictures")
    save_every: int = Field(100, gt=0, description="steps between checkpoints")
    watch_every: int = Field(100, gt=0, description="steps between measurements on unseen pictures")
    on_unreadable: Literal["stop", "skip"] = Field(
        "stop", description="a picture that cannot be decoded; skipped ones are counted"
    )
    on_full_disk: Literal["stop", "skip"] = Field(
        "stop", description="a checkpoint or metrics that cannot be written"
    )
    tensorboard: bool = Field(False, description="also log to TensorBoard, in the run folder")


class LoopConfig(_LoopConfig):
    """A training run of so many steps."""

    steps: int = Field(gt=0, lt=10**6)
    warmup_steps: int = Field(0, ge=0)


class EpochLoopConfig(_LoopConfig):
    """A training run of so many passes over its pictures."""

    epochs: float = Field(gt=0, allow_inf_nan=False)
    warmup_epochs: float = Field(0, ge=0, allow_inf_nan=False)

    def over(self, pictures: int) -> LoopConfig:
        """Return the run in steps, for a number of pictures."""
        values = self.model_dump(exclude={"epochs", "warmup_epochs"})
        each = pictures / self.batch_size
        steps, warmup = math.ceil(self.epochs * each), round(self.warmup_epochs * each)
        return LoopConfig(steps=steps, warmup_steps=warmup, **values)


class DistillConfig(Recipe):
    """`tocom-train distill`: plug-ins for one backbone, labels unused."""

    name: Name = Field(description="the bank's name")
    backbone: BackboneConfig
    pictures: PictureSets = Field(
        description='to learn from: pictures=photos.tar, several as pictures=["a.tar", "b"]'
    )
    unseen: int = Field(
        0, ge=0, description="pictures held out of `pictures`, watched while training"
    )
    ladder: LadderChoice = Field(
        None,
        description="what the rates mean: tome, the paper's (default); a ladder.json; a method",
    )
    max_rate: int = Field(16, gt=0, description="the bank has rates 0..max_rate")
    beyond: int = Field(
        0,
        ge=0,
        description="so many rates above max_rate are trained as well and then left out: the steps "
        "below, which are part of the way to them, learn more",
    )
    rank: int = Field(2, gt=0)
    targets: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = ("q", "v")
    basis: Literal["own", "shared"] = Field(
        "own", description="whether each step has an A of its own or all steps share one"
    )
    scale: float = Field(0.1, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1, description="on the low-rank hidden values")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the student")
    sources: int = Field(
        1, gt=0, description="random source rates a micro-batch, which they share out"
    )
    students: int = Field(1, gt=0, description="random target rates that learn from each source")
    pairs: Literal["uniform", "distance"] = Field(
        "uniform", description="how likely a pair of rates is: alike, or as they are far apart"
    )
    from_zero: float = Field(
        0.0, ge=0, le=1, description="share of draws whose source is rate 0 by rule, not by chance"
    )
    to_zero: float = Field(
        0.0, ge=0, le=1, description="share of draws one of whose targets is rate 0 by rule"
    )
    features: float = Field(
        0.0, ge=0, description="weight of the squared error of what the head reads, beside the KL"
    )
    tokens: float = Field(
        0.0, ge=0, description="weight of the relative squared error of the tokens after each block"
    )
    relative: bool = Field(
        False,
        description="divide each pair's loss by what plain merging costs that pair on the unseen "
        "pictures: all pairs count alike, however far apart",
    )
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig

    @property
    def highest(self) -> int:
        """The highest rate that is trained."""
        return self.max_rate + self.beyond

    @model_validator(mode="after")
    def _has_unseen(self) -> "DistillConfig":
        if self.relative and not self.unseen:
            raise ValueError(
                "relative losses are measured on held-out pictures, of which there are none: "
                "give unseen, such as unseen=96"
            )
        return self

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "DistillConfig":
        if self.students > self.highest:
            raise ValueError(
                f"students ({self.students}) have distinct targets: at most max_rate + beyond, "
                f"which is {self.highest}"
            )
        if self.from_zero + self.to_zero > 1:
            raise ValueError(
                f"from_zero ({self.from_zero:g}) and to_zero ({self.to_zero:g}) are shares of all "
                "draws: together at most 1"
            )
        return self


class AdaptFormerConfig(Recipe):
    """A branch beside the MLP of each block."""

    bottleneck: int = Field(32, gt=0, description="channels of the branch")
    scale: float = Field(0.1, gt=0, allow_inf_nan=False, description="factor s of its answer")


class LoraConfig(Recipe):
    """PEFT's low-rank pairs beside linear layers."""

    rank: int = Field(8, gt=0)
    alpha: int = Field(16, gt=0, description="the pairs count alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1)
    layers: tuple[Literal["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], ...] = Field(
        ("attn.qkv",), min_length=1
    )


class SearchConfig(Recipe):
    """A search of one value of the recipe, by accuracy on a part that is not trained on."""

    key: str = Field(description="such as adaptformer.scale or loop.learning_rate")
    values: tuple[float, ...] = Field(description="to try; none: there is no search")
    train: PicturesConfig | None = Field(None, description="to train on while searching")
    validation: PicturesConfig | None = Field(None, description="to measure on while searching")
    share: float = Field(
        0.1, gt=0, lt=1, description="else so much of `pictures`, drawn at random, to measure on"
    )

    @model_validator(mode="after")
    def _both(self) -> "SearchConfig":
        if (self.train is None) != (self.validation is None):
            raise ValueError("a search has both train and validation, or neither")
        return self


class FinetuneConfig(Recipe):
    """`tocom-train finetune`: a model for a labelled task, tuned at one source rate."""

    name: Name
    backbone: BackboneConfig
    pictures: PicturesConfig = Field(description="to learn from: pictures=train.tar")
    test: PicturesConfig = Field(description="to test on: test=test.tar")
    classes: int | None = Field(
        None, gt=0, description="of the head; default: those that the pictures have"
    )
    method: Literal["full", "linear", "lora", "adaptformer"] = Field(
        "full", description="what is tuned, beside a new head"
    )
    adaptformer: AdaptFormerConfig = AdaptFormerConfig()
    lora: LoraConfig = LoraConfig()
    search: SearchConfig | None = None
    source: int = Field(0, ge=0, description="rate that the model is tuned at")
    ladder: LadderChoice = Field(
        None,
        description="what the source rate means: tome, the paper's (default); a ladder.json; a "
        "method",
    )
    resize: Literal["crop", "squash"] = Field(
        "crop",
        description="what is seen of a picture when measuring and serving: the backbone's own "
        "crop, or all of it, squashed",
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    augment: AugmentConfig = AugmentConfig()
    loop: EpochLoopConfig

    @model_validator(mode="after")
    def _can_be_searched(self) -> "FinetuneConfig":
        for value in self.search.values if self.search else ():
            self.candidate(value)
        return self

    def candidate(self, value: float) -> "FinetuneConfig":
        """Return the recipe with a value of its search, which it has no more."""
        assert self.search is not None
        values = self.model_dump(exclude={"search"})
        *path, last = self.search.key.split(".")
        table: Any = values
        for key in path:
            table = table.get(key) if isinstance(table, dict) else None
        if not isinstance(table, dict) or last not in table:
            raise ValueError(f"search.key: the recipe has no {self.search.key}")
        table[last] = value
        return type(self).model_validate(values)


class EvaluateConfig(Recipe):
    """`tocom-train evaluate`: a model at every rate, with and without a bank."""

    name: str = "evaluation"
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what tables and plots call it")
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    pictures: PicturesConfig = Field(description="to measure on: pictures=test.tar")
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over the set; default: all"
    )
    labelled: bool = Field(True, description="whether the pictures' classes are the model's")
    sources: tuple[_Rate, ...] = Field((), description="default: the rate it was tuned at")
    targets: tuple[_Rate, ...] = Field((), description="default: every rate of the bank")
    ladder: LadderChoice = Field(
        None,
        description="what the rates mean: tome, a ladder.json or a method; default: as the bank "
        "says, or else the model",
    )
    max_rate: int = Field(
        16,
        ge=0,
        description="highest default target where neither a bank nor the ladder's rungs say it",
    )
    batch_size: int = Field(50, gt=0)
    workers: int = Field(1, ge=0, description="processes that decode pictures")


class CalibrateConfig(Recipe):
    """`tocom-train calibrate`: the multiplier of a bank's deltas for one model."""

    name: str = "calibration"
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    model: str | None = Field(None, description="what the table calls it")
    bank: str = Field(description="a bank folder, bundled:NAME or a store reference")
    pictures: PicturesConfig = Field(description="to measure on: pictures=test.tar")
    limit: int | None = Field(
        None, gt=0, description="so many pictures, spread evenly over the set; default: all"
    )
    source: _Rate | None = Field(None, description="default: the rate that the model was tuned at")
    targets: tuple[_Rate, ...] = Field(
        (), description="default: every rate of the bank but the source"
    )
    multipliers: tuple[_Multiplier, ...] = Field(
        # The paper's search around the multiplier that it trains with.
        (0.05, 0.08, 0.1, 0.12, 0.15),
        min_length=1,
        description="values of the scale to try, beside the bank's own",
    )
    continuous: bool = Field(False, description="then search between the best one's neighbours")
    per_target: bool = Field(False, description="a multiplier for each target, not one for all")
    measure: Literal["kl", "top1"] = Field(
        "kl", description="KL divergence from the source rate, without labels; or top-1"
    )
    batch_size: int = Field(50, gt=0)
    workers: int = Field(1, ge=0, description="processes that decode pictures")

    @model_validator(mode="after")
    def _smooth(self) -> "CalibrateConfig":
        if self.continuous and self.measure != "kl":
            raise ValueError("a continuous search needs a smooth measure: kl, not top1")
        return self


class TaskConfig(Recipe):
    """A task that is not one of VTAB-1k's."""

    name: str = Field(min_length=1, description="as tables call it")
    folder: str = Field(min_length=1, description="below the root")
    group: Literal["Natural", "Specialized", "Structured"]
    classes: int = Field(gt=0)


class VtabConfig(Recipe):
    """`tocom-train vtab`: fine-tune on each task at each source, measure at each target."""

    name: str = "vtab"
    root: str = Field(min_length=1, description="folder of the tasks' folders")
    tasks: tuple[str | TaskConfig, ...] = Field(
        (), description="folder names of VTAB-1k's tasks, or others described; default: all 19"
    )
    sources: tuple[_Rate, ...] = Field((0,), min_length=1)
    targets: tuple[_Rate, ...] = Field((0, 4, 8, 12, 16), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    ladder: LadderChoice = Field(
        None, description="what the rates mean; default: as the fine-tuning's recipe says"
    )
    bank: str | None = Field(None, description="a bank folder, bundled:NAME or a store reference")
    limit: int | None = Field(
        None, gt=0, description="so many test pictures to measure on; default: all"
    )
    recipe: str = Field("vtab1k-adaptformer", description="of the fine-tuning: a file or a preset")
    changes: tuple[str, ...] = Field((), description="key=value changes of that recipe")
    jobs: int = Field(1, gt=0, description="runs at once, which share out processors and GPUs")
