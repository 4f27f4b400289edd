"""The recipe of `tocom-train prune`."""

import math
from typing import Literal

from pydantic import Field, model_validator

from training.config import AugmentConfig, BackboneConfig, CropPct, Name
from training.ladders.choice import LadderChoice
from training.loop_config import LoopConfig
from training.pictures.config import PicturesConfig, PictureSets
from training.recipe import Recipe


class PruneConfig(Recipe):
    """`tocom-train prune`: a model with fewer channels in its queries, keys, values and MLPs."""

    name: Name = Field("prune", description="name of the model and of its run folder")
    backbone: BackboneConfig
    task: str | None = Field(
        None, description="a task folder, or bundled:NAME, that was tuned on the backbone"
    )
    pictures: PictureSets = Field(min_length=1, description="to learn from: pictures=train.tar")
    test: PicturesConfig | None = Field(
        None, description="to test on before and after, by their classes: test=test.tar"
    )
    labelled: bool = Field(
        True, description="whether the classes of the pictures are the model's, to learn from"
    )
    teacher: float = Field(
        1.0, ge=0, description="weight of the KL divergence from the model as it was"
    )
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of each label that is spread over all classes"
    )
    unseen: int = Field(
        0, ge=0, description="pictures held out of `pictures`, watched while training"
    )
    target: float = Field(
        0.25, gt=0, lt=1, description="share of the multiply-adds that the model is to lose"
    )
    begin: int = Field(0, ge=0, description="the step at which the first channels are chosen")
    every: int = Field(25, gt=0, description="steps between two choices, each made anew")
    growth: float = Field(
        0.00025, gt=0, le=1, description="by so much each choice is larger than the one before"
    )
    lasso: float = Field(1e-5, ge=0, description="weight of the group lasso of the compactors")
    score: Literal["norm", "gradient"] = Field(
        "norm",
        description="by which channels are chosen: the norm of their column of the compactor, as "
        "in the paper; or how much the loss feels them, which short runs need",
    )
    masked: bool = Field(
        False,
        description="whether a chosen channel counts nothing from then on; without it the lasso "
        "shrinks it, as in the paper, and it is cut at the end",
    )
    source: int | None = Field(
        None, ge=0, description="rate to prune for; default: that which the model was tuned at"
    )
    ladder: LadderChoice = Field(
        None,
        description="what the source rate means: a ladder.json, a bank, a method; default: as the "
        "model says",
    )
    crop_pct: CropPct = None
    augment: AugmentConfig = AugmentConfig()
    loop: LoopConfig

    @property
    def last_choice(self) -> int:
        """The step of the choice that reaches the target."""
        # A growth of a tenth of the target takes ten choices, whatever rounding makes of it.
        return self.begin + (math.ceil(self.target / self.growth - 1e-9) - 1) * self.every

    def target_at(self, step: int) -> float | None:
        """Return the share that is chosen at a step; None: nothing is chosen then."""
        choices, rest = divmod(step - self.begin, self.every)
        if rest or not self.begin <= step <= self.last_choice:
            return None
        return min(self.target, (choices + 1) * self.growth)

    @model_validator(mode="after")
    def _can_learn(self) -> "PruneConfig":
        if not self.labelled and not self.teacher:
            raise ValueError("without labels there is the teacher alone: give it a weight")
        if self.labelled and len(self.pictures) > 1:
            raise ValueError(
                f"labelled pictures are one set, got {len(self.pictures)}; labelled=false learns "
                "from the model as it was"
            )
        return self

    @model_validator(mode="after")
    def _one_class_a_picture(self) -> "PruneConfig":
        read = (*(self.pictures if self.labelled else ()), *([self.test] if self.test else ()))
        for each in read:
            if each.labels == "many":
                raise ValueError(
                    f"{each.path} has labels=many: labels to learn from or to test by are "
                    "labels=one, one class a picture; labelled=false reads none of `pictures`"
                )
        return self

    @model_validator(mode="after")
    def _gradients_as_they_are(self) -> "PruneConfig":
        if self.score == "gradient" and self.loop.precision == "fp16":
            raise ValueError(
                "score=gradient needs gradients as they are, and those of loop.precision=fp16 are "
                "scaled and overflow: give loop.precision=bf16 or no, or score=norm"
            )
        return self

    @model_validator(mode="after")
    def _reaches_its_target(self) -> "PruneConfig":
        if self.last_choice >= self.loop.steps:
            raise ValueError(
                f"the target {self.target:g} is reached after step {self.last_choice}, and the run "
                f"has {self.loop.steps}: give it more steps, a larger growth or a smaller every"
            )
        return self
