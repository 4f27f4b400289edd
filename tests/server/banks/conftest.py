"""A server of banks: its store, its models and who may change them."""

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import save

from adapters import BackboneInfo, Bank, BankInfo, Geometry, Store
from adapters.bank import ladder_entries, tensor_shapes
from server.banks import routes as bank_routes
from server.banks.catalogue import Banks
from server.models.loading import load_model
from server.models.registry import Registry
from server.models.served import ServedModel
from server.settings import Settings
from server.web.access import Access
from server.web.middleware import BodyLimit, Budget, RequestId
from server.web.problems import add_handlers
from tests.server.conftest import MAX_RATE
from tests.tocom_models import small_model
from tocom import TOME, Ladder, load_backbone

KEY = "admin-" + "a" * 16
MAX_BYTES = 500_000
NARROW = Geometry.of(small_model("vit_small"))


@pytest.fixture(scope="module")
def bare(tiny) -> ServedModel:
    return load_model(tiny.model_copy(update={"name": "bare", "bank": None, "source": 2}))


@pytest.fixture
def registry(served, bare) -> Registry:
    return Registry([served, bare])


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def swaps() -> list[str]:
    return []


@pytest.fixture
def app(registry, store, swaps) -> FastAPI:
    app = FastAPI()
    app.state.access = Access(Settings(admin_key=KEY))
    app.state.banks = Banks(registry, store, swaps.append)
    app.include_router(bank_routes.router)
    add_handlers(app)
    limits = {bank_routes.PATH: MAX_BYTES}
    app.add_middleware(BodyLimit, budget=Budget(2 * MAX_BYTES), max_bytes=1000, by_path=limits)
    app.add_middleware(RequestId)
    return app


@pytest.fixture
def admin(app) -> TestClient:
    return TestClient(
        app, headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False
    )


@pytest.fixture(scope="session")
def make_bank(model_folder):
    backbone = BackboneInfo.of(load_backbone(str(model_folder)))

    def make(
        seed: int = 0,
        name: str = "new",
        max_rate: int = MAX_RATE,
        ladder: Ladder = TOME,
        **changes,
    ) -> Bank:
        info = BankInfo(
            **ladder_entries(ladder),
            name=name,
            backbone=backbone.model_copy(update=changes),
            max_rate=max_rate,
            rank=2,
            targets=("q", "v"),
            scale=1.0,
            training={"recipe": "none"},
        )
        draw = torch.Generator().manual_seed(seed)
        shapes = tensor_shapes(info).items()
        return Bank(info, {key: 0.3 * torch.randn(shape, generator=draw) for key, shape in shapes})

    return make


def files(bank: Bank) -> dict[str, bytes]:
    return {"info": bank.info.model_dump_json().encode(), "plugins": save(bank.tensors)}


def attach(admin: TestClient, model: str, bank: str):
    return admin.put(f"/v1/models/{model}/bank", json={"bank": bank})


def listed(admin: TestClient) -> dict[str, dict]:
    return {bank["name"]: bank for bank in admin.get("/v1/banks").json()["banks"]}


# What there is
