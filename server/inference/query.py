"""The parameters of requests that run a model."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

AUTO = "auto"
BUDGET = "budget"

#: A share of rate 0's multiply-adds. Which can be had, the model says better than a description.
Share = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1})]


class RateQuery(BaseModel):
    """Which model a request wants, at which rate and by when; nothing is ignored."""

    # A misspelt rate must not be answered at another one.
    model_config = ConfigDict(extra="forbid")

    rate: str = Field(
        default="0",
        description="tokens merged per block, a whole number from 0 (the stock model) to the "
        "model's `max_rate`; higher is cheaper. `auto`: the server chooses the lowest that keeps "
        "the deadline",
        examples=["8"],
    )
    budget: Share | None = Field(
        default=None,
        description="in place of `rate`: the lowest rate that takes at most this share of the "
        "multiply-adds of rate 0",
        examples=[0.75],
    )
    ladder: str | None = Field(
        default=None,
        description="which of the model's ladders rates are of; default: its first. On any but "
        "`tome`, rates are its rungs from 0, the stock model, to its `max_rate`",
        examples=["tome"],
    )
    min_rate: int | None = Field(
        default=None, ge=0, description="lowest rate that `auto` may choose"
    )
    max_rate: int | None = Field(
        default=None, ge=0, description="highest rate that `auto` may choose: a floor of quality"
    )
    deadline_ms: int | None = Field(
        default=None, gt=0, le=600_000, description="milliseconds after which no answer is wanted"
    )
    model: str | None = Field(default=None, description="model to ask; default: the first")
    compensate: bool = Field(
        default=True, description="make up for the difference of rates with the model's bank"
    )

    @property
    def asked(self) -> str:
        """What was asked for: a rate, `auto` or `budget`."""
        return self.rate if self.budget is None else BUDGET


class ClassifyQuery(RateQuery):
    """Parameters of a classification."""

    top_k: int | None = Field(
        default=None, ge=1, description="number of predictions; of a multi-label model at least"
    )
    logits: bool = Field(default=False, description="also return the logits of all classes")
    merge_map: bool = Field(default=False, description="also return which patches became one token")


class EmbedQuery(RateQuery):
    """Parameters of a request for features."""

    normalize: bool = Field(
        default=False, description="scale to length 1: a dot product is the cosine then"
    )


class SegmentQuery(RateQuery):
    """Parameters of a segmentation."""

    format: Literal["json", "png"] | None = Field(
        default=None,
        description="`png`: an image whose palette has the colours of the classes; `json`: runs of "
        "pixels; default: PNG where `Accept` asks for it, else JSON",
    )
