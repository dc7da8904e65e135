"""Tensor-parallel layers refuse wrong arguments and inputs on every rank."""

import numpy as np
import pytest

import ferro
from ferro_strategies import nn
from ferro_strategies import tensor_parallel as tp

from .models import simulate


def tied_model():
    model = nn.Sequential(nn.Linear(3, 3, rng=0), nn.Linear(3, 3, rng=0))
    model.layers[1].weight = model.layers[0].weight
    return model


def tied_attention():
    attention, linear = nn.Attention(4, 2, rng=0), nn.Linear(4, 4, rng=1)
    linear.weight = attention.query.weight
    return nn.Sequential(attention, linear)


COLUMN = tp.ColumnParallelLinear
REFUSED = {
    "too few columns": (
        lambda group: COLUMN(4, 1, group, rng=0),
        r"1 out_features cannot be cut into \(1, 0\).*at least one",
    ),
    "too few rows": (
        lambda group: tp.RowParallelLinear(1, 4, group, rng=0),
        r"1 in_features cannot be cut into \(1, 0\)",
    ),
    "sizes": (
        lambda group: COLUMN.from_serial(nn.Linear(4, 4, rng=0), group, sizes=[3, 2]),
        r"4 out_features cannot be cut into \(3, 2\)",
    ),
    "too few heads": (
        lambda group: tp.ParallelAttention(4, 1, group, rng=0),
        r"1 num_heads cannot be cut into \(1, 0\)",
    ),
    "too few words": (
        lambda group: tp.ParallelEmbedding(1, 4, group, rng=0),
        r"1 num_embeddings cannot be cut into \(1, 0\)",
    ),
    "seeds": (
        lambda group: COLUMN(4, 4, group, rng=group.rank),
        "values of weight .give all ranks one rng seed.*rank 1 has",
    ),
    "options": (
        lambda group: COLUMN(4, 4, group, rng=0, sequence_parallel=group.rank == 0),
        "rank 0 has the option sequence_parallel=True, rank 1 has the option sequence_parallel=F",
    ),
    "another layer": (
        lambda group: tp.ParallelAttention.from_serial(nn.Linear(4, 4, rng=0), group),
        r"ParallelAttention is made of Attention, not of Linear\(4, 4",
    ),
    "in pieces already": (
        lambda group: tp.ParallelAttention.from_serial(
            tp.parallelize(nn.Attention(4, 2, rng=0), group, {"query": COLUMN.from_serial}), group
        ),
        r"parameter 'query.weight' of Attention.* is in pieces already",
    ),
    "gathered and sequence parallel": (
        lambda group: COLUMN(4, 4, group, gather_output=True, sequence_parallel=True),
        "gather_output makes whole sequences",
    ),
    "whole inputs and sequence parallel": (
        lambda group: tp.RowParallelLinear(4, 4, group, input_is_parallel=False, sequence_parallel=True),
        "sequence_parallel needs input_is_parallel",
    ),
    "dtype": (lambda group: COLUMN(4, 4, group, rng=0)(np.ones((2, 4))), "expected input of dtype float32"),
    "column shape": (
        lambda group: COLUMN(4, 4, group, rng=0, sequence_parallel=True)(np.ones((2, 4), "f")),
        r"expected input of shape \(B, t, 4\), got \(2, 4\)",
    ),
    "row shape": (
        lambda group: tp.RowParallelLinear(4, 4, group, rng=0)(np.ones((2, 4), "f")),
        r"expected input of shape \(..., 2\), got \(2, 4\)",
    ),
    "row sequences": (
        lambda group: tp.RowParallelLinear(4, 4, group, rng=0, sequence_parallel=True)(np.ones((3, 2), "f")),
        r"expected input of shape \(B, T, 2\), got \(3, 2\)",
    ),
    "attention shape": (
        lambda group: tp.ParallelAttention(4, 2, group, rng=0)(np.ones((2, 0, 4), "f")),
        r"expected input of shape \(B, T >= 1 over all ranks, 4\), got \(2, 0, 4\)",
    ),
    "norm shape": (
        lambda group: tp.SequenceParallelLayerNorm(4, group)(np.ones((2, 3), "f")),
        r"expected input of shape \(..., 4\), got \(2, 3\)",
    ),
    "unembedding shape": (
        lambda group: tp.ParallelUnembedding(tp.ParallelEmbedding(5, 4, group, rng=0))(np.ones((2, 3), "f")),
        r"ParallelUnembedding.* expected input of shape \(\.\.\., 4\), got \(2, 3\)",
    ),
    "region shape": (
        lambda group: tp.SplitIn(group)(np.ones(3)),
        r"expected input of shape of at least 2 dimensions, got \(3,\)",
    ),
    "indices": (
        lambda group: tp.ParallelEmbedding(5, 4, group, rng=0)(np.array([1, 5])),
        "expected indices from 0 to 4, got 1 to 5",
    ),
    "no indices": (
        lambda group: tp.ParallelEmbedding(5, 4, group, rng=0)(np.ones(2)),
        "expected integer indices, got float64",
    ),
    "label": (
        lambda group: tp.vocab_parallel_cross_entropy(np.ones((1, 2)), np.array([4]), group),
        "labels must be from 0 to 3, got 4 to 4",
    ),
    "labels' dtype": (
        lambda group: tp.vocab_parallel_cross_entropy(np.ones((1, 2)), np.ones(1), group),
        "labels must be integers, got float64",
    ),
    "labels' shape": (
        lambda group: tp.vocab_parallel_cross_entropy(np.ones((1, 2)), np.array([1, 0]), group),
        r"need labels of shape \(1,\), got \(2,\)",
    ),
    "no classes": (
        lambda group: tp.vocab_parallel_cross_entropy(np.ones((1, 1 - group.rank)), np.array([0]), group),
        r"have \(1, 0\) classes; each needs at least one",
    ),
    "plan": (
        lambda group: tp.parallelize(
            nn.Sequential(nn.Linear(2, 2)), group, {"layers.*": COLUMN.from_serial, "head": COLUMN}
        ),
        r"no module is called like \['head'\]. There are: layers.0",
    ),
    "plan among many": (
        lambda group: tp.parallelize(
            nn.Sequential(*[nn.ReLU() for _ in range(50)]), group, {"head": COLUMN.from_serial}
        ),
        r"There are: layers.0, layers.1, layers.2, layers.3, and 46 more\.",
    ),
    "tied": (
        lambda group: tp.parallelize(tied_model(), group, {"layers.1": COLUMN.from_serial}),
        "'layers.1' and 'layers.0' share parameter 'weight'.*ParallelUnembedding",
    ),
    "tied and sharded differently": (
        lambda group: tp.parallelize(
            tied_model(), group, {"layers.0": COLUMN.from_serial, "layers.1": tp.RowParallelLinear.from_serial}
        ),
        "'layers.1' shares parameter 'weight' with another layer.*do not cut it alike",
    ),
    "tied below": (
        lambda group: tp.parallelize(
            tied_attention(), group, {"layers.0": tp.ParallelAttention.from_serial, "layers.1": COLUMN.from_serial}
        ),
        "'layers.1' and 'layers.0.query' share parameter 'weight'",
    ),
}


@pytest.mark.parametrize(("attempt", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_on_every_rank(attempt, message):
    def run(group):
        with pytest.raises(ferro.UsageError, match=message):
            attempt(group)

    simulate(run, 2)
