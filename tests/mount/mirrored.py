"""What tests of mirroring have in common: pieces of scripts, and what these have shown."""

from __future__ import annotations

import subprocess

from fakefs.records import Record, parse
from tests.mounted import FAKEFS

SETUP = """
    cd /sys/kernel/tracing
    on() { for event; do echo 1 > events/$event/enable; done; }
"""
SHOW = """
    echo 0 > /sys/kernel/tracing/tracing_on
    grep -v '^#' /sys/kernel/tracing/trace
"""
GUEST = f"""
    guest() {{ {FAKEFS[0]} -m fakefs.cli exec -- "$@"; }}
"""
"""The shell function `guest` runs a command in the guest."""


def hits(done: subprocess.CompletedProcess[str]) -> list[Record]:
    """The trace a script has shown."""
    assert (done.stderr, done.returncode) == ("", 0)
    return [hit for hit in parse(done.stdout) if hit.event]
