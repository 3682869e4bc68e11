"""Does a lab work? Before anything is done its check must fail, and pass once its solution has been typed."""

from __future__ import annotations

import subprocess

from fakefs.errors import UserError
from fakefs.labs.catalog import Lab
from fakefs.labs.grading import grade
from fakefs.labs.session import TRACING, Guests, Place, Session

_SECONDS = 120


def try_out(lab: Lab, guests: Guests) -> bool:
    """Run a lab's solution in a fresh guest; what goes wrong is told on standard error. Raises UserError."""
    if not lab.hints:
        raise UserError(f"lab {lab.name}: there is no hint in hints.md")
    return Place(lab, guests).run(None, ["true"], lambda session: _inside(lab, session)) == 0


def _inside(lab: Lab, session: Session) -> None:
    if grade(lab, session, None).passed:
        raise UserError(f"lab {lab.name}: its check passes before anything is done")
    try:
        done = subprocess.run(
            ["bash", "-e", str(lab.directory / "solution")],
            cwd=TRACING,
            env=session.environment() | {"SECRET": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = str(error.stdout or "")
        raise UserError(f"lab {lab.name}: its solution did not end within {_SECONDS} s{_quoted(said)}") from None
    outcome = grade(lab, session, None)
    if not outcome.passed:
        raise UserError(f"lab {lab.name}: its solution does not pass: {outcome.items[-1].text}{_quoted(done.stdout)}")
    if done.returncode:
        raise UserError(f"lab {lab.name}: its solution fails with exit status {done.returncode}{_quoted(done.stdout)}")


def _quoted(text: str) -> str:
    return "".join(f"\n# {line}" for line in text.splitlines()[-30:])
