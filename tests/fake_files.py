"""`fakefs.files.Files` without a guest: a dictionary of files that behave like those of a tracefs, and worse.

As a program, serves them: `python fake_files.py DIR [MOUNT_OPTIONS]`; prints "ready" when the mount answers.
The file `control` takes commands, one a line: `mkdir P`, `rm P`, `file P TEXT`, `feed P TEXT`, `many P N`.
"""

from __future__ import annotations

import errno
import os
import signal
import stat as st
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from fakefs.files import Caller, Files, Interrupt, OpenFile, Stat

ROOT = b"/sys/kernel/tracing"


@dataclass
class Node:
    stat: Stat
    data: bytes = b""
    kind: str = "plain"
    """plain, pipe, busy (one opener), control, log (what was written, with flags and offset), or an errno's name."""
    children: dict[bytes, Node] = field(default_factory=dict)
    waiters: list[Callable[[], None]] = field(default_factory=list)
    openers: int = 0


@dataclass
class FakeOpen:
    node: Node
    flags: int
    seekable: bool = True


def fail(name: str) -> OSError:
    number = int(name) if name.isdigit() else getattr(errno, name)
    return OSError(number, name)


class FakeFiles:
    def __init__(self) -> None:
        self._ino = 0
        self.root = self.node(0o40755)
        self.log = b""

    def watch_attributes(self, changed: Callable[[], None]) -> None:
        """None of its attributes is lasting."""

    def node(self, mode: int, data: bytes = b"", kind: str = "plain") -> Node:
        self._ino += 1
        return Node(Stat(mode, 1, 0, 0, 0, self._ino, 4096, 10**18 + 1, 10**18 + 2, 10**18 + 3), data, kind)

    def at(self, path: bytes) -> Node:
        if path == ROOT:
            return self.root
        if not path.startswith(ROOT + b"/"):
            raise fail("ENOENT")
        node = self.root
        for name in path[len(ROOT) + 1 :].split(b"/"):
            if not st.S_ISDIR(node.stat.mode):
                raise fail("ENOTDIR")
            if name not in node.children:
                raise fail("ENOENT")
            node = node.children[name]
        return node

    def parent(self, path: bytes) -> tuple[Node, bytes]:
        directory, _, name = path.rpartition(b"/")
        return self.at(directory), name

    def add(self, path: bytes, node: Node) -> Node:
        directory, name = self.parent(path)
        if name in directory.children:
            raise fail("EEXIST")
        directory.children[name] = node
        return node

    def feed(self, node: Node, data: bytes) -> None:
        node.data += data
        waiters, node.waiters = node.waiters, []
        for waiter in waiters:
            waiter()

    async def stat(self, path: bytes) -> Stat:
        return self.at(path).stat

    async def entries(self, caller: Caller, path: bytes) -> list[tuple[bytes, Stat]]:
        return [(name, node.stat) for name, node in self.at(path).children.items()]

    async def open(self, caller: Caller, path: bytes, flags: int, mode: int = 0) -> OpenFile:
        try:
            node = self.at(path)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            node = self.add(path, self.node(st.S_IFREG | mode))
        if node.kind == "busy" and node.openers:
            raise fail("EBUSY")
        if node.kind.startswith("open:"):
            raise fail(node.kind[5:])
        node.openers += 1
        if flags & os.O_TRUNC:
            node.data = b""
        return FakeOpen(node, flags)

    async def close(self, file: OpenFile) -> None:
        assert isinstance(file, FakeOpen)
        file.node.openers -= 1

    async def read(self, caller: Caller, file: OpenFile, offset: int, size: int, flags: int, intr: Interrupt) -> bytes:
        assert isinstance(file, FakeOpen)
        node = file.node
        if node.kind == "pipe":
            return await self.read_pipe(node, size, flags, intr)
        if node.kind.startswith("read:"):
            raise fail(node.kind[5:])
        if node.kind == "crash":
            raise ZeroDivisionError("as asked")
        if node.kind == "caller":
            return f"{caller.tid} {caller.uid} {caller.gid}\n".encode()[offset:]
        if node.kind == "log":
            return self.log[offset : offset + size]
        if node.kind == "short":
            size = min(size, 10)
        if node.kind == "long":
            return b"x" * (size + 100) if offset == 0 else b""
        return node.data[offset : offset + size]

    async def read_pipe(self, node: Node, size: int, flags: int, intr: Interrupt) -> bytes:
        while not node.data:
            if flags & os.O_NONBLOCK:
                raise fail("EAGAIN")
            woken = trio.Event()
            interrupted = False

            def interrupt(woken: trio.Event = woken) -> None:
                nonlocal interrupted
                interrupted = True
                woken.set()

            node.waiters.append(woken.set)
            intr.on_interrupt(interrupt)
            await woken.wait()
            if interrupted:
                raise OSError(512, "ERESTARTSYS")
        data, node.data = node.data[:size], node.data[size:]
        return data

    async def write(self, caller: Caller, file: OpenFile, offset: int, data: bytes, flags: int, intr: Interrupt) -> int:
        assert isinstance(file, FakeOpen)
        node = file.node
        if node.kind.startswith("write:"):
            raise fail(node.kind[6:])
        if node.kind == "minus":
            return -5
        if node.kind == "short":
            data = data[:10]
        if node.kind == "control":
            for line in data.splitlines():
                self.command(line)
        elif node.kind == "log":
            trunc, append = bool(file.flags & os.O_TRUNC), bool(file.flags & os.O_APPEND)
            self.log += f"{offset} {len(data)} {trunc:d} {append:d}\n".encode()
        elif node.kind == "pipe":
            self.feed(node, data)
        elif flags & os.O_APPEND:
            node.data += data
        else:
            node.data = node.data[:offset].ljust(offset, b"\0") + data + node.data[offset + len(data) :]
        return len(data)

    def command(self, line: bytes) -> None:
        verb, _, rest = line.partition(b" ")
        path, _, text = rest.partition(b" ")
        path = ROOT + b"/" + path
        if verb == b"mkdir":
            self.add(path, self.node(0o40755))
        elif verb == b"rm":
            directory, name = self.parent(path)
            directory.children.pop(name, None)
        elif verb == b"file":
            self.add(path, self.node(0o100644, text))
        elif verb == b"feed":
            self.feed(self.at(path), text + b"\n")
        elif verb == b"many":
            directory = self.at(path)
            for index in range(int(text)):
                directory.children[b"f%d" % index] = self.node(0o100644, b"1\n")
        elif verb == b"raw":
            directory, name = self.parent(path)
            directory.children[name + b"\0x"] = self.node(0o100644)
            directory.children[b"n" * 256] = self.node(0o100644)
        else:
            raise fail("EINVAL")

    async def poll(self, caller: Caller, file: OpenFile, events: int, notify: Callable[[], None] | None) -> int:
        assert isinstance(file, FakeOpen)
        ready = 0x1 | 0x4 | 0x40 | 0x100
        if file.node.kind == "pipe" and not file.node.data:
            ready = 0x4 | 0x100
            if notify is not None and not ready & events:
                file.node.waiters.append(notify)
        return ready & events

    async def mkdir(self, caller: Caller, path: bytes, mode: int) -> None:
        self.add(path, self.node(st.S_IFDIR | mode))

    async def rmdir(self, caller: Caller, path: bytes) -> None:
        directory, name = self.parent(path)
        if directory.children[name].children:
            raise fail("ENOTEMPTY")
        del directory.children[name]

    async def unlink(self, caller: Caller, path: bytes) -> None:
        directory, name = self.parent(path)
        del directory.children[name]

    async def rename(self, caller: Caller, old: bytes, new: bytes, flags: int) -> None:
        directory, name = self.parent(old)
        node = directory.children.pop(name)
        to, name = self.parent(new)
        to.children[name] = node

    async def link(self, caller: Caller, old: bytes, new: bytes) -> None:
        raise fail("EPERM")

    async def symlink(self, caller: Caller, target: bytes, path: bytes) -> None:
        self.add(path, self.node(st.S_IFLNK | 0o777, target))

    async def mknod(self, caller: Caller, path: bytes, mode: int, rdev: int) -> None:
        if not st.S_ISREG(mode):
            raise fail("EPERM")
        self.add(path, self.node(mode))

    async def readlink(self, path: bytes) -> bytes:
        return self.at(path).data

    async def truncate(self, caller: Caller, path: bytes, file: OpenFile | None, size: int) -> None:
        node = self.at(path)
        node.data = node.data[:size].ljust(size, b"\0")

    async def chmod(self, caller: Caller, path: bytes, mode: int) -> None:
        node = self.at(path)
        node.stat = replace(node.stat, mode=st.S_IFMT(node.stat.mode) | mode)

    async def chown(self, caller: Caller, path: bytes, uid: int, gid: int) -> None:
        node = self.at(path)
        stat = node.stat
        node.stat = replace(stat, uid=stat.uid if uid == -1 else uid, gid=stat.gid if gid == -1 else gid)


