"""The Open Inference Protocol as the stock client speaks it, with a real server of a tiny model."""

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from server import create_app
from server.images import decode
from server.models import ServedModel
from server.settings import ApiKey
from tests.server.conftest import CLASSES, MAX_RATE, listening, picture, png, problem

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
    return np.stack([served.transform(decode(data, 10**6)).numpy() for data in PICTURES])


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


def test_health(triton):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert triton.is_model_ready("tiny", "1")
    assert not triton.is_model_ready("tiny", "2")
    assert not triton.is_model_ready("huge")


def test_health_of_a_server_that_is_about_to_end(app, triton, http):
    app.state.serving.stopping.set()
    try:
        assert triton.is_server_live()
        assert not triton.is_server_ready()
        assert not triton.is_model_ready("tiny")
        assert "shutting down" in problem(http.get("/v2/health/ready"))
    finally:
        app.state.serving.stopping.clear()


def test_server_metadata(triton):
    metadata = triton.get_server_metadata()
    assert metadata["name"] == "tocom-serve"
    assert metadata["version"]
    assert metadata["extensions"] == [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "model_repository",
        "parameters",
        "statistics",
    ]


@pytest.mark.parametrize("version", ["", "1"])
def test_model_metadata(triton, version):
    assert triton.get_model_metadata("tiny", version) == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "pytorch_timm",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 64, 64]},
        ],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "features", "datatype": "FP32", "shape": [-1, 192]},
        ],
    }


