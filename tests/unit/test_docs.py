"""The documentation without running it: links, the reference of commands, man pages, and how its blocks are marked."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import manual
from fakefs import cli
from fakefs.mirror import calls
from fakefs.mirror.calls import Level
from tests.doc_pages import PAGES, REASONS, ROOT, Block, alike, blocks, steps

COMMANDS = list(manual.commands(cli.parser()))
_INDEX = ROOT / "docs" / "index.md"
_LINK = re.compile(r"(?<!!)\[(?:[^][]|\[[^]]*\])*\]\(([^)\s]+)\)")


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a page that are not in a block, with their numbers."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and MyST make them."""
    headings = [line.lstrip("#").strip() for _, line in _prose(page.read_text()) if re.match("#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for number, line in _prose(page.read_text()):
        for target in _LINK.findall(line):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            where = f"{page.name}:{number}"
            assert file.is_file(), f"{where}: there is no {name}"
            assert not anchor or anchor in _anchors(file), f"{where}: {file.name} has no heading for #{anchor}"


def test_the_index_has_all_pages() -> None:
    linked = set(re.findall(r"(?m)^- \[[^]]*\]\(([\w-]+\.md)\)", _INDEX.read_text()))
    assert linked == {page.name for page in PAGES if page.parent == _INDEX.parent and page != _INDEX}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_hides_from_being_run(page: Path) -> None:
    """Blocks of commands are fenced and marked as `tests.doc_pages` says."""
    text = page.read_text()
    for number, line in _prose(text):
        assert not line.startswith("    "), f"{page.name}:{number}: an indented block; use a fenced one"
    for block in blocks(page, text):
        assert block.language, f"{block.where}: this block has no language; text if it is none"
        if block.language == "console":
            assert steps(block), f"{block.where}: no command"
        if block.info.startswith("not"):
            assert block.not_run in REASONS, f"{block.where}: `not run:` and one of {', '.join(REASONS)}"


# ---- the reference of commands, man pages, --help


def test_the_reference_is_what_the_parser_says() -> None:
    current = (ROOT / "docs" / "commands.md").read_text()
    assert current == manual.markdown(COMMANDS), "docs/commands.md is old: make reference"


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)


def test_the_reference_has_every_command_and_option() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for parser in _parsers(cli.parser()):
        _, heading, section = text.partition(f"\n## `{parser.prog}`\n")
        assert heading, parser.prog
        section = section.partition("\n## ")[0]
        for action in parser._actions:
            for option in action.option_strings if action.dest != "help" else []:
                assert re.search(rf"^\| .*{re.escape(option)}\b", section, re.M), f"{parser.prog} {option}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_has_examples_that_the_parser_takes(command: manual.Command, tmp_path: Path) -> None:
    assert command.description
    for argument in (*command.positional, *command.options):
        assert argument.help, f"{command.name} --help says nothing of {argument.written}"
    assert command.examples, f"{command.name} --help has no examples"
    own = 0
    for line in command.examples:
        for words in _calls(re.sub(r"\$\(.*?\)", "FILE", re.sub(r" {2,}.*", "", line))):
            own += words[: len(command.name.split())] == command.name.split()
            parsed, _ = cli._split(words[1:])
            cli.parser().parse_args(parsed)
    assert own, f"no example of {command.name} calls it"


def _calls(line: str) -> Iterator[list[str]]:
    """The calls of fakefs in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    while words:
        end = next((at for at, word in enumerate(words) if word in ("|", "||", "&&", ";")), len(words))
        if words[0] == "fakefs":
            yield words[:end]
        words = words[end + 1 :]


def test_man_pages() -> None:
    """Their structure; `tests/mount/test_doc_pages.py` asks groff and mandoc."""
    pages = dict(manual.man_pages(COMMANDS, "1.0", "2026-11-26"))
    assert set(pages) == {f"{command.name.replace(' ', '-')}.1" for command in COMMANDS}
    for name, text in pages.items():
        lines = text.splitlines()
        assert lines[0].startswith(f".TH {name[:-2].upper()}".replace("-", r"\-")), name
        sections = [line[4:] for line in lines if line.startswith(".SH ")]
        assert sections[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"], name
        assert sections[-2:] == ["EXAMPLES", "SEE ALSO"], name
        requests = {line.split()[0] for line in lines if line.startswith((".", "'"))}
        assert requests <= {".TH", ".SH", ".TP", ".PP", ".EX", ".EE"}, name
        assert all(ord(character) < 128 for character in text), name


def test_man_page_text_is_escaped() -> None:
    odd = manual.Command("fakefs x", "fakefs x 'C'", "It's `a` ~\\x.\n\n.TH is no request.", [], [], [".x"], [])
    [(_, text)] = manual.man_pages([odd], "1", "2026-11-26")
    assert "It\\(aqs \\(gaa\\(ga \\(ti\\ex." in text
    assert "\n\\&.TH is no request." in text
    assert "\n\\&.x\n" in text


_NOT_MADE = {"set_robust_list", "arch_prctl", "rt_sigreturn"}
"""Calls that tell of something."""
_OF_EVENTS = {"perf_event_open", "ioctl", "mmap"}
"""Those that are made in the guest instead, at any level."""


def test_the_table_of_mirrored_calls_is_the_one_that_is_gone_by() -> None:
    told: dict[Level, list[str]] = {level: [] for level in Level if level}
    section = (ROOT / "docs" / "run.md").read_text().partition("### Which system calls\n")[2].partition("\n\n#")[0]
    level = Level.OFF
    for first, names in re.findall(r"(?m)^\| (?:`(\w+)`)? ?\| ([a-z0-9_, ]+) \|$", section):
        level = Level[first.upper()] if first else level
        told[level] += names.split(", ")
    for level, names in told.items():
        expected = {call.name for call in calls.TABLE if call.level is level} - _NOT_MADE
        expected -= _OF_EVENTS if level is Level.PROCESS else set()
        assert sorted(names) == sorted(expected), level.name


# ---- the tools of the test of pages


def test_blocks_and_steps() -> None:
    text = "a\n```console\n$ cat <<END\n> x\n> END\nx\n$ true\n```\n````text\n```\n````\n```sh not run: root\nid\n```\n"
    console, plain, script = blocks(ROOT / "x.md", text)
    assert [(step.line, step.command, step.shown) for step in steps(console)] == [
        (3, "cat <<END\nx\nEND", ["x"]),
        (7, "true", []),
    ]
    assert (plain.text, plain.line, plain.language) == ("```\n", 9, "text")
    assert (script.not_run, script.file, script.where) == ("root", "", "x.md:12")
    assert Block(ROOT / "x.md", 1, "sh", "needs a b", "").needs == ["a", "b"]
    assert Block(ROOT / "x.md", 1, "sh", "a.sh", "").file == "a.sh"
    with pytest.raises(ValueError, match=r"x\.md:1: this block is not closed"):
        list(blocks(ROOT / "x.md", "```sh\n"))
    with pytest.raises(ValueError, match=r"x\.md:2: a console block begins with"):
        steps(Block(ROOT / "x.md", 1, "console", "", "x\n"))


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        (["a  b"], ["a b"]),
        (["a", "...", "d"], ["a", "b", "c", "d"]),
        (["..."], []),
        (["size ... bytes"], ["size 12 bytes"]),
        (["[1] 1234", "x"], ["x"]),
        (["[    1.5] oops"], ["[   12.500000] oops"]),
        (
            ["             cat-25327   [000] .....     1.631280: p: (vfs_read+0x4/0x370) n=0x10"],
            ["            cat-7 [000] ...1.    21.631280: p: (vfs_read+0x8/0x390) n=0x10"],
        ),
        ([" 0)   0.345 us    |  fput();"], [" 0) + 12.345 us   |  fput();"]),
        (["p: (0x5618cf0f5e10) at 0x..."], ["p: (0x7fb90f5e10aa) at 0x5618cf0f5e10"]),
        (["Linux 6.12.107+deb13-cloud-amd64"], ["Linux 6.12.111+deb13-cloud-amd64"]),
    ],
)
def test_lines_that_are_the_same(shown: list[str], printed: list[str]) -> None:
    assert alike(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        (["a"], []),
        ([], ["a"]),
        (["a"], ["a", "b"]),
        (["n=0x10"], ["n=0x11"]),
        (["a", "...", "d"], ["a", "b"]),
        (["cat-1 [000] ..... 1.0: p: x"], ["dd-1 [000] ..... 1.0: p: x"]),
        (["hits 3"], ["hits 4"]),
    ],
)
def test_lines_that_differ(shown: list[str], printed: list[str]) -> None:
    assert not alike(shown, printed)