ERRNOS = [*(name for name in errno.errorcode.values()), *(str(n) for n in (511, 512, 513, 516, 517, 1000))]


def tree() -> FakeFiles:
    files = FakeFiles()

    def put(name: bytes, data: bytes = b"", kind: str = "plain", mode: int = 0o100644) -> None:
        files.add(ROOT + b"/" + name, files.node(mode, data, kind))

    put(b"tracing_on", b"1\n")
    put(b"current_tracer", b"nop\n")
    put(b"big", bytes(range(256)) * 16384)
    put(b"\xff\xfe", b"latin\n")
    put(b"link", b"tracing_on", mode=0o120777)
    put(b"secret", b"s\n", mode=0o100640)
    for pipe in (b"trace_pipe", b"pipe2", b"pipe3"):
        put(pipe, kind="pipe")
    for kind in ("busy", "control", "log", "short", "long", "crash", "minus", "caller"):
        put(kind.encode(), b"0123456789abcdefghij", kind)
    put(b"errors", mode=0o40755)
    put(b"events", mode=0o40755)
    for name in ERRNOS:
        for what in ("open", "read", "write"):
            put(f"errors/{what}_{name}".encode(), kind=f"{what}:{name}")
    return files


async def main(mountpoint: Path, words: str) -> None:
    from fakefs.fuse.options import MountOptions
    from fakefs.fuse.session import serve
    from fakefs.mountpoint import check, lock

    files: Files = tree()
    with lock(mountpoint), trio.open_signal_receiver(signal.SIGTERM) as signals:
        check(mountpoint)
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            options = MountOptions.parse(words)
            await serve(files, mountpoint, options=options, ready=lambda: print("ready", flush=True))
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    from fakefs.errors import UserError

    try:
        trio.run(main, Path(sys.argv[1]), ",".join(sys.argv[2:]))
    except* UserError as group:
        print(f"fakefs: {group.exceptions[0]}", file=sys.stderr)
        sys.exit(getattr(group.exceptions[0], "exit_status", 1))