@pytest.mark.parametrize("version", ["", "1"])
def test_model_config(triton, served, version):
    config = triton.get_model_config("tiny", version)
    assert (config["name"], config["max_batch_size"]) == ("tiny", 32)
    assert config["input"] == [
        {"name": "image", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
        {"name": "pixels", "data_type": "TYPE_FP32", "dims": [3, 64, 64], "optional": True},
    ]
    assert [(each["name"], each["dims"]) for each in config["output"]] == [
        ("logits", [10]),
        ("probabilities", [10]),
        ("features", [192]),
    ]
    assert config["dynamic_batching"] == {
        "preferred_batch_size": [16],
        "max_queue_delay_microseconds": 0,
    }
    assert config["parameters"] == {
        "max_rate": {"string_value": str(MAX_RATE)},
        "source_rate": {"string_value": "0"},
        "bank_digest": {"string_value": served.bank.info.digest},
    }


def test_repository(triton):
    ready = {"version": "1", "state": "READY", "reason": ""}
    models = [{"name": "tiny", **ready}, {"name": "bare", **ready}]
    assert triton.get_model_repository_index() == models
    triton.load_model("tiny")
    for refused, message in [
        (lambda: triton.load_model("huge"), r"\[404\] no model is called 'huge'"),
        (lambda: triton.load_model("tiny", config="{}"), r"\[403\] .* load takes no parameters"),
        (lambda: triton.unload_model("tiny"), r"\[403\] .* is served until the server ends"),
        (lambda: triton.unload_model("huge"), r"\[404\] no model is called 'huge'"),
    ]:
        with pytest.raises(InferenceServerException, match=message):
            refused()
    assert triton.is_model_ready("tiny")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_pictures(triton, served, binary, shape):
    sent = PICTURES if binary else [base64.b64encode(data) for data in PICTURES]
    outputs = [InferRequestedOutput("logits", binary_data=binary)]
    inputs = images(*sent, binary=binary, shape=shape)
    result = triton.infer("tiny", inputs, outputs=outputs, request_id="seven")
    response = result.get_response()
    assert (response["model_name"], response["model_version"]) == ("tiny", "1")
    assert response["id"] == "seven"
    assert ("data" in response["outputs"][0]) is not binary
    np.testing.assert_allclose(result.as_numpy("logits"), expected(served), atol=1e-4)


@pytest.mark.parametrize("binary", [True, False])
def test_prepared_pixels(triton, served, binary):
    result = triton.infer("tiny", pixels(prepared(served), binary))
    np.testing.assert_allclose(result.as_numpy("logits"), expected(served), atol=1e-4)


def test_who_names_no_output_gets_all(triton, served):
    result = triton.infer("tiny", images(*PICTURES))
    logits, probabilities = result.as_numpy("logits"), result.as_numpy("probabilities")
    assert [each["name"] for each in result.get_response()["outputs"]] == [
        "logits",
        "probabilities",
        "features",
    ]
    softmax = torch.tensor(logits).softmax(dim=-1).numpy()
    np.testing.assert_allclose(probabilities, softmax, atol=1e-6)
    with torch.inference_mode():
        head = served.backbone.model.head(torch.tensor(result.as_numpy("features"))).numpy()
    np.testing.assert_allclose(head, logits, atol=1e-4)


@pytest.mark.parametrize("rate", [3, "3", 3.0])
@pytest.mark.parametrize("compensate", [True, False])
def test_a_request_chooses_its_rate(triton, served, rate, compensate):
    parameters = {"rate": rate, "compensate": compensate}
    result = triton.infer("tiny", images(*PICTURES), parameters=parameters)
    logits = expected(served, 3, compensate)
    np.testing.assert_allclose(result.as_numpy("logits"), logits, atol=1e-4)
    cost = served.costs[3]
    about = told(result)
    assert 1 <= about.pop("batch_size") <= len(PICTURES)
    assert about == {
        "rate": 3,
        "reason": "asked",
        "source_rate": 0,
        "compensate": compensate,
        "tokens": cost.plan.tokens[-1],
        "macs": cost.macs,
        "bank_digest": served.bank.info.digest,
    }


def test_without_parameters_the_stock_model_runs(triton):
    about = told(triton.infer("bare", images(PICTURES[0])))
    assert (about["rate"], about["compensate"], about["source_rate"]) == (0, False, 2)
    assert "bank_digest" not in about


def test_auto_keeps_to_its_range(triton):
    parameters = {"rate": "auto", "min_rate": 2, "max_rate": "2"}
    about = told(triton.infer("tiny", images(PICTURES[0]), parameters=parameters))
    assert about["rate"] == 2
    assert about["reason"] != "asked"


@pytest.mark.parametrize("binary", [True, False])
def test_classification(triton, binary):
    outputs = [
        InferRequestedOutput("probabilities", binary_data=binary, class_count=3),
        InferRequestedOutput("logits", class_count=99),
    ]
    result = triton.infer("tiny", images(*PICTURES), outputs=outputs)
    plain = triton.infer("tiny", images(*PICTURES))
    best = result.as_numpy("probabilities")
    assert result.get_output("probabilities")["datatype"] == "BYTES"
    assert best.shape == (3, 3)
    assert result.as_numpy("logits").shape == (3, len(CLASSES))
    for row, probabilities in zip(best, plain.as_numpy("probabilities"), strict=True):
        for text, index in zip(row, np.argsort(-probabilities), strict=False):
            value, number, label = (text.decode() if binary else text).split(":")
            assert (int(number), label) == (index, CLASSES[index])
            assert float(value) == pytest.approx(probabilities[index], abs=1e-4)
            assert len(value.partition(".")[2]) == 6


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(triton, served, algorithm):
    result = triton.infer("tiny", images(*PICTURES), request_compression_algorithm=algorithm)
    np.testing.assert_allclose(result.as_numpy("logits"), expected(served), atol=1e-4)


def test_asynchronous_requests(address, served):
    with InferenceServerClient(address, concurrency=4) as triton:
        asked = [triton.async_infer("tiny", images(data)) for data in PICTURES * 4]
        answers = [each.get_result().as_numpy("logits")[0] for each in asked]
    logits = np.tile(expected(served), (4, 1))
    np.testing.assert_allclose(np.stack(answers), logits, atol=1e-4)


def test_a_body_that_is_nothing_but_the_picture(http, served):
    answer = http.post(
        "/v2/models/tiny/versions/1/infer", content=PICTURES[1], headers={HEADER: "0"}
    )
    assert answer.status_code == 200
    result = InferResult.from_response_body(
        answer.content, header_length=int(answer.headers[HEADER])
    )
    np.testing.assert_allclose(result.as_numpy("logits")[0], expected(served)[1], atol=1e-4)


def test_json_without_a_content_type(http, served):
    body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [3, 3, 64, 64]}]}
    body["inputs"][0]["data"] = prepared(served).tolist()
    answer = http.post("/v2/models/tiny/infer", content=json.dumps(body))
    assert answer.headers["content-type"] == "application/json"
    assert HEADER not in answer.headers
    logits = answer.json()["outputs"][0]
    assert (logits["name"], logits["shape"]) == ("logits", [3, 10])
    values = np.reshape(logits["data"], (3, 10))
    np.testing.assert_allclose(values, expected(served), atol=1e-4)


