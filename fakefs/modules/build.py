"""Build a loadable module from C files, with the host's compiler and the kernel's headers: no kbuild.

What kbuild's modpost would add is little, and written here: the module's descriptor, its `vermagic`, the checksums of
the symbols it uses. What objtool would add is left out: mitigations are off in the guest, so that no call
or return has to be patched; static branches are compiled as no-operations instead of being made so afterwards; without
ORC data the kernel unwinds a module's frames by frame pointers, which it is compiled with. Only the caller of a
function that is just being entered is then left out of a stack trace.

Functions of a module begin as the kernel's own do, with a call to `__fentry__` and a record of it, so that the function
tracer and probes see no difference. Follows Documentation/kbuild/modules.rst and scripts/Makefile.lib of Linux.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fakefs import kernels
from fakefs.errors import UserError
from fakefs.kernels import Progress
from fakefs.modules import headers
from fakefs.modules.headers import Headers

_FLAGS = shlex.split("""
-D__KERNEL__ -DMODULE -DCC_USING_FENTRY -nostdinc -std=gnu11 -fms-extensions -O2 -w
-m64 -mcmodel=kernel -mno-red-zone -mno-sse -mno-mmx -mno-sse2 -mno-3dnow -mno-avx -mno-80387 -mno-fp-ret-in-387
-mpreferred-stack-boundary=3 -mskip-rax-setup -falign-functions=16 -fno-pic -fno-pie -fno-common -fno-strict-aliasing
-fshort-wchar -funsigned-char -fno-asynchronous-unwind-tables -fno-delete-null-pointer-checks -fno-stack-protector
-fno-omit-frame-pointer -fno-optimize-sibling-calls -fno-strict-overflow -pg -mfentry -mrecord-mcount
""")

# Objtool turns each static branch of a module into a no-operation; without it they have to be compiled so.
_OWN_CONFIGURATION = "#undef CONFIG_HAVE_JUMP_LABEL_HACK\n"

_DESCRIPTOR = """\
#include <linux/module.h>
#define INCLUDE_VERMAGIC
#include <linux/vermagic.h>

MODULE_INFO(vermagic, VERMAGIC_STRING);
MODULE_INFO(name, KBUILD_MODNAME);
MODULE_INFO(depends, "");

