"""Errors a person sees: one line on stderr and an exit status, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A one-line message saying what happened and what to do.

    `exit_status` is what the command exits with: 1 when it could not be done, 2 when it was asked for wrongly.
    """

    def __init__(self, message: str, *, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first exception in a group that is none itself: what a nursery raises, for those that want one."""
    inner = group.exceptions[0]
    return first_of(inner) if isinstance(inner, BaseExceptionGroup) else inner
