from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from server.errors import UnknownModelError
from server.models.loading import load_model, load_models
from server.models.registry import Registry
from server.models.served import ServedModel
from server.settings import Settings
from tests.server.ladders import UNEVEN
from tests.server.segmenters import streets
from tocom import TOME


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


def test_what_a_network_takes_is_forgotten_where_it_is_served(tiny, tmp_path):
    asked = (tiny, tiny.model_copy(update={"name": "other"}), streets(tiny, tmp_path))
    models = [*load_models(Settings(models=asked, device="cpu")), load_model(tiny)]
    models[-1] = replace(models[-1], name="elsewhere")
    for model in models:
        for rate in (3, 9):
            model.controller.times.measured(rate, 2, 1.0)
    registry, network = Registry(models), models[0].backbone.model
    assert len(registry.measure_again(network, TOME, 3)) == 2
    assert registry.measure_again(network, TOME, 9) == []  # of a bank that is served no more
    assert registry.measure_again(network, UNEVEN, 3) == []
    left = [list(model.controller.times._table.cells) for model in models]
    assert left == [[], [], [(3, 2), (9, 2)], [(3, 2), (9, 2)]]


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