__visible struct module __this_module __section(".gnu.linkonce.this_module") = {{
	.name = KBUILD_MODNAME,
{members}	.arch = MODULE_ARCH_INIT,
}};
"""
_VERSIONS = """
static const struct modversion_info versions[] __used __section("__versions") = {{
{lines}}};
"""


def build(source: Path, release: str, progress: Progress = kernels.say, *, more: Sequence[Path] = ()) -> Path:
    """Return the module built from a C file, and `more` of them, for a kernel release: from the cache if it is there.

    It has the name of the first. Headers beside a file are found by `#include "..."`. Raises UserError, with the
    compiler's first error.
    """
    name, sources = source.stem, [source, *more]
    for each in sources:
        if each.suffix != ".c" or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,54}", each.stem):
            raise UserError(f"{each}: not a C file whose name can be a module's", exit_status=2)
    against = headers.find(release, progress)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    place = kernels.cache_dir() / "modules" / release / _key(sources, against, compiler) / f"{name}.ko"
    if place.exists():
        return place
    with tempfile.TemporaryDirectory(prefix="fakefs-module-") as scratch:
        built = _Build(against, compiler, name, Path(scratch)).run(sources)
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_name(f".{os.getpid()}.ko")
        shutil.copyfile(built, unfinished)
        unfinished.replace(place)
    return place


def _key(sources: Sequence[Path], against: Headers, compiler: list[str]) -> str:
    """A name for what comes of C files and the headers beside them."""
    key = hashlib.blake2b(digest_size=12)
    version = _run([*compiler, "--version"], "no C compiler").splitlines()[:1]
    stamp = against.symvers.stat().st_mtime_ns
    key.update(repr((_FLAGS, _OWN_CONFIGURATION, _DESCRIPTOR, version, str(against.flavour), stamp)).encode())
    try:
        for source in sources:
            for path in [source, *sorted(source.parent.glob("*.h"))]:
                key.update(b"%s\0%s" % (path.name.encode(), hashlib.blake2b(path.read_bytes()).digest()))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", exit_status=2) from None
    return key.hexdigest()


class _Build:
    def __init__(self, against: Headers, compiler: list[str], name: str, scratch: Path) -> None:
        self._against = against
        self._compiler = compiler
        self._name = name
        self._scratch = scratch

    def run(self, sources: Sequence[Path]) -> Path:
        """Return the module, in the scratch directory."""
        source = sources[0]
        (self._scratch / "own.h").write_text(_OWN_CONFIGURATION)
        parts = [self._compile(each, self._scratch / f"code{number}.o") for number, each in enumerate(sources)]
        defined, used = self._symbols(parts)
        descriptor = self._scratch / "descriptor.c"
        descriptor.write_text(self._descriptor(source, defined, used))
        parts.append(self._compile(descriptor, self._scratch / "descriptor.o"))
        module = self._scratch / "module.ko"
        script = ["-T", str(self._against.linker_script)]
        _run(["ld", "-m", "elf_x86_64", "-r", "--build-id=sha1", *script, "-o", str(module), *map(str, parts)], source)
        return module

    def _compile(self, source: Path, output: Path) -> Path:
        common = self._against.common / "include/linux"
        # Where the kernel has them, functions begin with ENDBR, as its own do.
        branches = "branch" if self._against.configured("X86_KERNEL_IBT") else "none"
        name, file = (text.replace("-", "_") for text in (self._name, source.stem))
        command = [
            *(*self._compiler, *_FLAGS, f"-fcf-protection={branches}", "-fno-jump-tables"),
            *(f"-I{directory}" for directory in self._against.include),
            f"-I{source.parent.absolute()}",
            *(f"-D{macro}" for macro in (f'KBUILD_MODNAME="{name}"', f'KBUILD_BASENAME="{file}"')),
            *(f"-D{macro}" for macro in (f'KBUILD_MODFILE="{name}"', f"__KBUILD_MODNAME=kmod_{name}")),
        ]
        for header in (common / "kconfig.h", self._scratch / "own.h", common / "compiler_types.h"):
            command += ["-include", str(header)]
        _run([*command, "-c", str(source), "-o", str(output)], source)
        return output

    def _symbols(self, parts: Sequence[Path]) -> tuple[set[str], set[str]]:
        """Global symbols that object files have, and those they want from elsewhere."""
        defined: set[str] = set()
        used: set[str] = set()
        for part in parts:
            for line in _run(["nm", "-g", str(part)], part).splitlines():
                kind, name = line.split()[-2:]
                (used if kind == "U" else defined).add(name)
        return defined, used - defined - {"__this_module"}

    def _descriptor(self, source: Path, defined: set[str], used: set[str]) -> str:
        """What modpost writes: the C text of the module's descriptor."""
        exported = self._exported([*used, "module_layout"])
        missing = sorted(used - exported.keys())
        if missing:
            raise UserError(f"{source}: Linux {self._against.release} exports no {', '.join(missing)} to modules")
        members = "\t.init = init_module,\n" if "init_module" in defined else ""
        if "cleanup_module" in defined and self._against.configured("MODULE_UNLOAD"):
            members += "\t.exit = cleanup_module,\n"
        text = _DESCRIPTOR.format(members=members)
        if self._against.configured("MODVERSIONS"):
            lines = (f'\t{{ {checksum}, "{name}" }},\n' for name, checksum in sorted(exported.items()))
            text += _VERSIONS.format(lines="".join(lines))
        return text

    def _exported(self, names: Iterable[str]) -> dict[str, str]:
        """The checksums of those of the names that the kernel itself exports: checksum, name, "vmlinux", ..."""
        text = self._against.symvers.read_text()
        found = re.finditer(r"^(0x[0-9a-f]{8})\t(\S+)\tvmlinux\t", text, re.M)
        wanted = set(names)
        return {match[2]: match[1] for match in found if match[2] in wanted}


def _run(command: list[str], what: Path | str) -> str:
    """Run a tool and return what it prints; raises UserError with the first error it reports."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise UserError(f"modules need a C compiler, and {command[0]} is not there: apt-get install gcc") from None
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason given"]
        raise UserError(next((line for line in lines if "error:" in line), f"{what}: {lines[-1]}"))
    return done.stdout
