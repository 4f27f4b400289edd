"""The Open Inference Protocol as the stock client speaks it to a model of segmentation."""

import base64
from collections.abc import Iterator
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image
from tritonclient.http import InferenceServerClient, InferRequestedOutput

from server.app import create_app
from server.oip import tensors
from tests.server.conftest import MAX_RATE, listening, picture, png, problem
from tests.server.oip.conftest import images, pixels, refusal, told
from tests.server.segmenters import streets

PICTURES = [png(picture(seed, 80, 64)) for seed in range(3)]


@pytest.fixture(scope="module")
def address(settings, tiny, tmp_path_factory) -> Iterator[str]:
    models = {"models": (tiny, streets(tiny, tmp_path_factory.mktemp("tasks")))}
    with listening(create_app(settings.model_copy(update={"max_pixels": 20_000, **models}))) as at:
        yield at


def classes(http: httpx.Client, data: bytes, rate: int = 0) -> np.ndarray:
    """The class of each pixel as the server's own interface says it."""
    answer = http.post("/v1/segment", params={"rate": rate, "format": "png"}, content=data)
    with Image.open(BytesIO(answer.content)) as image:
        return np.asarray(image)


def test_its_tensors_are_described(triton: InferenceServerClient):
    metadata = triton.get_model_metadata("streets")
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}]
    assert metadata["outputs"] == [{"name": "classes", "datatype": "UINT8", "shape": [-1, -1, -1]}]
    config = triton.get_model_config("streets")
    assert [(each["name"], each["data_type"], each["dims"]) for each in config["output"]] == [
        ("classes", "TYPE_UINT8", [-1, -1])
    ]
    assert config["parameters"]["max_rate"] == {"string_value": str(MAX_RATE)}
    assert triton.is_model_ready("streets")


@pytest.mark.parametrize("binary", [True, False])
def test_every_pixel_of_some_pictures_has_its_class(triton, http, binary):
    sent = PICTURES if binary else [base64.b64encode(data) for data in PICTURES]
    outputs = [InferRequestedOutput("classes", binary_data=binary)]
    result = triton.infer(
        "streets", images(*sent, binary=binary), outputs=outputs, parameters={"rate": 3}
    )
    response = result.get_response()
    assert (response["outputs"][0]["datatype"], response["outputs"][0]["shape"]) == (
        "UINT8",
        [3, 64, 80],
    )
    found = result.as_numpy("classes")
    assert found.dtype == np.uint8
    for own, data in zip(found, PICTURES, strict=True):
        # Another rounding may decide a pixel between two classes that are as likely.
        assert (own == classes(http, data, 3)).mean() > 0.999
    answer = http.post("/v1/segment", params={"rate": 3}, content=PICTURES[0]).json()
    ran = told(result)
    for name in ("ladder", "rate", "macs", "macs_ratio", "bank_digest"):
        assert ran[name] == answer[name]
    all_of_them = triton.infer("streets", images(PICTURES[0]))
    assert [each["name"] for each in all_of_them.get_response()["outputs"]] == ["classes"]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (
            images(PICTURES[0], png(picture(0, 40, 30))),
            {},
            r"must be of one size, got 40 x 30 and 80 x 64 pixels",
        ),
        (images(*PICTURES, *PICTURES[:1]), {}, "have 20,480 pixels together; at most 20,000"),
        (images(PICTURES[0], b"no picture"), {}, "image 1: the content is not a JPEG"),
        (pixels(np.zeros((1, 3, 64, 64), np.float32)), {}, "one of the inputs image is needed"),
        (
            images(PICTURES[0]),
            {"outputs": [InferRequestedOutput("logits")]},
            "the outputs are classes; got 'logits'",
        ),
        (
            images(PICTURES[0]),
            {"outputs": [InferRequestedOutput("classes", class_count=2)]},
            "classes are of pixels",
        ),
        (images(PICTURES[0]), {"parameters": {"rate": 6}}, "runs at the rates 0 to 5"),
    ],
)
def test_what_cannot_be_is_refused(triton, inputs, options, message):
    _, said = refusal(triton, "streets", inputs, **options)
    assert message in said


def test_json_has_the_classes_of_fewer_pixels_than_bytes_have(triton, monkeypatch):
    monkeypatch.setattr(tensors, "JSON_PIXELS", 2 * 64 * 80)
    for binary, count in ((True, 3), (False, 2)):
        outputs = [InferRequestedOutput("classes", binary_data=binary)]
        result = triton.infer("streets", images(*PICTURES[:count]), outputs=outputs)
        assert result.as_numpy("classes").shape == (count, 64, 80)
    outputs = [InferRequestedOutput("classes", binary_data=False)]
    status, said = refusal(triton, "streets", images(*PICTURES), outputs=outputs)
    assert status == "413"
    assert "at most 10,240 are allowed in JSON: ask for binary output" in said


def test_in_json_a_picture_is_base64(http):
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["?"]}]}
    answer = http.post("/v2/models/streets/infer", json=body)
    assert answer.status_code == 400
    assert "in JSON images are base64" in problem(answer)
