"""insmod, rmmod, modprobe and lsmod for the private view of `fakefs run`: the machine's own would ask its kernel."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_FAKEFS = """#!/bin/sh
PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}} exec {python} -m fakefs {command}"$@"
"""
_MODPROBE = """#!/bin/sh
# Samples are all that modprobe has here; options that ask for silence or speed mean nothing.
while :; do
    case $1 in
    -r | --remove) shift; exec "${0%/*}/rmmod" "$@" ;;
    -*) shift ;;
    *) break ;;
    esac
done
exec "${0%/*}/fakefs" modprobe "$@"
"""
_LSMOD = """#!/bin/sh
echo 'Module                  Size  Used by'
while read -r name size uses users _; do
    users=${{users%,}}
    printf '%-22s %6s  %s %s\\n' "$name" "$size" "$uses" "${{users#-}}"
done <'{modules}'
"""


def write(directory: Path, proc: Path) -> None:
    """Write the programs, and `fakefs` itself, into a directory that is to come first in PATH.

    `proc` is the guest's /proc: a machine whose kernel has no modules has no /proc/modules to show it at.
    """
    package = shlex.quote(str(Path(__file__).parents[2]))
    texts = {
        name: _FAKEFS.format(path=package, python=shlex.quote(sys.executable), command=command)
        for name, command in (("fakefs", ""), ("insmod", "insmod "), ("rmmod", "rmmod "))
    }
    for name, text in (texts | {"modprobe": _MODPROBE, "lsmod": _LSMOD.format(modules=proc / "modules")}).items():
        tool = directory / name
        tool.write_text(text)
        tool.chmod(0o755)
