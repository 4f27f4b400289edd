"""Spans as a collector would get them."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from server.models.registry import Registry
from server.observe import tracing
from server.observe.metrics import Metrics
from server.observe.notes import note
from server.observe.requests import RequestLog
from server.settings import Settings
from server.web.middleware import RequestId
from tocom import ConfigError

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (*tracing.ENDPOINTS, *tracing.PROTOCOLS, "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def application(provider, served):
    app = FastAPI(telemetry=tracing.telemetry(provider))

    @app.post("/classify/{name}")
    async def classify(request: Request, name: str) -> str:
        note(request, model="tiny", rate=2, reason="load", bank_digest="d1g", batch_size=4)
        note(request, decode_ms=3.5, queue_ms=0.25, inference_ms=9.0)
        return "done"

    @app.get("/readyz")
    async def readyz() -> str:
        return "ready"

    app.add_middleware(tracing.Attributes)
    app.add_middleware(RequestLog, metrics=Metrics(Registry([served]), slo=0.5))
    app.add_middleware(RequestId)
    return TestClient(app)


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def client(exporter, served):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return application(provider, served)


def test_a_request_is_one_span_that_says_what_ran_and_why_and_how_long_it_took(client, exporter):
    client.post("/classify/a")
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /classify/{name}"
    assert span.kind is SpanKind.SERVER
    own = {name: v for name, v in span.attributes.items() if name.startswith("tocom.")}
    assert own == {
        "tocom.model": "tiny",
        "tocom.rate": 2,
        "tocom.reason": "load",
        "tocom.bank_digest": "d1g",
        "tocom.batch_size": 4,
        "tocom.decode_ms": 3.5,
        "tocom.queue_ms": 0.25,
        "tocom.inference_ms": 9.0,
    }


def test_the_trace_of_a_caller_goes_on(client, exporter):
    client.post("/classify/a", headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == CALLER


def test_what_a_caller_does_not_sample_is_not_traced(client, exporter):
    client.post("/classify/a", headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    assert exporter.get_finished_spans() == ()


def test_a_request_that_ran_nothing_has_nothing_of_ours(client, exporter):
    client.get("/nix")
    (span,) = exporter.get_finished_spans()
    assert span.attributes["http.response.status_code"] == 404
    assert not any(name.startswith("tocom.") for name in span.attributes)


def test_probes_are_not_traced(client, exporter):
    client.get("/readyz")
    assert exporter.get_finished_spans() == ()


def test_the_log_names_the_trace(client, caplog):
    with caplog.at_level("INFO", "server"):
        client.post("/classify/a", headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    (record,) = caplog.records
    assert record.args["trace_id"] == TRACE


def test_without_a_provider_requests_are_answered_alike(served, caplog):
    with caplog.at_level("INFO", "server"):
        assert application(None, served).post("/classify/a").json() == "done"
    assert "trace_id" not in caplog.records[0].args


def test_nothing_is_traced_unless_asked_for(monkeypatch):
    assert tracing.provider(Settings()) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert tracing.provider(Settings(otel=False)) is None


def test_without_the_package_the_wish_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(ConfigError, match=r"pip install 'tocom-serve\[otel\]'"):
        tracing.provider(Settings(otel=True))


def test_another_protocol_is_an_error(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match=r"over http/protobuf, not 'grpc'"):
        tracing.provider(Settings(otel=True))


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        server.got = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("named", "name"), [(None, b"tocom-serve"), ("photos", b"photos")])
def test_spans_go_where_the_environment_says(collector, monkeypatch, served, named, name):
    address = f"http://127.0.0.1:{collector.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    if named:
        monkeypatch.setenv("OTEL_SERVICE_NAME", named)
    provider = tracing.provider(Settings())
    application(provider, served).post("/classify/a")
    provider.shutdown()
    ((path, spans),) = collector.got
    assert path == "/v1/traces"
    assert name in spans
    assert b"POST /classify/{name}" in spans
