from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fakefs import doctor, kernels
from fakefs.doctor import Check
from fakefs.errors import UserError

APPARMOR = "apparmor_restrict_unprivileged_userns"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKEFS_CACHE", str(tmp_path / "cache"))


def test_every_check_gives_a_line_and_a_fix_if_it_failed() -> None:
    results = doctor.checks()
    assert len({check.name for check in results}) == len(results)
    for check in results:
        assert check.detail
        assert "\n" not in check.detail + check.remedy
        assert check.ok == (not check.remedy)


def test_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Check("good", True, "1.0"), Check("bad one", False, "is missing", "apt-get install it")
    monkeypatch.setattr(doctor, "_CHECKS", [lambda: good])
    assert doctor.run() == 0
    assert capsys.readouterr().out == "ok    good  1.0\nall is well\n"
    monkeypatch.setattr(doctor, "_CHECKS", [lambda: good, lambda: bad])
    assert doctor.run() == 1
    assert capsys.readouterr().out == (
        "ok    good     1.0\nFAIL  bad one  is missing\n               fix: apt-get install it\n1 of 2 checks failed\n"
    )


def test_python_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.python_version().ok
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    assert doctor.python_version() == Check("Python", False, "3.10.9", "apt-get install python3  (3.11 or newer)")


def test_fuse_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "fuse"
    assert "modprobe fuse" in doctor.fuse_device(device).remedy
    device.touch()
    assert doctor.fuse_device(device).ok

    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    def no_such_device(*arguments: object) -> int:
        raise OSError(19, "No such device")

    monkeypatch.setattr(os, "open", refuse)
    assert doctor.fuse_device(device).remedy == f"sudo chmod 666 {device}"
    monkeypatch.setattr(os, "open", no_such_device)
    assert doctor.fuse_device(device).detail == f"{device} cannot be opened: No such device"


def test_fusermount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.fusermount() == Check("fusermount3", True, "/usr/bin/fusermount3")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor.fusermount().remedy == "apt-get install fuse3"


def test_pyfuse3(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"libfuse3.so.3: cannot open shared object file ({name})\nmore")

    monkeypatch.setattr(doctor, "import_module", fail)
    check = doctor.pyfuse3_module()
    assert not check.ok
    assert check.detail == "libfuse3.so.3: cannot open shared object file (pyfuse3)"


def test_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lambda name: "2.1.4")
    assert doctor.unicorn_version() == Check("Unicorn", True, "2.1.4")
    monkeypatch.setattr(metadata, "version", lambda name: "2.0.0")
    assert doctor.unicorn_version() == Check("Unicorn", False, "2.0.0", "pip install unicorn==2.1.4")
    monkeypatch.setattr(metadata, "version", none)
    assert doctor.unicorn_version().detail == "not installed"


def test_native_parts(tmp_path: Path) -> None:
    assert doctor.native_parts(tmp_path).detail == (
        "not built: emulator/_core.so, fakefs/fuse/_shim.so, fakefs/mirror/_notes.so"
    )
    (tmp_path / "fakefs/fuse").mkdir(parents=True)
    (tmp_path / "fakefs/fuse/_shim.abi3.so").touch()
    (tmp_path / "fakefs/mirror").mkdir()
    (tmp_path / "fakefs/mirror/_notes.so").touch()
    assert doctor.native_parts(tmp_path).detail == "not built: emulator/_core.so"
    (tmp_path / "emulator").mkdir()
    (tmp_path / "emulator/_core.so").touch()
    assert doctor.native_parts(tmp_path) == Check("native parts", True, "built")


def test_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.kernel() == Check("kernel", False, "none yet", "fakefs kernel fetch")
    monkeypatch.setattr(kernels, "default_kernel", lambda: tmp_path)
    assert doctor.kernel() == Check("kernel", True, str(tmp_path))

    def gone() -> Path:
        raise UserError("it is gone")

    monkeypatch.setattr(kernels, "default_kernel", gone)
    assert doctor.kernel() == Check("kernel", False, "it is gone", "fakefs kernel use PATH")


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.cache().ok
    assert not (tmp_path / "cache").exists()  # looking makes nothing
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAKEFS_CACHE", str(tmp_path / "file" / "deeper"))
    assert not doctor.cache().ok
    assert "FAKEFS_CACHE" in doctor.cache().remedy


def test_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 5 << 30))
    assert doctor.disk().ok
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 5 << 20))
    assert doctor.disk().detail.startswith("5 MiB free in ")
    assert doctor.disk().detail.endswith(", 1024 MiB are needed")


def test_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000000 kB\nMemAvailable:    1048576 kB\n")
    assert doctor.memory(meminfo) == Check("memory", True, "1024 MiB available")
    meminfo.write_text("MemAvailable:    1024 kB\n")
    assert doctor.memory(meminfo).detail == "1 MiB available, 512 MiB are needed"
    meminfo.write_text("")
    assert not doctor.memory(meminfo).ok


@pytest.mark.parametrize(
    ("sysctl", "value", "remedy"),
    [
        ("kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
        (f"kernel/{APPARMOR}", "1", f"sudo sysctl kernel.{APPARMOR}=0"),
        ("user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=15000"),
        ("user/max_user_namespaces", "96365", ""),
    ],
)
def test_user_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sysctl: str, value: str, remedy: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / sysctl).parent.mkdir()
    (tmp_path / sysctl).write_text(f"{value}\n")
    check = doctor.user_namespaces(tmp_path)
    assert (check.ok, check.remedy) == (not remedy, remedy)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert doctor.user_namespaces(tmp_path).ok == (check.ok or not sysctl.startswith("user/"))