def test_the_answer_tells_where_its_time_went(http):
    answer = http.post("/v2/models/tiny/infer", content=PICTURES[0], headers={HEADER: "0"})
    for stage in ("decode", "queue", "inference", "total"):
        assert f"{stage};dur=" in answer.headers["server-timing"]


@pytest.mark.parametrize(
    ("model", "version", "status", "message"),
    [
        ("huge", "", "404", "no model is called 'huge'; there are: tiny, bare"),
        ("tiny", "2", "404", "the model 'tiny' has no version '2', only '1'"),
    ],
)
def test_unknown_models_and_versions(triton, model, version, status, message):
    assert refusal(triton, model, images(PICTURES[0]), version) == (status, message)
    for ask in (
        triton.get_model_metadata,
        triton.get_model_config,
        triton.get_inference_statistics,
    ):
        with pytest.raises(InferenceServerException, match="404"):
            ask(model, version)


@pytest.mark.parametrize(
    ("parameters", "status", "message"),
    [
        ({"rate": 6}, "422", "runs at the rates 0 to 5, whole numbers, or auto; got rate='6'"),
        ({"rate": "fast"}, "422", "got rate='fast'"),
        ({"rate": 2.5}, "422", "got rate='2.5'"),
        ({"rate": 2, "max_rate": 3}, "422", "max_rate is for rate=auto, and the rate is '2'"),
        ({"rat": 2}, "400", "parameters.rat: Extra inputs are not permitted, got 2"),
        ({"deadline_ms": 0}, "400", "parameters.deadline_ms: Input should be greater than 0"),
    ],
)
def test_parameters_that_are_refused(triton, parameters, status, message):
    got = refusal(triton, "tiny", images(PICTURES[0]), parameters=parameters)
    assert got[0] == status
    assert message in got[1]


ONES = np.ones((1, 3, 64, 64), np.float32)


@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        (
            [InferInput("photo", [1], "BYTES").set_data_from_numpy(np.array([b"x"]))],
            "400",
            "one of the inputs image, pixels is needed, got ['photo']",
        ),
        (
            images(PICTURES[0]) + pixels(ONES),
            "400",
            "one of the inputs image, pixels is needed, got ['image', 'pixels']",
        ),
        (
            [InferInput("pixels", [1], "FP64").set_data_from_numpy(np.ones(1))],
            "400",
            "input 'pixels' must have the datatype FP32, got 'FP64'",
        ),
        (
            pixels(ONES[0]),
            "400",
            "input 'pixels' must have the shape [-1, 3, 64, 64], got [3, 64, 64]",
        ),
        (
            images(*PICTURES, shape=[1, 3]),
            "400",
            "input 'image' must have the shape [-1, 1], got [1, 3]",
        ),
        (
            images(*[b""] * 33),
            "413",
            "a request may have 32 images here, got 33",
        ),
        (
            images("no base64", binary=False),
            "400",
            "image 0: in JSON images are base64, and this is not: ",
        ),
        (
            images(*PICTURES, b"no picture"),
            "415",
            "image 3: the content is not a JPEG, PNG or WebP image",
        ),
        (images(b""), "400", "image 0: the image is empty: it has no bytes"),
        (
            images(PICTURES[0], PICTURES[1][:-500]),
            "422",
            "image 1: the image cannot be decoded: ",
        ),
        (
            pixels(np.concatenate([ONES, ONES * np.nan])),
            "422",
            "image 1: its pixels must be finite numbers",
        ),
        (
            pixels(np.concatenate([ONES, ONES * 3e38])),
            "422",
            "image 1: what the model says of it is not finite; are its pixels normalised?",
        ),
    ],
)
def test_inputs_that_are_refused(triton, inputs, status, message):
    got = refusal(triton, "tiny", inputs)
    assert got[0] == status
    assert got[1].startswith(message)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["scores"], "the outputs are logits, probabilities, features; got 'scores'"),
        (["logits", "logits"], "output 'logits' is asked for more than once"),
    ],
)
def test_outputs_that_are_refused(triton, outputs, message):
    asked = [InferRequestedOutput(name) for name in outputs]
    assert refusal(triton, "tiny", images(PICTURES[0]), outputs=asked) == ("400", message)


