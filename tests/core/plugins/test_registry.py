"""Plugins: real distributions, thrown away after each test; every error names the one at fault."""

import importlib
import re

import importlib_metadata
import pytest

import ferro
from ferro import backends, collectives, hookspecs, strategies
from ferro.cli.main import main
from ferro.errors import BackendUnavailable, PluginError, UsageError
from ferro.plugins import extras
from ferro.plugins import registry as plugins

GOOD = """
@hookimpl
def ferro_backends():
    return [backend("pipes")]
"""


def test_a_good_plugin_offers_its_backend(site):
    site.install("ferro-pipes", "pipes", GOOD)
    found = backends.available()
    assert set(found) == {"pipes", "simulated"}
    assert found["pipes"].ok
    assert found["pipes"].reason == "it is there"
    assert backends.get("pipes").summary == "pipes"
    assert plugins.installed().versions()["pipes"] == "ferro-pipes 1.5"
    assert plugins.installed().broken == []


BROKEN = {
    "import failure": (
        "import no_such_library",
        "failed to import .*: ModuleNotFoundError: No module named 'no_such_library'. "
        "Repair or uninstall ferro-bad 1.5",
    ),
    "exit on import": ("import sys\nsys.exit('no license')", "failed to import .*: SystemExit: no license"),
    "error on import": ("1 / 0", "failed to import .*: ZeroDivisionError"),
    "unknown hook": (
        "@hookimpl\ndef ferro_colours():\n    return []",
        "implements a hook that ferro does not specify.*ferro_colours.*The hooks are "
        r"ferro_backends, ferro_collectives, ferro_commands, ferro_observers, ferro_strategies\.",
    ),
    "hook with other arguments": (
        "@hookimpl\ndef ferro_backends(colour):\n    return []",
        "or with other arguments.*colour",
    ),
    "hook that raises": (
        "@hookimpl\ndef ferro_backends():\n    raise KeyError('lost')",
        r"ferro_backends\(\) of .* raised KeyError: 'lost'",
    ),
    "hook that raises late": (
        "@hookimpl\ndef ferro_backends():\n    yield 1 / 0",
        r"ferro_backends\(\) of .* raised ZeroDivisionError",
    ),
    "wrong items": (
        "@hookimpl\ndef ferro_backends():\n    return ['pipes']",
        r"ferro_backends\(\) of .* returned a str, not a BackendInfo",
    ),
    "no sequence": ("@hookimpl\ndef ferro_backends():\n    return 5", r"ferro_backends\(\) of .* raised TypeError"),
}


