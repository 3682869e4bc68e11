"""Grading: run a lab's `check` on the state of the tracefs, the trace, and what the student answered."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from fakefs import client
from fakefs.errors import UserError
from fakefs.labs.catalog import Lab
from fakefs.labs.script import TRACING, run_script
from fakefs.labs.session import Session

_PRELUDE = Path(__file__).with_name("prelude.sh")
_SECONDS = 60


@dataclass(frozen=True)
class Item:
    """One thing that had to be so, and whether it is."""

    text: str
    passed: bool


@dataclass(frozen=True)
class Outcome:
    """What a check came to: its items up to the first that is not so, and what else it said."""

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all is so."""
        return all(item.passed for item in self.items)


def grade(lab: Lab, session: Session, answer: str | None) -> Outcome:
    """Grade a lab in its session; an `answer` is remembered for the next time. Raises UserError."""
    directory = Session.directory()
    if answer is not None:
        (directory / "answer").write_text(answer)
    given = (directory / "answer").read_text() if (directory / "answer").exists() else ""
    status = json.loads(client.ask(client.find_mount(None), {"do": "status"}))
    if status["dead"]:
        reason = re.sub(r"^\[[ \d.]*\] ", "", str(status["dead"]).splitlines()[0])
        raise UserError(f"the guest has died ({reason}); a fresh one: fakefs lab reset")
    try:
        outcome = _run_check(lab, session, given)
    except OSError as error:
        raise UserError(f"lab {lab.name}: cannot be checked: {error.strerror}; fakefs lab reset") from None
    if lab.answer and not given and outcome.passed:
        return Outcome([*outcome.items, Item(f"you have answered {lab.answer}: fakefs lab check ANSWER", False)])
    return outcome


def _run_check(lab: Lab, session: Session, answer: str) -> Outcome:
    """Run the script with tracing off, which a `trace` that is read would otherwise fill. Raises OSError, UserError."""
    switch, trace = TRACING / "tracing_on", Session.directory() / "trace"
    was_on = switch.read_bytes() == b"1\n"
    if was_on:
        switch.write_text("0")
    try:
        trace.write_bytes((TRACING / "trace").read_bytes())
        argv = ["sh", "-c", '. "$1"; . "$2"', "check", str(_PRELUDE), str(lab.directory / "check")]
        environment = {**session.environment(), "TRACE": str(trace), "ANSWER": answer}
        done = run_script(lab, "check", argv, environment, _SECONDS, merge=False)
    finally:
        if was_on:
            switch.write_text("1")
    items = [Item(line[3:], line.startswith("ok ")) for line in done.stdout.splitlines() if line[:3] in ("ok ", "no ")]
    notes = [line for line in done.stdout.splitlines() if line[:3] not in ("ok ", "no ")]
    if not items or (done.returncode and items[-1].passed):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"lab {lab.name}: its check is broken (exit status {done.returncode}): {said}")
    return Outcome(items, notes)
