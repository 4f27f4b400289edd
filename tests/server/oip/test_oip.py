"""The Open Inference Protocol as the stock client speaks it: what is answered."""

import base64
import json

import numpy as np
import pytest
import torch
from tritonclient.http import InferenceServerClient, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from tests.server.conftest import CLASSES, MAX_RATE, problem
from tests.server.oip.conftest import HEADER, PICTURES, expected, images, pixels, prepared, told


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
        "ladders": {"string_value": "tome"},
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
        "ladder": "tome",
        "method": "tome",
        "rate": 3,
        "reason": "asked",
        "source_rate": 0,
        "compensate": compensate,
        "tokens": cost.plan.tokens[-1],
        "macs": cost.macs,
        "macs_ratio": round(served.share(3), 4),
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
