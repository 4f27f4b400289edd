"""How messages for people are worded: what is misspelt, what is wrong with a value."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str) -> str:
    """Return a text with control characters escaped: it begins no line and steers no terminal."""
    return _CONTROL.sub(lambda control: control[0].encode("unicode_escape").decode("ascii"), text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean ...?` with the known word that is most like `word`; empty: none is."""
    from difflib import get_close_matches  # only who errs waits for it

    found = get_close_matches(word, list(known), n=1)
    return f", did you mean {found[0]}?" if found else ""


def words_of(fault: Mapping[str, Any]) -> str:
    """Return pydantic's words for a fault, without those that it puts before a message of ours."""
    return str(fault["msg"]).removeprefix("Value error, ")


def value_fault(fault: Mapping[str, Any]) -> str:
    """Say what is wrong with a value, without its name: `must be at least 1`.

    Args:
        fault: one of those that pydantic's ValidationError lists.
    """
    limits: Mapping[str, Any] = fault.get("ctx", {})
    match fault["type"]:
        case "missing":
            return "is missing"
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "must be a number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "string_type":
            return "must be a text"
        case "tuple_type" | "list_type":
            return "must be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a table of keys and values"
        case "literal_error":
            return f"must be {limits['expected']}"
        case "greater_than":
            return f"must be more than {limits['gt']}"
        case "greater_than_equal":
            return f"must be at least {limits['ge']}"
        case "less_than":
            return f"must be less than {limits['lt']}"
        case "less_than_equal":
            return f"must be at most {limits['le']}"
        case "too_short":
            return f"must have at least {limits['min_length']} of them"
        case "string_too_short":
            return "must not be empty"
        case "string_pattern_mismatch":
            return f"must match the pattern {limits['pattern']}"
        case "value_error":
            return f"is wrong: {limits['error']}"
    return f"is wrong: {fault['msg']}"
