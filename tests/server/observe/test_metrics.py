"""What is counted, and what the counters say over HTTP."""

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.models.loading import load_model
from server.models.registry import Registry
from server.models.served import AutoWork
from server.observe.metrics import Metrics
from tests.server.conftest import MAX_RATE
from tests.server.segmenters import streets

TINY = {"model": "tiny", "ladder": "tome"}
SIZE = (3, 64, 64)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(served, clock):
    return Metrics(Registry([served]), slo=0.2, clock=clock)


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"tocom_{name}", labels)


def test_a_batch_counts_its_images_and_their_tokens(metrics, served):
    metrics.ran(served.at(0, True), "asked", (2, *SIZE), 0.01, [0.1, 0.3])
    metrics.ran(served.at(2, True), "asked", (3, *SIZE), 0.01, [0, 0, 0])
    assert value(metrics, "images_total", **TINY, rate="0") == 2
    assert value(metrics, "images_total", **TINY, rate="2") == 3
    # 16 patches and a class token enter the first of 3 blocks; 2 go in each.
    assert value(metrics, "tokens_total", **TINY) == 2 * (3 * 17) + 3 * (17 + 15 + 13)
    assert value(metrics, "batch_size_sum") == 5
    assert value(metrics, "batch_size_count") == 2
    assert value(metrics, "queue_duration_seconds_count") == 5
    assert value(metrics, "queue_duration_seconds_sum") == pytest.approx(0.4)
    assert value(metrics, "stage_duration_seconds_sum", stage="inference") == pytest.approx(0.02)


def test_a_picture_of_several_windows_counts_the_tokens_of_all(tiny, tmp_path):
    segmenter = load_model(streets(tiny, tmp_path))
    metrics = Metrics(Registry([segmenter]), slo=0.2)
    metrics.ran(segmenter.at(2, True), "asked", (2, 3, 64, 96), 0.01, [0, 0])
    assert value(metrics, "images_total", model="streets", ladder="tome", rate="2") == 2
    # Two windows of 64 pixels side by side.
    assert value(metrics, "tokens_total", model="streets", ladder="tome") == 2 * 2 * (17 + 15 + 13)


def test_only_rates_that_the_server_chose_are_its_decisions(metrics, served):
    metrics.ran(served.at(4, True), "asked", (8, *SIZE), 0.01, [0] * 8)
    metrics.ran(served.at(1, True), "load", (1, *SIZE), 0.01, [0])
    metrics.ran(served.at(5, True), "load", (3, *SIZE), 0.01, [0] * 3)
    assert value(metrics, "rate_decisions_total", reason="load") == 2
    assert value(metrics, "rate_decisions_total", reason="quality") == 0
    assert value(metrics, "rate_decisions_total", reason="asked") is None
    assert value(metrics, "auto_rate_count", **TINY) == 4
    assert value(metrics, "auto_rate_sum", **TINY) == 1 + 3 * 5


def test_all_reasons_begin_at_zero(metrics):
    for reason in ("quality", "deadline", "backlog", "load", "cooling", "slack"):
        assert value(metrics, "rate_decisions_total", reason=reason) == 0


def test_what_does_not_come_out_is_counted_by_its_stage(metrics, served):
    work = AutoWork(served, 0, MAX_RATE, compensate=True)
    metrics.decoded(work, 0.25)
    metrics.failed(work, "decode")
    metrics.missed(work, "queue")
    metrics.missed(work, "queue")
    metrics.cancelled(work)
    assert value(metrics, "stage_duration_seconds_sum", stage="decode") == 0.25
    assert value(metrics, "failed_total", stage="decode") == 1
    assert value(metrics, "failed_total", stage="inference") == 0
    assert value(metrics, "deadline_missed_total", stage="queue") == 2
    assert value(metrics, "cancelled_total") == 1


def test_a_request_is_counted_by_model_rate_and_code(metrics):
    metrics.answered("tiny", "tome", 3, 200, 0.15)
    metrics.answered("tiny", "tome", "auto", 503, None)
    assert value(metrics, "requests_total", **TINY, rate="3", code="200") == 1
    assert value(metrics, "requests_total", **TINY, rate="auto", code="503") == 1
    assert value(metrics, "request_duration_seconds_count", **TINY, rate="3") == 1
    assert value(metrics, "request_duration_seconds_count", **TINY, rate="auto") is None


def test_the_objective_is_a_bound_of_the_histogram(metrics):
    metrics.answered("tiny", "tome", 3, 200, 0.15)
    metrics.answered("tiny", "tome", 3, 200, 0.25)
    labels = TINY | {"rate": "3"}
    assert value(metrics, "request_duration_seconds_bucket", le="0.2", **labels) == 1


@pytest.mark.parametrize(
    ("model", "ladder", "rate", "counted"),
    [
        ("nix", "tome", 3, ("", "", "")),
        ("tiny", "nix", 3, ("", "", "")),
        (None, None, None, ("", "", "")),
        ("tiny", "tome", None, ("tiny", "tome", "")),
        ("tiny", "tome", MAX_RATE + 1, ("tiny", "tome", "")),
        ("tiny", "tome", "03", ("tiny", "tome", "")),
    ],
)
def test_what_is_not_served_makes_no_series_of_its_own(metrics, model, ladder, rate, counted):
    metrics.answered(model, ladder, rate, 422, 0.1)
    labels = dict(zip(("model", "ladder", "rate"), counted, strict=True))
    assert value(metrics, "requests_total", code="422", **labels) == 1


def test_servers_of_one_process_count_apart(metrics, served):
    other = Metrics(Registry([served]), slo=0.2)
    other.swapped("ok")
    assert value(other, "swaps_total", result="ok") == 1
    assert value(metrics, "swaps_total", result="ok") == 0


def test_images_a_second_are_those_of_the_last_seconds(metrics, served, clock):
    assert metrics.images_per_second() == 0
    for _ in range(600):
        clock.now += 0.1
        metrics.ran(served.at(0, True), "asked", (2, *SIZE), 0.01, [0, 0])
    assert metrics.images_per_second() == pytest.approx(20, rel=0.02)
    clock.now += 60
    assert metrics.images_per_second() == pytest.approx(0, abs=0.1)


def samples(client):
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_prometheus_reads_what_the_server_did_and_is(settings, photo):
    with TestClient(create_app(settings)) as client:
        assert not any(name == "tocom_images_total" for name, *_ in samples(client))
        client.post("/v1/classify?rate=2", files={"file": photo})
        client.post("/v1/classify?rate=auto&model=bare", files={"file": photo})
        client.post("/v1/classify?rate=nix", files={"file": photo})
        client.get("/nix")
        after = samples(client)
        digest = client.get("/v1/models/tiny").json()["bank"]["digest"]
    assert after["tocom_requests_total", "200", "tome", "tiny", "2"] == 1
    assert after["tocom_requests_total", "200", "tome", "bare", "0"] == 1
    assert sum(v for key, v in after.items() if key[0] == "tocom_requests_total") == 3
    assert after["tocom_images_total", "tome", "tiny", "2"] == 1
    assert after["tocom_auto_rate_count", "tome", "bare"] == 1
    assert after["tocom_auto_rate_count", "tome", "tiny"] == 0
    assert after["tocom_model_info", digest, "tiny"] == 1
    assert after["tocom_model_info", "", "bare"] == 1
    assert after["tocom_queue_depth", "tiny"] == 0
    assert after["tocom_inflight_images",] == 0
    assert after["tocom_inflight_requests",] == 0
    assert after["tocom_ready",] == 1
