"""The pytest plugin: `@pytest.mark.ranks(4)` runs a test on 4 ranks, each with its `group`.

    @pytest.mark.ranks(1, 2, 4)
    def test_sum(group):
        assert group.all_reduce(1) == group.world_size

`pytest --ferro-backend gloo` runs the same test on processes. ferro is imported only if a test is
marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

_TIMEOUT_S = 60.0
_SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class MarkedWorld:
    """The value of the argument `group` of a marked test until its ranks run.

    Attributes:
        backend: name of the backend.
        size: number of ranks.
    """

    backend: str
    size: int


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for backends and deadline."""
    options = parser.getgroup("ferro", "tests on ranks (@pytest.mark.ranks)")
    options.addoption(
        "--ferro-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="backend on which tests marked with ranks run; several: repeat it, or separate the "
        f"names by commas (default: {_SIMULATED}, in which ranks are threads)",
    )
    options.addoption(
        "--ferro-timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="S",
        help="seconds that a test on ranks may take (default: %(default)g)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker; check the deadline."""
    config.addinivalue_line(
        "markers",
        "ranks(*counts): run the test on so many ranks, once for each count given; its argument "
        "`group` is each rank's ferro.ProcessGroup",
    )
    if not config.getoption("--ferro-timeout") > 0:
        raise pytest.UsageError("--ferro-timeout must be a positive number of seconds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each backend and each number of ranks."""
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker is None:
        return
    _check(metafunc, marker)
    worlds = [MarkedWorld(name, n) for name in _backends(metafunc.config) for n in marker.args]
    metafunc.parametrize("group", worlds, ids=[f"{world.backend}-{world.size}" for world in worlds])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Refuse the session at once when tests that will run need a backend that cannot be used."""
    if any(world_of(item) for item in items):
        from ferro_testing.pytest_ranks import check_backends

        check_backends(_backends(config))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a marked test on its ranks."""
    world = world_of(pyfuncitem)
    if world is None:
        return None
    from ferro_testing.pytest_ranks import run_test

    timeout_s = pyfuncitem.config.getoption("--ferro-timeout")
    run_test(pyfuncitem, world.backend, world.size, timeout_s)
    return True


def world_of(item: pytest.Item) -> MarkedWorld | None:
    """Return the world on which a test is to run; None for one that is not marked."""
    callspec = getattr(item, "callspec", None)
    world = callspec.params.get("group") if callspec is not None else None
    return world if isinstance(world, MarkedWorld) else None


def _check(metafunc: pytest.Metafunc, marker: pytest.Mark) -> None:
    """Raise an error about a marked test, with its file and line."""
    wrong = ""
    if not marker.args or marker.kwargs:
        wrong = "give numbers of ranks, as in @pytest.mark.ranks(2, 4)"
    elif not all(type(count) is int and count > 0 for count in marker.args):
        wrong = f"numbers of ranks are integers from 1, not {marker.args}"
    elif metafunc.cls is not None:
        wrong = "a test on ranks is a function at the top level of its file, not a method: other "
        wrong += "processes load it by file and name"
    elif "group" not in metafunc.fixturenames:
        wrong = "a test on ranks takes the argument `group`"
    if wrong:
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {wrong}")


def _backends(config: pytest.Config) -> list[str]:
    """Return the backends asked for; a map from devices to backends contains commas, too."""
    given = config.getoption("--ferro-backend") or [_SIMULATED]
    names = [name for text in given for name in ([text] if ":" in text else text.split(","))]
    return list(dict.fromkeys(name.strip() for name in names))
