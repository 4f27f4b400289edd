"""The shapes of questions and answers, as they go over the wire."""

from typing import Literal, TypeAlias

from pydantic import BaseModel, Field

#: What models do: name what a picture shows, or say it of every pixel.
Kind: TypeAlias = Literal["classification", "embedding", "segmentation"]


class Prediction(BaseModel):
    """One class and how likely it is."""

    index: int
    label: str
    score: float = Field(
        description="softmax over all classes; of a multi-label model each class's own sigmoid"
    )


class Tokens(BaseModel):
    """How many tokens there are along the forward; at most, where pictures decide that."""

    input: int = Field(description="tokens that enter the first block")
    blocks: list[int] = Field(description="tokens that leave each block")
    final: int


class Timings(BaseModel):
    """Where the time of a request went, in milliseconds."""

    decode: float = Field(description="decoding and preprocessing")
    queue: float = Field(description="waiting for a decoder and for the batch")
    inference: float = Field(description="the forward of the whole batch")
    total: float = Field(description="from the request's headers to its answer")


class MergeMap(BaseModel):
    """What became of the patches of the image."""

    grid: tuple[int, int] = Field(description="patches down and across")
    tokens: list[int] = Field(
        description="for each patch, row by row, the number of the final token that holds it: its "
        "own alone if it was kept, one with others if it was merged; -1: it was dropped"
    )
    dropped: int = Field(default=0, description="patches that were dropped")


class ImageAnswer(BaseModel):
    """What every answer to an image says: what ran, why and what it cost."""

    model: str
    ladder: str = Field(description="what rates mean: the model's ladder that it ran on")
    method: str = Field(description="how tokens were reduced")
    asked_rate: str = Field(
        description="what the request asked for: a rate, `auto`, `cascade` or `budget`"
    )
    asked_budget: float | None = Field(description="the budget; null if none was asked for")
    asked_agreement: float | None = Field(
        description="of a cascade, the agreement that it is for; null: none, or a budget"
    )
    rate: int = Field(
        description="rate that the model ran at: the rung of the ladder; of a cascade's the last"
    )
    rates: list[int] = Field(
        description="all rates that the image ran at, one after the other: of a cascade one or "
        "several"
    )
    reason: str = Field(
        description="`asked`, or why auto chose it: `quality` is the lowest allowed; a higher one "
        "was needed for the `deadline`, the `backlog` or the `load`, or shortly before "
        "(`cooling`); `slack`, with SlackFit. Why a cascade ended there: the answer is `sure`, or "
        "none before was (`unsure`), or there was no time for another run (`deadline`)"
    )
    source_rate: int = Field(
        description="rate that the model was tuned at; 0 if that was on another ladder"
    )
    compensate: bool = Field(description="whether a delta was applied")
    tokens: Tokens
    macs: int = Field(description="multiply-adds of the image, in all its runs")
    macs_ratio: float = Field(description="multiply-adds compared to rate 0")
    timings_ms: Timings
    batch_size: int = Field(description="images that ran together; 0 if it is `cached`")
    cached: bool = Field(
        default=False, description="whether the answer was kept from before, and nothing ran"
    )
    bank_digest: str | None = Field(
        description="content of the model's bank for the ladder; null without one"
    )
    request_id: str


class Classification(ImageAnswer):
    """The answer to a classification."""

    predictions: list[Prediction] = Field(description="most likely first")
    merge_map: MergeMap | None = Field(default=None, description="only if asked for")
    logits: list[float] | None = Field(default=None, description="only if asked for")


class Classifications(BaseModel):
    """The answers to several images, in their order."""

    results: list["Classification | Problem"]


class ClassShare(BaseModel):
    """A class of a picture's pixels, and how many have it."""

    index: int
    label: str
    share: float = Field(description="of all pixels, 0 to 1")


