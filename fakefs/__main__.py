"""The command `fakefs` from its first line on: a Ctrl-C while it is still being imported ends it without a word.

Python would show a traceback, or, where it comes in the middle of the import system's own work, lose it.
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line; return the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fakefs import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
