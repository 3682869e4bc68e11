from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakefs import debian, kernel_command, kernels
from fakefs.debian import Source, parse_deb822, parse_one_line
from fakefs.errors import UserError
from tests.tiny_kernel import bzimage, elf

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
# http://elsewhere.example
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def vmlinuz(version: str) -> bytes:
    return bzimage(elf([f"\xcc\xccLinux version {version} (someone)".encode()]))


# A system with an apt of its own, told by files what to answer. A "package" of it is a bare tar file.
APT = """\
#!/bin/sh
echo "$(basename "$0") $*" >> "$FAKE/log"
case "$(basename "$0") $*" in
"apt-config "*) echo "list='$FAKE/sources.list'"; echo "parts='$FAKE/parts/'";;
*" update "*) if [ -e "$FAKE/offline" ]; then echo "W: something" >&2; echo "E: no network." >&2; exit 100; fi
    cp "$3" "$FAKE/apt.conf"
    cp "$(dirname "$3")/debian.sources" "$FAKE/used.sources";;
*" depends "*) for name; do :; done; cat "$FAKE/depends/$name" 2>/dev/null || exit 100;;
*" show "*) for name; do :; done; echo "Package: $name"; echo "Version: $(cat "$FAKE/version")";;
*" download "*) cp "$FAKE"/packages/*.deb .;;
"dpkg-deb --fsys-tarfile "*) cat "$2";;
*) echo "E: not expected: $0 $*" >&2; exit 1;;
esac
"""


