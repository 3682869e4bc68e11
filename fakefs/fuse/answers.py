"""What a request is answered with when its handler fails.

An OSError of `Files` is the answer, if the kernel takes it. Anything else is a bug: told in one line on stderr and
answered EIO, for pyfuse3 ends the mount at an exception it does not know. Follows fuse_dev_do_write() of Linux.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from fakefs.fuse import request  # loads the shim, which must come before pyfuse3

# isort: split
from pyfuse3 import FUSEError

P = ParamSpec("P")
T = TypeVar("T")

_RESTART_FIRST, _RESTART_LAST = 512, 516  # ERESTARTSYS..ERESTART_RESTARTBLOCK: for the kernel's own eyes


def answer_errno(exc: OSError) -> int:
    """The errno to answer with. The kernel drops an answer outside 1..511, and its caller would wait forever."""
    number = exc.errno or errno.EIO
    if _RESTART_FIRST <= number <= _RESTART_LAST:
        return errno.EINTR
    if number == errno.ENOSYS:
        return errno.EOPNOTSUPP  # ENOSYS would turn this kind of request off for the life of the mount
    return number if 0 < number < _RESTART_FIRST else errno.EIO


def answering(
    handler: Callable[P, Awaitable[T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn what `handler` raises into the FUSEError that pyfuse3 answers with.

    If the operations have a `turn` it is taken for the time of the handler.
    """

    @functools.wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        turn = getattr(args[0], "turn", None)
        try:
            if turn is not None and not turn.take_at_once():
                note = request.note()
                await turn.take()
                request.restore(note)
            return await handler(*args, **kwargs)
        except OSError as exc:
            raise FUSEError(answer_errno(exc)) from None
        except Exception as exc:
            complain(handler.__name__, exc)
            raise FUSEError(errno.EIO) from None
        finally:
            if turn is not None:
                turn.give_up()

    return answer


def complain(what: str, exc: BaseException) -> None:
    """Tell of a bug in one line on stderr, with the place it comes from."""
    place = exc.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" at {os.path.basename(place.tb_frame.f_code.co_filename)}:{place.tb_lineno}" if place else ""
    sys.stderr.write(f"fakefs: {what} failed: {exc!r}{where}\n")
