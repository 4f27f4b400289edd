"""The JSON of `/v1/embeddings`, as OpenAI's clients send and read it, with images as input.

An image is a data: URI, alone or as the `image_url` part of a message. Text is not read.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, FailFast, Field, model_validator

from server.inference.query import Entry, JsonRateQuery, ModelQuery
from server.v1.uploads import from_base64
from server.web.fetching import URL


def _file_or_address(text: Any) -> Any:
    """Return the file that a data: URI holds; an address is left as it is."""
    if not isinstance(text, str) or URL.match(text):
        return text
    if not text.startswith("data:"):
        raise ValueError(
            "images are embedded here, not text: expected a data: URI "
            f"(data:image/jpeg;base64,...), got {text[:40]!r}"
        )
    return from_base64(text)


#: The file of an image; where it lies elsewhere, its address.
FileOrAddress = Annotated[
    bytes | str, BeforeValidator(_file_or_address, json_schema_input_type=str)
]


class ImageURL(Entry):
    """Where an image is."""

    url: FileOrAddress = Field(description="a data: URI, or a URL that this server may fetch")
    detail: Literal["auto", "low", "high"] | None = Field(
        default=None, description="changes nothing: all images get the size that the model wants"
    )


class ImagePart(Entry):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(Entry):
    """A message of a chat, as vLLM's clients wrap an image."""

    role: str = Field(max_length=40)
    content: Annotated[list[ImagePart], FailFast()] = Field(min_length=1)


def _as_part(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": "image_url", "image_url": {"url": value}}
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


#: A text alone, or the part of a message that it stands for.
InputPart = Annotated[ImagePart, BeforeValidator(_as_part, json_schema_input_type=str | ImagePart)]


class EmbeddingsRequest(JsonRateQuery, ModelQuery):
    """A request for embeddings: what OpenAI has, and what is asked for of an image here."""

    input: Annotated[
        list[InputPart],
        FailFast(),
        BeforeValidator(_as_list, json_schema_input_type=str | ImagePart | list[str | ImagePart]),
    ] = Field(default_factory=list, min_length=1, description="one image, or a list of them")
    messages: Annotated[list[Message], FailFast()] = Field(
        default_factory=list,
        min_length=1,
        description="in place of `input`: a chat that holds one image",
    )
    modality: Literal["image"] = Field(default="image", description="what `input` is")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="numbers, or base64 of little-endian float32"
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="only the model's own: features cannot be cut short"
    )
    user: str | None = Field(default=None, max_length=4096, description="not used")
    normalize: bool = Field(
        default=True, description="scale to length 1: a dot product is the cosine then"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "EmbeddingsRequest":
        if bool(self.input) == bool(self.messages):
            raise ValueError("one of input and messages must be there, and only one")
        if self.messages and (images := len(self.images)) != 1:
            raise ValueError(
                f"messages get one embedding, of one image, and these hold {images}: send several "
                "as a list in input"
            )
        return self

    @property
    def images(self) -> list[bytes | str]:
        """The images, in their order: files, or addresses of files."""
        parts = [*self.input, *(part for message in self.messages for part in message.content)]
        return [part.image_url.url for part in parts]


class EmbeddingItem(BaseModel):
    """The features of an image, what ran for it and what that cost."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="place of the image in the request")
    embedding: list[float] | str = Field(description="numbers, or base64 of them")
    ladder: str = Field(description="what rates mean")
    rate: int = Field(description="rate that the model ran at; of several the last one")
    rates: list[int] = Field(description="all that it ran at, one after the other")
    reason: str = Field(description="`asked`, why auto chose it, or why a cascade ended there")
    macs: int = Field(description="multiply-adds of all its runs")
    macs_ratio: float = Field(description="multiply-adds compared to rate 0")
    bank_digest: str | None = Field(description="content of the model's bank; null without one")
    cached: bool = Field(description="whether the answer was kept from before, and nothing ran")


class Usage(BaseModel):
    """What a request is counted as."""

    prompt_tokens: int = Field(description="tokens that entered the model, of all images")
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The embeddings of all images of a request, in their order."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class OpenAIError(BaseModel):
    """What went wrong, within an `OpenAIProblem`."""

    message: str = Field(description="what came and what is allowed")
    type: str
    param: str | None
    code: str | None = Field(description="kind of the error")


class OpenAIProblem(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    error: OpenAIError
