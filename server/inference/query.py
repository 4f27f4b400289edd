"""The parameters of requests that run a model."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

AUTO = "auto"
BUDGET = "budget"
CASCADE = "cascade"

#: Of a cascade whose request does not say it.
AGREEMENT = 0.99

#: Entries of an object in a request. Each entry too many is an error that pydantic describes,
#: and it describes all of them: millions would take its time and memory.
MAX_ENTRIES = 32

#: A share of rate 0's multiply-adds, or of images. Which can be had, the model says better than a
#: description.
Share = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1})]


class RateQuery(BaseModel):
    """At which rate a request wants its images run and by when; nothing is ignored."""

    # A misspelt rate must not be answered at another one.
    model_config = ConfigDict(extra="forbid")

    rate: str = Field(
        default="0",
        description="how much to save, a whole number from 0 (nothing is merged) to the model's "
        "`max_rate`; higher is cheaper. `auto`: the server chooses the lowest that keeps "
        "the deadline. `cascade`: the image does, which runs at a high rate and again at a lower "
        "one if that answer is not sure",
        examples=["2"],
    )
    budget: Share | None = Field(
        default=None,
        description="in place of `rate`: the lowest rate that takes at most this share of the "
        "multiply-adds of rate 0; with `rate=cascade` the mean share of many images",
        examples=[0.75],
    )
    agreement: Share | None = Field(
        default=None,
        description="of `rate=cascade`: the share of images to be answered as at rate 0; default: "
        f"{AGREEMENT:g}",
        examples=[0.97],
    )
    ladder: str | None = Field(
        default=None,
        description="which of the model's ladders rates are of; default: its first. On any but "
        "`tome`, rates are its rungs from 0, the stock model, to its `max_rate`",
        examples=["half"],
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
    compensate: bool = Field(
        default=True, description="make up for the difference of rates with the model's bank"
    )

    @property
    def asked(self) -> str:
        """What was asked for: a rate, `auto`, `cascade` or `budget`."""
        return BUDGET if self.budget is not None and self.rate != CASCADE else self.rate

    @property
    def asked_agreement(self) -> float | None:
        """The agreement that a cascade is to have; None: it has a budget, or it is none."""
        if self.rate != CASCADE or self.budget is not None:
            return None
        return AGREEMENT if self.agreement is None else self.agreement


class ModelQuery(RateQuery):
    """Which model a request wants, too, where its address does not say that."""

    model: str | None = Field(default=None, description="model to ask; default: the first")


class ClassifyQuery(ModelQuery):
    """Parameters of a classification."""

    top_k: int | None = Field(
        default=None, ge=1, description="number of predictions; of a multi-label model at least"
    )
    logits: bool = Field(default=False, description="also return the logits of all classes")
    merge_map: bool = Field(default=False, description="also return which patches became one token")


class EmbedQuery(ModelQuery):
    """Parameters of a request for features."""

    normalize: bool = Field(
        default=False, description="scale to length 1: a dot product is the cosine then"
    )


class Entry(BaseModel):
    """An object in the JSON of a request; nothing in it is ignored."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _not_endless(cls, entry: Any) -> Any:
        if isinstance(entry, dict) and len(entry) > MAX_ENTRIES:
            raise ValueError(f"an object may have {MAX_ENTRIES} entries")
        return entry


class JsonRateQuery(Entry, RateQuery):
    """The same parameters in JSON, where a rate may be a number."""

    rate: str = Field(
        default="0",
        description="as for /v1/classify, a number or a string",
        json_schema_extra={"type": ["string", "integer"]},
        examples=[2, "auto"],
    )

    @field_validator("rate", mode="before")
    @classmethod
    def _as_text(cls, rate: Any) -> Any:
        if isinstance(rate, float):
            # Some clients have no other numbers: 8.0 is 8.
            return str(int(rate)) if rate.is_integer() else repr(rate)
        return str(rate) if type(rate) is int else rate


class SegmentQuery(ModelQuery):
    """Parameters of a segmentation."""

    format: Literal["json", "png"] | None = Field(
        default=None,
        description="`png`: an image whose palette has the colours of the classes; `json`: runs of "
        "pixels; default: PNG where `Accept` asks for it, else JSON",
    )
