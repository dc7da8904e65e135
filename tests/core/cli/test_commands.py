"""The `ferro` program: commands of core, of plugins, of plugins that are absent or broken; listings."""

import json
import re

import importlib_metadata
import pytest

from ferro.cli.main import main
from ferro.plugins import extras
from ferro.types import Availability

COMMAND = """
from ferro.hookspecs import CommandInfo

def load():
    def command(arguments):
        print("{name}", *arguments)
        return 7
    return command

@hookimpl
def ferro_commands():
    return [CommandInfo(name="{name}", summary="tell the {name}", load=load)]
"""
UNLOADABLE = """
from ferro.hookspecs import CommandInfo

def load():
    import no_such_library

@hookimpl
def ferro_commands():
    return [CommandInfo(name="paint", summary="tell the colours", load=load)]
"""


def test_help_lists_installed_commands_and_the_extras_that_bring_others(site, capsys):
    site.install("ferro-clock", "clock", COMMAND.format(name="time"))
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(re.findall(r"^  (\w+) +(.+)$", "\n".join(lines), re.MULTILINE))
    assert list(listed)[:4] == ["backends", "plugins", "run", "time"]
    assert listed["time"] == "tell the time"
    absent = {name: text for name, text in listed.items() if text.startswith("not installed")}
    assert absent == {
        name: f"not installed: {extras.how_to_install(extra)}"
        for name, extra in {
            "bench": "bench",
            "checkpoint": "checkpoint",
            "conformance": "testing",
            "show": "strategies",
        }.items()
    }


def test_an_installed_command_is_not_called_absent(site, capsys):
    for name in ("bench", "checkpoint", "conformance", "show"):
        site.install(f"ferro-{name}", name, COMMAND.format(name=name))
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "not installed" not in out
    assert "tell the bench" in out


def test_without_a_command_the_help_is_shown_as_a_mistake(site, capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: ferro COMMAND")


def test_the_version_is_told(site, capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ferro {importlib_metadata.version('ferro')}\n"


def test_a_command_is_given_its_arguments_and_gives_the_status(site, capsys):
    site.install("ferro-clock", "clock", COMMAND.format(name="time"))
    assert main(["time", "--now", "-h"]) == 7
    assert capsys.readouterr().out == "time --now -h\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frob"], "there is no command 'frob'; there are: backends, plugins, run; see `ferro --help`"),
        (["--frob"], "unrecognized argument --frob; see `ferro --help`"),
        (["bench"], "the command 'bench' is not installed: the extra 'bench' brings it: pip install /"),
    ],
)
def test_an_unknown_command_is_a_mistake_that_says_what_there_is(site, capsys, arguments, words):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ferro: {words}")
    assert err.count("\n") == 1


def test_a_command_that_fails_to_import_is_named_with_its_distribution(site, capsys):
    site.install("ferro-paint", "paint", UNLOADABLE)
    assert main(["--help"]) == 0
    assert "tell the colours" in capsys.readouterr().out
    assert main(["paint"]) == 1
    assert capsys.readouterr().err == (
        "ferro: the command 'paint' of ferro-paint 1.5 failed to import: ModuleNotFoundError: "
        "No module named 'no_such_library'. Repair or uninstall ferro-paint 1.5.\n"
    )


