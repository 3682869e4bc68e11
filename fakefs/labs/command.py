"""`fakefs lab`: list, start, check and the rest. What they do is in the modules beside this."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fakefs.arguments import add_command, size
from fakefs.errors import UserError

if TYPE_CHECKING:
    from fakefs.arguments import Commands
    from fakefs.labs.catalog import Lab
    from fakefs.labs.session import Guests, Session

_TEMPLATE = Path(__file__).parent / "template"


def add_parser(commands: Commands) -> None:
    """Add the command to those of `fakefs`."""
    lab = add_command(
        commands,
        "lab",
        "learn and teach kernel tracing: exercises that are graded",
        "fakefs lab list\nfakefs lab start first-probe\nfakefs lab check\nfakefs lab new my-lab",
    )
    actions = lab.add_subparsers(dest="lab_command", metavar="COMMAND", required=True)

    what = "list the labs, from first steps to hard, and your progress"
    listing = add_command(actions, "list", what, "fakefs lab list")
    listing.add_argument("--json", action="store_true", help="for a class: what is known of each lab")
    listing.set_defaults(run=_list)

    start = add_command(
        actions,
        "start",
        "open a shell with a fresh guest for a lab, or run a command in it",
        "fakefs lab start first-probe\nfakefs lab start ./my-lab\nfakefs lab start first-probe -- bash my-solution.sh",
        usage="fakefs lab start [-h] [--kernel PATH] [--memory SIZE] NAME [-- CMD [ARG ...]]",
    )
    start.add_argument("name", metavar="NAME", help="a lab's name, or its directory")
    start.set_defaults(run=_start)

    check = add_command(
        actions,
        "check",
        "grade the lab that is running",
        "fakefs lab check\nfakefs lab check vfs_read\nfakefs lab check --json",
    )
    check.add_argument("answer", metavar="ANSWER", nargs="?", help="what the lab asks for, if it does")
    check.add_argument("--json", action="store_true", help="the result as JSON")
    check.set_defaults(run=_check)

    for name, what, run in (
        ("hint", "give the next hint", _hint),
        ("solution", "show what one could have typed", _solution),
        ("text", "show the lab's text again", _text),
    ):
        command = add_command(actions, name, what, f"fakefs lab {name}\nfakefs lab {name} first-probe")
        command.add_argument("name", metavar="NAME", nargs="?", help="a lab (default: the one that is running here)")
        command.set_defaults(run=run)

    reset = add_command(actions, "reset", "begin the running lab anew, with a fresh guest", "fakefs lab reset")
    reset.add_argument("name", metavar="NAME", nargs="?", help="when run from outside, and several are running")
    reset.set_defaults(run=_reset)

    new = add_command(actions, "new", "make a directory with a small lab to begin with", "fakefs lab new my-lab")
    new.add_argument("directory", metavar="DIR", type=Path, help="the directory to make; its name is the lab's")
    new.set_defaults(run=_new)

    test = add_command(
        actions,
        "test",
        "try labs out: the check must fail before the solution, and pass after it; TAP",
        "fakefs lab test ./my-lab\nfakefs lab test --kernel sid $(fakefs lab list --names)",
    )
    test.add_argument("names", metavar="NAME", nargs="+", help="labs or directories of labs")
    test.set_defaults(run=_test)
    listing.add_argument("--names", action="store_true", help="the names alone")
    for command in (start, test):
        command.add_argument("--kernel", metavar="KERNEL", help="path, version or suite (default: fakefs kernel list)")
        command.add_argument("--memory", metavar="SIZE", type=size, default=0, help="the guest's RAM: 128M ...")


def _guests(arguments: argparse.Namespace) -> Guests:
    from fakefs.labs.session import Guests
    from fakefs.testbed import find_kernel

    kernel = Path(find_kernel(arguments.kernel)) if arguments.kernel else None
    return Guests(kernel, arguments.memory)


def _current() -> tuple[Lab, Session]:
    """The lab this process is in. Raises UserError."""
    from fakefs.labs import catalog
    from fakefs.labs.session import Session

    session = Session.current()
    if session is None:
        raise UserError("no lab is running here; begin one: fakefs lab start NAME", exit_status=2)
    return catalog.read(Path(session.lab)), session


def _named(name: str | None) -> tuple[Lab, Path]:
    """A lab by its name, or the one that is running here; and where its progress is kept. Raises UserError."""
    from fakefs.labs import catalog, progress

    if name is None:
        lab, session = _current()
        return lab, Path(session.progress)
    lab = catalog.find(name)
    return lab, progress.place(lab.name)


def _list(arguments: argparse.Namespace) -> int:
    from fakefs.labs import catalog, progress

    labs = catalog.labs()
    if arguments.names:
        print("\n".join(lab.name for lab in labs))
        return 0
    known = {lab.name: progress.load(progress.place(lab.name)) for lab in labs}
    if arguments.json:
        entries = [{"lab": lab.name, "title": lab.title, "level": lab.level, **asdict(known[lab.name])} for lab in labs]
        print(json.dumps(entries, indent=2))
        return 0
    width = max(len(lab.name) for lab in labs)
    for lab in labs:
        mark = "*" if known[lab.name].passed_at else " "
        print(f"{mark} {lab.name:{width}}  {'+' * lab.level:5} {lab.minutes:3} min  {lab.title}")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    from fakefs.labs import catalog, session

    if session.Session.current() is not None:
        raise UserError("this is a lab's shell: leave it first, or: fakefs lab reset")
    return session.start(catalog.find(arguments.name), _guests(arguments), arguments.program)


def _check(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from fakefs.labs import progress
    from fakefs.labs.grading import grade

    lab, session = _current()
    keep = Path(session.progress)
    outcome = grade(lab, session, arguments.answer)
    before = progress.load(keep)
    now = datetime.now(UTC).isoformat(timespec="seconds") if outcome.passed else ""
    after = progress.change(keep, checks=before.checks + 1, passed_at=before.passed_at or now)
    if arguments.json:
        result: dict[str, Any] = {"lab": lab.name, "passed": outcome.passed, **asdict(outcome)}
        print(json.dumps({**result, "progress": asdict(after)}))
        return 0 if outcome.passed else 1
    for note in outcome.notes:
        print(note)
    for item in outcome.items:
        print(f"  {'ok' if item.passed else 'not yet:'} {item.text}")
    print(f"lab {lab.name}: passed" if outcome.passed else f"lab {lab.name}: not yet; fakefs lab hint helps")
    return 0 if outcome.passed else 1


def _hint(arguments: argparse.Namespace) -> int:
    from fakefs.labs import progress

    lab, keep = _named(arguments.name)
    taken, hints = progress.load(keep).hints, lab.hints
    if taken >= len(hints):
        taken = len(hints) - 1  # the last one again
        print("That was the last hint; fakefs lab solution tells all.\n")
    print(f"Hint {taken + 1} of {len(hints)}\n\n{hints[taken]}")
    progress.change(keep, hints=taken + 1)
    return 0


def _solution(arguments: argparse.Namespace) -> int:
    from fakefs.labs import progress

    lab, keep = _named(arguments.name)
    sys.stdout.write(lab.text("solution"))
    progress.change(keep, solution_seen=True)
    return 0


def _text(arguments: argparse.Namespace) -> int:
    from fakefs.labs import session

    session.show(_named(arguments.name)[0])
    return 0


def _reset(arguments: argparse.Namespace) -> int:
    from fakefs.labs import session

    session.reset(arguments.name)
    return 0


def _new(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    if directory.exists():
        raise UserError(f"{directory} is there already", exit_status=2)
    shutil.copytree(_TEMPLATE, directory)
    print(f"{directory}: read README.md and lab.toml in it; fakefs lab test {directory} tries it out")
    return 0


def _test(arguments: argparse.Namespace) -> int:
    from fakefs.labs import catalog
    from fakefs.labs.trial import try_out

    guests = _guests(arguments)
    print(f"TAP version 13\n1..{len(arguments.names)}", flush=True)
    failed = 0
    for number, name in enumerate(arguments.names, 1):
        try:
            passed = try_out(catalog.find(name), guests)
        except UserError as error:
            print(f"fakefs: {error}", file=sys.stderr, flush=True)
            passed = False
        print(f"{'ok' if passed else 'not ok'} {number} - {name}", flush=True)
        failed += not passed
    return 1 if failed else 0
