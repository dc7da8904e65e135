"""A hybrid backend of gloo and NCCL on a real GPU that two ranks share."""

from __future__ import annotations

import numpy as np
import pytest

import ferro
from ferro_testing import run_ranks

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _with_a_gpu():
    pytest.importorskip("cupy")
    found = ferro.backends.available().get("nccl")
    if found is None or not found.ok:
        pytest.skip("NCCL cannot be used here: " + ("not offered" if found is None else found.reason))


def reduce_on_both(group):
    import cupy

    n, me = group.world_size, group.rank
    on_gpu = cupy.full(1000, me + 1.0, cupy.float32)
    on_cpu = np.full(1000, me + 1.0, np.float32)
    found = []
    for _ in range(5):
        totals = group.all_reduce(on_gpu, async_op=True), group.all_reduce(on_cpu, async_op=True)
        gpu_total, cpu_total = (work.wait() for work in totals)
        found.append(isinstance(gpu_total, cupy.ndarray) and isinstance(cpu_total, np.ndarray))
        found.append(float(gpu_total[-1]) == float(cpu_total[-1]) == n * (n + 1) / 2)
        group.barrier()
    buffer = cupy.empty_like(on_gpu)
    group.sendrecv(on_gpu, buffer, (me + 1) % n, (me - 1) % n)
    found.append(float(buffer[0]) == (me - 1) % n + 1.0)
    names = [type(part).__name__ for part in group.backend.collectives.values()]
    return [all(found), names, type(group.backend.p2p).__name__]


@pytest.mark.parametrize("requested", ["hybrid", "cpu:gloo,cuda:nccl"])
def test_arrays_on_a_gpu_go_to_nccl_and_others_to_gloo(requested):
    found = run_ranks(reduce_on_both, 2, backend=requested, env={"NCCL_MULTI_RANK_GPU_ENABLE": "1"})
    for right, (cpu, cuda), p2p in found:
        assert right
        assert (cpu, p2p) == ("GlooBackend", "GlooBackend")
        assert "Nccl" in cuda
