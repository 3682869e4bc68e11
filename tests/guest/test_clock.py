"""The clock of a guest in real time, when the host is far ahead."""

from __future__ import annotations

import trio

from emulator.guest import Guest
from fakefs.pump import Pump

_GETPID = 39
_SECOND = 1_000_000_000


def test_what_it_is_far_behind_is_left_out(guest: Guest) -> None:
    """As after 20 s of tracing all there is: moved on by that at once, it would have the guest's watchdog bite."""

    async def main() -> None:
        pump = Pump(guest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            assert await pump.call(guest.agent.init, [(_GETPID,)]) == [1]
            begun = guest.machine.cpu.now
            pump._epoch -= 20 * _SECOND
            for _ in range(3):
                assert await pump.call(guest.agent.init, [(_GETPID,)]) == [1]
                await trio.lowlevel.checkpoint()
            moved = guest.machine.cpu.now - begun
            nursery.cancel_scope.cancel()
        assert _SECOND <= moved < 10 * _SECOND
        assert "soft lockup" not in guest.machine.console.text()

    trio.run(main)
