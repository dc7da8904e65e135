"""Finding libucc: what is said where there is none, or not one that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

import ferro
from ferro.errors import BackendUnavailable
from ferro_ucc.library import VARIABLE, UsableLibrary, find_library

VERSION = "void ucc_get_version(unsigned *a, unsigned *b, unsigned *c) { *a = %d; *b = %d; *c = %d; }"


def refused() -> str:
    """Return what `available` and `init` both say of ucc, which cannot be used."""
    found = ferro.backends.available()["ucc"]
    assert not found.ok
    assert VARIABLE in found.hint
    with pytest.raises(BackendUnavailable) as caught:
        ferro.init("ucc")
    assert (caught.value.backend, caught.value.reason) == ("ucc", found.reason)
    assert caught.value.hint == found.hint
    return found.reason


def test_a_file_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "libucc.so.1"))
    reason = refused()
    assert str(tmp_path / "libucc.so.1") in reason
    assert "cannot open shared object" in reason


def test_a_file_that_is_no_library_is_named(monkeypatch, tmp_path):
    path = tmp_path / "libucc.so.1"
    path.write_text("not a library")
    monkeypatch.setenv(VARIABLE, str(path))
    assert str(path) in refused()


def test_without_the_variable_the_loader_is_asked(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    found = find_library()
    if isinstance(found, UsableLibrary):
        assert found.path == "libucc.so.1"
    else:
        assert "libucc.so.1" in found.reason
        assert VARIABLE in found.reason


def test_another_library_is_refused(monkeypatch, compile_library):
    monkeypatch.setenv(VARIABLE, str(compile_library("other", "int other(void) { return 1; }")))
    assert "ucc_get_version" in refused()


@pytest.mark.parametrize("version", [(1, 0, 3), (1, 9, 0), (2, 1, 0), (0, 1, 1)])
def test_other_versions_are_refused(version, monkeypatch, compile_library):
    path = compile_library("stub", VERSION % version)
    monkeypatch.setenv(VARIABLE, str(path))
    reason = refused()
    assert ".".join(map(str, version)) in reason
    assert "1.1 to 1.8" in reason


@pytest.mark.parametrize("version", [(1, 1, 0), (1, 8, 2)])
def test_versions_known_are_found(version, monkeypatch, compile_library):
    path = compile_library("stub", VERSION % version)
    monkeypatch.setenv(VARIABLE, str(path))
    found = ferro.backends.available()["ucc"]
    assert found.ok
    assert found.version == ".".join(map(str, version))
    assert str(path) in found.reason


def test_a_library_that_lacks_a_function_is_refused_by_init(monkeypatch, compile_library):
    monkeypatch.setenv(VARIABLE, str(compile_library("stub", VERSION % (1, 8, 0))))
    with pytest.raises(BackendUnavailable, match="ucc_"):
        ferro.init("ucc")


def test_asking_loads_nothing_into_this_process(monkeypatch, compile_library):
    """UCX below a real libucc installs signal handlers and starts a thread when it is loaded."""
    path = compile_library("stub", VERSION % (1, 8, 0))
    monkeypatch.setenv(VARIABLE, str(path))
    assert ferro.backends.available()["ucc"].ok
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_library_that_crashes_takes_nobody_along(monkeypatch, compile_library):
    source = "#include <stdlib.h>\n__attribute__((constructor)) static void go(void) { abort(); }"
    monkeypatch.setenv(VARIABLE, str(compile_library("crash", source)))
    found = ferro.backends.available()["ucc"]
    assert not found.ok
    assert "-6" in found.reason


def test_it_is_taken_only_when_asked_for():
    assert ferro.backends.get("ucc").default_under == ()
