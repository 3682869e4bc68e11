"""`fakefs kernel`: fetch, list and choose kernels. The work is done in `fakefs.kernels`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fakefs.arguments import add_command

if TYPE_CHECKING:
    from fakefs.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add `kernel` to the program's commands; `run` in the parsed arguments takes these and returns an exit status."""
    kernel = add_command(
        commands,
        "kernel",
        "get, list and choose the Linux kernels that fakefs runs",
        "fakefs kernel fetch\nfakefs kernel list\nfakefs kernel use ~/linux/arch/x86/boot/bzImage",
    )
    actions = kernel.add_subparsers(dest="kernel_command", metavar="COMMAND", required=True)

    fetch = add_command(
        actions,
        "fetch",
        "fetch Debian's kernel for virtual machines with this system's apt, without installing it",
        "fakefs kernel fetch\nfakefs kernel fetch --suite sid\n"
        'fakefs mount --kernel "$(fakefs kernel fetch)" /tmp/tracing',
        more="The last line printed is the kernel's path. Signatures are checked; this system's apt stays as it is.",
    )
    fetch.add_argument("--suite", metavar="NAME", help="Debian suite: stable (the default), testing, sid, bookworm...")
    fetch.add_argument("--update", action="store_true", help="ask for a newer one even if the suite's kernel is here")
    fetch.set_defaults(run=_fetch)

    listing = add_command(actions, "list", "list the kernels at hand; * marks the default one", "fakefs kernel list")
    listing.set_defaults(run=_list)

    use = add_command(
        actions,
        "use",
        "make a kernel file the default one",
        "fakefs kernel use /boot/vmlinuz-6.12.0\nfakefs kernel use ~/linux/vmlinux",
        more="An x86-64 vmlinuz (bzImage) or vmlinux of Linux 5.15 or newer. The file is used where it is, not copied.",
    )
    use.add_argument("path", metavar="PATH", type=Path, help="a vmlinuz or vmlinux")
    use.set_defaults(run=_use)


def _fetch(arguments: argparse.Namespace) -> int:
    from fakefs import kernels

    print(kernels.fetch(arguments.suite, update=arguments.update))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from fakefs import kernels

    found = kernels.installed()
    width = max((len(kernel.version) for kernel in found), default=0)
    for kernel in found:
        mark = "*" if kernel.default else " "
        suites = f"  ({', '.join(kernel.suites)})" if kernel.suites else ""
        print(f"{mark} {kernel.version:{width}}  {kernel.path}{suites}")
    if not found:
        kernels.say("fakefs: no kernel yet: fakefs kernel fetch")
    return 0


def _use(arguments: argparse.Namespace) -> int:
    from fakefs import kernels

    print(kernels.use(arguments.path))
    return 0
