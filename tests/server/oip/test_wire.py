"""The wire format against the stock client's: what it writes we read, what we write it reads."""

import gzip
import json
import re
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tritonclient.http import InferenceServerClient, InferInput, InferResult

from server.errors import BadRequestError, TooLargeError, UnsupportedTypeError
from server.oip.schemas import InferResponse
from server.oip.wire import OutputTensor, inflate, read_request, write_response

SHAPES = array_shapes(max_dims=4, max_side=4)
FLOATS = arrays(np.float32, SHAPES, elements=st.floats(width=32))
#: What answers hold.
FINITE = arrays(
    np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
TEXTS = arrays(object, SHAPES, elements=st.text())
#: What JSON can hold as well; encoded, as elements of BYTES are.
STRINGS = arrays(object, SHAPES, elements=st.text().map(str.encode))
BYTES = arrays(object, SHAPES, elements=st.binary())


def written(values: np.ndarray, binary: bool = True, **options) -> tuple[bytes, str | None]:
    """What the stock client sends for one tensor, and its header."""
    datatype = "BYTES" if values.dtype == object else "FP32"
    tensor = InferInput("x", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    body, length = InferenceServerClient.generate_request_body([tensor], **options)
    return body, None if length is None else str(length)


def read(body: bytes, header: str | None):
    """The values of the only tensor of a request, in the stock client's form."""
    _, (tensor,) = read_request(body, header, raw_input="image")
    if tensor.datatype == "FP32":
        return tensor.floats()
    found = np.empty(tensor.elements, dtype=object)
    found[:] = tensor.strings()
    return found.reshape(tensor.shape)


def request(*inputs: dict, behind: bytes = b"", **entries) -> tuple[bytes, str]:
    """A request that the stock client would not write."""
    text = json.dumps({"inputs": list(inputs), **entries}).encode()
    return text + behind, str(len(text))


def floats(shape, **entries) -> dict:
    return {"name": "x", "datatype": "FP32", "shape": shape, **entries}


def strings(shape, **entries) -> dict:
    return {"name": "x", "datatype": "BYTES", "shape": shape, **entries}


@given(FLOATS | STRINGS, st.booleans())
def test_tensors_of_the_stock_client_arrive(values, binary):
    found = read(*written(values, binary))
    assert found.shape == values.shape
    assert np.array_equal(found, values, equal_nan=values.dtype != object)


@given(BYTES)
def test_any_bytes_arrive(values):
    assert read(*written(values)).tolist() == values.tolist()


@given(
    st.lists(st.tuples(FINITE | TEXTS, st.booleans())),
    st.text(min_size=1) | st.none(),
)
def test_the_stock_client_reads_answers(outputs, identity):
    response = InferResponse(
        model_name="tiny", id=identity, parameters={"rate": 8, "reason": "asked"}, outputs=[]
    )
    tensors = [OutputTensor(f"x{i}", *each) for i, each in enumerate(outputs)]
    body, length = write_response(response, tensors)
    assert (length is None) == (not any(binary for _, binary in outputs))
    result = InferResult.from_response_body(body, header_length=length)
    assert result.get_response().get("id") == identity
    assert result.get_response()["parameters"] == {"rate": 8, "reason": "asked"}
    for tensor, (values, binary) in zip(tensors, outputs, strict=True):
        found = result.as_numpy(tensor.name)
        if binary and values.dtype == object:
            values = np.vectorize(str.encode, otypes=[object])(values)
        assert found.shape == values.shape
        assert np.array_equal(found, values)


@given(BYTES, st.binary(min_size=1, max_size=3), st.data())
def test_damaged_requests_are_refused_or_read(values, junk, data):
    body, header = written(values)
    at = data.draw(st.integers(0, len(body)))
    keep = data.draw(st.integers(at, len(body)))
    with suppress(BadRequestError):
        read(body[:at] + junk + body[keep:], header)


@given(st.binary(), st.none() | st.text() | st.integers().map(str))
def test_junk_is_refused(body, header):
    if header is not None and header.isdecimal() and int(header) == 0:
        return  # one element, whatever it is
    with pytest.raises(BadRequestError):
        read(body, header)


def test_a_header_of_0_makes_the_body_one_element():
    request, (tensor,) = read_request(b"photo", "0", raw_input="image")
    assert (tensor.name, tensor.shape, tensor.strings()) == ("image", (1,), [b"photo"])
    assert request.parameters.binary_data_output


def test_several_inputs_lie_behind_the_json_in_their_order():
    a = InferInput("a", [2], "FP32")
    a.set_data_from_numpy(np.array([1, 2], np.float32))
    b = InferInput("b", [1], "FP32")
    b.set_data_from_numpy(np.array([3], np.float32), binary_data=False)
    c = InferInput("c", [1], "BYTES")
    c.set_data_from_numpy(np.array([b"4"], object))
    body, length = InferenceServerClient.generate_request_body([a, b, c])
    _, found = read_request(body, str(length), raw_input="image")
    assert [each.name for each in found] == ["a", "b", "c"]
    assert found[0].floats().tolist() == [1, 2]
    assert found[1].floats().tolist() == [3]
    assert found[2].strings() == [b"4"]


def test_nested_data_is_row_major():
    body, header = request(floats([2, 3], data=[[1, 2, 3], [4, 5, 6]]))
    assert read(body, header).tolist() == [[1, 2, 3], [4, 5, 6]]
    body, header = request(strings([2, 1], data=[["a"], ["b"]]))
    assert read(body, header).tolist() == [[b"a"], [b"b"]]


def test_numbers_that_fp32_cannot_hold_become_infinite():
    body, header = request(floats([2], data=[1e300, -1e300]))
    assert read(body, header).tolist() == [np.inf, -np.inf]


def test_notes_of_clients_at_an_input_are_left_alone():
    note = {"content_type": "base64"}
    assert read(*request(strings([1], data=["a"], parameters=note))).tolist() == [b"a"]


@pytest.mark.parametrize(
    ("body", "header", "message"),
    [
        (b"", None, "body: Invalid JSON: EOF while parsing a value at line 1 column 0, got b''"),
        (
            b"\xff\xd8" * 99,
            None,
            r"Invalid JSON: expected value at line 1 column 1, got b'\xff\xd8\xff",
        ),
        (b"[" * 10**5, None, "body: Invalid JSON: recursion limit exceeded"),
        (b"[{}" * 10**6, None, "the request has 2,000,000 lists and objects; 262,144 are allowed"),
        (b"[]", None, "body: Input should be an object, got []"),
        (b"{}", None, "inputs: Field required, got {}"),
        (b"{}", "two", "Inference-Header-Content-Length must be a number of bytes, got 'two'"),
        (b"{}", "-1", "Inference-Header-Content-Length must be a number of bytes, got '-1'"),
        (b"{}", "9" * 5000, "Inference-Header-Content-Length must be a number of bytes"),
        (b"{}", "3", "Inference-Header-Content-Length is 3, and the body has 2 bytes"),
        (*request(), "inputs: List should have at least 1 item after validation, not 0, got []"),
        (
            *request(*[floats([1], data=[0])] * 9),
            "inputs: List should have at most 8 items after validation, not 9",
        ),
        (
            *request(floats([1], data=[0]), paramters={"rate": 8}),
            "paramters: Extra inputs are not permitted, got {'rate': 8}",
        ),
        (
            *request(floats([1], data=[0]), parameters={str(key): 0 for key in range(10**5)}),
            "parameters: an object may have 32 entries, got {",
        ),
        (
            *request(floats([1], data=[0]), outputs=[{"name": "y", "parameters": {"kind": 1}}]),
            "outputs.0.parameters.kind: Extra inputs are not permitted, got 1",
        ),
        (
            *request(floats([0], data=[])),
            "inputs.0.shape.0: Input should be greater than or equal to 1, got 0",
        ),
        (
            *request(floats([], data=[])),
            "inputs.0.shape: List should have at least 1 item after validation, not 0, got []",
        ),
        (*request(floats([1])), "input 'x' must have either data or binary_data_size"),
        (
            *request(floats([1], data=[0], parameters={"binary_data_size": 4}), behind=bytes(4)),
            "input 'x' must have either data or binary_data_size",
        ),
        (
            *request(floats([2], parameters={"binary_data_size": 8}), behind=bytes(7)),
            "input 'x': 8 bytes from 0 on go beyond the 7 bytes behind the JSON",
        ),
        (
            *request(floats([2], parameters={"binary_data_size": 8}), behind=bytes(9)),
            "the body has 1 bytes that belong to no input",
        ),
        (
            *request(floats([3], parameters={"binary_data_size": 8}), behind=bytes(8)),
            "input 'x': shape [3] has 12 bytes, 8 came",
        ),
        (*request(floats([3], data=[1, 2])), "input 'x': shape [3] has 3 elements, 2 came"),
        (*request(floats([2], data=[1, "x"])), "input 'x': its data must be numbers"),
        (*request(floats([2], data=[1, 10**400])), "input 'x': its data must be numbers"),
        (*request(floats([2], data=[1, {}])), "input 'x': its data must be numbers"),
        (*request(floats([2], data=[[1], [2]])), "input 'x': its data must be numbers"),
        (*request(floats([2, 2], data=[[1], [2, 3]])), "shape [2, 2] has 4 elements, 3 came"),
        (*request(floats([1, 1], data=[[[1]]])), "input 'x': its data must be numbers"),
        (*request(floats([2, 1], data=[[1], 2])), "input 'x': its data must be numbers"),
        (*request(strings([2], data=["a"])), "input 'x': shape [2] has 2 elements, 1 came"),
        (*request(strings([2], data=["a", 1])), "input 'x': its data must be strings"),
        (*request(strings([2], data=["a", ["b"]])), "input 'x': its data must be strings"),
        (
            *request(strings([2], parameters={"binary_data_size": 8}), behind=b"\x02\0\0\0ab\0\0"),
            "input 'x': element 1 goes beyond its 8 bytes",
        ),
        (
            *request(strings([1], parameters={"binary_data_size": 7}), behind=b"\x04\0\0\0abc"),
            "input 'x': element 0 goes beyond its 7 bytes",
        ),
        (
            *request(strings([1], parameters={"binary_data_size": 6}), behind=b"\x01\0\0\0ab"),
            "input 'x': shape [1] has 5 bytes, 6 came",
        ),
    ],
)
def test_what_is_wrong_is_said(body, header, message):
    with pytest.raises(BadRequestError) as caught:
        read(body, header)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [
        ({"rate": 8}, "8"),
        ({"rate": 8.0}, "8"),
        ({"rate": 8.5}, "8.5"),
        ({"rate": 8.0000001}, "8.0000001"),
        ({"rate": "auto"}, "auto"),
    ],
)
def test_a_rate_is_a_number_or_a_string(parameters, rate):
    body, header = request(floats([1], data=[0]), parameters=parameters)
    assert read_request(body, header, "image")[0].parameters.rate == rate


@pytest.mark.parametrize(
    ("parameters", "milliseconds"),
    [
        ({}, None),
        ({"timeout": 0}, None),
        ({"timeout": 2_500}, 2),
        ({"timeout": 1}, 1),
        ({"deadline_ms": 7}, 7),
        ({"timeout": 0, "deadline_ms": 7}, 7),
    ],
)
def test_a_timeout_in_microseconds_is_a_deadline(parameters, milliseconds):
    body, header = request(floats([1], data=[0]), parameters=parameters)
    assert read_request(body, header, "image")[0].parameters.deadline_ms == milliseconds


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rate": True}, "parameters.rate: Input should be a valid string, got True"),
        ({"rate": None}, "parameters.rate: Input should be a valid string, got None"),
        ({"model": "tiny"}, "parameters.model: Extra inputs are not permitted, got 'tiny'"),
        ({"timeout": 5, "deadline_ms": 5}, "only one may be there"),
        ({"timeout": -1}, "parameters.timeout: Input should be greater than or equal to 0"),
        ({"sequence_id": 1}, "parameters.sequence_id: Extra inputs are not permitted, got 1"),
    ],
)
def test_parameters_that_are_not_allowed(parameters, message):
    body, header = request(floats([1], data=[0]), parameters=parameters)
    with pytest.raises(BadRequestError, match=re.escape(message)):
        read_request(body, header, "image")