@dataclass
class System:
    directory: Path
    said: list[str]

    def offers(self, depends: dict[str, str], files: dict[str, bytes], version: str = "1-1") -> None:
        """Say what packages depend on each other and what is in the one package file they all come in."""
        (self.directory / "version").write_text(version)
        for name, listing in depends.items():
            (self.directory / "depends" / name).write_text(listing)
        with tarfile.open(self.directory / "packages" / "kernel.deb", "w") as tar:
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("./boot/vmlinuz-link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)

    def offers_kernel(self, version: str, package: str = "1-1") -> None:
        name = f"linux-image-{version}-cloud-amd64"
        files = {
            f"./boot/vmlinuz-{version}": vmlinuz(version),
            f"./boot/config-{version}": b"CONFIG_FTRACE=y\n",
            f"./boot/System.map-{version}": b"stub",
            f"./usr/lib/modules/{version}/kernel/drivers/a.ko": b"module",
        }
        depends = {debian.PACKAGE: f"{debian.PACKAGE}\n  Depends: {name}\n", name: f"{name}\n  Depends: kmod\n"}
        self.offers(depends, files, package)

    def calls(self, what: str) -> int:
        log = self.directory / "log"
        return log.read_text().count(what) if log.exists() else 0


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    fake = tmp_path / "system"
    for name in ("bin", "parts", "depends", "packages"):
        (fake / name).mkdir(parents=True)
    for name in ("apt-config", "apt-get", "apt-cache", "dpkg-deb"):
        (fake / "bin" / name).write_text(APT)
        (fake / "bin" / name).chmod(0o755)
    (fake / "parts" / "debian.sources").write_text(DEB822)
    monkeypatch.setenv("PATH", f"{fake / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("FAKEFS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_host_kernel", lambda: None)
    return System(fake, [])


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKEFS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert kernels.cache_dir() == Path("/home/someone/.cache/fakefs")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernels.cache_dir() == Path("/home/someone/.cache/fakefs")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert kernels.cache_dir() == Path("/xdg/fakefs")
    monkeypatch.setenv("FAKEFS_CACHE", "/own")
    assert kernels.cache_dir() == Path("/own")


def test_fetch_puts_the_kernel_in_place(system: System, capsys: pytest.CaptureFixture[str]) -> None:
    system.offers_kernel("6.12.107+deb13-cloud-amd64")
    path = kernels.fetch(None, system.said.append)
    assert path == kernels.cache_dir() / "kernels/6.12.107+deb13-cloud-amd64/vmlinuz"
    assert path.read_bytes() == vmlinuz("6.12.107+deb13-cloud-amd64")
    assert sorted(os.listdir(path.parent)) == ["config", "package", "vmlinuz"]
    assert kernels.default_kernel() == path
    assert kernels.installed() == [kernels.Kernel("6.12.107+deb13-cloud-amd64", path, ("stable",), True)]
    assert "Debian stable" in system.said[0]
    assert capsys.readouterr() == ("", "")
    assert left_over() == []


def left_over() -> list[str]:
    """What is in the cache besides kernels, links and the lock."""
    directory = kernels.cache_dir() / "kernels"
    return [name for name in os.listdir(directory) if name.startswith(".") and name != ".lock"]


def test_the_second_fetch_asks_nobody(system: System) -> None:
    system.offers_kernel("6.12.1")
    path = kernels.fetch("stable", system.said.append)
    calls = system.calls("\n")
    assert kernels.fetch("stable", system.said.append) == kernels.fetch(None, system.said.append) == path
    assert system.calls("\n") == calls


def test_update(system: System) -> None:
    system.offers_kernel("6.12.1")
    old = kernels.fetch(None, system.said.append)
    assert kernels.fetch(None, system.said.append, update=True) == old
    assert system.calls(" download ") == 1  # the same package needs no download
    system.offers_kernel("6.12.1", package="1-2")  # built anew under the same name
    assert kernels.fetch(None, system.said.append, update=True) == old
    assert (old.parent / "package").read_text() == "linux-image-6.12.1-cloud-amd64 1-2\n"
    system.offers_kernel("6.12.10")
    new = kernels.fetch(None, system.said.append, update=True)
    assert new.parent.name == "6.12.10"
    assert [kernel.version for kernel in kernels.installed()] == ["6.12.10", "6.12.1"]
    assert kernels.default_kernel() == new
    assert left_over() == []


def test_a_kernel_in_several_packages(system: System) -> None:
    """Debian since 7.x: the kernel is behind another package, in /usr."""
    image, base, binary = (f"linux-{part}-7.2.13+deb14-cloud-amd64" for part in ("image", "base", "binary-unsigned"))
    depends = {
        debian.PACKAGE: f"{debian.PACKAGE}\n  Depends: linux-base-cloud-amd64\n  Depends: {image}\n",
        image: f"{image}\n  Depends: {base}\n |Depends: {binary}\n  Depends: <linux-other>\n",
        base: f"{base}\n",
        binary: f"{binary}\n  Depends: linux-modules-7.2.13+deb14-cloud-amd64\n",
    }
    system.offers(depends, {"./usr/lib/modules/7.2.13/vmlinuz": vmlinuz("7.2.13")})
    assert kernels.fetch("sid", system.said.append).parent.name == "7.2.13"
    (download,) = [line for line in (system.directory / "log").read_text().splitlines() if " download " in line]
    assert set(download.split(" download ")[1].split()) == {image, base, binary}
    assert kernels.installed()[0].suites == ("sid",)


def test_apt_is_kept_from_the_systems_state(system: System) -> None:
    system.offers_kernel("6.12.1")
    kernels.fetch("trixie", system.said.append)
    used = (system.directory / "used.sources").read_text()
    assert "URIs: http://mirror.example/debian\n" in used
    assert "Suites: trixie\n" in used
    assert "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n" in used
    assert "rusted" not in used.lower()
    configuration = (system.directory / "apt.conf").read_text()
    for name in ("Dir::State", "Dir::State::status", "Dir::Cache", "Dir::Etc::sourcelist"):
        (value,) = [line.split('"')[1] for line in configuration.splitlines() if line.startswith(f"{name} ")]
        assert value.startswith(str(kernels.cache_dir()))
    assert "#clear APT::Update::Post-Invoke;" in configuration
    for line in configuration.splitlines():
        assert "Allow" not in line or line.endswith('"false";')


def test_fallback_to_the_systems_suite(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.offers_kernel("6.1.0")
    fetch = kernels._fetch

    def only_bookworm(source: Source, suite: str, progress: kernels.Progress) -> Path:
        if suite == "stable":
            raise debian.AptError("no such suite")
        return fetch(source, suite, progress)

    monkeypatch.setattr(kernels, "_fetch", only_bookworm)
    path = kernels.fetch(None, system.said.append)
    assert system.said[0] == "fakefs: no kernel from Debian stable: no such suite"
    assert kernels.installed() == [kernels.Kernel("6.1.0", path, ("bookworm",), True)]


def test_fallback_to_the_systems_kernel(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system.directory / "offline").touch()
    own = tmp_path / "vmlinuz-6.9"
    own.write_bytes(vmlinuz("6.9"))
    monkeypatch.setattr(kernels, "_host_kernel", lambda: own)
    assert kernels.fetch(None, system.said.append) == own
    assert kernels.default_kernel() == own
    assert system.said[-1] == f"fakefs: bookworm: no network; using this system's own kernel {own}"
    with pytest.raises(UserError, match="sid: no network"):  # who asks for a suite gets that one
        kernels.fetch("sid", system.said.append)


def remove_apt(system: System) -> None:
    (system.directory / "bin" / "apt-config").unlink()
    os.environ["PATH"] = str(system.directory / "bin")


def remove_sources(system: System) -> None:
    (system.directory / "parts" / "debian.sources").write_text("")


def offer_junk(system: System) -> None:
    system.offers_kernel("6.12.1")
    (system.directory / "packages" / "kernel.deb").write_bytes(b"not a tar" * 1000)


def offer_an_old_kernel(system: System) -> None:
    system.offers_kernel("5.10.1")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda system: (system.directory / "offline").touch(), "sid: no network"),
        (remove_apt, "apt-config is not on this system"),
        (remove_sources, "no Debian archive is in this system's apt sources"),
        (lambda system: system.offers({debian.PACKAGE: "x\n"}, {}), "linux-image-cloud-amd64 depends on no kernel"),
        (offer_junk, "kernel.deb: damaged"),
        (offer_an_old_kernel, "too old"),
    ],
)
def test_failure_is_a_line_and_leaves_nothing(system: System, spoil: Callable[[System], None], message: str) -> None:
    spoil(system)
    with pytest.raises(UserError, match=message) as raised:
        kernels.fetch("sid", system.said.append)
    assert str(raised.value).endswith("to use a kernel file you have: fakefs kernel use PATH")
    assert "\n" not in str(raised.value)
    assert os.listdir(kernels.cache_dir() / "kernels") == [".lock"]


