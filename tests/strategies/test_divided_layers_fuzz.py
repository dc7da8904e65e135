"""Random small transformers under tensor, context and expert parallel train as they do in one process.

FERRO_FUZZ_RUNS=1000 makes that many models instead of a few.
"""

import os
from functools import partial

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, ContextParallel, DeviceMesh, ExpertParallel, MoE, nn, optim
from ferro_strategies import tensor_parallel as tp

RUNS = int(os.environ.get("FERRO_FUZZ_RUNS", "12"))
F64 = np.float64


class Draw:
    """The random choices of one run."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.kind = ("tensor", "context", "expert")[seed % 3]
        self.replicas, self.ranks = [(1, 1), (1, 2), (1, 3), (2, 2), (1, 4)][rng.integers(5)]
        self.words = int(rng.integers(4, 9))
        self.kv_heads = int(rng.integers(4, 6))
        self.heads = self.kv_heads * int(rng.integers(1, 3))
        self.dim = self.heads * 2
        self.hidden = int(rng.integers(4, 12))
        self.experts, self.top_k = int(rng.integers(4, 7)), int(rng.integers(1, 4))
        self.capacity_factor = [None, 0.7, 1.3][rng.integers(3)] if self.replicas == 1 else None
        self.causal, self.bias, self.tied, self.checkpoint, self.sequence_parallel, self.before = (
            rng.integers(0, 2, 6) > 0
        )
        self.rotary_base = [None, 30.0][rng.integers(2)]
        self.blocks = int(rng.integers(1, 3))
        self.sizes = [int(rng.integers(1, 8)) for _ in range(2)]
        self.microbatches = int(rng.integers(1, 3))
        self.optimizer = [partial(optim.SGD, lr=0.2, momentum=0.9), partial(optim.AdamW, lr=0.01)][rng.integers(2)]

    def build(self):
        rng = np.random.default_rng(1)
        wide = {"dtype": F64, "rng": rng}
        wrap = nn.Checkpoint if self.checkpoint else nn.Sequential
        layers = [nn.Embedding(self.words, self.dim, **wide)]
        for _ in range(self.blocks):
            attention = nn.Attention(
                self.dim,
                self.heads,
                causal=self.causal,
                bias=self.bias,
                num_kv_heads=self.kv_heads,
                rotary_base=self.rotary_base,
                **wide,
            )
            if self.kind == "expert":
                inner = [
                    MoE(self.dim, self.hidden, self.experts, self.top_k, capacity_factor=self.capacity_factor, **wide)
                ]
                inner[0].aux_loss_weight = 0.1 if self.replicas == 1 else 0.0
            else:
                inner = [nn.Linear(self.dim, self.hidden, **wide), nn.GELU(), nn.Linear(self.hidden, self.dim, **wide)]
            layers.append(nn.Residual(wrap(nn.Sequential(nn.LayerNorm(self.dim, dtype=F64), attention))))
            layers.append(nn.Residual(wrap(nn.Sequential(nn.LayerNorm(self.dim, dtype=F64), *inner))))
        layers.append(nn.LayerNorm(self.dim, dtype=F64))
        layers.append(nn.Unembedding(layers[0]) if self.tied else nn.Linear(self.dim, self.words, **wide))
        return nn.Sequential(*layers)

    def plan(self):
        option = {"sequence_parallel": self.sequence_parallel}
        last = f"layers.{2 * self.blocks + 2}"
        head = tp.ParallelUnembedding if self.tied else tp.ColumnParallelLinear
        plan = {
            "layers.0": partial(tp.ParallelEmbedding.from_serial, **option),
            "layers.?.module.layers.1": lambda layer, group: (
                tp.ParallelAttention if isinstance(layer, nn.Attention) else tp.ColumnParallelLinear
            ).from_serial(layer, group, **option),
            "layers.?.module.layers.3": partial(tp.RowParallelLinear.from_serial, **option),
            last: partial(head.from_serial, **option),
        }
        if self.sequence_parallel:
            norms = ["layers.?.module.layers.0", f"layers.{2 * self.blocks + 1}"]
            plan |= dict.fromkeys(norms, tp.SequenceParallelLayerNorm.from_serial)
        if not self.checkpoint:  # Sequential(Sequential(...)) has one more level of names than Checkpoint
            plan = {name.replace("module.layers", "module.layers.0.layers"): convert for name, convert in plan.items()}
        return plan

    def train(self, model, optimizer, take, loss_of):
        for step, length in enumerate(self.sizes):
            rows = 4 * self.replicas * (self.ranks if self.kind == "expert" else 1)
            rng = np.random.default_rng(step)
            words, following = rng.integers(0, self.words, (2, rows, length))
            for part in np.split(np.arange(rows), self.microbatches):
                given = take(part)
                scores, pullback = model.vjp(words[given])
                _, grad = loss_of(scores, following[given])
                pullback(grad / self.microbatches)
            optimizer.step()
            optimizer.zero_grad()

    def parallel(self, group):
        mesh = DeviceMesh((self.replicas, self.ranks), ("dp", "own"), group)
        model = self.build()
        optimizer = self.optimizer(model.parameters())
        own, loss_of = mesh["own"], nn.cross_entropy
        if self.kind == "tensor":
            model = tp.parallelize(model, own, self.plan())
            loss_of = partial(tp.vocab_parallel_cross_entropy, group=own)
        elif self.kind == "context":
            model = ContextParallel(model, own, zigzag=self.sequence_parallel)
        else:
            model = ExpertParallel(model, own)
        if self.replicas > 1:
            model = DDP(model, mesh["dp"])
        if not self.before:
            optimizer = self.optimizer(model.parameters())
        shares, mine = self.replicas, mesh["dp"].rank
        if self.kind == "expert":
            shares, mine = self.replicas * self.ranks, group.rank
        self.train(model, optimizer, lambda rows: np.array_split(rows, shares)[mine], loss_of)
        return tp.full_state_dict(model)


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_random_transformer_trains_as_in_one_process(seed):
    draw = Draw(seed)
    serial = draw.build()
    draw.train(serial, draw.optimizer(serial.parameters()), lambda rows: rows, nn.cross_entropy)
    expected = serial.state_dict()
    for state in ferro.simulate(draw.parallel, draw.replicas * draw.ranks, timeout_s=30.0):
        assert list(state) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(state[name], value, rtol=1e-7, atol=1e-8, err_msg=f"{name}, {vars(draw)}")
