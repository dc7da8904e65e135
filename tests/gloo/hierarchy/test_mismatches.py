"""Ranks on several hosts that make different calls: each learns of it at once, in the same words."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest

import ferro
from ferro.collectives import Choice, get
from ferro_gloo.backend import GlooBackend

LAYOUTS = {"one host": [0, 0, 0, 0], "two hosts": [0, 0, 1, 1], "uneven": [0, 0, 1, 1, 1], "three hosts": [0, 1, 1, 2]}
ROOTED = ("broadcast", "reduce", "gather")
OPS = (*ROOTED, "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "barrier")
DTYPES = ("float64", "float32", "int32", "float16")


def random_call(rng, ranks):
    size = rng.choice([1, 1000, 70_000]) * ranks
    return rng.choice(OPS), rng.choice(DTYPES), size, rng.choice(["sum", "max"]), rng.randrange(ranks)


def make(group, call):
    op, dtype, size, reduction, root = call
    x = np.ones(size, dtype)
    if op == "barrier":
        group.barrier()
    elif op == "reduce":
        group.reduce(x, root, reduction)
    elif op in ROOTED:
        getattr(group, op)(x, root)
    elif "reduce" in op:
        getattr(group, op)(x, reduction)
    else:
        getattr(group, op)(x)


def differing_calls(seed, ranks):
    """Choose two calls that differ in what counts, and the ranks that make the second."""
    rng = random.Random(seed)
    one = other = random_call(rng, ranks)
    changed = rng.choice([(0,), (1,), (2,), (0, 2), (0, 1, 2, 3, 4)])
    if one[0] in ROOTED and rng.random() < 0.3:
        changed = (4,)
    while one == other or (one[0] == other[0] == "barrier"):
        drawn = random_call(rng, ranks)
        other = tuple(drawn[i] if i in changed else one[i] for i in range(5))
        if one[0] == "barrier":
            one = random_call(rng, ranks)
    return one, other, rng.sample(range(ranks), rng.choice([1, 1, ranks // 2]))


def errors(group, seeds):
    found = []
    for seed in seeds:
        one, other, odd = differing_calls(seed, group.world_size)
        part = group.split(0)
        group.barrier()
        began = time.monotonic()
        try:
            make(part, other if group.rank in odd else one)
            found.append(f"seed {seed}: no error")
        except ferro.FerroError as error:
            found.append(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.monotonic() - began < 15, f"noticed by the deadline: {found[-1]}"
        group.barrier()
    return found


@pytest.mark.parametrize(("layout", "algorithm"), [*((name, "") for name in LAYOUTS), ("two hosts", "star")])
def test_every_rank_learns_of_a_mismatch(start_ranks, layout, algorithm):
    hosts = LAYOUTS[layout]
    fixed = {"all_reduce": get("all_reduce", algorithm)} if algorithm else {}

    def connect(config):
        return GlooBackend.connect(replace(config, host_id=f"host {hosts[config.rank]}", choice=Choice(fixed=fixed)))

    ranks = start_ranks(len(hosts), connect=connect, timeout_s=20.0)
    ranks.start(lambda group: errors(group, range(20)))
    results = ranks.join()
    assert not ranks.errors, ranks.errors
    for seed, texts in enumerate(zip(*results.values(), strict=True)):
        assert len(set(texts)) == 1, texts
        assert texts[0].startswith(f"seed {seed}: CollectiveMismatch"), differing_calls(seed, len(hosts))
