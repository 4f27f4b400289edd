"""Recipes: what each command takes, validated by pydantic."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from adapters.schema import Proportional, Targets
from adapters.task import data_config
from training.ladders.choice import LadderChoice
from training.loop_config import EpochLoopConfig, LoopConfig
from training.pictures.config import PicturesConfig, PictureSets
from training.recipe import Recipe

#: Of what is made: banks and tasks have their names in paths and addresses.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")]
#: 0.875 is the papers': the shorter side comes to 256 pixels, of which the middle 224 are seen.
CropPct = Annotated[
    Annotated[float, Field(gt=0, le=1)] | None,
    Field(description="share of a picture's shorter side that is seen; default: as the model says"),
]


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
    hflip: float = Field(0.5, ge=0, le=1, description="probability of mirroring left to right")
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


class MetricConfig(Recipe):
    """A metric that learns which tokens are alike, as part of a bank."""

    channels: int = Field(32, gt=0, description="of the metric; 64 in the paper")
    temperature: float = Field(
        0.05,
        gt=0,
        allow_inf_nan=False,
        description="how soft merging is while the metric learns, in cosine similarity; 0.1 in "
        "the paper",
    )
    share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="of the micro-batches, in which the metric learns; in the others the plug-ins "
        "do, and at 1 there are none",
    )


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
        description="what rates mean: tome, the paper's (default); a ladder.json, a bank, a method",
    )
    max_rate: int = Field(16, gt=0, description="the bank has rates 0..max_rate")
    beyond: int = Field(
        0,
        ge=0,
        description="so many rates above max_rate are trained as well and then left out: the steps "
        "below, which are part of the way to them, learn more",
    )
    metric: MetricConfig | None = Field(
        None,
        description="learn a metric for the method tome as well, in place of its own: "
        "metric.channels=64; default: none is learned",
    )
    proportional: Proportional = True
    rank: int = Field(2, gt=0, description="width of one step's low-rank pair")
    targets: Targets = Field(
        ("q", "v"), description="layers of each block that the plug-ins change"
    )
    basis: Literal["own", "shared"] = Field(
        "own", description="whether each step has an A of its own or all steps share one"
    )
    scale: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="factor of the deltas, the bank's multiplier"
    )
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
    crop_pct: CropPct = None
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
        if self.metric and not self.unseen:
            raise ValueError(
                "a metric begins from held-out pictures, of which there are none: give unseen, "
                "such as unseen=96"
            )
        return self

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "DistillConfig":
        if self.students > self.highest:
            raise ValueError(
                f"students ({self.students}) have distinct targets: at most max_rate + beyond, "
                f"which is {self.highest}"
            )
        if self.sources > (most := self.loop.micro_batch):
            raise ValueError(
                f"sources ({self.sources}) share out a micro-batch: at most {most}, its pictures"
            )
        if self.from_zero + self.to_zero > 1:
            raise ValueError(
                f"from_zero ({self.from_zero:g}) and to_zero ({self.to_zero:g}) are shares of all "
                "draws: together at most 1"
            )
        return self


class ElasticConfig(Recipe):
    """`tocom-train elastic`: all weights of a backbone tuned for all rungs, labels unused."""

    name: Name = Field("elastic", description="name of the model and of its run folder")
    backbone: BackboneConfig
    pictures: PictureSets = Field(
        min_length=1, description="to learn from; labels are not read: pictures=photos.tar"
    )
    unseen: int = Field(
        96, gt=0, description="pictures held out of `pictures`, watched while training"
    )
    ladder: LadderChoice = Field(
        None,
        description="what rates mean: tome, the paper's (default); a ladder.json, a bank, a method",
    )
    max_rate: int = Field(16, gt=0, description="rates 0..max_rate are tuned for")
    rates: tuple[int, ...] = Field(
        (), description="tune for these alone, one or more of 0..max_rate; empty: for all of them"
    )
    proportional: Proportional = True
    students: int = Field(2, gt=0, description="random rates that learn from each picture")
    features: float = Field(
        1.0, ge=0, description="weight of the squared error of what the head reads, beside the KL"
    )
    tokens: float = Field(
        2.0, ge=0, description="weight of the relative squared error of the tokens after each block"
    )
    crop_pct: CropPct = None
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "ElasticConfig":
        for rate in self.rates:
            if not 0 <= rate <= self.max_rate or self.rates.count(rate) > 1:
                raise ValueError(
                    f"rates must be distinct, of 0 to max_rate, which is {self.max_rate}; got "
                    f"{list(self.rates)}"
                )
        if self.students > (most := len(self.tuned_for)):
            raise ValueError(
                f"students ({self.students}) have distinct rates: at most {most}, the number of "
                "rates that are tuned for"
            )
        return self

    @property
    def tuned_for(self) -> Sequence[int]:
        """The rates that students run at."""
        return self.rates or range(self.max_rate + 1)


class AdaptFormerConfig(Recipe):
    """A branch beside the MLP of each block."""

    bottleneck: int = Field(32, gt=0, description="channels of the branch")
    scale: float = Field(0.1, gt=0, allow_inf_nan=False, description="factor s of its answer")


class LoraConfig(Recipe):
    """PEFT's low-rank pairs beside linear layers."""

    rank: int = Field(8, gt=0, description="width of each low-rank pair")
    alpha: int = Field(16, gt=0, description="the pairs count alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on what enters the pairs")
    layers: tuple[Literal["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"], ...] = Field(
        ("attn.qkv",), min_length=1, description="layers of each block that get a pair"
    )


