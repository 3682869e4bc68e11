"""The process behind a mount: guest, pump, FUSE session and control socket in one trio loop."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from emulator.cpu.interface import GuestDied
from emulator.errors import EmulatorError
from emulator.guest import Guest
from fakefs.control import Control
from fakefs.errors import UserError, first_of
from fakefs.files import Files
from fakefs.fuse.options import MountOptions
from fakefs.fuse.session import serve
from fakefs.guestfiles import GuestFiles
from fakefs.prepare import noted
from fakefs.pump import Pump
from fakefs.shadow import Shadows
from fakefs.static import TRACEFS, StaticPaths
from fakefs.syscalls import AT_FDCWD, Sys
from fakefs.wprobe.carrier import CarrierFacts, Carriers
from fakefs.wprobe.files import WprobeFiles
from fakefs.wprobe.off_limits import OffLimits
from fakefs.wprobe.table import Table, TableFacts

if TYPE_CHECKING:
    from fakefs.mirror.launch import Recording

_SEED_SIZE = 32
_RNDADDENTROPY = 0x40085203  # <linux/random.h>; random(4)


@dataclass(frozen=True)
class Service:
    """What a daemon serves: guest path `root` on host directory `mountpoint`."""

    mountpoint: Path
    root: bytes = TRACEFS
    deterministic: bool = False
    wprobe: str = "unlimited"  # or "strict", like four debug registers, or "off"
    options: MountOptions = field(default_factory=MountOptions)
    private: bool = False  # in a mount namespace of its own, with which the mount ends
    recording: Recording | None = None  # of processes that are mirrored

    @property
    def filesystem(self) -> bytes:
        """The directory of the guest whose filesystem takes mount options: of the guest as a whole, its tracefs."""
        return TRACEFS if self.root == b"/" else self.root


def run(guest: Guest, service: Service, ready: Callable[[], None]) -> None:
    """Serve until unmounted or told to stop by a signal; `ready` is called when the mount answers. Raises UserError."""
    gc.freeze()
    gc.enable()
    try:
        trio.run(_main, guest, service, ready)
    except BaseExceptionGroup as group:
        expected, other = group.split((UserError, EmulatorError))
        if expected is None or other is not None:
            raise
        raise first_of(expected) from None


async def _main(guest: Guest, service: Service, ready: Callable[[], None]) -> None:
    pump = Pump(guest, deterministic=service.deterministic)
    watched: list[int] = []
    async with trio.open_nursery() as nursery:
        shadows = Shadows(pump, nursery)
        files = make_files(guest, service, shadows, nursery)
        control = Control(service.mountpoint, pump, shadows, files, service.filesystem)
        nursery.start_soon(_keep_running, pump, watched)
        if not service.deterministic:
            await set_clock(shadows)
        await seed_random(shadows, bytes(_SEED_SIZE) if service.deterministic else os.urandom(_SEED_SIZE))
        if wanted := service.options.for_guest():
            await files.remount(service.filesystem, wanted)
        await nursery.start(control.serve)
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        served: Files = files
        if service.recording is not None:
            served = _mirror(shadows, files, service.recording, nursery)

        def mounted() -> None:
            watched.extend(_fuse_descriptors())
            ready()

        await serve(
            served,
            service.mountpoint,
            root=service.root,
            options=service.options,
            auto_unmount=not service.private,
            turn=pump.turn,
            ready=mounted,
        )
        nursery.cancel_scope.cancel()


def _mirror(shadows: Shadows, files: GuestFiles, recording: Recording, nursery: trio.Nursery) -> Files:
    """Have processes mirrored; return the files with those that these are given."""
    import resource

    from fakefs.mirror.mirror import Mirror
    from fakefs.perf.events import Events
    from fakefs.perf.files import EventFiles

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a pidfd for each process
    events = Events(shadows, nursery)
    mirror = Mirror(shadows, files.host_files, events, recording, nursery)
    shadows.watching = mirror
    nursery.start_soon(mirror.receive)
    nursery.start_soon(mirror.run)
    return EventFiles(files, events)


def make_files(guest: Guest, service: Service, shadows: Shadows, nursery: trio.Nursery) -> GuestFiles:
    """Return the guest's files, with wprobes unless they are not wanted or this kernel cannot carry them."""
    is_static = StaticPaths(noted(guest, "events"), TRACEFS)
    if service.wprobe == "off":
        return GuestFiles(shadows, nursery, is_static)
    try:
        carriers = Carriers(guest, CarrierFacts.from_json(noted(guest, "carrier")))
        facts = TableFacts.from_json(noted(guest, "table"))
        forbidden = OffLimits(guest, noted(guest, "off_limits"))
        table = Table(guest, facts, carriers, forbidden, strict=service.wprobe == "strict")
    except EmulatorError as error:
        print(f"fakefs: no wprobes: {error}", file=sys.stderr, flush=True)
        return GuestFiles(shadows, nursery, is_static)
    return WprobeFiles(shadows, nursery, is_static, table)


async def _keep_running(pump: Pump, watched: list[int]) -> None:
    """Run the guest; when it dies say so and let the mount answer EIO until it is unmounted."""
    try:
        await pump.run(watched)
    except GuestDied as death:
        print(f"fakefs: the guest died: {death}", file=sys.stderr, flush=True)


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async for _ in signals:
            scope.cancel()


async def set_clock(shadows: Shadows) -> None:
    """Set the guest's time of day to the host's: a snapshot may be old."""
    import struct
    import time

    now = time.time_ns()
    init = shadows.init
    async with init.lock:
        shadows.pump.agent.put(init.task, 0, struct.pack("<qq", now // 10**9, now % 10**9))
        await shadows.pump.call(init.task, [(Sys.CLOCK_SETTIME, 0, init.task.virtual(0))])


async def seed_random(shadows: Shadows, seed: bytes) -> None:
    """Give the guest's random numbers a seed: the first getrandom(2) there would gather one for many seconds."""
    import struct

    init = shadows.init
    async with init.lock:
        agent, at, call = shadows.pump.agent, init.task.virtual, shadows.pump.call
        agent.put(init.task, 0, b"/dev/urandom\0")
        [fd] = await call(init.task, [(Sys.OPENAT, AT_FDCWD, at(0), os.O_WRONLY, 0)])
        agent.put(init.task, 0, struct.pack("<ii", 8 * len(seed), len(seed)) + seed)
        await call(init.task, [(Sys.IOCTL, fd, _RNDADDENTROPY, at(0)), (Sys.CLOSE, fd)])


def _fuse_descriptors() -> list[int]:
    """Return our descriptors of /dev/fuse: readable when a request waits."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.append(int(name))
        except OSError:
            continue
    return found
