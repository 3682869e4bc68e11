"""What the commands' arguments have in common: how a command describes itself, a kernel's RAM, numbers of seconds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(
    commands: Commands, name: str, what: str, examples: str, *, usage: str | None = None, more: str = ""
) -> argparse.ArgumentParser:
    """Add a command whose help says `what` it does, `more` about it, and has examples, a line each."""
    return commands.add_parser(
        name,
        usage=usage,
        help=what,
        description="\n\n".join(filter(None, [what[0].upper() + what[1:] + ".", more])),
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def size(text: str) -> int:
    """Parse 128M, 1G, 262144K into bytes. Raises argparse.ArgumentTypeError."""
    units = {"K": 10, "M": 20, "G": 30}
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "M")
    if not (digits.isascii() and digits.isdigit()) or not 0 < int(digits) << units[unit] <= 2 << 30:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size up to 2G, such as 128M")
    return int(digits) << units[unit]


def seconds(text: str) -> float:
    """Parse a number of seconds. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 86400")
    return number