class DynamicViTConfig(Recipe):
    """What the method dynamicvit learns from beside the labels; defaults are the paper's."""

    teacher: str | None = Field(
        None,
        description="as backbone.name: a model that is tuned for the same task, at rate 0; "
        "default: none, and no losses of one",
    )
    ratio: float = Field(
        2.0, gt=0, description="weight of the squared error of the share of tokens that is kept"
    )
    distillation: float = Field(
        0.5, ge=0, description="weight of the KL divergence from the teacher's answers"
    )
    tokens: float = Field(
        0.5, ge=0, description="weight of the squared error of kept tokens from the teacher's"
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

    name: Name = Field(description="name of the task and of its run folder")
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
    dynamicvit: DynamicViTConfig = DynamicViTConfig()
    search: SearchConfig | None = Field(
        None, description="try several values of one key first and keep the best"
    )
    source: int = Field(0, ge=0, description="rate that the model is tuned at")
    ladder: LadderChoice = Field(
        None,
        description="what the source rate means: tome, the paper's (default); a ladder.json, a "
        "bank, a method",
    )
    proportional: Proportional = True
    resize: Literal["crop", "squash"] = Field(
        "crop",
        description="what is seen of a picture when measuring and serving: the backbone's own "
        "crop, or all of it, squashed",
    )
    crop_pct: CropPct = None
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of each label that is spread over all classes"
    )
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth: largest probability of skipping a block"
    )
    augment: AugmentConfig = AugmentConfig()
    loop: EpochLoopConfig

    @model_validator(mode="after")
    def _seen_in_one_way(self) -> "FinetuneConfig":
        data_config(self.resize, self.crop_pct)
        return self

    @property
    def many(self) -> bool:
        """Whether pictures have several classes."""
        return self.pictures.labels == "many"

    @model_validator(mode="after")
    def _labelled_alike(self) -> "FinetuneConfig":
        search = self.search
        others = [self.test, *((search.train, search.validation) if search else ())]
        if any(each is not None and each.labels != self.pictures.labels for each in others):
            raise ValueError(
                "pictures, test and those of a search have one class each, or all have many: give "
                "all the same labels"
            )
        if self.many and (self.augment.mixup or self.augment.cutmix):
            raise ValueError("mixup and cutmix are for pictures of one class, not labels=many")
        return self

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
