from concurrent.futures import ThreadPoolExecutor

import pytest

from server.errors import UnknownModelError
from server.models.loading import load_model
from server.models.registry import Registry
from server.models.served import ServedModel


@pytest.fixture(scope="module")
def bare(tiny) -> ServedModel:
    return load_model(tiny.model_copy(update={"name": "bare", "bank": None}))


def test_the_first_model_is_the_default(served, bare):
    registry = Registry([bare, served])
    assert registry.get(None) is bare
    assert registry.get("tiny") is served
    assert registry.all() == (bare, served)


@pytest.mark.parametrize("name", ["", "Tiny", "nix"])
def test_an_unknown_model_names_those_there_are(served, bare, name):
    with pytest.raises(UnknownModelError, match=f"'{name}'; there are: tiny, bare$"):
        Registry([served, bare]).get(name)


def test_a_long_name_is_cut(served):
    with pytest.raises(UnknownModelError) as raised:
        Registry([served]).get("x" * 10_000)
    assert len(str(raised.value)) < 200


def test_a_handle_takes_the_place_of_the_one_of_its_name(served, bare):
    registry = Registry([served, bare])
    other = served.with_bank(None)
    registry.replace(other)
    assert registry.all() == (other, bare)
    assert registry.get(None) is other


def test_no_model_is_added_later(served, bare):
    registry = Registry([served])
    with pytest.raises(UnknownModelError, match="'bare'"):
        registry.replace(bare)
    assert registry.all() == (served,)


def test_readers_see_one_of_the_handles_while_they_change(served):
    registry = Registry([served])
    handles = [served, *(served.with_bank(None) for _ in range(3))]

    def read(_: int) -> bool:
        return registry.get(None) in handles and registry.get("tiny") in handles

    with ThreadPoolExecutor(4) as pool:
        seen = pool.map(read, range(400))
        for i in range(400):
            registry.replace(handles[i % 4])
        assert all(seen)
