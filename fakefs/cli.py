"""The command `fakefs`: arguments in, one function per command, errors as one line and an exit status."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from emulator.errors import EmulatorError
from emulator.guest import DEFAULT_MEMORY
from fakefs.arguments import add_command, size
from fakefs.errors import UserError

EXAMPLES = """examples:
  fakefs mount /tmp/tracing          a kernel's tracefs in /tmp/tracing
  cat /tmp/tracing/available_tracers
  fakefs exec -- ls /proc            run a program inside that kernel
  fakefs umount /tmp/tracing
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see: {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks the version up only when asked for it: that takes 30 ms, a tenth of a mount's start."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        sys.stdout.write(f"fakefs {version()}\n")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; the man pages are made from it."""
    from fakefs import kernel_command, test_command
    from fakefs.labs import command as lab_command
    from fakefs.modules import command as module_commands

    whole: argparse.ArgumentParser = _Parser(
        prog="fakefs",
        description="A Linux kernel's tracefs as a directory, for users who are not root; the kernel is emulated.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action=_Version, help="show the version and exit")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)

    mount = add_command(
        commands,
        "mount",
        "start a kernel and mount its tracefs on a directory",
        "fakefs mount /tmp/tracing\n"
        "fakefs mount --kernel ~/linux/vmlinux --memory 256M /tmp/tracing\n"
        "fakefs mount --root /sys/kernel/debug /tmp/debug\n"
        "fakefs mount -o gid=1000 --deterministic --foreground /tmp/tracing\n"
        "fakefs mount -o remount,gid=1001,mode=750 /tmp/tracing",
    )
    mount.add_argument("directory", metavar="DIR", type=Path, help="an empty directory")
    _add_guest_options(mount)
    mount.add_argument(
        "--root",
        metavar="PATH",
        default="/sys/kernel/tracing",
        help="the guest's directory to show, default: %(default)s",
    )
    mount.add_argument("-o", dest="options", metavar="OPTIONS", default="", help="uid=, gid=, mode=, ro; remount")
    mount.add_argument("--foreground", action="store_true", help="serve until Ctrl-C instead of in the background")
    mount.set_defaults(run=_mount)

    umount = add_command(commands, "umount", "unmount a directory and end its kernel", "fakefs umount /tmp/tracing")
    umount.add_argument("directory", metavar="DIR", type=Path, help="where it is mounted")
    lazy = "also while files in it are open; the kernel ends with them, or at the next umount"
    umount.add_argument("--lazy", action="store_true", help=lazy)
    umount.set_defaults(run=_umount)

    run = add_command(
        commands,
        "run",
        "run a program with a guest's tracefs at /sys/kernel/tracing, and its kernel's other files",
        "fakefs run -- trace-cmd list -e sched\n"
        "fakefs run -- sh -c 'echo 1 > /sys/kernel/tracing/events/sched/enable; cat /sys/kernel/tracing/trace'\n"
        "fakefs run --mount /tmp/tracing -- ./my-test.sh",
        usage="fakefs run [OPTION ...] -- CMD [ARG ...]",
    )
    what = "run your shell as by fakefs run"
    shell = add_command(commands, "shell", what, "fakefs shell\nfakefs shell --mount /tmp/mnt")
    for command in (run, shell):
        _add_guest_options(command)
        command.add_argument("--mount", metavar="DIR", type=Path, help="the kernel of a running mount, not a fresh one")
        command.add_argument(
            "--mirror",
            choices=("off", "process", "files", "all"),
            help="what programs do that the guest does too; default: files, off if --deterministic",
        )
        command.set_defaults(run=_run)

    execute = add_command(
        commands,
        "exec",
        "run a program inside the guest: busybox's at least",
        "fakefs exec -- ls -l /proc/self\n"
        "fakefs exec /tmp/tracing -- sh -c 'dd if=/dev/zero of=/dev/null bs=1 count=1000'\n"
        "echo hello | fakefs exec -- tr a-z A-Z\n"
        "fakefs exec --host-binary -- ./a.out argument",
        usage="fakefs exec [-h] [--host-binary] [DIR] -- CMD [ARG ...]",
    )
    execute.add_argument(
        "--host-binary",
        action="store_true",
        help="CMD is a program of this machine, taken into the guest with the libraries its own loader names",
    )
    execute.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="the mount (default: the only one)")
    execute.set_defaults(run=_exec)

    what = "show what the guest printed on its console"
    console = add_command(commands, "console", what, "fakefs console /tmp/tracing")
    console.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="the mount (default: the only one)")
    console.set_defaults(run=_console)

    status = add_command(commands, "status", "tell about a running mount, as JSON", "fakefs status /tmp/tracing")
    status.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="the mount (default: the only one)")
    status.set_defaults(run=_status)

    doctor = add_command(commands, "doctor", "check what this machine has and what is missing", "fakefs doctor")
    doctor.set_defaults(run=_doctor)
    test_command.add_parser(commands)
    kernel_command.add_parser(commands)
    module_commands.add_parsers(commands)
    lab_command.add_parser(commands)
    return whole


