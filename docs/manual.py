"""The command line's reference, made from the argument parser: `docs/commands.md`, and a man page for each command.

    python docs/manual.py markdown docs/commands.md
    python docs/manual.py man build/man

What is in them is what `--help` says, so nothing is written twice. The man pages keep to the macros of man(7) that both
groff and mandoc know.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = "examples:\n"

ENVIRONMENT = {
    "FAKEFS_CACHE": "Where kernels and snapshots are kept; default: $XDG_CACHE_HOME/fakefs, or ~/.cache/fakefs.",
    "XDG_RUNTIME_DIR": "Where the sockets of running mounts are; default: a directory of the user's in /tmp.",
    "XDG_STATE_HOME": "Where your progress in labs is kept, in fakefs/labs; default: ~/.local/state.",
    "SHELL": "The shell of fakefs shell.",
}

EXIT_STATUS = {
    "0": "Done.",
    "1": "It failed; one line on standard error says why, and what to do.",
    "2": "The command line is wrong, or names something that is not there.",
    "125": "fakefs run: fakefs itself failed. Other values are the program's own, as with fakefs exec.",
}


@dataclass(frozen=True)
class Argument:
    """One option or positional argument: how it is written ("--kernel PATH"), and its help."""

    written: str
    help: str


@dataclass(frozen=True)
class Command:
    """What the parser knows of one command. `name` has all words: "fakefs kernel fetch"."""

    name: str
    usage: str
    description: str
    positional: list[Argument]
    options: list[Argument]
    examples: list[str]
    subcommands: list[Argument]


def commands(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """The command of a parser, then those below it, in the order they were added."""
    branches = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    left_out = (*branches, *(action for action in parser._actions if action.dest == "help"))
    plain = [action for action in parser._actions if action not in left_out]
    yield Command(
        name=parser.prog,
        usage=usage(parser),
        description=parser.description or "",
        positional=[Argument(_written(action), _help(parser, action)) for action in plain if not action.option_strings],
        options=[Argument(_written(action), _help(parser, action)) for action in plain if action.option_strings],
        examples=examples(parser),
        subcommands=[
            Argument(f"{parser.prog} {choice.dest}", choice.help or "")
            for branch in branches
            for choice in branch._choices_actions
        ],
    )
    for branch in branches:
        for below in branch.choices.values():
            yield from commands(below)


def examples(parser: argparse.ArgumentParser) -> list[str]:
    """The lines that the help of a parser shows as examples."""
    _, _, text = (parser.epilog or "").partition(EXAMPLES)
    return [line.removeprefix("  ") for line in text.splitlines()]


def usage(parser: argparse.ArgumentParser) -> str:
    """How a command is called, in one line. argparse's own differs from one Python to the next."""
    if parser.usage:
        return parser.usage
    options = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    positional = [_positional(action) for action in parser._actions if not action.option_strings]
    return " ".join(
        [parser.prog, *(f"[{_with_value(option.option_strings[0], option)}]" for option in options), *positional]
    )


def _positional(action: argparse.Action) -> str:
    if isinstance(action, argparse._SubParsersAction):
        return "COMMAND ..."
    metavar = _metavar(action)
    return {"?": f"[{metavar}]", "*": f"[{metavar} ...]", "+": f"{metavar} ..."}.get(str(action.nargs), metavar)


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _with_value(option: str, action: argparse.Action) -> str:
    return option if action.nargs == 0 else f"{option} {_metavar(action)}"


def _written(action: argparse.Action) -> str:
    if not action.option_strings:
        return _metavar(action)
    return ", ".join(_with_value(option, action) for option in action.option_strings)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog}


# ---- Markdown


