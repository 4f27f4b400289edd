"""The JSON of the Open Inference Protocol, as far as it is spoken here.

Requests may hold nothing that is not read: a misspelt parameter must not be answered as if it
were not there.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from server.inference.query import Entry, JsonRateQuery

#: Of every model; what changes about one is its bank, which answers name by its digest.
VERSION = "1"

#: Inputs or outputs in a request, and dimensions of one: more than any model here has.
MAX_TENSORS = 8
MAX_DIMENSIONS = 8


class InferQuery(JsonRateQuery):
    """The parameters of a request for inference."""

    timeout: int = Field(
        default=0,
        ge=0,
        le=600_000_000,
        description="deadline in microseconds, in place of `deadline_ms`; 0: none",
    )
    binary_data_output: bool = Field(
        default=False, description="whether outputs that do not say so themselves are binary"
    )

    @model_validator(mode="after")
    def _one_deadline(self) -> "InferQuery":
        if self.timeout and self.deadline_ms is not None:
            raise ValueError("deadline_ms and timeout are the same: only one may be there")
        if self.timeout:
            self.deadline_ms = max(1, self.timeout // 1000)
        return self


class InputParameters(Entry):
    """How an input is sent; clients note there what else they like."""

    model_config = ConfigDict(extra="ignore")

    binary_data_size: int | None = Field(
        default=None, ge=0, description="bytes that it has behind the JSON, in place of `data`"
    )


class RequestInput(Entry):
    """A tensor that is sent."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=1)]], FailFast()] = Field(
        min_length=1, max_length=MAX_DIMENSIONS
    )
    datatype: str
    parameters: InputParameters = Field(default_factory=InputParameters)
    data: list[Any] | None = Field(default=None, description="its elements, flat or nested")


class OutputParameters(Entry):
    """In which form an output is wanted."""

    binary_data: bool | None = Field(
        default=None, description="whether behind the JSON; default: `binary_data_output`"
    )
    classification: int = Field(
        default=0, ge=0, description="as strings of that many highest values; 0: as it is"
    )


class RequestedOutput(Entry):
    """A tensor that is wanted."""

    name: str
    parameters: OutputParameters = Field(default_factory=OutputParameters)


class InferRequest(Entry):
    """A request for inference."""

    id: str | None = Field(default=None, max_length=1000, description="comes back in the answer")
    parameters: InferQuery = Field(default_factory=InferQuery)
    inputs: Annotated[list[RequestInput], FailFast()] = Field(
        min_length=1,
        max_length=MAX_TENSORS,
        description="`image` or, but for segmentation, `pixels`",
    )
    outputs: Annotated[list[RequestedOutput], FailFast()] = Field(
        default=[], max_length=MAX_TENSORS, description="none: all that the model has"
    )


class BinarySize(BaseModel):
    """How an output is sent."""

    binary_data_size: int = Field(description="bytes that it has behind the JSON")


class ResponseOutput(BaseModel):
    """A tensor that is answered."""

    name: str
    datatype: str
    shape: list[int]
    parameters: BinarySize | None = Field(default=None, description="only of binary ones")
    data: list[int] | list[float] | list[str] | None = Field(
        default=None, description="flat; only in JSON"
    )


class InferResponse(BaseModel):
    """An answer to a request for inference."""

    model_name: str
    model_version: str = VERSION
    id: str | None = Field(default=None, description="the request's, if it had one")
    parameters: dict[str, int | float | bool | str] = Field(
        description="what ran, why and its cost"
    )
    outputs: list[ResponseOutput]


class ServerLive(BaseModel):
    """A server that lives."""

    live: bool


class ServerReady(BaseModel):
    """A server that is ready."""

    ready: bool


class ModelReady(ServerReady):
    """A model that is ready."""

    name: str


class ServerMetadata(BaseModel):
    """What a server is."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """What a model takes or gives."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1: the number of images")


class ModelMetadata(BaseModel):
    """What a model is."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata] = Field(description="one of them is sent")
    outputs: list[TensorMetadata]


class ConfiguredTensor(BaseModel):
    """What a model takes or gives, of one image."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool = Field(default=False, description="whether it may be left out")


class DynamicBatching(BaseModel):
    """How requests become batches."""

    preferred_batch_size: list[int] = Field(description="images that run together at most")
    max_queue_delay_microseconds: int


class ConfigParameter(BaseModel):
    """A further setting."""

    string_value: str


class ModelConfig(BaseModel):
    """How a model is served."""

    name: str
    platform: str
    max_batch_size: int = Field(description="images that one request may have")
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    dynamic_batching: DynamicBatching
    parameters: dict[str, ConfigParameter]


class RepositoryEntry(BaseModel):
    """A model among all."""

    name: str
    version: str
    state: str
    reason: str


class RepositoryRequest(Entry):
    """What to load a model with, or to unload beside it."""

    parameters: dict[str, Any] = Field(default_factory=dict)


class Duration(BaseModel):
    """How often something was done and how long that took."""

    count: int = 0
    ns: int = Field(default=0, description="nanoseconds in all")

    def add(self, seconds: float, count: int = 1) -> None:
        """Take note of something that was done."""
        self.count += count
        self.ns += round(1e9 * seconds)


class InferenceStatistics(BaseModel):
    """Where the time of requests went. The slowest image of a request stands for all."""

    success: Duration = Field(default_factory=Duration)
    fail: Duration = Field(default_factory=Duration)
    queue: Duration = Field(default_factory=Duration, description="waiting")
    compute_input: Duration = Field(default_factory=Duration, description="decoding")
    compute_infer: Duration = Field(default_factory=Duration, description="in the model")
    compute_output: Duration = Field(default_factory=Duration, description="writing the answer")
    cache_hit: Duration = Field(default_factory=Duration, description="there is no cache")
    cache_miss: Duration = Field(default_factory=Duration, description="there is no cache")


class BatchStatistics(BaseModel):
    """Batches of one size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(BaseModel):
    """What a model has done for the protocol's requests."""

    name: str
    version: str = VERSION
    last_inference: int = Field(default=0, description="milliseconds since 1970; 0: never")
    inference_count: int = Field(default=0, description="images")
    execution_count: int = Field(default=0, description="batches")
    inference_stats: InferenceStatistics = Field(default_factory=InferenceStatistics)
    batch_stats: list[BatchStatistics] = []


class StatisticsList(BaseModel):
    """Statistics of models."""

    model_stats: list[ModelStatistics]
