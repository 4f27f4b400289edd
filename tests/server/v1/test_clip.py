"""An image tower of CLIP: what its head projects to is the embedding, and it has no classes."""

import base64

import pytest
import timm
import torch
from fastapi.testclient import TestClient
from timm.models import save_for_hf
from torch.nn import functional as F

import tocom
from server.app import create_app
from server.models.loading import load_model
from server.settings import ModelSettings
from tests.server.conftest import problem, seen

WIDTH = 512
TOP = 16 // 2  # its patches, shared among its blocks


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> ModelSettings:
    torch.manual_seed(0)
    model = timm.create_model("vit_xsmall_patch16_clip_224", img_size=64, depth=2)
    config = {"pretrained_cfg": {"input_size": (3, 64, 64), "num_classes": WIDTH}}
    folder = tmp_path_factory.mktemp("clip") / "clip"
    save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return ModelSettings(name="clip", backbone=str(folder))


@pytest.fixture(scope="module")
def client(settings, tiny, clip):
    both = settings.model_copy(update={"models": (clip, tiny)})
    with TestClient(create_app(both)) as client:
        yield client


@pytest.fixture(scope="module")
def expected(clip, photo):
    """What the head makes of the photo at a rate, [D]."""
    served = load_model(clip)
    image = seen(served, photo)[None]

    def projected(rate: int = 0) -> torch.Tensor:
        with torch.inference_mode():
            return tocom.forward(served.backbone.model, image, rate)[0]

    return projected


def uri(photo: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(photo).decode()}"


@pytest.mark.parametrize("rate", [0, 3])
def test_the_embedding_is_what_the_head_projects_to(client, photo, expected, rate):
    answer = client.post("/v1/embed", params={"rate": rate}, files={"file": photo})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["model"] == "clip"  # the first that embeds
    assert (told["rate"], told["macs_ratio"] < 1) == (rate, rate > 0)
    found = torch.tensor(told["embedding"])
    assert found.shape == (WIDTH,)
    torch.testing.assert_close(found, expected(rate), atol=1e-5, rtol=0)


def test_openais_clients_get_the_same_at_length_1(client, photo, expected):
    asked = {"model": "clip", "input": uri(photo), "rate": 3, "dimensions": WIDTH}
    answer = client.post("/v1/embeddings", json=asked)
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["data"]
    found = torch.tensor(item["embedding"])
    torch.testing.assert_close(found, F.normalize(expected(3), dim=0), atol=1e-5, rtol=0)


def test_the_features_before_the_projection_are_no_embedding(client, photo):
    asked = {"model": "clip", "input": uri(photo), "dimensions": 256}
    answer = client.post("/v1/embeddings", json=asked)
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert message.startswith("embeddings of the model 'clip' have 512 dimensions and cannot be")


def infer(client, photo, *outputs):
    image = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [1],
        "data": [base64.b64encode(photo).decode()],
    }
    asked = {"inputs": [image], "outputs": [{"name": name} for name in outputs]}
    return client.post("/v2/models/clip/infer", json=asked)


def test_tensors_are_embeddings_alone(client, photo, expected):
    (output,) = infer(client, photo).json()["outputs"]
    assert (output["name"], output["shape"]) == ("features", [1, WIDTH])
    torch.testing.assert_close(torch.tensor(output["data"]), expected(), atol=1e-5, rtol=0)
    told = client.get("/v2/models/clip").json()["outputs"]
    assert told == [{"name": "features", "datatype": "FP32", "shape": [-1, WIDTH]}]
    refused = infer(client, photo, "logits")
    assert refused.status_code == 400
    assert "the outputs are features; got 'logits'" in refused.text


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classify/batch", "/models/clip"])
def test_it_has_no_classes(client, photo, path):
    query = {} if path == "/models/clip" else {"model": "clip"}
    body = {"content": photo} if path == "/models/clip" else {"files": {"file": photo}}
    answer = client.post(path, params=query, **body)
    assert answer.status_code == 422
    assert problem(answer) == (
        "the model 'clip' is for embedding (/v1/embed), and this is for classification; models "
        "for that: tiny"
    )


def test_no_cascade_can_be_calibrated_for_it(client, photo):
    answer = client.post("/v1/embed", params={"rate": "cascade"}, files={"file": photo})
    assert answer.status_code == 422
    assert problem(answer).endswith("and the model 'clip' is for embedding")


def test_who_names_no_model_is_answered_by_one_with_classes(client, photo):
    assert client.post("/v1/classify", files={"file": photo}).json()["model"] == "tiny"


def test_the_list_says_what_it_is(client):
    listed = {each["name"]: each for each in client.get("/v1/models").json()["models"]}
    told = [(each["kind"], each["classes"], each["dimensions"]) for each in listed.values()]
    assert told == [("embedding", 0, WIDTH), ("classification", 10, 192)]
    assert listed["clip"]["max_rate"] == TOP
    assert client.get("/v1/models/clip").json()["class_names"] == []
