"""The Open Inference Protocol: what is refused, counted and charged, and what junk does."""

import gzip
import json
import re
import threading
from pathlib import Path

import gevent
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from server.app import create_app
from server.settings import ApiKey
from tests.server.conftest import listening, problem
from tests.server.oip.conftest import HEADER, PICTURES, images, pixels, refusal


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


@pytest.mark.parametrize("opening", [b"[", b'{"inputs":'])
def test_a_body_that_is_nested_too_deeply_is_refused(http, opening):
    answer = http.post("/v2/models/tiny/infer", content=opening * 10**5)
    assert answer.status_code == 400
    assert "body: Invalid JSON: recursion limit exceeded" in problem(answer)


def test_parameters_of_a_load_are_few(http):
    answer = http.post("/v2/repository/models/tiny/load", content=b"[" * 2**15)
    assert answer.status_code == 413
    answer = http.post("/v2/repository/models/tiny/load", content=b"[" * 1000)
    assert answer.status_code == 400


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
            gevent.sleep(0.01)  # the client sends in a greenlet of this thread
        status, message = refusal(triton, "tiny", images(*[PICTURES[0]] * 30))
        assert status == "503"
        assert message == "3 of 32 places in the queue are taken; 30 would be needed"
        parameters = {"deadline_ms": 1000}
        status, message = refusal(triton, "tiny", images(PICTURES[0]), parameters=parameters)
        assert status == "504"
        assert "the deadline passed before the" in message
        assert refusal(triton, "tiny", images(PICTURES[0]), timeout=1_000_000)[0] == "504"
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
    root = Path(__file__).parents[3]
    monkeypatch.chdir(root)
    guide = (root / "docs" / "open-inference-protocol.md").read_text()
    (example,) = re.findall(r"^```text\n(from .*?)^```", guide, re.M | re.S)
    # As written it is for the model that the server has by default.
    for ours, theirs in {
        "localhost:8000": address,
        "imagenet": "tiny",
        '"rate": 2': '"rate": 4',
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


def test_what_a_body_inflates_to_is_counted(app, http, monkeypatch):
    budget = app.state.serving.budget
    body = gzip.compress(
        json.dumps(
            {
                "inputs": [
                    {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["x" * 10**6]}
                ]
            }
        ).encode()
    )
    assert len(body) < 10**4
    monkeypatch.setattr(budget, "limit", budget.held + 10**6)
    answer = http.post("/v2/models/tiny/infer", content=body, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 503
    assert "of the 1,000,000 bytes that they may have together" in problem(answer)
    monkeypatch.setattr(budget, "limit", budget.held + 2 * 10**6)
    answer = http.post("/v2/models/tiny/infer", content=body, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415  # it is no picture
    assert budget.held == 0
