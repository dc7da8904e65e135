"""Module.summary: every parameter, its piece on this rank, and sizes, under each strategy."""

import numpy as np

import ferro
from ferro_strategies import DDP, FSDP, DeviceMesh, Pipeline, deferred, nn, tensor_parallel


def test_a_plain_model():
    model = nn.Sequential(nn.Linear(3, 4, rng=0), nn.BatchNorm(4))
    model[0].bias.requires_grad = False
    y, pull = model.vjp(np.ones((2, 3), np.float32))
    pull(y)
    lines = model.summary().splitlines()
    assert lines[0].split() == ["name", "layer", "shape", "dtype", "on", "this", "rank", "bytes"]
    assert lines[2].split() == ["layers.0.weight", "Linear", "(3,", "4)", "float32", "whole", "48"]
    assert lines[3].split() == ["layers.0.bias", "Linear", "(4,)", "float32", "whole,", "frozen", "16"]
    assert lines[-4].split() == ["layers.1.num_batches_tracked", "BatchNorm", "()", "int64", "whole,", "buffer", "8"]
    assert lines[-2] == "24 elements in parameters, 20 of them trained; the whole takes 136 B"
    assert lines[-1] == "on this rank: 136 B of parameters and buffers, 80 B of gradients that exist"
    with deferred():
        large = nn.Linear(1024, 512)
    assert "deferred" in large.summary()
    assert "the whole takes 2.0 MiB" in large.summary()
    assert "on this rank: 2.0 KiB" in large.summary()


def test_pieces_are_told_with_their_groups():
    def work(group):
        mesh = DeviceMesh((2, 2), ("dp", "tp"), group)
        layer = tensor_parallel.ColumnParallelLinear.from_serial(nn.Linear(6, 4, bias=False, rng=0), mesh["tp"])
        model = nn.Sequential(FSDP(nn.Sequential(layer), mesh["dp"]), DDP(nn.Linear(4, 2, rng=0), mesh["dp"]))
        pipe = Pipeline([FSDP(nn.Linear(2, 2, rng=0), mesh["dp"])], mesh["tp"], microbatches=1)
        return model.summary(), pipe.summary(), (mesh["dp"].rank, mesh["tp"].rank)

    for text, staged, (dp, tp) in ferro.simulate(work, 4, timeout_s=20):
        row = text.splitlines()[2]
        assert row.startswith("layers.0.layers.0.weight  ColumnParallelLinear  (6, 4)")
        assert f"(6,): {tp + 1} of 2 along dim 1 over " in row
        assert f", then {dp + 1} of 2 of a flat row over " in row
        assert row.endswith(" 24")
        assert "on this rank: 64 B" in text
        assert f"{tp}.weight" in staged