class Segmentation(ImageAnswer):
    """The answer to a request for the class of every pixel."""

    size: tuple[int, int] = Field(description="height and width of the picture in pixels")
    classes: list[ClassShare] = Field(description="those that pixels have, the largest first")
    runs: list[int] = Field(
        description="the pixels row by row, from the top left: by turns a class and how many "
        "pixels have it, also across the ends of rows"
    )


class Segmentations(BaseModel):
    """The answers to several images, in their order."""

    results: list["Segmentation | Problem"]


class Embedding(ImageAnswer):
    """The answer to a request for the features of an image."""

    embedding: list[float] = Field(
        description="pooled features: what the model's head reads; of a CLIP image tower, what "
        "it projects them to"
    )
    normalized: bool = Field(description="whether its length was made 1")


class Embeddings(BaseModel):
    """The answers to several images, in their order."""

    results: list["Embedding | Problem"]


class BatchLine(BaseModel):
    """What became of one image of a batch, and how far the batch is."""

    index: int | None = Field(
        description="place of the image in the request, from 0; null: the error ended the batch, "
        "and images without a line of their own were not classified"
    )
    name: str | None = Field(description="what the request calls it")
    done: int = Field(description="images that are answered, this one included")
    total: int | None = Field(description="images in the request; null while it is still arriving")
    result: Classification | None = None
    error: "Problem | None" = Field(default=None, description="in place of a result")


class RateCost(BaseModel):
    """What a rate costs."""

    rate: int
    tokens: int = Field(description="tokens that leave the last block")
    macs: int = Field(description="multiply-adds of one image")
    macs_ratio: float = Field(description="multiply-adds compared to rate 0")


class BankSummary(BaseModel):
    """Which bank a model is served with."""

    name: str
    digest: str


class Rung(BaseModel):
    """A rate of a ladder: what it does, costs and is worth."""

    rate: int
    tokens: list[int] = Field(
        description="tokens that leave each block; at most, where pictures decide that"
    )
    macs: int = Field(description="multiply-adds of one image")
    share: float = Field(description="multiply-adds compared to rate 0: the least `budget` for it")
    top1: float | None = Field(default=None, description="percent; null if it was not measured")
    agreement: float | None = Field(default=None, description="percent of answers as at rate 0")
    kl: float | None = Field(default=None, description="KL divergence from rate 0, in nats")


class CascadeSummary(BaseModel):
    """A way in which images decide their own compute, as it was calibrated."""

    rates: list[int] = Field(description="of its runs, one after the other")
    agreement: float = Field(description="share of images answered as at rate 0")
    share: float = Field(description="mean multiply-adds compared to rate 0")


class LadderSummary(BaseModel):
    """A ladder that a model is served on: what its rates mean."""

    name: str
    digest: str = Field(description="SHA-256 of what its rates do, whatever it is called")
    method: str = Field(description="how tokens are reduced")
    options: dict[str, bool | int | float | str] = Field(description="of the method")
    max_rate: int
    source_rate: int = Field(
        description="rate that the model was tuned at; 0 if that was on another ladder"
    )
    bank: BankSummary | None = Field(description="what makes up for its rates; null: nothing does")
    rungs: list[Rung]
    cascade: list[CascadeSummary] = Field(
        default=[],
        description="what `rate=cascade` may choose from, the cheapest first; empty: it is not to "
        "be had on this ladder",
    )


class ModelSummary(BaseModel):
    """A served model."""

    name: str
    kind: Kind = Field(default="classification", description="what it does")
    backbone: str
    architecture: str
    classes: int
    dimensions: int | None = Field(
        default=None, description="numbers of an embedding; null: it is not for embedding"
    )
    source_rate: int
    max_rate: int
    bank: BankSummary | None = Field(description="for one of its ladders")
    rates: list[RateCost] = Field(description="those of the default ladder")
    ladders: list[LadderSummary] = Field(description="the default one first")


class Figures(BaseModel):
    """How well a model does at a rate."""

    top1: float | None = Field(default=None, description="percent; null without labels")
    map: float | None = Field(
        default=None, description="mean average precision in percent, of a multi-label model"
    )
    agreement: float = Field(description="percent of answers as at the source rate")
    kl: float = Field(description="KL divergence from the source rate, in nats")


