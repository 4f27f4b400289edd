"""A real server of a tiny model and the stock client of the Open Inference Protocol."""

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from tritonclient.http import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException

from server.app import create_app
from server.models.served import ServedModel
from tests.server.conftest import listening, picture, png, seen

PICTURES = [png(picture(seed)) for seed in range(3)]
HEADER = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def app(settings):
    return create_app(settings.model_copy(update={"max_queue": 32}))


@pytest.fixture(scope="module")
def address(app) -> Iterator[str]:
    with listening(app) as address:
        yield address


@pytest.fixture(scope="module")
def triton(address) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(address) as client:
        yield client


@pytest.fixture(scope="module")
def http(address) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}", timeout=60) as client:
        yield client


def images(*data: bytes, binary: bool = True, shape: list[int] | None = None) -> list[InferInput]:
    """Pictures as the stock client sends them."""
    values = np.array(data, dtype=object).reshape(shape or [len(data)])
    tensor = InferInput("image", list(values.shape), "BYTES")
    return [tensor.set_data_from_numpy(values, binary_data=binary)]


def pixels(values: np.ndarray, binary: bool = True) -> list[InferInput]:
    tensor = InferInput("pixels", list(values.shape), "FP32")
    return [tensor.set_data_from_numpy(values, binary_data=binary)]


def prepared(served: ServedModel) -> np.ndarray:
    """The pictures as the model wants them, [3, 3, 64, 64]."""
    return np.stack([seen(served, data).numpy() for data in PICTURES])


def expected(served: ServedModel, rate: int = 0, compensate: bool = True) -> np.ndarray:
    """What the model says of the pictures in one batch, [3, 10]."""
    with torch.inference_mode():
        outputs = served.at(rate, compensate)(torch.from_numpy(prepared(served)))
    return torch.stack([output.logits for output in outputs]).numpy()


def told(result: InferResult) -> dict:
    return result.get_response()["parameters"]


def refusal(triton: InferenceServerClient, *arguments, **options) -> tuple[str, str]:
    """Status and message of the exception that the stock client raises for inference."""
    with pytest.raises(InferenceServerException) as caught:
        triton.infer(*arguments, **options)
    return caught.value.status(), caught.value.message()
