"""The headers modules are compiled against: Debian's package for a kernel, fetched as the kernel is.

    CACHE/headers/RELEASE/common/       include/, arch/x86/include/: the same for all of Debian's configurations
    CACHE/headers/RELEASE/flavour/      what belongs to this one: generated headers, module.lds, Module.symvers

A kernel of one's own has its headers where it was built: /lib/modules/RELEASE/build leads there. Debian's build tools
(modpost, objtool) are not used: they want the C library of the suite they come from. See `fakefs.modules.build`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fakefs import kernels
from fakefs.errors import UserError
from fakefs.kernels import Progress

_RELEASE = re.compile(r"[0-9][\w.+~-]{0,100}")
_INSTALLED = Path("/lib/modules")
_PART = re.compile(r"usr/src/linux-headers-[^/]+/(include/.+|arch/x86/include/.+|arch/x86/module\.lds|Module\.symvers)")


@dataclass(frozen=True)
class Headers:
    """Where the headers of the kernel `release` are; `common` and `flavour` may be the same directory."""

    release: str
    common: Path
    flavour: Path

    @property
    def include(self) -> list[Path]:
        """The directories the compiler looks in, first to last."""
        return [
            self.common / "arch/x86/include",
            self.flavour / "arch/x86/include/generated",
            self.common / "include",
            self.flavour / "include",
            self.common / "arch/x86/include/uapi",
            self.flavour / "arch/x86/include/generated/uapi",
            self.common / "include/uapi",
            self.flavour / "include/generated/uapi",
        ]

    @property
    def linker_script(self) -> Path:
        """How the sections of a module are put together."""
        places = [self.flavour / "arch/x86/module.lds", self.flavour / "scripts/module.lds"]
        return next((place for place in places if place.exists()), places[0])

    @property
    def symvers(self) -> Path:
        """The symbols the kernel exports, with their checksums."""
        return self.flavour / "Module.symvers"

    def configured(self, option: str) -> bool:
        """Whether the kernel was built with CONFIG_`option`."""
        text = (self.flavour / "include/generated/autoconf.h").read_text()
        return re.search(rf"^#define CONFIG_{option} 1$", text, re.M) is not None


def find(release: str, progress: Progress = kernels.say) -> Headers:
    """Return the headers of a kernel release, fetching Debian's if they are not there. Raises UserError."""
    if not _RELEASE.fullmatch(release):
        raise UserError(f"{release!r} is not the release of a kernel")
    place = kernels.cache_dir() / "headers" / release
    if not place.is_dir() and (installed := _installed(release)):
        return installed
    if not place.is_dir():
        _fetch(release, place, progress)
    return Headers(release, place / "common", place / "flavour")


def _installed(release: str) -> Headers | None:
    """The headers of a kernel that this system could run."""
    build = Path(os.path.realpath(_INSTALLED / release / "build"))
    if not (build / "include/generated/autoconf.h").exists():
        return None
    # Debian's has the common part elsewhere, and a Makefile that includes that one's.
    elsewhere = re.search(r"^include +(/\S+)/Makefile$", (build / "Makefile").read_text(errors="replace"), re.M)
    headers = Headers(release, Path(elsewhere[1]) if elsewhere else build, build)
    return headers if headers.symvers.exists() and headers.linker_script.exists() else None


def _fetch(release: str, place: Path, progress: Progress) -> None:
    from fakefs.debian import AptError, system_source

    with kernels.locked(progress):
        if place.is_dir():
            return  # another process fetched them while this one waited
        reason = ""
        try:
            source = system_source()
            known = next((kernel.suites for kernel in kernels.installed() if kernel.version == release), ())
            for suite in dict.fromkeys([*known, kernels.DEFAULT_SUITE, source.suites[0]]):
                try:
                    _unpack(release, suite, place, progress)
                except AptError as error:
                    reason = reason or f"{suite}: {error}"
                else:
                    return
        except AptError as error:
            reason = str(error)
        except OSError as error:
            raise UserError(f"could not keep the headers in {place}: {error.strerror}") from None
    raise UserError(f"could not fetch the headers of Linux {release}, which modules need: {reason}")


def _unpack(release: str, suite: str, place: Path, progress: Progress) -> None:
    """Fetch from one suite and put in place; the lock is held. Raises AptError."""
    import tempfile

    from fakefs.debian import Apt, AptError, files_of, system_source

    place.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place.parent) as scratch:
        apt = Apt(Path(scratch, "apt"), system_source(), suite)
        progress(f"fakefs: fetching the headers of Linux {release} from Debian {suite} (once)")
        apt.update()
        new = Path(scratch, "new")
        for deb in apt.download(apt.headers(release)):
            part = new / ("common" if "-common_" in deb.name else "flavour")
            part.mkdir(parents=True)
            files_of(deb, lambda path: match[1] if (match := _PART.fullmatch(path)) else None, part)
        headers = Headers(release, new / "common", new / "flavour")
        if not (headers.symvers.exists() and headers.linker_script.exists() and headers.common.is_dir()):
            raise AptError(f"linux-headers-{release} is not what modules can be built with")
        new.rename(place)