@pytest.mark.parametrize("suite", ["", "../x", "a b", "-o", "stable\nTrusted: yes", "x" * 65])
def test_odd_suites_are_refused(system: System, suite: str) -> None:
    with pytest.raises(UserError, match="not the name of a Debian suite") as raised:
        kernels.fetch(suite, system.said.append)
    assert raised.value.exit_status == 2
    assert system.calls("\n") == 0


def test_an_interrupted_fetch_leaves_nothing(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.offers_kernel("6.12.1")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(debian, "files_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            kernels.fetch(None, system.said.append)
    assert os.listdir(kernels.cache_dir() / "kernels") == [".lock"]
    (kernels.cache_dir() / "kernels" / ".fetch-killed" / "apt").mkdir(parents=True)  # as after SIGKILL
    assert kernels.installed() == []
    kernels.fetch(None, system.said.append)
    assert left_over() == []


def test_a_full_disk_is_a_line(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.offers_kernel("6.12.1")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(debian, "_copy", fail)
    with pytest.raises(UserError, match=r"could not keep the kernel in .*: No space left on device"):
        kernels.fetch(None, system.said.append)
    assert os.listdir(kernels.cache_dir() / "kernels") == [".lock"]


def test_only_one_fetches_at_a_time(system: System) -> None:
    system.offers_kernel("6.12.1")
    program = "from fakefs import kernels; print(kernels.fetch())"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert system.calls(" download ") == 1


def test_use(system: System, tmp_path: Path) -> None:
    system.offers_kernel("6.12.1")
    fetched = kernels.fetch(None, system.said.append)
    mine = tmp_path / "my vmlinuz"
    mine.write_bytes(vmlinuz("6.15.0"))
    assert kernels.use(mine) == kernels.default_kernel() == mine
    assert kernels.installed() == [
        kernels.Kernel("my vmlinuz", mine, (), True),
        kernels.Kernel("6.12.1", fetched, ("stable",), False),
    ]
    kernels.use(fetched)
    assert kernels.installed() == [kernels.Kernel("6.12.1", fetched, ("stable",), True)]
    kernels.use(mine)
    mine.unlink()
    with pytest.raises(UserError, match="is gone; choose another"):
        kernels.default_kernel()
    with pytest.raises(UserError, match="cannot read the kernel"):
        kernels.use(mine)


def test_nothing_yet(system: System) -> None:
    assert kernels.default_kernel() is None
    assert kernels.installed() == []


def test_cache_that_cannot_be_made(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAKEFS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set FAKEFS_CACHE to a directory you can write to"):
        kernels.fetch()


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="fakefs")
    kernel_command.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["kernel", *arguments])
    status: int = parsed.run(parsed)
    return status


def test_commands(system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("list") == 0
    assert capsys.readouterr() == ("", "fakefs: no kernel yet: fakefs kernel fetch\n")
    system.offers_kernel("6.12.1")
    assert command("fetch", "--suite", "trixie", "--update") == 0
    path = kernels.default_kernel()
    assert capsys.readouterr().out == f"{path}\n"
    assert command("list") == 0
    assert capsys.readouterr().out == f"* 6.12.1  {path}  (trixie)\n"
    assert command("use", str(path)) == 0
    assert capsys.readouterr().out == f"{path}\n"


@pytest.mark.parametrize("name", [[], ["fetch"], ["list"], ["use"]])
def test_help_has_examples(name: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(*name, "--help")
    assert "examples:\n  fakefs kernel " in capsys.readouterr().out


def test_deb822() -> None:
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    archive, security = parse_deb822(DEB822)
    assert archive == Source(
        "http://mirror.example/debian", ("bookworm", "bookworm-updates"), ("main", "contrib"), keyring
    )
    assert archive.is_debian
    assert not security.is_debian


def test_deb822_with_a_key_inside() -> None:
    key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----"
    text = f"Types: deb\nURIs: file:/mirror/debian\nSuites: sid\nComponents: main\nSigned-By:\n {key}\nEnabled: yes\n"
    (source,) = parse_deb822(text)
    assert source.signed_by == f"\n {key}"
    assert source.is_debian
    assert list(parse_deb822(text.replace("yes", "no"))) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("deb http://m.example/debian sid main", Source("http://m.example/debian", ("sid",), ("main",), "")),
        (
            "deb [arch=amd64 signed-by=/k.gpg trusted=yes] ftp://m.example/debian/ stable main contrib # why",
            Source("ftp://m.example/debian/", ("stable",), ("main", "contrib"), "/k.gpg"),
        ),
        ("  deb\tfile:/mirror/debian   trixie  main", Source("file:/mirror/debian", ("trixie",), ("main",), "")),
        ("deb-src http://m.example/debian sid main", None),
        ("# deb http://m.example/debian sid main", None),
        ("deb http://m.example/flat ./", None),
        ("deb", None),
    ],
)
def test_one_line(line: str, expected: Source | None) -> None:
    assert list(parse_one_line(line)) == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("source", "debian_archive"),
    [
        (Source("http://deb.example/debian", ("bookworm",), ("main",), ""), True),
        (Source("http://m.example/mirror", ("stable",), ("main",), "/k/debian-archive-keyring.gpg"), True),
        (Source("http://m.example/mirror", ("trixie-backports",), ("main",), ""), True),
        (Source("http://m.example/ubuntu", ("noble",), ("main",), ""), False),
        (Source("http://m.example/debian", ("bookworm",), ("contrib",), ""), False),
        (Source("http://m.example/debian-security", ("stable",), ("main",), ""), False),
        (Source("http://m.example/other", ("stable",), ("main",), "/k/other.gpg"), False),
    ],
)
def test_which_is_debians_archive(source: Source, debian_archive: bool) -> None:
    assert source.is_debian is debian_archive


@given(st.text("deb \t\n#[]=:.-abURIsTyp"))
def test_any_sources(text: str) -> None:
    for source in [*parse_one_line(text), *parse_deb822(text)]:
        assert source.uri
