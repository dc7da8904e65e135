"""Composition and connect: the parts that "hybrid" and maps of devices name, chosen, refused and connected."""

from __future__ import annotations

import numpy as np
import pytest

import ferro
from ferro import Availability, BackendConfig, BackendInfo, Device, backends
from ferro.rendezvous import MemoryStore
from ferro.simulated import SimulatedBackend
from ferro_hybrid import plugin
from ferro_hybrid.composition import Composition, parse_map
from ferro_hybrid.connect import connect
from ferro_testing import run_ranks

CPU, CUDA = Device.CPU, Device.CUDA


class Installed:
    """Backends that seem to be installed; each remembers what it was created with."""

    def __init__(self, monkeypatch):
        self.infos = {}
        self.configs = {}
        self.made = {}
        monkeypatch.setattr(backends, "get", self.get)
        monkeypatch.setattr(backends, "supporting", self.supporting)
        monkeypatch.setattr(backends, "default", lambda launcher: self.defaults.get(launcher))
        self.defaults = {"single": "wire", "openmpi": "passing"}
        self.add("wire", (CPU,), default_under=("*",))
        self.add("passing", (CPU,), default_under=("openmpi",))
        self.add("mixed", (CPU, CUDA), ok=False)
        self.add("cards", (CUDA,))
        self.add("hybrid", (CPU, CUDA), composes=True)

    def add(self, name, devices, *, ok=True, **more):
        def create(config):
            self.configs[name] = config
            [made] = Ending.create_group(1)
            made.devices = devices
            self.made[name] = made
            return made

        def probe():
            return Availability(ok=ok, reason="" if ok else f"{name} is broken")

        info = BackendInfo(name=name, summary="", devices=devices, probe=probe, create=create, **more)
        self.infos[name] = info

    def get(self, name):
        if name not in self.infos:
            raise ferro.BackendUnavailable(name, "it is not installed")
        return self.infos[name]

    def supporting(self, device):
        return sorted(name for name, info in self.infos.items() if device in info.devices)

    def fail(self, name):
        def create(config):
            raise ferro.BackendUnavailable(name, "it broke on the way")

        old = self.infos[name]
        self.infos[name] = BackendInfo(name=name, summary="", devices=old.devices, probe=old.probe, create=create)


class Ending(SimulatedBackend):
    closed = False

    def close(self):
        self.closed = True
        super().close()


@pytest.fixture
def installed(monkeypatch):
    return Installed(monkeypatch)


def config(requested="hybrid", launcher="single", **options):
    return BackendConfig(
        rank=0, world_size=1, store=MemoryStore(), launcher=launcher, requested=requested, options=options
    )


@pytest.mark.parametrize(
    ("given", "collectives", "p2p"),
    [
        (config(), {CPU: "wire", CUDA: "cards"}, "wire"),
        (config(launcher="openmpi"), {CPU: "passing", CUDA: "cards"}, "passing"),
        (config("cpu:passing,cuda:cards"), {CPU: "passing", CUDA: "cards"}, "passing"),
        (config("cpu:passing", p2p="wire"), {CPU: "passing"}, "wire"),
        (config("cuda:cards", launcher="openmpi"), {CUDA: "cards"}, "passing"),
        (config(collectives={"cpu": "wire"}), {CPU: "wire"}, "wire"),
        (config(collectives={CUDA: "cards"}, p2p="passing"), {CUDA: "cards"}, "passing"),
        (config(collectives="passing", p2p="wire"), "passing", "wire"),
        (config(collectives="passing"), "passing", "wire"),
        (config(collectives="cards"), "cards", "wire"),
    ],
)
def test_the_parts_are_those_that_the_user_names_or_the_defaults(installed, given, collectives, p2p):
    composition = Composition.from_config(given)
    assert (composition.collectives, composition.p2p) == (collectives, p2p)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (config("cpu:wire,gpu:cards"), ferro.UsageError, "no device 'gpu'"),
        (config("cpu:wire,cpu:passing"), ferro.UsageError, "names device cpu twice"),
        (config("cpu:wire,"), ferro.UsageError, "'' should be DEVICE:BACKEND"),
        (config("cpu:"), ferro.UsageError, "'cpu:' should be DEVICE:BACKEND"),
        (config("cpu:cuda:cards"), ferro.UsageError, "should be DEVICE:BACKEND"),
        (config("cpu: wire"), ferro.BackendUnavailable, "' wire'"),
        (config("cpu:nosuch"), ferro.BackendUnavailable, "nosuch"),
        (config("cpu:hybrid"), ferro.UsageError, "'hybrid', which is made of others itself"),
        (config("cpu:wire,cuda:passing"), ferro.UsageError, "passing takes .* cpu, not on cuda"),
        (config("cpu:mixed"), ferro.BackendUnavailable, "mixed is broken"),
        (config("cpu:wire", p2p="cards"), ferro.UsageError, "cards takes .* cuda, not on cpu"),
        (config("cpu:wire", collectives="wire"), ferro.UsageError, "says already"),
        (config(p2p=3), ferro.UsageError, "p2p is the name of a backend, not 3"),
        (config(collectives={}), ferro.UsageError, "not {}"),
        (config(collectives={"cpu": 3}), ferro.UsageError, "a map from devices to names"),
        (config(colectives="wire"), ferro.UsageError, "no option colectives"),
        (config(options={"gloo": {}}), ferro.UsageError, "its own backends: gloo"),
        (config(options={"wire": 3}), ferro.UsageError, "maps backends to their own options"),
    ],
)
def test_what_makes_no_sense_is_refused(installed, given, error, words):
    with pytest.raises(error, match=words):
        Composition.from_config(given)