@given(st.binary(max_size=2000))
def test_bodies_are_inflated(body):
    assert inflate(gzip.compress(body), "gzip", limit=2000) == body
    assert inflate(zlib.compress(body), "deflate", limit=2000) == body
    assert inflate(body, "", limit=0) == body


def test_a_bomb_is_inflated_to_the_limit_only():
    bomb = gzip.compress(bytes(10**7))
    assert inflate(bomb, "GZIP", limit=10**7) == bytes(10**7)
    with pytest.raises(TooLargeError, match="larger than the 9,999,999 bytes that are allowed"):
        inflate(bomb, "gzip", limit=10**7 - 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body does not end where its gzip ends"),
        (b"no gzip", "the body is not gzip"),
        (gzip.compress(b"abc", mtime=0)[:-1], "the body does not end where its gzip ends"),
        (gzip.compress(b"abc", mtime=0) + b"d", "the body does not end where its gzip ends"),
        (gzip.compress(b"abc", mtime=0)[:-8] + bytes(8), "the body is not gzip"),
    ],
)
def test_damaged_gzip_is_refused(body, message):
    with pytest.raises(BadRequestError, match=message):
        inflate(body, "gzip", limit=100)


def test_other_encodings_are_refused():
    with pytest.raises(UnsupportedTypeError, match="gzip, deflate or identity, got 'br'"):
        inflate(b"", "br", limit=100)
