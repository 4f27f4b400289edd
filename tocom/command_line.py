"""What the command lines of all programs have in common. Imports nothing that takes long."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from tocom.wording import did_you_mean


class Parser(argparse.ArgumentParser):
    """Tells mistakes in one line each, with the word that was probably meant.

    Attributes:
        hint: is added where an option is like none that there are.
        offers: by argument, the words that a shell offers for it.
    """

    hint = ""

    def __init__(self, **arguments: Any) -> None:
        # A part of an option's name would come to mean another one with the next option.
        super().__init__(allow_abbrev=False, **arguments)
        self.offers: dict[str, Callable[[], Iterable[str]]] = {}

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Read the arguments, after a look for options that there are not.

        They come first: argparse would take what follows one for something else.
        """
        words = sys.argv[1:] if args is None else list(args)
        known = self._options()
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                self.error(f"there is no option {name}{did_you_mean(name, known) or self.hint}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the usage, which would bury it, and end with exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def _options(self) -> set[str]:
        """Return its options and those of its commands."""
        options = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    options |= command._options()
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        there = [str(choice) for choice in action.choices]
        meant = did_you_mean(str(value), there)
        listed = f"{' There' if meant else '; there'} are: {', '.join(there)}"
        raise argparse.ArgumentError(action, f"there is no {value!r}{meant}{listed}")


class Version(argparse.Action):
    """Prints the version of the program and ends it."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit"
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print the version and end."""
        from importlib.metadata import version

        sys.stdout.write(f"{parser.prog} {version('tocom-serve')}\n")
        parser.exit()
