"""A tiny model with a bank, on disk as users would have them, and a server of it."""

import asyncio
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from timm.models import save_for_hf

from adapters import BackboneInfo, Bank, BankInfo
from adapters.bank import tensor_shapes
from server.app import create_app
from server.engine.engine import Engine
from server.models.loading import load_model
from server.models.served import ServedModel
from server.settings import ModelSettings, Settings
from tests.server.works import Clock, Double
from tests.tocom_models import small_model
from tocom import load_backbone

MAX_RATE = 5
CLASSES = [f"thing {i}" for i in range(10)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = {
        "pretrained_cfg": {"input_size": (3, 64, 64), "num_classes": 10, "label_names": CLASSES}
    }
    save_for_hf(small_model(), folder, model_config=config, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def bank_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    info = BankInfo(
        name="tiny",
        backbone=BackboneInfo.of(load_backbone(str(model_folder))),
        max_rate=MAX_RATE,
        rank=2,
        targets=("q", "v"),
        scale=1.0,
        evaluation={"top1": [0.5] * (MAX_RATE + 1)},
    )
    torch.manual_seed(1)
    tensors = {name: 0.1 * torch.randn(shape) for name, shape in tensor_shapes(info).items()}
    return Bank(info, tensors).save(tmp_path_factory.mktemp("banks") / "tiny")


@pytest.fixture(scope="session")
def tiny(model_folder: Path, bank_folder: Path) -> ModelSettings:
    return ModelSettings(name="tiny", backbone=str(model_folder), bank=str(bank_folder))


@pytest.fixture(scope="session")
def settings(tiny: ModelSettings) -> Settings:
    bare = ModelSettings(name="bare", backbone=tiny.backbone, source=2)
    limits = {"max_pixels": 1_000_000, "max_body_bytes": 2**20, "max_graphs": 0}
    return Settings(models=(tiny, bare), device="cpu", **limits)


@pytest.fixture(scope="session")
def served(tiny: ModelSettings) -> ServedModel:
    return load_model(tiny)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def work() -> Double:
    return Double("work")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Where a thread has one torch thread it is not by chance: those to come begin with two."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def make(clock: Clock) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**arguments: object) -> Engine:
        engine = Engine(**{"decode_threads": 1, "clock": clock, **arguments})
        made.append(engine)
        return engine

    yield make
    for engine in made:
        if not engine._worker.ident:
            engine.start()
        if not engine._closed:
            engine.stop()


@pytest.fixture(scope="session")
def photo() -> bytes:
    return png(picture(0))


def picture(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    """Return a coarse random pattern; tokens of plain noise would all be alike."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def seen(model: ServedModel, data: bytes) -> torch.Tensor:
    """Return what a model makes of a file in RGB, [3, H, W]."""
    return model.transform(Image.open(io.BytesIO(data)))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def listening(app) -> Iterator[str]:
    """Serve an application over real HTTP; yields its host and port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def call(app, *messages, path="/v1/classify", headers=(), method="POST"):
    """Send a request to the application as bare ASGI: some messages, then silence.

    Returns the status, the body and the messages that nobody read.
    """
    unread, sent = list(messages), []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def receive():
        if not unread:
            await asyncio.Event().wait()
        return unread.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), timeout=60))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body), unread


def problem(answer) -> str:
    """Check that an answer is a problem and return what it says."""
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["status"] == answer.status_code
    assert body["detail"] == body["error"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["instance"] == answer.request.url.path
    assert body["title"]
    return body["detail"]
