"""The pytest plugin: a fresh kernel's tracefs for each test that asks for one. The guide is docs/testing.md.

    def test_probe(tracefs):
        tracefs.write("dynamic_events", "p:reads vfs_read count=$arg3")
        tracefs.write("events/kprobes/reads/enable", "1")
        tracefs.guest("dd if=/proc/version of=/dev/null bs=64 count=1")
        assert 64 in [hit.fields["count"] for hit in tracefs.hits("reads")]

Everything of fakefs is imported when the first test asks for it: others pay nothing for the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from fakefs.forkserver import ForkServer, Order
    from fakefs.testbed import FreshTracefs, Run

_MARK = "fakefs"
_SETTINGS = ("kernel", "memory", "append", "deterministic", "wprobe")
_ARGUMENTS = (*_SETTINGS, "root")


class _Reporter(Protocol):
    def sections(self) -> list[tuple[str, str]]: ...


_USED = pytest.StashKey[list[tuple[str, _Reporter]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and settings."""
    group = parser.getgroup("fakefs", "fakefs: a fresh kernel for each test")
    group.addoption("--fakefs-kernel", metavar="KERNEL", help="path, version or suite; see: fakefs kernel list")
    group.addoption("--fakefs-required", action="store_true", help="fail, not skip, where nothing can be mounted")
    parser.addini("fakefs_kernel", "the kernel of tests: path, version or suite", default="")
    parser.addini("fakefs_memory", "its RAM, such as 256M", default="")
    parser.addini("fakefs_append", "words for its command line", default="")
    parser.addini("fakefs_deterministic", "virtual time never follows the host's clock", type="bool", default=False)
    parser.addini("fakefs_wprobe", "watchpoints: unlimited, strict or off", default="unlimited")


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    what = "the kernel of this test's tracefs, over the ini options fakefs_*"
    config.addinivalue_line("markers", f"{_MARK}({', '.join(f'{name}=...' for name in _ARGUMENTS)}): {what}")


def _order(config: pytest.Config, **chosen: object) -> Order:
    """What is chosen here, else on the command line, else in the ini file."""
    from argparse import ArgumentTypeError

    from fakefs.arguments import size
    from fakefs.errors import UserError
    from fakefs.forkserver import Order
    from fakefs.testbed import find_kernel

    unknown = set(chosen) - set(_ARGUMENTS)
    if unknown:
        pytest.fail(f"fakefs: a kernel is chosen by {', '.join(_ARGUMENTS)}, not {sorted(unknown)}", False)
    given = {name: config.getini(f"fakefs_{name}") for name in _SETTINGS} | {"root": Order.root}
    given["kernel"] = config.getoption("--fakefs-kernel") or given["kernel"]
    given |= chosen
    if given["wprobe"] not in ("unlimited", "strict", "off"):
        pytest.fail(f"fakefs: wprobe={given['wprobe']!r} is not one of unlimited, strict, off", False)
    try:
        kernel = find_kernel(str(given["kernel"])) if given["kernel"] else None
        memory = size(str(given["memory"])) if given["memory"] else 0
    except (UserError, ArgumentTypeError) as error:
        pytest.fail(f"fakefs: {error}", False)
    texts = {name: str(given[name]) for name in ("append", "wprobe", "root")}
    return Order(kernel, memory, deterministic=bool(given["deterministic"]), **texts)


def _marked(request: pytest.FixtureRequest) -> Order:
    """What the marks of a test say, the nearest first."""
    chosen: dict[str, object] = {}
    for mark in reversed(list(request.node.iter_markers(_MARK))):
        if mark.args:
            pytest.fail(f"@pytest.mark.{_MARK} takes {', '.join(_ARGUMENTS)}, not {mark.args}", False)
        chosen |= mark.kwargs
    return _order(request.config, **chosen)


def _remember(node: pytest.Item | pytest.Session, name: str, reporter: _Reporter) -> None:
    node.stash.setdefault(_USED, []).append((name, reporter))


@pytest.fixture(scope="session")
def fakefs_server(request: pytest.FixtureRequest) -> Iterator[ForkServer]:
    """The process that fresh kernels are forked from: one per pytest process."""
    from fakefs.forkserver import ForkServer
    from fakefs.testbed import missing

    reason = missing()
    if reason and request.config.getoption("--fakefs-required"):
        pytest.fail(reason, pytrace=False)
    elif reason:
        pytest.skip(reason)
    server = ForkServer()
    yield server
    server.close()


def _mount(server: ForkServer, places: pytest.TempPathFactory, order: Order) -> FreshTracefs:
    from fakefs.errors import UserError
    from fakefs.testbed import FreshTracefs

    directory = places.mktemp("tracefs") / "tracing"
    directory.mkdir()
    try:
        return FreshTracefs(server, directory, order)
    except UserError as error:
        pytest.fail(f"fakefs: {error}", pytrace=False)


@pytest.fixture
def tracefs(
    request: pytest.FixtureRequest, fakefs_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FreshTracefs]:
    """The tracefs of a fresh kernel, mounted at `.path`: see fakefs.testbed.Tracefs."""
    mounted = _mount(fakefs_server, tmp_path_factory, _marked(request))
    _remember(request.node, "tracefs", mounted)
    yield mounted
    mounted.close()


@pytest.fixture(scope="session")
def new_tracefs(
    request: pytest.FixtureRequest, fakefs_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., FreshTracefs]]:
    """Mount further kernels, each until it is closed or the session ends: `new_tracefs(wprobe="off")`."""
    with ExitStack() as stack:

        def new(**chosen: object) -> FreshTracefs:
            mounted = _mount(fakefs_server, tmp_path_factory, _order(request.config, **chosen))
            stack.callback(mounted.close)
            _remember(request.session, "new_tracefs", mounted)
            return mounted

        yield new


@pytest.fixture
def fakefs_run(
    request: pytest.FixtureRequest, fakefs_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Run a shell script, or a file that is one, with a fresh kernel at /sys/kernel/tracing: see fakefs.testbed.Run."""
    from fakefs.testbed import run_at_real_paths, script_argv

    order = _marked(request)

    def run(script: str | Path, *arguments: str, timeout: float = 60.0) -> Run:
        argv = script_argv(script) if isinstance(script, Path) else ["sh", "-c", script, "sh"]
        kept = tmp_path_factory.mktemp("fakefs-run")
        done = run_at_real_paths(fakefs_server, [*argv, *arguments], order, kept, timeout)
        _remember(request.node, "fakefs_run", done)
        return done

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what its kernels have to say."""
    report = yield
    if report.failed and report.when != "teardown":
        for name, reporter in item.stash.get(_USED, []) + item.session.stash.get(_USED, []):
            report.sections += [(f"{name}: {title}", text or "(empty)") for title, text in reporter.sections()]
    return report
