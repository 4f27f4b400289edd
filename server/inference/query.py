"""The parameters of requests that run a model."""

from pydantic import BaseModel, ConfigDict, Field

AUTO = "auto"


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


class ClassifyQuery(RateQuery):
    """Parameters of a classification."""

    top_k: int | None = Field(default=None, ge=1, description="number of predictions")
    logits: bool = Field(default=False, description="also return the logits of all classes")
    merge_map: bool = Field(default=False, description="also return which patches became one token")


class EmbedQuery(RateQuery):
    """Parameters of a request for features."""

    normalize: bool = Field(
        default=False, description="scale to length 1: a dot product is the cosine then"
    )
