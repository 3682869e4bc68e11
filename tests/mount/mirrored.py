"""What tests of mirroring have in common: pieces of scripts, and what these have shown."""

from __future__ import annotations

import subprocess

from fakefs.records import Record, parse
from tests.mounted import FAKEFS, PATIENCE

SETUP = """
    cd /sys/kernel/tracing
    on() { for event; do echo 1 > events/$event/enable; done; }
"""
SEEN = """
    seen() {
        mapfile -t lines < /sys/kernel/tracing/trace
        for line in "${lines[@]}"; do [[ $line != *"$1"*"$2"* ]] || return 0; done
        return 1
    }
"""
"""The shell function `seen` tells whether a line of the trace has $1 and behind that $2."""
SHOW = """
    echo 0 > /sys/kernel/tracing/tracing_on
    grep -v '^#' /sys/kernel/tracing/trace
"""
GUEST = f"""
    guest() {{ {FAKEFS[0]} -m fakefs exec -- "$@"; }}
"""
"""The shell function `guest` runs a command in the guest."""


STATE = f"""
    state() {{
        local end=$((SECONDS + {PATIENCE:.0f}))
        until [[ $(guest sed -n 's/^State:.//p' /proc/$1/status) =~ $2 ]]; do [ $SECONDS -lt $end ] || exit 9; done
    }}
"""
"""The shell function `state` waits until the guest says that the state of process $1 is like $2. Needs `guest`."""


def hits(done: subprocess.CompletedProcess[str]) -> list[Record]:
    """The trace a script has shown."""
    assert (done.stderr, done.returncode) == ("", 0)
    return [hit for hit in parse(done.stdout) if hit.event]
