"""The five things built from C. Everything else about the package is in pyproject.toml.

None of them is a Python extension module: three are shared libraries that ctypes loads, and two are static
programs of the guest, without a C library: its init, and what stands for the host's programs. Each is one command of
the C compiler (`CC`, by default `cc`).
"""

from __future__ import annotations

import os
import shlex
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CORE = [
    *("core", "operand", "paging", "plt", "redirect", "shortcuts", "smc", "translate"),
    *("watch", "watch_hits", "watch_table"),
]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
LIBRARY = ["-O2", "-g", "-fPIC", "-shared", "-Wl,-z,relro,-z,now"]
FREESTANDING = [
    *("-Os", "-static", "-nostdlib", "-s"),
    *("-fno-stack-protector", "-fno-builtin", "-fno-asynchronous-unwind-tables"),
]


class Native(Extension):
    """A file built from C, `name` + `suffix` in the package; `packages` are those pkg-config is asked about."""

    def __init__(
        self,
        name: str,
        sources: list[str],
        flags: list[str],
        suffix: str = ".so",
        depends: list[str] | None = None,
        packages: list[str] | None = None,
    ) -> None:
        super().__init__(name, sources, depends=depends or [])
        self.flags, self.suffix, self.packages = flags, suffix, packages or []

    def command(self, output: str) -> list[str]:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        return [*compiler, *WARNINGS, *self.flags, "-o", output, *self.sources, *pkg_config(self.packages)]


ONE_SEGMENT = ["-Wl,-z,noseparate-code", "-Wl,--build-id=none"]  # execve() maps less
OUT_OF_THE_WAY = ["-Wl,-Ttext-segment=0x7ff00000"]  # of the addresses that programs have
GUEST_HEADERS = ["emulator/guest/protocol.h", "emulator/guest/serve.h"]

NATIVE = [
    Native(
        "emulator._core",
        [f"emulator/native/{part}.c" for part in CORE],
        LIBRARY,
        depends=[f"emulator/native/{part}.h" for part in CORE],
    ),
    Native("fakefs.fuse._shim", ["fakefs/fuse/shim.c"], LIBRARY, packages=["fuse3"]),
    Native("fakefs.mirror._notes", ["fakefs/mirror/notes.c"], [*LIBRARY, "-pthread"]),
    Native(
        "emulator.guest.agent",
        ["emulator/guest/agent.c"],
        FREESTANDING,
        suffix="",
        depends=GUEST_HEADERS,
    ),
    Native(
        "emulator.guest.stub",
        ["emulator/guest/stub.c"],
        [*FREESTANDING, *ONE_SEGMENT, *OUT_OF_THE_WAY],
        suffix="",
        depends=GUEST_HEADERS,
    ),
]


def pkg_config(packages: list[str]) -> list[str]:
    """Return the compiler's arguments for libraries; CompileError when one is not installed."""
    if not packages:
        return []
    try:
        return shlex.split(subprocess.check_output(["pkg-config", "--cflags", "--libs", *packages], text=True))
    except (OSError, subprocess.CalledProcessError) as error:
        text = f"pkg-config knows no {' '.join(packages)}: apt-get install pkg-config libfuse3-dev"
        raise CompileError(text) from error


class BuildNative(build_ext):
    """Compiles and links in one go, under plain names: ABI tags of Python would mean nothing."""

    def get_ext_filename(self, fullname: str) -> str:
        # Called with the full name or, for in-place builds, with its last part.
        [suffix] = [ext.suffix for ext in NATIVE if ext.name.split(".")[-1] == fullname.split(".")[-1]]
        return fullname.replace(".", os.sep) + suffix

    def build_extension(self, ext: Native) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(output.name + ".new")
        try:
            subprocess.run(ext.command(str(unfinished)), check=True)
            unfinished.replace(output)  # whoever runs the old one keeps it
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.sources[0]} was not built: {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)


# Man pages are installed where `make man` has made them before.
MAN_PAGES = ("share/man/man1", sorted(glob("build/man/*.1")))

setup(ext_modules=NATIVE, cmdclass={"build_ext": BuildNative}, data_files=[MAN_PAGES])
