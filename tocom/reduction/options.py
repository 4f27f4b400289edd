"""What options of methods may be."""

import sys

from tocom.errors import ReductionError


def check_number(method: str, option: str, value: object, most: float = sys.float_info.max) -> None:
    """Check that an option is a finite number of 0 or more.

    Args:
        method, option: their names, for the error.
        value: of the option.
        most: what it may be at most.

    Raises:
        ReductionError: naming what is allowed, if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        open_end = most == sys.float_info.max
        allowed = "a number of 0 or more" if open_end else f"a number from 0 to {most:g}"
        raise ReductionError(
            f"the option {option!r} of the method {method!r} must be {allowed}, got {value!r}"
        )


def check_above_zero(method: str, option: str, value: object) -> None:
    """Check that an option is a finite number above 0.

    Raises:
        ReductionError: if it is not.
    """
    check_number(method, option, value)
    if value == 0:
        raise ReductionError(f"the option {option!r} of the method {method!r} must be above 0")


def check_flag(method: str, option: str, value: object) -> None:
    """Check that an option is true or false.

    Raises:
        ReductionError: if it is not.
    """
    if not isinstance(value, bool):
        raise ReductionError(
            f"the option {option!r} of the method {method!r} must be true or false, got {value!r}"
        )


def check_one_of(method: str, option: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that an option is one of the words that it may be.

    Raises:
        ReductionError: naming what is allowed, if it is not.
    """
    if value not in allowed:
        raise ReductionError(
            f"the option {option!r} of the method {method!r} must be one of "
            f"{', '.join(allowed)}, got {value!r}"
        )


def check_whole(method: str, option: str, value: object, least: int) -> None:
    """Check that an option is a whole number of `least` or more.

    Raises:
        ReductionError: naming what is allowed, if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ReductionError(
            f"the option {option!r} of the method {method!r} must be a whole number of {least} or "
            f"more, got {value!r}"
        )
