"""The GPU that a rank takes, and ranks whose GPUs or NCCLs cannot be connected."""

from __future__ import annotations

import pytest

from ferro import BackendUnavailable
from ferro_nccl.placement import RankPlacement, choose_gpu, find_conflict, gpu_name

from .conftest import Ranks


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


def placements(*gpus, version=23203, sharing=False):
    return [
        RankPlacement(rank=rank, host=f"n{rank}", gpu=gpu, version=version, sharing=sharing)
        for rank, gpu in enumerate(gpus)
    ]


def test_ranks_on_one_gpu_are_both_named():
    assert find_conflict(placements("a", "b", "c")) is None
    reason, hint = find_conflict(placements("a", "b", "a"))
    assert "rank 0 (host n0) and rank 2 (host n2) are on one GPU (a)" in reason
    assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in hint
    assert find_conflict(placements("a", "a", sharing=True)) is None
    assert find_conflict(placements("a", "a", sharing=True, version=22907)) is not None  # too old for it


def test_other_versions_of_nccl_are_named():
    mixed = [*placements("a"), *placements("b", "c", version=22907)[1:]]
    reason, _ = find_conflict(mixed)
    assert reason == "rank 0 (host n0) has NCCL 2.32.3, rank 1 (host n1) has NCCL 2.29.7"


def test_a_placement_is_encoded_and_decoded():
    [placement] = placements("a")
    assert RankPlacement.decode(placement.encode()) == placement


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
    assert find_conflict(placements("a", gpu_name("a"))) is None