def test_features_are_no_classes(triton):
    asked = [InferRequestedOutput("features", class_count=2)]
    status, message = refusal(triton, "tiny", images(PICTURES[0]), outputs=asked)
    assert (status, message) == (
        "400",
        "classification is of logits or probabilities; features are no classes",
    )


def test_a_short_body_is_a_problem(http):
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    tensor["parameters"] = {"binary_data_size": 9}
    text = json.dumps({"inputs": [tensor]})
    answer = http.post(
        "/v2/models/tiny/infer", content=text + "tail", headers={HEADER: str(len(text))}
    )
    assert answer.status_code == 400
    assert "9 bytes from 0 on go beyond the 4 bytes behind the JSON" in problem(answer)


def test_a_bomb_is_refused(http):
    bomb = gzip.compress(bytes(2**24))
    answer = http.post("/v2/models/tiny/infer", content=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413
    assert problem(answer).startswith("the inflated body is larger than the 1,048,576 bytes")


def test_a_full_server_is_unavailable(app, address, triton):
    engine = app.state.serving.engine
    release = threading.Event()
    held = engine.call(release.wait)
    first = InferenceServerClient(address)  # its only connection will be waiting
    try:
        taken = first.async_infer("tiny", images(*PICTURES))
        while engine.load().taken < len(PICTURES):
            release.wait(0.01)
        status, message = refusal(triton, "tiny", images(*[PICTURES[0]] * 30))
        assert status == "503"
        assert message == "3 of 32 places in the queue are taken; 30 would be needed"
        parameters = {"deadline_ms": 50}
        status, message = refusal(triton, "tiny", images(PICTURES[0]), parameters=parameters)
        assert status == "504"
        assert message == "image 0: the deadline passed before the answer was there"
        assert refusal(triton, "tiny", images(PICTURES[0]), timeout=50_000)[0] == "504"
    finally:
        release.set()
    assert held.result()
    assert taken.get_result().as_numpy("logits").shape == (3, 10)
    first.close()


def test_statistics(settings):
    with listening(create_app(settings)) as address, InferenceServerClient(address) as triton:
        (before,) = triton.get_inference_statistics("tiny", "1")["model_stats"]
        assert (before["last_inference"], before["inference_count"]) == (0, 0)
        for number in (1, 3):
            triton.infer("tiny", images(*PICTURES[:number]))
        refusal(triton, "tiny", images(b"no picture"))
        triton.infer("bare", images(PICTURES[0]))
        tiny, bare = triton.get_inference_statistics()["model_stats"]
        assert triton.get_inference_statistics("bare")["model_stats"] == [bare]
    assert (tiny["name"], tiny["version"], bare["name"]) == ("tiny", "1", "bare")
    assert (tiny["inference_count"], bare["inference_count"]) == (4, 1)
    assert 2 <= tiny["execution_count"] <= 4
    assert tiny["last_inference"] > 10**12
    stats = tiny["inference_stats"]
    counts = {name: value["count"] for name, value in stats.items()}
    assert counts == {
        "success": 2,
        "fail": 1,
        "queue": 2,
        "compute_input": 2,
        "compute_infer": 2,
        "compute_output": 2,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    stages = ("queue", "compute_input", "compute_infer", "compute_output")
    assert all(stats[stage]["ns"] > 0 for stage in stages)
    assert stats["compute_infer"]["ns"] <= stats["success"]["ns"]
    batches = [each["compute_infer"]["count"] for each in tiny["batch_stats"]]
    assert sum(batches) == tiny["execution_count"]


def test_keys_are_asked_for_and_charged_by_the_image(settings):
    key = ApiKey(name="alice", key="a key of sixteen".replace(" ", "-"), rate_limit=0.001, burst=4)
    headers = {"X-API-Key": key.key.get_secret_value()}
    app = create_app(settings.model_copy(update={"api_keys": (key,)}))
    with listening(app) as address, InferenceServerClient(address) as triton:
        assert triton.is_model_ready("tiny")
        assert refusal(triton, "tiny", images(PICTURES[0]))[0] == "401"
        triton.infer("tiny", images(*PICTURES), headers=dict(headers))
        triton.infer("tiny", images(PICTURES[0]), headers=dict(headers))
        status, message = refusal(triton, "tiny", images(PICTURES[0]), headers=dict(headers))
        assert status == "429"
        assert "the key 'alice' allows 0.001 images a second, 4 at once" in message


def test_the_example_of_the_guide_runs(address, capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    guide = (root / "docs" / "open-inference-protocol.md").read_text()
    (example,) = re.findall(r"^```text\n(from .*?)^```", guide, re.M | re.S)
    # As written it is for the model that the server has by default.
    for ours, theirs in {
        "localhost:8000": address,
        "caltech101": "tiny",
        '"rate": 8': '"rate": 4',
    }.items():
        assert ours in example
        example = example.replace(ours, theirs)
    exec(example, {})
    best, about = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[\[(b'\d\.\d{6}:\d:thing \d' ?){3}\]\]", best)
    assert "'rate': 4" in about


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def either(*usual) -> st.SearchStrategy:
    return st.sampled_from(usual) | ANYTHING


INPUTS = st.fixed_dictionaries(
    {"name": either("image", "pixels"), "datatype": either("BYTES", "FP32")},
    optional={
        "shape": either([1], [2], [1, 1], [1, 3, 64, 64], [2**40]),
        "data": either([""], [0.5], ["aGk="]),
        "parameters": either({"binary_data_size": 8}),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(INPUTS, min_size=1, max_size=2) | ANYTHING},
    optional={
        "id": either("a"),
        "parameters": st.dictionaries(
            st.sampled_from(("rate", "timeout", "min_rate", "compensate", "binary_data_output")),
            either("auto", 0, 5),
        ),
        "outputs": either([{"name": "logits", "parameters": {"classification": 2}}]),
    },
)


@given(REQUESTS, st.binary(max_size=16), st.integers(-2, 2) | st.none())
def test_no_request_is_an_error_of_the_server(client, request_, behind, shift):
    text = json.dumps(request_).encode()
    headers = {} if shift is None else {HEADER: str(len(text) + shift)}
    answer = client.post("/v2/models/tiny/infer", content=text + behind, headers=headers)
    assert answer.status_code in (200, 400, 413, 415, 422, 503, 504)
    if answer.status_code != 200:
        assert problem(answer)


@given(st.binary(), st.sampled_from(("", "0", "7", "x")), st.sampled_from(("", "gzip", "br")))
def test_no_junk_is_an_error_of_the_server(client, body, length, encoding):
    headers = {HEADER: length, "Content-Encoding": encoding}
    answer = client.post("/v2/models/tiny/infer", content=body, headers=headers)
    assert 400 <= answer.status_code < 500
    assert problem(answer)
