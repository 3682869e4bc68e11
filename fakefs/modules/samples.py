"""The kernel's own samples for tracing, built as modules: trace events, trace_printk, kprobes, direct calls.

Their source is in Debian's source package of the kernel, of which nothing else is kept.

    CACHE/modules/RELEASE/samples/NAME.ko      what `fakefs modprobe NAME` loads
"""

from __future__ import annotations

import re
import tarfile
import tempfile
from pathlib import Path

from fakefs import kernels
from fakefs.errors import UserError
from fakefs.kernels import Progress
from fakefs.modules.build import build

_SAMPLES = re.compile(r"[^/]+/samples/(trace_events|trace_printk|ftrace|kprobes)/[\w-]+\.[ch]")


def build_samples(release: str, progress: Progress = kernels.say) -> list[Path]:
    """Return the samples that can be built for a kernel release: from the cache if they are there. Raises UserError."""
    place = kernels.cache_dir() / "modules" / release / "samples"
    if place.is_dir():
        return sorted(place.glob("*.ko"))
    match = re.match(r"\d+\.\d+", release)
    if match is None:
        raise UserError(f"{release!r} is not the release of a kernel")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".samples-", dir=place.parent) as scratch:
        sources = _fetch(match[0], release, Path(scratch), progress)
        new = Path(scratch, "new")
        new.mkdir()
        for source in sources:
            try:
                (new / f"{source.stem}.ko").write_bytes(build(source, release, progress).read_bytes())
            except UserError as error:  # each is a module of its own; some want a configuration that is not there
                progress(f"fakefs: {source.name} left out: {error}")
        try:
            new.rename(place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    return sorted(place.glob("*.ko"))


def _fetch(series: str, release: str, scratch: Path, progress: Progress) -> list[Path]:
    """Get the samples' C files of a kernel series ("6.12") into `scratch`. Raises UserError."""
    from fakefs.debian import Apt, AptError, system_source

    package = f"linux-source-{series}"
    reason = ""
    try:
        source = system_source()
        known = next((kernel.suites for kernel in kernels.installed() if kernel.version == release), ())
        for suite in dict.fromkeys([*known, kernels.DEFAULT_SUITE, source.suites[0]]):
            try:
                apt = Apt(scratch / f"apt-{suite}", source, suite)
                progress(f"fakefs: fetching {package} from Debian {suite} for its samples (150 MB, once)")
                apt.update()
                [deb] = apt.download([package])
                return _unpack(deb, scratch / "source")
            except AptError as error:
                reason = reason or f"{suite}: {error}"
    except AptError as error:
        reason = str(error)
    raise UserError(f"could not fetch the samples of Linux {series}: {reason}")


def _unpack(deb: Path, directory: Path) -> list[Path]:
    """Take the samples out of the archive within the package. Raises AptError."""
    from fakefs.debian import AptError, files_of

    files_of(deb, lambda path: "source.tar.xz" if path.endswith(".tar.xz") else None, directory)
    try:
        with tarfile.open(directory / "source.tar.xz", "r|xz") as tar:
            for member in tar:
                content = tar.extractfile(member) if _SAMPLES.fullmatch(member.name) else None
                if content:
                    file = directory / Path(member.name).parent.name / Path(member.name).name
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(content.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AptError(f"{deb.name}: damaged: {error}") from None
    finally:
        (directory / "source.tar.xz").unlink(missing_ok=True)
    return sorted(directory.glob("*/*.c"))
