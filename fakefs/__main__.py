"""The command `fakefs` from its first line on, as long as its modules are still being imported.

A Ctrl-C ends it without a word then: Python would show a traceback, or, in the middle of the import system's own work,
lose it. A standard descriptor that is closed is opened, lest the next file, of the guest's memory say, becomes one.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run the command line; return the exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free descriptor is that one; a program that is started has it closed again.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fakefs import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
