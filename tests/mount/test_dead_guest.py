"""A guest that comes to a bad end while programs wait: they get EIO, and the daemon says of what it died.

The guest's root loads a program in the place of the kernel, by kexec: eight bytes of machine code that run with
interrupts off, all timers stopped, and no handler for any exception.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fakefs.testbed import Tracefs
from tests.guest_calls import compile_static
from tests.mount.golden_cases import errnos
from tests.mounted import FAKEFS, PATIENCE, fakefs, in_guest, popen, wait_for_reader

KEXEC = r"""
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    static unsigned char code[4096];
    struct { const void *from; size_t size; unsigned long to; size_t room; } segment = { code, 4096, 1 << 20, 4096 };

    for (int i = 1; i < argc; i++)
        code[i - 1] = strtol(argv[i], NULL, 16);
    if (syscall(SYS_kexec_load, segment.to, 1L, &segment, 62L << 16))
        perror("kexec_load");
    syscall(SYS_reboot, 0xfee1dead, 672274793, 0x45584543, 0);
    perror("reboot");
    return 1;
}
"""


@pytest.fixture(scope="module")
def kexec(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compile_static(KEXEC, tmp_path_factory.mktemp("kexec"))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("fa eb fe", "the guest loops with interrupts off at 0x100001"),  # cli; jmp to itself
        ("fa f4", "the guest halted with interrupts off"),  # cli; hlt
        ("0f 01 1c 25 00 08 10 00 0f 0b", "triple fault"),  # lidt of zeros; ud2
    ],
    ids=["loop", "halt", "triple-fault"],
)
def test_all_who_wait_are_told(tracefs: Tracefs, kexec: bytes, code: str, reason: str) -> None:
    install = [*FAKEFS, "exec", str(tracefs.path), "--", "sh", "-c", "cat >/tmp/kexec; chmod +x /tmp/kexec"]
    subprocess.run(install, input=kexec, check=True)
    readers = [
        popen(tracefs, ["cat", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in ("trace_pipe", "per_cpu/cpu0/trace_pipe_raw")
    ]
    for reader in readers:
        wait_for_reader(reader.pid)
    crash = in_guest(tracefs, "/tmp/kexec", *code.split())
    assert (crash.returncode, errnos(crash.stderr)) == (1, ["EIO"])
    for reader in readers:
        _, complaint = reader.communicate(timeout=PATIENCE)
        assert (reader.returncode, errnos(complaint.decode())) == (1, ["EIO"])
    script = "cat $TRACEFS/tracing_on; echo 1 >$TRACEFS/tracing_on; mkdir $TRACEFS/instances/i"
    after = tracefs.sh(script, cwd=Path("/"))
    assert set(errnos(after.stderr)) == {"EIO"}, after.stderr
    dead = str(tracefs.status()["dead"])
    assert reason in dead
    assert dead.endswith("  | agent: ready"), "the last lines of the console"
    assert fakefs("umount", tracefs.path).returncode == 0
