"""The probe names the first thing that is missing, and the plugin offers nccl all the same."""

from __future__ import annotations

import pytest

import ferro
from ferro import BackendUnavailable
from ferro.types import Device
from ferro_nccl.plugin import ferro_backends
from ferro_nccl.probe import SystemQueries, probe

EVERYTHING = {
    "has_module": lambda name: True,
    "has_library": lambda name: True,
    "gpus": lambda: 2,
    "version": lambda name: "2.32.3" if name == "nvidia-nccl-cu13" else None,
}


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ({"has_module": lambda name: name != "cupy_backends"}, "CuPy is not installed"),
        (
            {"has_module": lambda name: name != "nvidia.nccl", "has_library": lambda name: name != "libnccl.so.2"},
            "there is no NCCL",
        ),
        ({"has_library": lambda name: name != "libcuda.so.1"}, "there is no NVIDIA driver"),
        ({"gpus": lambda: 0}, "the NVIDIA driver knows no GPU"),
    ],
)
def test_the_probe_says_what_is_missing(lacking, reason):
    found = probe(SystemQueries(**{**EVERYTHING, **lacking}))
    assert not found.ok
    assert reason in found.reason
    assert found.hint


def test_the_probe_where_all_is_there():
    found = probe(SystemQueries(**EVERYTHING))
    assert (found.ok, found.reason, found.version) == (True, "CuPy, NCCL and 2 GPU(s)", "2.32.3")
    found = probe(SystemQueries(**{**EVERYTHING, "gpus": lambda: None}))
    assert (found.ok, found.reason) == (True, "CuPy and NCCL")
    other = {"has_module": lambda name: name == "cupy_backends"}
    assert probe(SystemQueries(**{**EVERYTHING, **other})).ok  # libnccl of the system


def test_the_plugin_offers_nccl_and_explains_itself_where_it_cannot_be_used():
    [info] = ferro_backends()
    assert info.devices == (Device.CUDA, Device.CPU)
    assert info.default_under == ()
    found = info.probe()
    assert found.ok or (found.reason and found.hint)
    if not found.ok:
        with pytest.raises(BackendUnavailable) as caught:
            ferro.init("nccl", world_size=1, rank=0)
        assert caught.value.reason == found.reason