def test_a_plugin_that_fails_to_import_may_be_the_one_with_an_unknown_command(site, capsys):
    site.install("ferro-bad", "bad", "import no_such_library")
    site.install("ferro-clock", "clock", COMMAND.format(name="time"))
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "tell the time" in out
    assert "ferro: plugin 'bad' of ferro-bad 1.5 failed to import" in out
    assert main(["time"]) == 7
    capsys.readouterr()
    assert main(["paint"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("ferro: no installed plugin offers the command 'paint'; plugin 'bad' of ferro-bad 1.5 failed")


def test_a_command_claimed_twice_is_an_error_when_it_is_asked_for(site, capsys):
    for name in ("one", "two"):
        site.install(f"ferro-{name}", name, COMMAND.format(name="time"))
    words = "the command name 'time' is claimed by ferro-one 1.5 and by ferro-two 1.5: uninstall one of them"
    assert main(["time"]) == 1
    assert capsys.readouterr().err == f"ferro: {words}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert f"ferro: {words}" in out
    assert "tell the time" not in out


def test_plugins_are_shown_as_a_table(site, capsys):
    site.install("ferro-clock", "clock", COMMAND.format(name="time") + "\nFERRO_API_VERSION = 1")
    assert main(["plugins"]) == 0
    head, clock, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["plugin", "distribution", "hooks", "contract", "import"]
    assert re.fullmatch(r"clock +ferro-clock 1\.5 +ferro_commands +1 +\d+\.\d ms", clock)


def test_plugins_are_shown_as_json_and_a_broken_one_gives_status_1(site, capsys):
    site.install("ferro-clock", "clock", COMMAND.format(name="time"))
    site.install("ferro-bad", "bad", "1 / 0")
    assert main(["plugins", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["loaded"]["clock"].pop("import_s") > 0
    assert found["loaded"]["clock"] == {
        "distribution": "ferro-clock 1.5",
        "module": "throwaway_ferro_clock",
        "hooks": ["ferro_commands"],
        "api_version": None,
        "unmarked": [],
        "newer": False,
    }
    assert set(found["loaded"]) == {"clock", "core"}
    assert "ferro-bad 1.5 failed to import" in found["broken"]["bad"]
    assert main(["plugins"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("bad: plugin 'bad' of ferro-bad 1.5 failed to import")


def test_a_listing_refuses_unknown_arguments(site, capsys):
    assert main(["plugins", "--yaml"]) == 2
    assert capsys.readouterr().err == "ferro: unrecognized arguments: --yaml; see `ferro plugins --help`\n"


@pytest.mark.parametrize(
    "arguments", [["run", "-n", "0", __file__], ["frob"], ["run", "--log-dir", __file__, __file__]]
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("ferro: ")
    assert err.count("\n") == 1


FOUND = {
    "fast": Availability(ok=True, reason="found", version="1.2"),
    "slow": Availability(ok=False, reason="library absent " * 8, hint="pip install slow"),
}


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferro.cli.listings.available", lambda: FOUND)


@pytest.mark.usefixtures("two_backends")
def test_backends_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["backend", "usable", "version"],
        ["fast", "yes", "1.2"],
        ["slow", "no", "-"],
    ]
    assert lines[2].index("library") == lines[3].index("library") == lines[0].index("why")
    assert lines[2].index("pip install slow") == lines[0].index("what to do")


@pytest.mark.usefixtures("two_backends")
def test_backends_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fast"] == {"ok": True, "reason": "found", "hint": "", "version": "1.2"}
    assert found["slow"]["hint"] == "pip install slow"


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ("lambda: 1 / 0", "failed to import: ZeroDivisionError"),
        ("lambda: __import__('json').no_such", "failed to import: AttributeError"),
        ("lambda: None", "is a NoneType, no callable"),
    ],
)
def test_a_command_that_cannot_be_loaded_is_named_with_its_distribution(site, capsys, load, words):
    source = f"""
        from ferro.hookspecs import CommandInfo

        @hookimpl
        def ferro_commands():
            return [CommandInfo(name="paint", summary="paint", load={load})]
    """
    site.install("ferro-paint", "paint", source)
    assert main(["paint"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("ferro: the command 'paint' of ferro-paint 1.5 ")
    assert words in err
    assert err.count("\n") == 1


def test_a_plugin_with_a_failing_hook_is_shown_as_broken(site, capsys):
    site.install("ferro-bad", "bad", "@hookimpl\ndef ferro_commands():\n    raise ValueError('boom')")
    assert main(["plugins"]) == 1
    assert "bad: ferro_commands() of ferro-bad 1.5 raised ValueError: boom" in capsys.readouterr().out
