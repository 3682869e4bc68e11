"""`fakefs insmod`, `rmmod`, `modprobe` and `module`: modules for a guest. The work is done in the files beside this."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fakefs.arguments import add_command
from fakefs.errors import UserError

if TYPE_CHECKING:
    from fakefs.arguments import Commands


def add_parsers(commands: Commands) -> None:
    """Add the commands to those of `fakefs`."""
    insmod = add_command(
        commands,
        "insmod",
        "load a kernel module into the guest; a C file is built first",
        "fakefs insmod hello.ko\nfakefs insmod hello.c /tmp/tracing value=7",
        usage="fakefs insmod [-h] FILE [DIR] [NAME=VALUE ...]",
    )
    insmod.add_argument("file", metavar="FILE", type=Path, help="a module (.ko), or the C file of one")
    insmod.add_argument("words", metavar="DIR, NAME=VALUE", nargs="*", help="the mount; the module's parameters")
    insmod.set_defaults(run=_insmod)

    modprobe = add_command(
        commands,
        "modprobe",
        "load one of the kernel's sample modules into the guest",
        "fakefs module samples\nfakefs modprobe trace-events-sample",
        usage="fakefs modprobe [-h] NAME [DIR] [NAME=VALUE ...]",
    )
    modprobe.add_argument("name", metavar="NAME", help="one that fakefs module samples has built")
    modprobe.add_argument("words", metavar="DIR, NAME=VALUE", nargs="*", help="the mount; the module's parameters")
    modprobe.set_defaults(run=_modprobe)

    rmmod = add_command(commands, "rmmod", "remove a kernel module from the guest", "fakefs rmmod hello")
    rmmod.add_argument("name", metavar="NAME", help="the module's name, without .ko")
    rmmod.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="the mount (default: the only one)")
    rmmod.set_defaults(run=_rmmod)

    module = add_command(
        commands,
        "module",
        "build kernel modules with this machine's compiler and the headers of the guest's kernel",
        "fakefs module build hello.c\nfakefs module build --kernel sid -o hello.ko hello.c\nfakefs module samples",
    )
    actions = module.add_subparsers(dest="module_command", metavar="COMMAND", required=True)
    build = add_command(
        actions,
        "build",
        "build a module from C files, and print where it is",
        'fakefs module build hello.c\nfakefs insmod "$(fakefs module build driver.c driver_events.c)"',
    )
    build.add_argument("source", metavar="FILE.c", type=Path, help="the C file that gives the module its name")
    build.add_argument("more", metavar="MORE.c", type=Path, nargs="*", help="further ones of the same module")
    build.add_argument("-o", dest="output", metavar="FILE.ko", type=Path, help="where to write it")
    build.set_defaults(run=_build)
    samples = add_command(
        actions,
        "samples",
        "build the samples for tracing from Debian's source of the kernel, and print where they are",
        "fakefs module samples\nfakefs module samples --kernel bookworm",
    )
    samples.set_defaults(run=_samples)
    for command in (build, samples):
        command.add_argument("--kernel", metavar="KERNEL", help="path, version or suite; default: fakefs kernel list")


def _words(words: list[str]) -> tuple[Path | None, list[str]]:
    """Divide what follows the module's name into the mount and the parameters."""
    parameters = [word for word in words if "=" in word]
    rest = [word for word in words if "=" not in word]
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: a parameter is NAME=VALUE", exit_status=2)
    return Path(rest[0]) if rest else None, parameters


def _insmod(arguments: argparse.Namespace) -> int:
    from fakefs.client import find_mount
    from fakefs.modules import client

    directory, parameters = _words(arguments.words)
    client.insert(find_mount(directory), arguments.file, parameters)
    return 0


def _modprobe(arguments: argparse.Namespace) -> int:
    from fakefs.client import find_mount
    from fakefs.modules import client

    directory, parameters = _words(arguments.words)
    client.probe(find_mount(directory), arguments.name, parameters)
    return 0


def _rmmod(arguments: argparse.Namespace) -> int:
    from fakefs.client import find_mount
    from fakefs.modules import client

    client.remove(find_mount(arguments.directory), arguments.name)
    return 0


def _release(name: str | None) -> str:
    """The release of a kernel named on the command line, or of the default one, fetched if need be."""
    from emulator.kernel.image import KernelImage
    from fakefs import kernels
    from fakefs.testbed import find_kernel

    path = Path(find_kernel(name)) if name else kernels.default_kernel() or kernels.fetch()
    return KernelImage.load(path).version


def _build(arguments: argparse.Namespace) -> int:
    from shutil import copyfile

    from fakefs.modules.build import build

    module = build(arguments.source, _release(arguments.kernel), more=arguments.more)
    if arguments.output:
        module = Path(copyfile(module, arguments.output))
    print(module)
    return 0


def _samples(arguments: argparse.Namespace) -> int:
    from fakefs.modules.samples import build_samples

    for path in build_samples(_release(arguments.kernel)):
        print(path)
    return 0