class BankFigures(Figures):
    """How well it does with its bank, and what that changed picture by picture.

    Won and lost are pictures; p is that of the two-sided sign test.
    """

    top1_won: int | None = None
    top1_lost: int | None = None
    top1_p: float | None = None
    agreement_won: int | None = None
    agreement_lost: int | None = None
    agreement_p: float | None = None
    kl_change: float | None = Field(default=None, description="bank less plain")
    kl_change_se: float | None = Field(default=None, description="its standard error")


class EvaluationRow(BaseModel):
    """A model tuned at the source rate and run at the target rate."""

    source: int
    target: int
    gmacs: float
    tokens: int = Field(description="tokens that leave the last block")
    pictures: int
    multiplier: float | None = Field(default=None, description="scale of the bank's delta")
    plain: Figures
    bank: BankFigures | None = None


class EvaluationPictures(BaseModel):
    """What was measured on."""

    name: str
    count: int


class EvaluationLadder(BaseModel):
    """What the rates of an evaluation refer to."""

    name: str
    method: str
    digest: str = Field(description="that of the ladder, by which it is found among the model's")


class Evaluation(BaseModel):
    """What `tocom-train evaluate` measured of a model and `attach` wrote into its folder."""

    model: str
    bank: BankSummary | None
    ladder: EvaluationLadder | None = Field(
        default=None, description="what its rates refer to; null: measured before results said so"
    )
    pictures: EvaluationPictures
    rows: list[EvaluationRow]


class TaskSummary(BaseModel):
    """What was tuned for a task, on a backbone that others may share."""

    name: str
    digest: str
    method: str
    backbone_digest: str = Field(description="SHA-256 of the weights that it was tuned on")


class ModelDetail(ModelSummary):
    """A served model, with all that is known of it."""

    weights_digest: str = Field(description="SHA-256 of the backbone's weights")
    class_names: list[str]
    multi_label: bool = Field(
        False, description="a picture has several classes: all that score more than 0.5 are listed"
    )
    input_size: tuple[int, int, int] = Field(description="channels, height, width")
    crop: float = Field(
        description="share of the picture's shorter side that the model sees, in the middle"
    )
    crop_mode: str = Field(
        description="squash: all of the picture is brought to the size of that share, whatever its "
        "proportions; center: its proportions stay; none: all of it at its own proportions"
    )
    mean: list[float] = Field(description="of each channel, values in 0..1")
    std: list[float]
    multiplier: float | dict[int, float] | None = Field(
        description="in place of the bank's own scale, for all rates or for each, as searched for "
        "this model; null: the bank's own"
    )
    palette: list[tuple[int, int, int]] | None = Field(
        default=None, description="red, green and blue of each class; of segmentation"
    )
    evaluation: Evaluation | None = Field(description="what was measured, if its folder says so")
    task: TaskSummary | None = Field(description="the task on the backbone, if it is one")


class ModelList(BaseModel):
    """All served models, the default one first."""

    models: list[ModelSummary]


class ModelStatus(BaseModel):
    """What a model has to do just now."""

    name: str
    queued: int = Field(description="images that wait for their batch")
    auto_rate: int = Field(
        description="rate that auto chose last on the default ladder; 0 at first"
    )
    bank_digest: str | None


class Status(BaseModel):
    """What the server has to do just now."""

    ready: bool
    uptime_s: float
    images_per_second: float = Field(description="answered, over the last seconds")
    taken: int = Field(description="images taken and not yet answered")
    queued: int = Field(description="of these, images that wait for their batch")
    max_queue: int
    models: list[ModelStatus]


class Health(BaseModel):
    """A server that is well."""

    status: str


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str = Field(description="kind of the error")
    title: str
    status: int
    detail: str = Field(description="what came and what is allowed")
    instance: str
    error: str = Field(description="the same as detail")
    request_id: str
