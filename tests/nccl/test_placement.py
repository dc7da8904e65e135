"""Which GPU a rank takes, and who goes together: pure, then as a user meets it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import ferro
from ferro import BackendUnavailable, UsageError
from ferro.types import Device
from ferro_nccl.codes import DataType, Native, RedOp, native
from ferro_nccl.placement import Card, choose_gpu, gpu_name, objection
from ferro_nccl.plugin import ferro_backends
from ferro_nccl.probe import Surroundings, probe
from ferro_nccl.settings import Settings

from .conftest import Ranks


@pytest.mark.parametrize(
    ("dtype", "op", "wanted"),
    [
        ("float32", "sum", Native(7, 0)),
        ("float16", "mean", Native(6, 4)),
        ("bfloat16", "max", Native(9, 2)),
        ("float64", "min", Native(8, 3)),
        ("int8", "prod", Native(0, 1)),
        ("uint64", "sum", Native(5, 0)),
        ("complex64", "sum", Native(7, 0, 2)),
        ("complex128", "mean", Native(8, 4, 2)),
        ("complex64", "prod", None),
        ("int16", "sum", None),
        ("int32", "bxor", None),
        ("bool", "sum", Native(1, 2)),
        ("bool", "band", Native(1, 3)),
        ("bool", "bxor", None),
    ],
)
def test_table_of_reductions(dtype, op, wanted):
    assert native(dtype, ferro.ReduceOp(op)) == wanted


def test_what_depends_on_the_order_is_not_ncclss_where_the_order_counts():
    assert native("float32", ferro.ReduceOp.SUM, deterministic=True) is None
    assert native("complex64", ferro.ReduceOp.MEAN, deterministic=True) is None
    assert native("bfloat16", ferro.ReduceOp.MAX, deterministic=True) == Native(9, 2)
    assert native("int64", ferro.ReduceOp.SUM, deterministic=True) == Native(4, 0)
    assert native("bool", ferro.ReduceOp.SUM, deterministic=True) == Native(1, 2)
    assert native("float32", None) is None


def test_numbers_are_cupys():
    nccl = pytest.importorskip("cupy.cuda.nccl", reason="CuPy is not installed")
    for kind in DataType:
        assert getattr(nccl, f"NCCL_{kind.name}") == kind
    for op in RedOp:
        assert getattr(nccl, f"NCCL_{op.name}") == op


def test_choice_of_gpu():
    assert choose_gpu(8, 3, None) == 3
    assert choose_gpu(1, 3, None) == 0  # the launcher shows each process one of its own
    assert choose_gpu(8, 3, 5) == 5
    with pytest.raises(BackendUnavailable, match=r"number 4 on its host .*sees 2 GPUs.*no more"):
        choose_gpu(2, 4, None)
    with pytest.raises(BackendUnavailable, match=r"device=2 was asked for.*sees 2 GPUs"):
        choose_gpu(2, 0, 2)
    with pytest.raises(BackendUnavailable, match="sees no GPU"):
        choose_gpu(0, 0, None)


def cards(*gpus, version=23203, sharing=False):
    return [
        Card(rank=rank, host=f"n{rank}", gpu=gpu, version=version, sharing=sharing)
        for rank, gpu in enumerate(gpus)
    ]


def test_ranks_on_one_gpu_are_both_named():
    assert objection(cards("a", "b", "c")) is None
    reason, hint = objection(cards("a", "b", "a"))
    assert "rank 0 (host n0) and rank 2 (host n2) are on one GPU (a)" in reason
    assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in hint
    assert objection(cards("a", "a", sharing=True)) is None
    assert objection(cards("a", "a", sharing=True, version=22907)) is not None  # too old for it


def test_other_versions_of_nccl_are_named():
    mixed = [*cards("a"), *cards("b", "c", version=22907)[1:]]
    reason, _ = objection(mixed)
    assert reason == "rank 0 (host n0) has NCCL 2.32.3, rank 1 (host n1) has NCCL 2.29.7"


def test_a_card_travels():
    [card] = cards("a")
    assert Card.decode(card.encode()) == card


def test_every_rank_learns_of_two_on_one_gpu(machine):
    machine.uuids[2] = machine.uuids[0]
    ranks = Ranks(machine, 3)
    ranks.start(lambda group: None)
    ranks.join()
    for rank in range(3):
        assert isinstance(ranks.errors[rank], BackendUnavailable)
        assert "rank 0" in str(ranks.errors[rank])
        assert "rank 2" in str(ranks.errors[rank])
    assert machine.nccl.communicators == []


def test_two_on_one_gpu_where_nccl_is_told_to_allow_it(machine, on_ranks, monkeypatch):
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    machine.nccl.several_on_a_gpu = True
    machine.uuids[1] = machine.uuids[0]
    found = on_ranks(2, lambda group: machine.host(group.all_reduce(machine.array([1.0]))).tolist())
    assert found == {0: [2.0], 1: [2.0]}


def test_two_on_one_gpu_that_nccl_takes_for_other_hosts(monkeypatch):
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    assert gpu_name("a") == "a"
    monkeypatch.setenv("NCCL_HOSTID", "rank 1")
    assert objection(cards("a", gpu_name("a"))) is None


def test_the_option_device(machine, on_ranks):
    assert on_ranks(1, lambda group: machine.here.device, options={"device": 3}) == {0: 3}


def test_no_thread_makes_a_context_on_another_gpu(machine, on_ranks):
    """New threads begin on GPU 0, where a context takes memory that its own rank needs."""

    def work(group):
        gate = machine.block(group.backend._queue.stream)
        handle = group.all_reduce(machine.array([1.0]), async_op=True)
        later = group.all_reduce(np.ones(3), async_op=True)  # in a thread of the group's
        for look in (handle.done, group.backend._queue.check):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(10)
        gate.set()
        later.wait()
        group.split(0).close()

    on_ranks(1, work, options={"device": 2})
    assert machine.contexts == {2}


def test_a_thread_that_uses_another_gpu_is_left_there(machine, on_ranks):
    def work(group):
        machine._set_device(1)
        group.barrier()
        return machine.here.device

    assert on_ranks(1, work, options={"device": 2}) == {0: 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 1}, "nccl has no option devices"),
        ({"device": "cuda:0"}, "number of a GPU, not 'cuda:0'"),
        ({"device": True}, "number of a GPU"),
        ({"device": -1}, "number of a GPU"),
        ({"check_calls": 1}, "check_calls is True or False"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        Settings.read(options)


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
            {
                "has_module": lambda name: name != "nvidia.nccl",
                "has_library": lambda name: name != "libnccl.so.2",
            },
            "there is no NCCL",
        ),
        ({"has_library": lambda name: name != "libcuda.so.1"}, "there is no NVIDIA driver"),
        ({"gpus": lambda: 0}, "the NVIDIA driver knows no GPU"),
    ],
)
def test_the_probe_says_what_is_missing(lacking, reason):
    found = probe(Surroundings(**{**EVERYTHING, **lacking}))
    assert not found.ok
    assert reason in found.reason
    assert found.hint


def test_the_probe_where_all_is_there():
    found = probe(Surroundings(**EVERYTHING))
    assert (found.ok, found.reason, found.version) == (True, "CuPy, NCCL and 2 GPU(s)", "2.32.3")
    found = probe(Surroundings(**{**EVERYTHING, "gpus": lambda: None}))
    assert (found.ok, found.reason) == (True, "CuPy and NCCL")
    other = {"has_module": lambda name: name == "cupy_backends"}
    assert probe(Surroundings(**{**EVERYTHING, **other})).ok  # libnccl of the system


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