def test_a_map_is_read_in_the_order_given():
    assert list(parse_map("cuda:b,cpu:a").items()) == [(CUDA, "b"), (CPU, "a")]


def test_without_a_gpu_hybrid_says_what_is_missing(installed):
    installed.add("cards", (CUDA,), ok=False)
    with pytest.raises(ferro.BackendUnavailable) as caught:
        Composition.from_config(config())
    assert "cards: cards is broken; mixed: mixed is broken" in caught.value.reason
    assert "ferro.init('cpu:" in caught.value.hint


def test_two_backends_for_gpus_must_be_told_apart(installed):
    installed.add("mixed", (CUDA, CPU))
    with pytest.raises(ferro.BackendUnavailable, match=r"several .*\(cards, mixed\)"):
        Composition.from_config(config())


def test_a_default_that_cannot_be_used_is_told(installed):
    installed.add("wire", (CPU,), ok=False)
    with pytest.raises(ferro.BackendUnavailable, match="wire is broken"):
        Composition.from_config(config())
    installed.defaults.clear()
    with pytest.raises(ferro.BackendUnavailable, match="no installed backend is the default"):
        Composition.from_config(config())


# -- what `ferro backends` says ------------------------------------------------------------------


def probe():
    [info] = plugin.ferro_backends()
    return info.probe()


def test_the_probe_says_what_hybrid_is_here(installed):
    assert probe() == Availability(ok=True, reason="cpu: wire; cuda: cards")


def test_a_map_can_be_used_where_the_default_cannot(installed):
    installed.add("wire", (CPU,), ok=False, default_under=("*",))
    found = probe()
    assert found.ok
    assert found.reason == "cpu: wire is broken; cuda: cards"
    installed.add("passing", (CPU,), ok=False, default_under=("openmpi",))
    assert not probe().ok


def test_the_probe_survives_one_that_raises(installed):
    def explode():
        raise ZeroDivisionError("of a stranger")

    info = installed.infos["cards"]
    installed.infos["cards"] = BackendInfo(name="cards", summary="", devices=(CUDA,), probe=explode, create=info.create)
    found = probe()
    assert found.ok
    assert "cards: its probe raised ZeroDivisionError: of a stranger" in found.reason


def test_a_broken_plugin_is_told_by_the_probe(installed, monkeypatch):
    def broken(device):
        raise ferro.PluginError("two plugins claim it")

    monkeypatch.setattr(backends, "supporting", broken)
    found = probe()
    assert not found.ok
    assert "two plugins claim it" in found.reason


def test_the_broken_plugin_of_others_is_not_told_as_the_fault_of_hybrid(installed, monkeypatch):
    def broken(launcher):
        raise ferro.PluginError("ferro_backends() of strangers 1.0 raised KeyError")

    monkeypatch.setattr(backends, "default", broken)
    found = probe()
    assert found.ok
    assert found.reason.startswith("cpu: no default beside a broken plugin, name one; cuda: ")


def test_what_is_really_installed_can_be_asked():
    found = ferro.backends.available()["hybrid"]
    assert found.ok
    assert found.reason.startswith("cpu: gloo; cuda: ")


# -- connecting ----------------------------------------------------------------------------------


def test_each_part_has_a_corner_of_the_store_and_options_of_its_own(installed):
    given = config("cpu:wire,cuda:cards", options={"cards": {"speed": 3}}, p2p="passing")
    backend = connect(given)
    assert backend.p2p is installed.made["passing"]
    assert dict(backend.collectives) == {CPU: installed.made["wire"], CUDA: installed.made["cards"]}
    assert {n: dict(c.options) for n, c in installed.configs.items()} == {
        "passing": {},
        "wire": {},
        "cards": {"speed": 3},
    }
    for name, own in installed.configs.items():
        own.store.set("who", name.encode())
        assert own.requested == name
    for name, own in installed.configs.items():
        assert own.store.get("who", deadline=0.0) == name.encode()


def test_what_was_made_is_closed_when_another_cannot_be(installed):
    installed.fail("cards")
    with pytest.raises(ferro.BackendUnavailable, match="broke on the way"):
        connect(config())
    assert installed.made["wire"].closed


def test_ranks_that_find_different_backends_learn_of_it(installed):
    given = config()
    given.store.set("hybrid/composition", b"collectives cpu:wire, p2p wire")
    other = BackendConfig(rank=1, world_size=2, store=given.store, requested="hybrid")
    with pytest.raises(ferro.RendezvousError, match=r"rank 1 would .*cuda:cards.*; rank 0 with"):
        connect(other)


def reduce_and_look(group):
    backend = group.backend
    total = float(group.all_reduce(np.ones(2))[0])
    return [group.backend_name, type(backend.p2p).__name__, sorted(backend.collectives), total]


@pytest.mark.parametrize(
    ("requested", "options"),
    [("cpu:gloo", {}), ("hybrid", {"collectives": "gloo", "options": {"gloo": {"shared_memory": False}}})],
)
def test_init_takes_maps_and_options(requested, options):
    found = run_ranks(reduce_and_look, 2, backend=requested, init_options={"backend_options": options})
    assert found == [["hybrid", "GlooBackend", ["cpu"], 2.0]] * 2


def test_options_reach_their_backend():
    options = {"collectives": "gloo", "options": {"gloo": {"shared_memory": 3}}}
    with pytest.raises(ferro.UsageError, match="gloo's option shared_memory"):
        ferro.init("hybrid", backend_options=options)
