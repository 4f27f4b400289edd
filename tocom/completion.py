"""Completion of command lines in shells: what the programs print for `--completion SHELL`.

A script is made of a program's parser and holds all words that it offers, so that the program is
not started at each press of the key.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from tocom.command_line import Parser

SHELLS = ("bash", "fish", "zsh")

# Both shells read the same cases; they differ in where the words of the line are.
_BASH = """\
_{name}() {{
    local word command= before=${{COMP_WORDS[COMP_CWORD-1]}} current=${{COMP_WORDS[COMP_CWORD]}}
    local -a offered=() line=("${{COMP_WORDS[@]:1:COMP_CWORD-1}}")
{cases}
    COMPREPLY=($(compgen -W "${{offered[*]}}" -- "$current"))
}}
complete -o default -F _{name} {program}
"""
_ZSH = """\
#compdef {program}
_{name}() {{
    local word command= before=${{words[CURRENT-1]}} current=${{words[CURRENT]}}
    local -a offered=() line=(${{words[2,CURRENT-1]}})
{cases}
    compadd -a offered || _files
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _{name}
else
    compdef _{name} {program}
fi
"""
_CASES = """\
    for word in "${{line[@]}}"; do
        case $word in
            {commands}) command=$word; break ;;
        esac
    done
    case $command:$before in
{values}
        *) case $command:$current in
{words}
        esac ;;
    esac"""


class Completion(argparse.Action):
    """Prints the script that completes the program's command line in a shell, and ends it."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            choices=SHELLS,
            metavar="|".join(SHELLS),
            help="print the script that completes this program's arguments in a shell, and exit",
        )

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> NoReturn:
        """Print the script and end."""
        assert isinstance(parser, Parser)
        sys.stdout.write(script(parser, shell))
        parser.exit()


@dataclass(frozen=True)
class _Level:
    """What may follow a command.

    Attributes:
        command: its name; empty before there is one.
        options: what it takes.
        words: by what they stand for: commands with their help, presets.
    """

    command: str
    options: tuple[argparse.Action, ...]
    words: dict[str, str]


def script(parser: Parser, shell: str) -> str:
    """Return the script that completes a program's command line.

    Args:
        parser: the program's; commands of commands are not looked for.
        shell: one of `SHELLS`.
    """
    levels = list(_levels(parser))
    program = str(parser.prog)
    if shell == "fish":
        return "\n".join([*_fish(program, levels), ""])
    cases = _CASES.format(
        commands="|".join(levels[0].words),
        values="\n".join(_values(levels)),
        words="\n".join(_words(levels)),
    )
    frame = _BASH if shell == "bash" else _ZSH
    return frame.format(program=program, name=program.replace("-", "_"), cases=cases)


def _levels(parser: Parser) -> Iterator[_Level]:
    """Yield what a program takes before a command, and then what each command takes."""
    commands: dict[str, Any] = {}
    helps: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands |= action.choices
            helps |= {each.dest: each.help or "" for each in action._choices_actions}
    yield _Level("", _options(parser), helps)
    for name, command in commands.items():
        words = {word: "" for offer in command.offers.values() for word in offer()}
        yield _Level(name, _options(command), words)


def _options(parser: Parser) -> tuple[argparse.Action, ...]:
    return tuple(action for action in parser._actions if action.option_strings)


def _choices(option: argparse.Action) -> list[str]:
    """Return the values that an option may have, if they are known: `a|b` stands for them."""
    metavar = str(option.metavar)
    return metavar.split("|") if "|" in metavar else list(option.choices or ())


def _values(levels: list[_Level]) -> Iterator[str]:
    """Yield the cases after an option that takes a value. Without words the shell offers files."""
    free: list[str] = []
    for level in levels:
        for option in level.options:
            before = [f"{level.command}:{word}" for word in option.option_strings]
            if choices := _choices(option):
                yield f"        {'|'.join(before)}) offered=({shlex.join(choices)}) ;;"
            elif option.nargs != 0:
                free += before
    yield f"        {'|'.join(free)}) ;;"


def _words(levels: list[_Level]) -> Iterator[str]:
    """Yield two cases for each command: its options, and what else may stand there."""
    for level in levels:
        options = [word for option in level.options for word in option.option_strings]
        yield f"            {level.command}:-*) offered=({shlex.join(options)}) ;;"
        yield f"            {level.command}:*) offered=({shlex.join(level.words)}) ;;"


def _fish(program: str, levels: list[_Level]) -> Iterator[str]:
    commands = " ".join(levels[0].words)
    for level in levels:
        seen = f"__fish_seen_subcommand_from {level.command or commands}"
        start = f"complete -c {program} -n '{seen if level.command else f'not {seen}'}'"
        for word, text in level.words.items():
            # Before a command there are no files; a preset's place may have one.
            files = "" if level.command else " -f"
            yield f"{start}{files} -a {word}" + (f" -d {_fish_quoted(text)}" if text else "")
        for option in level.options:
            value = ""
            if option.nargs != 0:
                choices = _choices(option)
                value = f" -x -a {_fish_quoted(' '.join(choices))}" if choices else " -r"
            for word in option.option_strings:
                name = f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
                yield f"{start} {name}{value} -d {_fish_quoted(option.help or '')}"


def _fish_quoted(text: str) -> str:
    """Return a word as fish takes it: within quotes a backslash and a quote need a backslash."""
    plain = text.replace("%%", "%").replace("\\", "\\\\").replace("'", "\\'")
    return f"'{plain}'"