def _add_guest_options(command: argparse.ArgumentParser) -> None:
    what = "a vmlinuz or vmlinux; default: fakefs kernel list"
    command.add_argument("--kernel", metavar="PATH", type=Path, help=what)
    command.add_argument(
        "--memory", metavar="SIZE", type=size, default=DEFAULT_MEMORY, help="the guest's RAM: 256M (default), 1G ..."
    )
    command.add_argument("--append", metavar="TEXT", default="", help="words to add to the kernel's command line")
    command.add_argument("--deterministic", action="store_true", help="virtual time never follows the host's clock")
    command.add_argument(
        "--wprobe",
        choices=("unlimited", "strict", "off"),
        default="unlimited",
        help="watchpoints: any number (default), four as on hardware, or none",
    )


def version() -> str:
    """Return this package's version."""
    from importlib import metadata

    try:
        return metadata.version("fakefs")
    except metadata.PackageNotFoundError:
        return "0 (not installed)"


def _mount(arguments: argparse.Namespace) -> int:
    if "remount" in arguments.options.split(","):
        from fakefs import client

        client.ask(client.find_mount(arguments.directory), {"do": "remount", "options": arguments.options})
        return 0
    from fakefs.mounting import Order, mount

    mount(
        Order(
            directory=arguments.directory,
            kernel=arguments.kernel,
            memory=arguments.memory,
            append=arguments.append,
            root=arguments.root,
            options=arguments.options,
            deterministic=arguments.deterministic,
            wprobe=arguments.wprobe,
            foreground=arguments.foreground,
        )
    )
    return 0


def _umount(arguments: argparse.Namespace) -> int:
    from fakefs import client, mountpoint

    # After --lazy, a daemon lives on for the files that are still open, and unmounting once more is to end it.
    if mountpoint.mount_at(arguments.directory) or not client.stop(arguments.directory):
        mountpoint.unmount(arguments.directory, lazy=arguments.lazy)
        if arguments.lazy or mountpoint.wait_for_daemon(arguments.directory, 1):
            return 0
        # Another mount namespace, such as a container's, has a copy of the mount: it would live as long as that.
        client.stop(arguments.directory)
    if not mountpoint.wait_for_daemon(arguments.directory, 30):
        raise UserError(f"{arguments.directory}: is unmounted, but its daemon does not end; see: fakefs status")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from fakefs import run_command

    return run_command.run(arguments)


def _exec(arguments: argparse.Namespace) -> int:
    from fakefs import client

    if not arguments.program:
        raise UserError("no program given: fakefs exec [DIR] -- CMD", exit_status=2)
    mount = client.find_mount(arguments.directory)
    if arguments.host_binary:
        from fakefs.hostfiles.program import host_program

        return client.run_program(mount, arguments.program, os.environ, host_program(arguments.program[0]))
    env = {"PATH": "/bin:/sbin:/usr/bin:/usr/sbin", "HOME": "/root", "TERM": os.environ.get("TERM", "dumb")}
    return client.run_program(mount, arguments.program, env)


def _console(arguments: argparse.Namespace) -> int:
    from fakefs import client

    sys.stdout.write(client.ask(client.find_mount(arguments.directory), {"do": "console"}))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from fakefs import client

    sys.stdout.write(client.ask(client.find_mount(arguments.directory), {"do": "status"}))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fakefs import doctor

    return doctor.run()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    gc.disable()  # what is made while starting stays; to look for garbage in it takes 10 ms. A daemon turns it on again
    words = sys.argv[1:] if argv is None else argv
    # Everything behind `exec ... --` is the program's; argparse would look for options of ours in it.
    words, program = _split(words) if words[:1] in (["exec"], ["run"], ["shell"], ["lab"]) else (words, [])
    arguments = parser().parse_args(words)
    arguments.program = program
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # since `fakefs.__main__`; from here on somebody tidies up
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"fakefs: {error}", file=sys.stderr)
        return error.exit_status
    except EmulatorError as error:
        print(f"fakefs: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"fakefs: {where}{error.strerror}", file=sys.stderr)
        return 1


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
