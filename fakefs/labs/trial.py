"""Does a lab work? Before anything is done its check must fail, and pass once its solution has been typed."""

from __future__ import annotations

from fakefs.errors import UserError
from fakefs.labs.catalog import Lab
from fakefs.labs.grading import grade
from fakefs.labs.script import quoted, run_script
from fakefs.labs.session import Guests, Place, Session

_SECONDS = 120


def try_out(lab: Lab, guests: Guests) -> bool:
    """Run a lab's solution in a fresh guest; what goes wrong is told on standard error. Raises UserError."""
    if not lab.hints:
        raise UserError(f"lab {lab.name}: there is no hint in hints.md")
    return Place(lab, guests).run(None, ["true"], lambda session: _inside(lab, session)) == 0


def _inside(lab: Lab, session: Session) -> None:
    if grade(lab, session, None).passed:
        raise UserError(f"lab {lab.name}: its check passes before anything is done")
    argv = ["bash", "-e", str(lab.directory / "solution")]
    done = run_script(lab, "solution", argv, session.environment() | {"SECRET": ""}, _SECONDS)
    outcome = grade(lab, session, None)
    if not outcome.passed:
        raise UserError(f"lab {lab.name}: its solution does not pass: {outcome.items[-1].text}{quoted(done.stdout)}")
    if done.returncode:
        raise UserError(f"lab {lab.name}: its solution fails with exit status {done.returncode}{quoted(done.stdout)}")
