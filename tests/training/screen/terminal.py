"""A stderr that is a terminal, as far as programs can tell."""

import io
import sys

import pytest


class Terminal(io.StringIO):
    """Keeps what is written."""

    def isatty(self) -> bool:
        return True


def in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return what stderr is from now on; a test calls it itself, as pytest sets stderr for it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal
