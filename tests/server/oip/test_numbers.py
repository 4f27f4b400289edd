import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import BadRequestError
from server.oip import numbers, wire

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def request(shape: list[int], data: object, name: str = "x") -> dict:
    return {"name": name, "datatype": "FP32", "shape": shape, "data": data}


def read(body: bytes, monkeypatch: pytest.MonkeyPatch, sliced: bool) -> object:
    """Return the names and values of a request's tensors, or why it has none."""
    monkeypatch.setattr(wire, "LARGE", 0 if sliced else 2**30)
    try:
        _, inputs = wire.read_request(body, None, "image")
        return [f"{each.name}: {each.floats().tolist()}" for each in inputs]
    except BadRequestError as error:
        return str(error)


@given(
    st.data(),
    SHAPES,
    st.sampled_from([None, 1]),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")]),
)
def test_what_is_read_in_slices_is_what_a_parser_reads(data, shape, indent, separators):
    values = np.array(data.draw(st.lists(FLOATS, min_size=1, max_size=1))[0]) + np.arange(
        np.prod(shape), dtype=float
    )
    nested = values.reshape(shape).tolist() if data.draw(st.booleans()) else values.tolist()
    body = {"id": '"data": [1', "inputs": [request(shape, nested)]}
    text = json.dumps(body, indent=indent, separators=separators).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "SLICE", 7)
        patch.setattr(wire, "_check_nested", lambda text: None)
        rest, found = numbers.cut(text)
        assert len(found) == 1
        assert found[0].is_of(shape)
        assert json.loads(rest)["inputs"][0]["data"] == [0]
        assert read(text, patch, sliced=True) == read(text, patch, sliced=False)


@pytest.mark.parametrize(
    "data",
    [
        "[1,,2]",
        "[1,2",
        "[1 2]",
        "[1,2]]",
        "[[1],2]",
        "[[1,2]",
        "[01,2]",
        "[1.,2]",
        "[+1,2]",
        "[]",
        "[[],[]]",
        "[1,2,3]",
        "[1,null]",
        '["1","2"]',
        "[1,true]",
        "[NaN,1]",
        "[1e999,2]",
        "[" + "9" * 400 + ",2]",
        "[1,\x0c2]",
        "[[1,2]]",
        "[1],[2]",
        "1,2",
    ],
)
def test_what_is_odd_is_read_or_refused_as_a_parser_does(data):
    text = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":%s}]}' % data.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "SLICE", 3)
        plain = read(text, patch, sliced=False)
        assert read(text, patch, sliced=True) == plain


def test_two_tensors_keep_their_own(monkeypatch):
    body = {"inputs": [request([2], [1, 2], "a"), request([1, 2], [[3, 4]], "b")]}
    text = json.dumps(body).encode()
    assert read(text, monkeypatch, sliced=True) == ["a: [1.0, 2.0]", "b: [[3.0, 4.0]]"]
