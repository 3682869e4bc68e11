"""Debian packages by the system's own apt, without touching the system: nothing is installed, no apt state changes.

apt runs with a state directory, sources list and (empty) dpkg status of ours; only its mirror, keys and proxies are the
system's. Signatures are always checked. What is unpacked and where it goes is `fakefs.kernels`.

Follows sources.list(5), apt.conf(5) and deb822(5).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PACKAGE = "linux-image-cloud-amd64"
"""Debian's kernel for virtual machines: few drivers, all of tracing. A metapackage: it depends on the current one."""

# The packages a kernel is made of, by what Debian called them: the kernel is in linux-image-VERSION, since 7.x in
# linux-binary-VERSION (with its configuration in linux-base-VERSION), unsigned ones have that in the name.
_PART = re.compile(r"linux-(?:image|binary|base)-(?:unsigned-)?\d\S*-cloud-amd64")

_SUITE = re.compile(
    r"(?:(?:old){0,2}stable|testing|unstable|sid|experimental|bullseye|bookworm|trixie|forky|duke)"
    r"(?:-updates|-backports|-proposed-updates)?"
)


class AptError(Exception):
    """apt could not do it; the message is what it says, in one line."""


@dataclass(frozen=True)
class Source:
    """One entry of a sources list. `signed_by` is the value of Signed-By: files, fingerprints or a whole key, or ""."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str

    @property
    def is_debian(self) -> bool:
        """Whether this is a mirror of the Debian archive itself (neither its security part nor something else's)."""
        if "main" not in self.components or "security" in self.uri.lower():
            return False
        named = any(_SUITE.fullmatch(suite) for suite in self.suites)
        return named and ("debian" in self.signed_by or "debian" in self.uri or not self.signed_by)


def parse_one_line(text: str) -> Iterator[Source]:
    """Read sources.list's older form: `deb [option=value ...] uri suite component ...`."""
    for line in text.splitlines():
        match = re.fullmatch(r"\s*deb\s+(?:\[([^]]*)\]\s*)?([^#]*)(?:#.*)?", line)
        if match is None:
            continue
        words = match[2].split()
        options = dict(word.split("=", 1) for word in (match[1] or "").split() if "=" in word)
        if len(words) >= 3:
            yield Source(words[0], (words[1],), tuple(words[2:]), options.get("signed-by", ""))


def parse_deb822(text: str) -> Iterator[Source]:
    """Read the `.sources` form: paragraphs of `Field: value`, where a line that begins with a space continues."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] = fields.get(name, "") + "\n" + line
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        suites = tuple(fields.get("suites", "").split())
        components = tuple(fields.get("components", "").split())
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0", "off")
        if enabled and "deb" in fields.get("types", "").split():
            for uri in fields.get("uris", "").split():
                yield Source(uri, suites, components, fields.get("signed-by", ""))


def system_source() -> Source:
    """The first Debian archive in the system's own sources; raises AptError."""
    settings = dict(
        word.split("=", 1)
        for word in shlex.split(
            _run(["apt-config", "shell", "list", "Dir::Etc::sourcelist/f", "parts", "Dir::Etc::sourceparts/d"])
        )
    )
    files = [Path(settings.get("list", "/etc/apt/sources.list"))]
    parts = Path(settings.get("parts", "/etc/apt/sources.list.d"))
    if parts.is_dir():
        files += sorted(part for part in parts.iterdir() if part.suffix in (".list", ".sources"))
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        for source in (parse_deb822 if file.suffix == ".sources" else parse_one_line)(text):
            if source.is_debian:
                return source
    raise AptError("no Debian archive is in this system's apt sources")


class Apt:
    """apt-get and apt-cache for one suite, keeping all they need in `directory`."""

    def __init__(self, directory: Path, source: Source, suite: str) -> None:
        self._directory = directory
        for name in ("lists/partial", "cache/archives/partial", "log"):
            (directory / name).mkdir(parents=True)
        (directory / "status").touch()
        (directory / "debian.sources").write_text(_sources(source, suite))
        (directory / "apt.conf").write_text(_configuration(directory))

    def update(self) -> None:
        """Fetch the suite's list of packages."""
        self._apt("apt-get", "update", "--allow-releaseinfo-change")  # "stable" is another codename one day

    def parts(self) -> dict[str, str]:
        """The packages that make up the current kernel, and their versions."""
        found: dict[str, str] = {}
        ask = [PACKAGE]
        while ask:
            listing = self._apt("apt-cache", "depends", "--important", *ask)
            ask = [name for name in re.findall(r"Depends: <?([^\s<>]+)", listing) if _PART.fullmatch(name)]
            ask = sorted(set(ask) - found.keys())
            for name in ask:
                version = re.search(r"^Version: (\S+)$", self._apt("apt-cache", "show", name), re.M)
                found[name] = version[1] if version else ""
        if not found:
            raise AptError(f"{PACKAGE} depends on no kernel")
        return found

    def headers(self, release: str) -> list[str]:
        """The packages with the headers of a kernel: its own, and what it shares with other configurations."""
        own = f"linux-headers-{release}"
        listing = self._apt("apt-cache", "depends", "--important", own)
        return [own, *re.findall(r"Depends: (linux-headers-\S+-common)$", listing, re.M)]

    def download(self, names: list[str]) -> list[Path]:
        """Download packages, their checksums held against the signed lists."""
        packages = self._directory / "packages"
        packages.mkdir()
        self._apt("apt-get", "download", *names, cwd=packages)
        return sorted(packages.glob("*.deb"))

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        return _run([command[0], "-q", "-c", str(self._directory / "apt.conf"), *command[1:]], cwd=cwd)


def _sources(source: Source, suite: str) -> str:
    signed_by = f"Signed-By: {source.signed_by}\n" if source.signed_by else ""
    # Only the list of packages: a desktop's apt would also fetch descriptions, icons and file lists.
    return (
        f"Types: deb\nURIs: {source.uri}\nSuites: {suite}\nComponents: main\nArchitectures: amd64\n"
        f"Targets: Packages\n{signed_by}"
    )


def _configuration(directory: Path) -> str:
    """apt.conf, read after the system's: replaces whatever is state, hook or pin of the system."""
    settings = {
        "APT::Architecture": "amd64",
        "APT::Get::AllowUnauthenticated": "false",  # even where the system's apt is laxer
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::AllowWeakRepositories": "false",
        "Acquire::AllowDowngradeToInsecureRepositories": "false",
        "APT::Sandbox::User": "root",  # the user _apt may not enter a home directory
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "20",
        "Acquire::https::Timeout": "20",
        "Dir::Etc::sourcelist": f"{directory}/debian.sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": f"{directory}",
        "Dir::State::lists": f"{directory}/lists",
        "Dir::State::status": f"{directory}/status",
        "Dir::Cache": f"{directory}/cache",
        "Dir::Cache::archives": f"{directory}/cache/archives",
        "Dir::Log": f"{directory}/log",
    }
    cleared = ["APT::Architectures", "APT::Update::Pre-Invoke", "APT::Update::Post-Invoke"]
    cleared += ["APT::Update::Post-Invoke-Success", "APT::Default-Release"]
    return "".join(f"#clear {name};\n" for name in cleared) + "".join(
        f'{name} "{value}";\n' for name, value in settings.items()
    )


def files_of(package: Path, wanted: Callable[[str], str | None], directory: Path) -> None:
    """Copy regular files out of a .deb: `wanted` gives the name a path of the package gets in `directory`, or None."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    name = wanted(member.name.removeprefix("./")) if member.isfile() else None
                    content = tar.extractfile(member) if name else None
                    if name and content:
                        (directory / name).parent.mkdir(parents=True, exist_ok=True)
                        _copy(content, directory / name)
            process.stdout.read()  # past the archive's end, or dpkg-deb would fail to write it
            if process.wait():
                raise AptError(f"{package.name}: dpkg-deb cannot unpack it")
        except tarfile.TarError as error:
            raise AptError(f"{package.name}: damaged: {error}") from None
        finally:
            process.kill()


def _copy(content: IO[bytes], path: Path) -> None:
    with open(path, "wb") as file:
        while block := content.read(1 << 20):
            file.write(block)


def _run(command: list[str], cwd: Path | None = None) -> str:
    """Run an apt command and return what it prints; raises AptError with the line that says what went wrong."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except FileNotFoundError:
        raise AptError(f"{command[0]} is not on this system") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        complaints = [line[3:] for line in lines if line.startswith("E: ")] or lines[-1:] or ["no reason given"]
        raise AptError(complaints[0].strip().rstrip("."))
    return done.stdout
