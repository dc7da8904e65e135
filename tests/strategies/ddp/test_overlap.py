"""DDP reduces buckets while the backward pass computes, and the trace shows it; over gloo."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from ferro_strategies import DDP, nn
from ferro_strategies.ddp import bucket_reductions
from ferro_testing import run_ranks

BATCH, WIDTH, OUTPUTS = 4, 256, 1024
LONG_S = 20.0


class Slow(nn.Module):
    """Identity whose backward pass computes until the gradients of a layer above are averaged."""

    def __init__(self, above: nn.Linear, mean: float) -> None:
        self.elapsed: tuple[float, float] = (0.0, 0.0)
        self._above = above
        self._mean = mean

    def vjp(self, x):
        def pullback(grad_y):
            begin, deadline = time.time(), time.monotonic() + LONG_S
            while not (self._above.weight.grad == self._mean).all():
                assert time.monotonic() < deadline, "nothing was reduced during the backward pass"
            self.elapsed = (begin, time.time())
            return grad_y

        return x, pullback


def step(group):
    """Run one step; return begin and end of the slow layer. All numbers are small integers."""
    bucket_reductions.has_spare_core = lambda group: True  # whatever this machine has
    below, above = nn.Linear(1, WIDTH, bias=False), nn.Linear(WIDTH, OUTPUTS, bias=False)
    for layer in (below, above):
        layer.weight.data[...] = 1
    slow = Slow(above, BATCH * (group.world_size + 1) / 2)
    model = DDP(nn.Sequential(below, slow, above), group, bucket_bytes=1, first_bucket_bytes=1)
    y, pullback = model.vjp(np.ones((BATCH, 1), np.float32))
    pullback(np.full_like(y, group.rank + 1))
    assert (below.weight.grad == OUTPUTS * BATCH * (group.world_size + 1) / 2).all()
    return list(slow.elapsed)


def test_a_bucket_is_reduced_while_the_backward_pass_computes(tmp_path: Path):
    spans = run_ranks(step, 2, backend="gloo", env={"FERRO_TRACE": str(tmp_path)})
    for rank, (begin, end) in enumerate(spans):
        trace = json.loads((tmp_path / f"rank{rank}.json").read_text())["traceEvents"]
        threads = {event["tid"]: event["args"]["name"] for event in trace if event["name"] == "thread_name"}
        *_, first, second = (event for event in trace if event["name"] == "all_reduce")
        assert threads[first["tid"]] == "ferro-world-collectives"
        assert first["args"]["bytes"] == WIDTH * OUTPUTS * 4
        assert first["ts"] < end * 1e6, "it began when the slow layer had ended"
        # The slow layer itself saw the mean arrive; on a busy machine it may have begun after that.
        assert begin <= end
        assert first["ts"] + first["dur"] <= second["ts"]
        assert second["ts"] >= end * 1e6, "its gradient comes after the slow layer"
