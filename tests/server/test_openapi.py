"""The description of the interface is true, by schemathesis: it asks what is described.

Every answer must be described, of the described shape and no failure of the server, however
odd the question. What is asked is the same each time.
"""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as hypothesis_settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from server.app import create_app
from tests.server.conftest import listening

EXAMPLES = 12


@pytest.fixture(scope="module")
def address(settings) -> Iterator[str]:
    with listening(create_app(settings)) as address:
        yield address


def test_every_answer_is_as_described(address):
    schema = schemathesis.openapi.from_url(f"http://{address}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:

        @seed(0)
        @given(operation.as_strategy())
        @hypothesis_settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            # Parameters depend on one another and on the model; a description cannot say how.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