@pytest.mark.parametrize(("source", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_and_the_others_are_listed(site, source, words):
    site.install("ferro-bad", "bad", source)
    site.install("ferro-pipes", "pipes", GOOD)
    found = backends.available()
    assert set(found) == {"bad", "pipes", "simulated"}
    assert found["pipes"].ok
    assert found["simulated"].ok
    assert not found["bad"].ok
    assert "ferro-bad 1.5" in found["bad"].reason
    assert found["bad"].hint
    with pytest.warns(RuntimeWarning, match=f"(?s){words}") as told:
        backends.get("pipes")  # nobody asked for the broken one
    backends.get("pipes")  # it is told once
    [warning] = told
    assert "ferro-bad 1.5" in str(warning.message)
    assert warning.filename == __file__
    for asked in (lambda: backends.get("wires"), lambda: backends.default("single")):  # it may be the broken one's
        with pytest.raises(PluginError, match=f"(?s){words}") as caught:
            asked()
        assert "ferro-bad 1.5" in str(caught.value)
        assert caught.value.__cause__ is not None


def test_two_distributions_that_claim_one_plugin_name(site):
    site.install("ferro-one", "twin", GOOD)
    site.install("ferro-two", "twin", GOOD.replace("pipes", "wires"))
    found = backends.available()
    assert set(found) == {"twin", "simulated"}
    words = "the plugin name 'twin' is claimed by ferro-one 1.5 and by ferro-two 1.5"
    assert words in found["twin"].reason
    with pytest.warns(RuntimeWarning, match=words):
        backends.get("simulated")
    with pytest.raises(PluginError, match=words):
        backends.get("pipes")


def test_two_distributions_that_claim_one_backend_name(site):
    site.install("ferro-one", "one", GOOD)
    site.install("ferro-two", "two", GOOD)
    found = backends.available()
    words = "the backend name 'pipes' is claimed by ferro-one 1.5 and by ferro-two 1.5: uninstall"
    assert words in found["pipes"].reason
    assert not found["pipes"].ok
    assert found["simulated"].ok
    with pytest.raises(PluginError, match=words):
        backends.get("pipes")
    assert backends.get("simulated").name == "simulated"


def test_a_probe_that_raises_is_told_as_its_fault(site):
    site.install(
        "ferro-pipes",
        "pipes",
        """
        def probe():
            raise OSError("no pipes here")

        @hookimpl
        def ferro_backends():
            return [backend("pipes", probe)]
        """,
    )
    found = backends.available()["pipes"]
    assert not found.ok
    assert found.reason == "its probe raised OSError: no pipes here"
    assert found.hint == "Report this to the authors of ferro-pipes 1.5."
    assert backends.probe(backends.get("pipes")) == found
    with pytest.raises(BackendUnavailable, match="its probe raised OSError: no pipes here"):
        ferro.init("pipes")


def test_a_plugin_whose_hook_is_not_marked_is_named(site, capsys):
    site.install("ferro-wires", "wires", GOOD.replace("@hookimpl", ""))
    site.install("ferro-pipes", "pack", GOOD)
    with pytest.raises(BackendUnavailable) as caught:
        backends.get("wires")
    assert "plugin 'wires' of ferro-wires 1.5 is loaded, but offers no" in str(caught.value)
    assert caught.value.hint == "Is its ferro_backends decorated with @ferro.hookimpl?"
    words = "plugin 'wires' of ferro-wires 1.5: its ferro_backends cannot be heard: decorate it with @ferro.hookimpl"
    with pytest.raises(BackendUnavailable, match=f"no plugin that offers it is installed .*; {words}"):
        backends.get("pack")
    assert words in backends.available()["wires"].reason
    assert main(["plugins"]) == 0
    assert "wires: ferro-wires 1.5: its ferro_backends cannot be heard" in capsys.readouterr().out


def test_a_backend_that_is_not_installed_says_what_to_install(site):
    with pytest.raises(BackendUnavailable) as caught:
        backends.get("gloo")
    assert "no plugin that offers it is installed (installed: simulated)" in str(caught.value)
    assert caught.value.backend == "gloo"
    assert caught.value.hint == f"Install it: {extras.how_to_install('gloo')}."
    with pytest.raises(BackendUnavailable, match="Check the spelling, or install"):
        backends.get("glue")


def test_the_default_backend_is_the_launchers_or_everyones(site):
    assert backends.default("torchrun") is None
    site.install(
        "ferro-pipes",
        "pipes",
        """
        @hookimpl
        def ferro_backends():
            return [backend("pipes", under=("*",)), backend("wires", under=("slurm",))]
        """,
    )
    plugins.installed.cache_clear()
    assert backends.default("torchrun") == "pipes"
    assert backends.default("slurm") == "wires"
    site.install("ferro-more", "more", GOOD.replace('backend("pipes")', 'backend("x", under=("slurm",))'))
    plugins.installed.cache_clear()
    with pytest.raises(PluginError, match="backends wires and x both offer to be the default"):
        backends.default("slurm")


STRATEGY = """
@hookimpl
def ferro_strategies():
    return [StrategyInfo(name="{name}", summary="a summary", load=lambda: len)]
"""


def test_strategies_are_listed_and_loaded_by_name(site):
    assert strategies.available() == {}
    with pytest.raises(PluginError, match="offers the strategy 'ddp': none is installed"):
        strategies.get("ddp")
    site.install("ferro-one", "one", STRATEGY.format(name="mine"))
    plugins.installed.cache_clear()
    assert strategies.available() == {"mine": "a summary"}
    assert strategies.get("mine") is len
    site.install("ferro-two", "two", STRATEGY.format(name="mine"))
    site.install("ferro-three", "three", STRATEGY.format(name="other"))
    plugins.installed.cache_clear()
    assert strategies.available() == {"other": "a summary"}
    with pytest.raises(PluginError, match=r"strategy name 'mine' is claimed by ferro-one 1\.5 and"):
        strategies.get("mine")


def test_algorithms_of_plugins_stand_beside_the_built_in_ones(site):
    source = """
    @hookimpl
    def ferro_collectives():
        return [CollectiveInfo(collective="all_reduce", algorithm="{name}", build=print)]
    """
    builtin = collectives.available()["all_reduce"]
    assert "ring" in builtin
    site.install("ferro-one", "one", source.format(name="mine"))
    site.install("ferro-two", "two", source.format(name="ring"))
    plugins.installed.cache_clear()
    assert set(collectives.available()["all_reduce"]) == {*builtin, "mine"}
    assert collectives.get("all_reduce", "mine").build is print
    with pytest.raises(PluginError, match=r"'ring' for 'all_reduce' is claimed by ferro.* and by"):
        collectives.get("all_reduce", "ring")
    with pytest.raises(UsageError, match=r"no algorithm 'no' for 'all_reduce'; there are: .*mine"):
        collectives.get("all_reduce", "no")


def test_a_plugin_that_fails_in_one_hook_is_left_out_of_lists_only(site):
    site.install("ferro-bad", "bad", "@hookimpl\ndef ferro_collectives():\n    raise KeyError(1)")
    assert "all_reduce" in collectives.available()
    assert backends.available()["simulated"].ok
    words = r"ferro_collectives\(\) of ferro-bad 1.5 raised KeyError"
    with pytest.warns(RuntimeWarning, match=words):
        assert collectives.get("all_reduce", "ring").algorithm == "ring"
    with pytest.raises(PluginError, match=words):
        collectives.get("all_reduce", "mine")


def test_a_contract_version_that_differs_is_refused_with_both_versions(site):
    site.install("ferro-old", "old", GOOD + f"\nFERRO_API_VERSION = {hookspecs.API_VERSION + 1}")
    site.install("ferro-pipes", "pipes", GOOD + f"\nFERRO_API_VERSION = {hookspecs.API_VERSION}")
    loaded = plugins.installed()
    assert loaded.loaded["pipes"].api_version == hookspecs.API_VERSION
    (broken,) = loaded.broken
    assert broken.name == "old"
    assert str(broken.error) == (
        f"plugin 'old' of ferro-old 1.5 states FERRO_API_VERSION = {hookspecs.API_VERSION + 1}; "
        f"ferro {importlib_metadata.version('ferro')} has plugin contract version {hookspecs.API_VERSION}. "
        "Install a ferro-old and a ferro that were made for each other."
    )
    with pytest.warns(RuntimeWarning, match=r"ferro-old 1\.5 states"):
        backends.get("pipes")


def test_a_loaded_plugin_is_described(site):
    site.install("ferro-pipes", "pipes", GOOD + STRATEGY.format(name="mine"))
    found = plugins.installed().loaded["pipes"]
    assert (found.distribution, found.module) == ("ferro-pipes 1.5", "throwaway_ferro_pipes")
    assert (found.hooks, found.api_version) == (("ferro_backends", "ferro_strategies"), None)
    assert 0 < found.import_s < 60


COUNTING = """
calls = []

@hookimpl
def ferro_backends():
    calls.append("backends")
    return [backend("pipes")]

@hookimpl
def ferro_observers():
    calls.append("observers")
    return []
"""


def test_hooks_are_asked_once_per_process_and_observers_at_each_init(site):
    site.install("ferro-pipes", "pipes", COUNTING)
    for _ in range(2):
        backends.available()
        backends.get("pipes")
    calls = importlib.import_module("throwaway_ferro_pipes").calls
    assert calls == ["backends"]
    for _ in range(2):
        ferro.init("simulated").close()
        ferro.shutdown()
    assert calls == ["backends", "observers", "observers"]


def test_hooks_are_traced_where_the_environment_says_so(site, monkeypatch, capsys):
    site.install("ferro-pipes", "pipes", COUNTING)
    backends.available()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FERRO_TRACE_HOOKS", "1")
    plugins.installed.cache_clear()
    found = plugins.installed()
    found.survey("ferro_backends", object)
    found.survey("ferro_observers", object)
    lines = [re.sub(r" \(\d+\.\d ms\)$", "", line) for line in capsys.readouterr().err.splitlines()]
    own = f"ferro {importlib_metadata.version('ferro')}"
    assert lines == [
        f"ferro: ferro_backends() of {own}: simulated",
        "ferro: ferro_backends() of ferro-pipes 1.5: pipes",
        f"ferro: ferro_observers() of {own}: nothing",
        "ferro: ferro_observers() of ferro-pipes 1.5: nothing",
    ]


def test_ranks_do_not_compare_plugins_that_offer_commands_only(site):
    site.install("ferro-pipes", "pipes", GOOD)
    site.install("ferro-tool", "tool", "@hookimpl\ndef ferro_commands():\n    return []")
    loaded = plugins.installed().loaded
    assert set(loaded) == {"core", "pipes", "tool"}
    assert set(plugins.installed().versions()) == {"core", "pipes"}


UNFIT = {
    "devices in one string": ("devices='cpu'", r"devices='cpu': it is a tuple of one or more of 'cpu', 'cuda'"),
    "no device": ("devices=()", r"devices=\(\): it is a tuple"),
    "unknown device": ("devices=('tpu',)", r"devices=\('tpu',\): it is a tuple"),
    "launcher in a string": ("default_under='slurm'", "default_under='slurm': it is a tuple of launchers' names"),
    "unknown launcher": ("default_under=('slrum',)", r" default under 'slrum': the launchers are \*, ferro, .*slurm"),
    "launcher": ("launcher='mpiexec'", "launcher='mpiexec': it is None or callable"),
    "composes": ("composes=1", "composes=1: it is True or False"),
    "summary": ("summary=None", "summary=None: it is a string"),
    "probe": ("probe=Availability(ok=True)", "probe=.*: it is callable"),
}


@pytest.mark.parametrize(("field", "words"), UNFIT.values(), ids=UNFIT)
def test_fields_that_cannot_be_are_errors_of_their_plugin(site, field, words):
    source = f"@hookimpl\ndef ferro_backends():\n    return [replace(backend('pipes'), {field})]"
    site.install("ferro-pipes", "pipes", f"from dataclasses import replace\n{source}")
    assert re.search(f"ferro-pipes 1.5 returned a.*{words}", backends.available()["pipes"].reason)


def test_a_class_that_only_looks_alike_is_told_apart(site):
    source = "class BackendInfo:\n    name = 'pipes'\n\n@hookimpl\ndef ferro_backends():\n    return [BackendInfo()]"
    site.install("ferro-pipes", "pipes", source)
    words = (
        "a BackendInfo that module throwaway_ferro_pipes defines, not ferro's own: import BackendInfo from ferro.hook"
    )
    assert words in backends.available()["pipes"].reason


ANSWERS = {
    "True": "its probe returned a bool, not an Availability",
    "None": "its probe returned None, not an Availability",
    "Availability(ok=1)": "its probe returned an Availability with ok=1: it is True or False",
    "Availability(ok=True, reason=['x'])": "its probe returned an Availability with reason=['x']: it is a string",
    "sys.exit(3)": "its probe raised SystemExit: 3",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_a_probe_answers_is_checked(site, answer):
    source = f"import sys\n@hookimpl\ndef ferro_backends():\n    return [backend('pipes', lambda: {answer})]"
    site.install("ferro-pipes", "pipes", source)
    found = backends.available()["pipes"]
    assert (found.ok, found.reason) == (False, ANSWERS[answer])
    assert "ferro-pipes 1.5" in found.hint
    with pytest.raises(BackendUnavailable, match="its probe"):
        ferro.init("pipes")


MADE = {
    "None": "returned None, not a Backend",
    "object()": "returned an object, not a Backend",
    "SimulatedBackend.create_group(2)[1]": r"\(rank, world_size\) is \(1, 2\), not \(0, 1\)",
}


@pytest.mark.parametrize("made", MADE)
def test_what_create_returns_is_checked(site, made):
    source = f"return [replace(backend('pipes'), create=lambda config: {made})]"
    imports = "from dataclasses import replace\nfrom ferro.simulated import SimulatedBackend\n"
    site.install("ferro-pipes", "pipes", f"{imports}@hookimpl\ndef ferro_backends():\n    {source}")
    with pytest.raises(PluginError, match=f"backend 'pipes' of ferro-pipes 1.5 .*{MADE[made]}"):
        ferro.init("pipes")


def test_a_probe_that_asks_for_other_backends_warns_of_nothing(site):
    source = """
    from ferro import backends

    @hookimpl
    def ferro_backends():
        return [backend("pipes", lambda: backends.probe(backends.get("simulated")))]
    """
    site.install("ferro-pipes", "pipes", source)
    site.install("ferro-bad", "bad", "1 / 0")
    assert backends.available()["pipes"].ok
    with pytest.warns(RuntimeWarning, match="ferro-bad 1.5"):
        backends.get("pipes")


def test_probes_that_hang_are_told_and_not_waited_for(site, monkeypatch):
    source = """
    import threading
    for_ever = threading.Event()

    @hookimpl
    def ferro_backends():
        return [backend("pipes", for_ever.wait), backend("wires", for_ever.wait), backend("quick")]
    """
    site.install("ferro-pipes", "pipes", source)
    monkeypatch.setattr(backends, "_PROBE_S", 0.2)
    try:
        found = backends.available()
        assert found["quick"].ok
        for name in ("pipes", "wires"):
            assert found[name].reason == "its probe has not ended after 0.2 s"
            assert "ferro-pipes 1.5" in found[name].hint
        with pytest.raises(BackendUnavailable, match="has not ended"):
            ferro.init("pipes")
    finally:
        importlib.import_module("throwaway_ferro_pipes").for_ever.set()


ODD = {
    "a map": ("cpu:my", "a name is one word"),
    "no word": ("my pipes", "a name is one word"),
    "empty": ("", "a name is one word"),
    "an option": ("--help", "a name is one word"),
    "a number": (7, "a name is one word"),
}


@pytest.mark.parametrize(("name", "words"), ODD.values(), ids=ODD)
def test_a_name_that_is_no_word_is_an_error_of_its_plugin(site, name, words):
    site.install("ferro-pipes", "pipes", f"@hookimpl\ndef ferro_backends():\n    return [backend({name!r})]")
    with pytest.raises(PluginError, match=f"ferro-pipes 1.5.*{words}"):
        backends.get("pipes")
    assert "ferro-pipes 1.5" in backends.available()["pipes"].reason


def test_a_hook_that_returns_none_is_an_error(site):
    site.install("ferro-pipes", "pipes", "@hookimpl\ndef ferro_backends():\n    return None")
    with pytest.raises(PluginError, match=r"ferro_backends\(\) of ferro-pipes 1.5 returned None"):
        backends.get("pipes")


def test_a_truth_is_no_version_of_the_contract(site):
    site.install("ferro-pipes", "pipes", "FERRO_API_VERSION = True\n" + GOOD)
    with pytest.raises(PluginError, match="states FERRO_API_VERSION = True"):
        backends.get("pipes")


NEWER = f"FERRO_API_VERSION = ({hookspecs.API_VERSION}, {hookspecs.API_REVISION + 1})\n"
OF_A_NEWER_FERRO = """
@hookimpl
def ferro_colours():
    return []

@hookimpl
def ferro_backends():
    probe = lambda: Availability(ok=True, reason="it is there", colour="red")
    offered = BackendInfo(
        name="pipes", summary="", probe=probe, create=print, colours=("red",), default_under=("new launcher",)
    )
    return [offered]

@hookimpl
def ferro_collectives():
    return [CollectiveInfo(collective="all_reduce", algorithm="mine", build=print, colour="red")]
"""


def test_hooks_and_fields_of_a_newer_ferro_are_ignored_with_a_warning(site):
    site.install("ferro-pipes", "pipes", NEWER + OF_A_NEWER_FERRO)
    with pytest.warns(RuntimeWarning) as told:
        found = backends.available(), collectives.get("all_reduce", "mine")
    assert found[0]["pipes"].ok
    assert found[1].build is print
    assert backends.get("pipes").default_under == ("new launcher",)
    assert [str(it.message).partition(", which a newer ferro")[0] for it in told] == [
        "plugin 'pipes' of ferro-pipes 1.5 implements ferro_colours",
        "ferro_backends() of ferro-pipes 1.5 gives colours",
        "ferro_collectives() of ferro-pipes 1.5 gives colour",
    ]


def test_unknown_fields_are_errors_of_a_plugin_made_for_this_ferro(site):
    source = OF_A_NEWER_FERRO.replace("ferro_colours", "ferro_strategies")
    site.install("ferro-pipes", "pipes", f"FERRO_API_VERSION = {hookspecs.API_VERSION}\n{source}")
    assert "unexpected keyword argument 'colours'" in backends.available()["pipes"].reason


def test_hooks_that_fail_are_traced_and_listed(site, capsys, monkeypatch):
    monkeypatch.setenv("FERRO_TRACE_HOOKS", "1")
    site.install("ferro-bad", "bad", "@hookimpl\ndef ferro_strategies():\n    raise ValueError('boom')")
    [broken] = plugins.installed().failing()
    assert broken.name == "bad"
    assert "ValueError: boom" in str(broken.error)
    assert "ferro: ferro_strategies() of ferro-bad 1.5: an error" in capsys.readouterr().err
