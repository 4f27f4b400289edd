"""The description of the interface is true, by schemathesis: it asks what is described.

Every answer must be described and of the described shape, however odd the question; what is not
as described must be refused, and what wants a key must want it. What is asked is the same each
time.
"""

import base64
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from adapters import Bank
from server.app import create_app
from server.settings import Settings
from server.v1.batch import PATH as BATCH
from tests.server.conftest import listening, picture, png

EXAMPLES = 25
KEY = "admin-" + "k" * 16
PHOTO = png(picture(0))
B64 = base64.b64encode(PHOTO).decode()
CONFIG = {
    "auth": {"openapi": {"APIKeyHeader": {"api_key": KEY}, "HTTPBearer": {"bearer": KEY}}},
    # Keys are not made up, which would be refused before anything else is looked at.
    "generation": {"with-security-parameters": False},
}
CHANGE_BANK = "PUT /v1/models/{name}/bank"

for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, st.sampled_from([PHOTO, PHOTO[:90], b""]))


@pytest.fixture(scope="module")
def digest(bank_folder) -> str:
    return Bank.load(bank_folder).info.digest


@pytest.fixture(scope="module")
def operations(settings, tmp_path_factory) -> Iterator[list[schemathesis.APIOperation]]:
    given = settings.model_dump() | {"admin_key": KEY, "store": tmp_path_factory.mktemp("store")}
    with listening(create_app(Settings.model_validate(given))) as address:
        config = schemathesis.Config.from_dict(CONFIG)
        schema = schemathesis.openapi.from_url(f"http://{address}/openapi.json", config=config)
        yield [operation.ok() for operation in schema.get_all_operations()]


def ask(cases: SearchStrategy[schemathesis.Case], but: list) -> set[int]:
    """Send cases and check their answers, but for some checks; returns the answers' statuses."""
    seen = set()

    @seed(0)
    @given(cases)
    @hypothesis_settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        # The only one that looks at the clock.
        suppress_health_check=[HealthCheck.too_slow],
    )
    def check(case: schemathesis.Case) -> None:
        # A server that is busy past a deadline says so by a status above 500, as is described.
        seen.add(case.call_and_validate(excluded_checks=[not_a_server_error, *but]).status_code)

    check()
    return seen


def test_every_answer_is_as_described(operations, digest):
    known = {"name": "tiny", "bank": digest}
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [B64]}
    bodies = {
        CHANGE_BANK: {"bank": digest},
        "POST /v2/models/{name}/infer": {"inputs": [image]},
        "POST /v1/embeddings": {"input": f"data:image/png;base64,{B64}", "rate": 2},
        "POST /models/{name}": {"inputs": B64, "parameters": {"top_k": 2}},
    }
    statuses = {}
    for operation in operations:
        cases = operation.as_strategy()
        if path := {each.name: known[each.name] for each in operation.path_parameters}:
            cases |= operation.as_strategy(path_parameters=path)
        if body := bodies.get(operation.label):
            cases |= operation.as_strategy(
                path_parameters=path, body=body, media_type="application/json"
            )
        # Parameters depend on one another and on the model; a description cannot say how.
        statuses[operation.label] = ask(cases, [positive_data_acceptance])
    assert len(statuses) > 20
    assert {label for label, seen in statuses.items() if min(seen) >= 300} == {
        "POST /v1/banks",  # its files would have to be a bank
        "DELETE /v1/banks/{bank}",  # the only one is in use
        "POST /v1/segment",  # none of the models is for that
        "POST /v2/repository/models/{name}/unload",
    }


def test_what_is_not_as_described_is_refused(operations):
    for operation in operations:
        if not operation.query and not operation.body:
            continue  # whatever is asked is as described: any name fits a path
        # A form without a file is a batch of none.
        but = [negative_data_rejection] if operation.label == f"POST {BATCH}" else []
        ask(operation.as_strategy(GenerationMode.NEGATIVE), but)
