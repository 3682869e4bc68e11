"""The error every part of the emulator raises for what a user, a kernel image or the guest can cause."""

from __future__ import annotations


class EmulatorError(Exception):
    """Something went wrong that is not a bug here: the message is one line, says what happened and what to do."""
