"""The pages of the documentation as tests see them: fenced blocks, console sessions, and when two lines are the same.

    ```console                      typed into the page's shell, line by line; what is printed must be what is shown
    ```console needs trace-cmd      likewise, by a slow test and if it is installed
    ```console not run: network     not run, and counted; the reason is one of `REASONS`
    ```sh                           a script, run with the page's shell where the shell is; it must end with status 0
    ```sh name.sh                   a file, written where the page begins; console blocks use it. Of any language

In a console block `$ ` begins a command and `> ` goes on with it. A line of three dots stands for any number of lines,
and three dots in a line for anything in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

REASONS = {
    "network": "fetches something",
    "root": "needs root, or changes the machine it runs on",
    "machine": "is for another machine, or needs what few have",
    "checkout": "sets this checkout up, or runs all of its tests",
    "terminal": "is interactive",
    "shape": "shows the form of a command, with words to be replaced",
}
"""Why a block may be left out of the test."""

RUN = ("console", "sh", "bash", "python")
"""Languages of blocks that are run; others are text."""

not_run: list[tuple[str, str]] = []
"""Where there are blocks that the tests have not run, and why, for the end of pytest's report."""

_FENCE = re.compile(r"^(`{3,})(.*)$")
_NOT_RUN = re.compile(r"not run: (\S+)")


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is that of its opening fence; `info` is what is behind the language there."""

    page: Path
    line: int
    language: str
    info: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def not_run(self) -> str:
        """The reason that is given for not running it, or nothing."""
        marked = _NOT_RUN.fullmatch(self.info)
        return marked[1] if marked else ""

    @property
    def needs(self) -> list[str]:
        """Programs it needs."""
        return self.info.removeprefix("needs ").split() if self.info.startswith("needs ") else []

    @property
    def file(self) -> str:
        """The name of the file it is, or nothing."""
        return self.info if self.info and not self.not_run and not self.needs else ""


@dataclass
class Step:
    """A command of a console block, with the lines that are shown below it."""

    line: int
    command: str
    shown: list[str] = field(default_factory=list)


def blocks(page: Path, text: str) -> Iterator[Block]:
    """The fenced blocks of a page. Raises ValueError for one that is not closed."""
    fence, language, info, begun, lines = "", "", "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        found = _FENCE.match(line)
        if not fence and found:
            fence, begun, lines = found[1], number, []
            language, _, info = found[2].strip().partition(" ")
        elif fence and line.strip() == fence:
            yield Block(page, begun, language, info.strip(), "".join(f"{line}\n" for line in lines))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        raise ValueError(f"{page}:{begun}: this block is not closed")


def steps(block: Block) -> list[Step]:
    """The commands of a console block. Raises ValueError for one that does not begin with a command."""
    found: list[Step] = []
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if line.startswith("$ "):
            found.append(Step(number, line[2:]))
        elif not found:
            raise ValueError(f"{block.page}:{number}: a console block begins with `$ ` and a command")
        elif line.startswith("> ") and not found[-1].shown:
            found[-1].command += "\n" + line[2:]
        else:
            found[-1].shown.append(line)
    return found


_VARIES = (
    (r"^\S+: line \d+: ", "bash: "),
    (r"^(\S.{0,15})-\d+ (\[\d+\]) (?:[\w.]{4,6} )?\d+(?:\.\d+)?: ", r"\1-PID \2 TIME: "),
    (r"\b\d+\.\d+(-\d+)?\+?[\w.]*-(cloud-)?amd64", "RELEASE"),
    (r"\[ *\d+\.\d+\]", "[TIME]"),
    (r"\+0x[0-9a-f]+(/0x[0-9a-f]+)?", "+OFFSET"),
    (r"\b(0x)?(?:[0-9a-f]{16}|(?<=0x)[0-9a-f]{9,15})\b", r"\1ADDRESS"),
    (r"\b(\w*pid|ns|max)(=|: ?)\d+", r"\1\2N"),
    (r"([+!#*@$] )?\b\d+\.\d+ us\b", "DURATION"),
)
"""What differs from run to run, or with the next update of the kernel."""


def normal(line: str) -> str:
    """A line without what varies, and with single blanks."""
    line = " ".join(line.split())
    for pattern, instead in _VARIES:
        line = re.sub(pattern, instead, line)
    return line


def _of_the_shell(line: str) -> bool:
    """Whether an interactive shell tells of its jobs here, which one that runs a script does not."""
    return re.match(r"\[\d+\][+-]? ", line) is not None


def alike(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether what was printed is what a page shows."""
    patterns = [normal(line) for line in shown if not _of_the_shell(line)]
    text = "".join(normal(line) + "\n" for line in printed)
    return re.fullmatch("".join(map(_pattern, patterns)), text) is not None


def _pattern(line: str) -> str:
    if line == "...":
        return r"(?:.*\n)*?"
    return "[^\n]*".join(re.escape(part) for part in re.split(r"(?<!\.)\.\.\.(?!\.)", line)) + r"\n"
