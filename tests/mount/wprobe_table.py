"""Hold a strict mount against transcripts of a kernel that has the wprobe series: writes wprobe_table.tsv.

    python -m tests.mount.wprobe_table TRANSCRIPTS [CASE...]

TRANSCRIPTS is a directory of files, one a case: `# name:`, then commands (`$ `), what they printed, and `[exit N]`.
What differs from run to run and from kernel to kernel is replaced first (`normal`). Each case gets a fresh kernel, that
of $FAKEFS_TEST_KERNEL or the default one. Commands that work on other files than the tracefs's are run in the guest.

The table has each case, whether it is equal, and for those that are not the reason, from wprobe_reasons.tsv. Named
cases show a diff instead.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

from fakefs import kernels
from fakefs.forkserver import ForkServer, Order
from fakefs.testbed import FreshTracefs
from tests.mount import wprobe_sessions
from tests.mounted import FAKEFS

HERE = Path(__file__).parent / "wprobe_golden"
_OF_THE_MACHINE = re.compile(r"/tmp/|/proc/|\bhostname\b")
_MORE_REPLACED = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"entries-in-buffer/entries-written: .*", "entries-in-buffer/entries-written: N"),
        (r"^#\s+(_-+|/|\|).*|^#\s+TASK-PID.*|^#$", ""),  # the heading of a trace
        (r"\b(hitcount|Hits|Entries|Dropped): +\d+", r"\1: N"),
        (r"(?<=[a-z]{2}=)0x[0-9a-f]{6,}", "VAL"),
        (r"^ => \S+$", " => FUNC"),
        (r" +\} hitcount", " } hitcount"),
    )
]


def transcripts(directory: Path) -> Iterator[wprobe_sessions.Session]:
    """Yield the cases of a directory."""
    for path in sorted(directory.glob("[0-9]*.txt")):
        lines = path.read_text(encoding="latin-1").splitlines()
        kept = [line for line in lines if not line.startswith("# name:") and line != "[exit 0]"]
        yield wprobe_sessions.Session(path.stem, "\n".join(line.rstrip() for line in kept if line.strip()))


def here(command: str, kallsyms: Path) -> str:
    """A command of a transcript as it is to be given to bash on the mount."""
    command = re.sub(r"taskset -c \d ", "", command.replace("/proc/kallsyms", str(kallsyms)))
    parts = re.split(r"; ", command)
    # A file of its own name is the host's; the rest of what names one means the guest's.
    inside = [bool(_OF_THE_MACHINE.search(part)) and str(kallsyms) not in part for part in parts]
    return "; ".join(f"guest {shlex.quote(part)}" if of else part for part, of in zip(parts, inside, strict=True))


def script(session: wprobe_sessions.Session, guest: str, kallsyms: Path) -> str:
    """A bash script that prints the transcript's text on the same kernel."""
    there = wprobe_sessions.FILE_THERE.get(session.name)
    lines = [f'guest() {{ {guest} "$1"; }}', f"guest 'touch {there}'" if there else ":"]
    for command in session.commands:
        lines += [f"echo {shlex.quote('$ ' + command)}", f"eval {shlex.quote(here(command, kallsyms))}"]
        lines.append('status=$?; if [ $status != 0 ]; then echo "[exit $status]"; fi')
    return "\n".join(lines)


def normal(text: str) -> str:
    """A text without what differs from run to run and from kernel to kernel, the number of like lines included."""
    lines = wprobe_sessions.normal(text).split("\n")
    for pattern, by in _MORE_REPLACED:
        lines = [pattern.sub(by, line) for line in lines]
    return "\n".join(line for line, _ in groupby(line.rstrip() for line in lines if line.strip()))


def _with_data(kallsyms: str) -> str:
    """A kallsyms that calls data D: Debian's kernel says T of all that is not local."""
    lines = kallsyms.splitlines(keepends=True)
    end = next(at for at, line in enumerate(lines) if line.endswith(" _etext\n"))
    return "".join(lines[:end] + [line.replace(" T ", " D ") for line in lines[end:]])


class Asked:
    """Fresh mounts, one a case."""

    def __init__(self, base: Path) -> None:
        self._base = base
        named = os.environ.get("FAKEFS_TEST_KERNEL")
        self._kernel = Path(named) if named else kernels.default_kernel() or kernels.fetch()
        self._server = ForkServer()

    def ask(self, session: wprobe_sessions.Session) -> str:
        """Run a case; return what it printed."""
        directory = self._base / session.name
        directory.mkdir()
        with closing(FreshTracefs(self._server, directory, Order(str(self._kernel), wprobe="strict"))) as mount:
            kallsyms = self._base / "kallsyms"
            if not kallsyms.exists():
                kallsyms.write_text(_with_data(mount.guest("cat /proc/kallsyms").stdout))
            guest = " ".join([*FAKEFS, "exec", str(directory), "--", "sh", "-c"])
            return mount.sh(script(session, guest, kallsyms), merge=True).stdout


def main(directory: Path, names: list[str]) -> None:
    """Ask all cases, or those that begin with one of `names`."""
    reasons = dict(line.split("\t") for line in (HERE / "wprobe_reasons.tsv").read_text().splitlines())
    rows, equal = ["case\tequal\treason"], 0
    with tempfile.TemporaryDirectory() as base:
        asked = Asked(Path(base))
        for session in transcripts(directory):
            if names and not session.name.startswith(tuple(names)):
                continue
            theirs, ours = normal(session.text), normal(asked.ask(session))
            same = theirs == ours
            equal += same
            rows.append(f"{session.name}\t{'yes' if same else 'no'}\t{'' if same else reasons.get(session.name, '')}")
            if names and not same:
                diff = difflib.unified_diff(theirs.split("\n"), ours.split("\n"), "theirs", "ours", lineterm="")
                print(*diff, sep="\n")
    print(f"{equal} of {len(rows) - 1} are equal: {100 * equal / (len(rows) - 1):.1f} %")
    if not names:
        (HERE / "wprobe_table.tsv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
