"""Running a lab's scripts: in the tracefs, with nothing to read, and for no longer than a limit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from fakefs.errors import UserError
from fakefs.labs.catalog import Lab

TRACING = Path("/sys/kernel/tracing")
"""Where the tracefs is inside."""


def run_script(
    lab: Lab, name: str, argv: Sequence[str], environment: Mapping[str, str], limit: float, *, merge: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the lab's script `name` by a command; `merge` sends errors where the output goes.

    Raises UserError when it runs for more than `limit` seconds, with the last of what it printed.
    """
    try:
        return subprocess.run(
            argv,
            cwd=TRACING,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        raise UserError(f"lab {lab.name}: its {name} did not end within {limit:g} s{quoted(said)}") from None


def quoted(text: str) -> str:
    """The last lines of what a script printed, as comments below a message."""
    return "".join(f"\n# {line}" for line in text.splitlines()[-30:])