def markdown(all_commands: Iterable[Command]) -> str:
    """The reference as one Markdown page."""
    lines = [
        "<!-- Made by `make reference` from the argument parser: do not edit. -->",
        "",
        "# Commands",
        "",
        "What `fakefs COMMAND --help` says, for all commands. `make man` makes man pages of the same.",
    ]
    for command in all_commands:
        lines += ["", f"## `{command.name}`", "", command.description, "", "```text", command.usage, "```"]
        for title, arguments in (("argument", command.positional), ("option", command.options)):
            if arguments:
                lines += ["", f"| {title} | |", "|---|---|"]
                lines += [f"| `{_cell(argument.written)}` | {_cell(argument.help)} |" for argument in arguments]
        if command.subcommands:
            lines += ["", "| command | |", "|---|---|"]
            lines += [f"| [`{it.written}`](#{_slug(it.written)}) | {_cell(it.help)} |" for it in command.subcommands]
        if command.examples:
            lines += ["", "Examples:", "", "```text", *command.examples, "```"]
    lines += ["", "## Environment", "", "| variable | |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(what)} |" for name, what in ENVIRONMENT.items()]
    lines += ["", "## Exit status", "", "| status | |", "|---|---|"]
    lines += [f"| {status} | {_cell(what)} |" for status, what in EXIT_STATUS.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _slug(heading: str) -> str:
    return heading.lower().replace(" ", "-")


# ---- man pages


def man_pages(all_commands: Iterable[Command], version: str, date: str) -> Iterator[tuple[str, str]]:
    """Names of files and their texts; `date` is like 2026-11-26."""
    known = list(all_commands)
    for command in known:
        page = command.name.replace(" ", "-")
        lines = [f'.TH {_roff(page.upper())} 1 {date} "fakefs {version}" "User Commands"']
        lines += [".SH NAME", f"{_roff(page)} \\-", _prose(_first_words(command.description))]
        lines += [".SH SYNOPSIS", _styled(command.usage)]
        lines += [".SH DESCRIPTION"]
        for number, paragraph in enumerate(command.description.split("\n\n")):
            lines += [".PP"] * (number > 0) + [_prose(paragraph)]
        if command.subcommands:
            lines += [".SH COMMANDS"]
            lines += _tagged((_man_reference(sub.written), _prose(sub.help)) for sub in command.subcommands)
        if command.positional or command.options:
            lines += [".SH OPTIONS"]
            both = [*command.positional, *command.options]
            lines += _tagged((_styled(argument.written), _prose(argument.help)) for argument in both)
        if command is known[0]:
            lines += [".SH ENVIRONMENT"]
            lines += _tagged((f"\\fB{name}\\fR", _prose(text)) for name, text in ENVIRONMENT.items())
            lines += [".SH EXIT STATUS", *_tagged((status, _prose(text)) for status, text in EXIT_STATUS.items())]
        if command.examples:
            lines += [".SH EXAMPLES", ".EX", *map(_roff, command.examples), ".EE"]
        others = [other.name for other in known if other.name != command.name and _related(command.name, other.name)]
        lines += [".SH SEE ALSO", ",\n".join(map(_man_reference, others))]
        yield f"{page}.1", "\n".join(lines) + "\n"


def _related(name: str, other: str) -> bool:
    """Whether a page refers to another: to those above and below it, from where all others are reached."""
    return other.startswith(name + " ") or name.startswith(other + " ")


def _first_words(description: str) -> str:
    """The first sentence as a NAME section has it: small, without the stop."""
    sentence = re.split(r"\.(?:\s|$)", description)[0]
    return sentence if sentence[:2].isupper() or sentence.startswith("A Linux") else sentence[0].lower() + sentence[1:]


def _man_reference(name: str) -> str:
    return f"\\fB{_roff(name.replace(' ', '-'))}\\fR(1)"


def _tagged(entries: Iterable[tuple[str, str]]) -> list[str]:
    return [line for tag, text in entries for line in (".TP", tag, text or "\\&")]


def _prose(text: str) -> str:
    """A paragraph for roff, in lines that mandoc's lint finds short enough."""
    return "\n".join(_roff(line) for line in textwrap.wrap(text, 68, break_long_words=False, break_on_hyphens=False))


def _styled(text: str) -> str:
    """Words to be typed in bold, words to be replaced in italics."""
    parts = re.split(r"([A-Z][A-Z-]*[A-Z]|\b[A-Z]\b)", text)
    styled = ""
    for number, part in enumerate(parts):
        if number % 2:
            styled += f"\\fI{_roff(part)}\\fR"
        else:
            styled += re.sub(r"[\w\\-]+", lambda word: f"\\fB{word[0]}\\fR", _roff(part))
    return styled


_ROFF = {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti", '"': "\\(dq"}


def _roff(text: str) -> str:
    """A text for roff: its own characters escaped, no line taken for a request."""
    escaped = "".join(_ROFF.get(character, character) for character in text)
    return re.sub(r"(?m)^\.", r"\\&.", escaped)


def main(argv: list[str]) -> int:
    """Write what the first argument says to where the second says."""
    from fakefs import cli

    kind, where = argv[0], Path(argv[1])
    known = list(commands(cli.parser()))
    if kind == "markdown":
        where.write_text(markdown(known))
        return 0
    day = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))
    where.mkdir(parents=True, exist_ok=True)
    for old in where.glob("*.1"):
        old.unlink()
    for name, text in man_pages(known, cli.version(), time.strftime("%Y-%m-%d", day)):
        (where / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
