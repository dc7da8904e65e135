"""Random generators of ranks, derived from one seed."""

from __future__ import annotations

import operator
import random
import zlib

import numpy as np

from ferro import ProcessGroup, UsageError

from .nn.checks import check_group
from .nn.module import Module

_MOST = 1 << 64


class RankGenerators:
    """Random generators of one rank, derived from the seed that all ranks gave to `seed_all`.

    Generators that have the same name are the same, also in another program: ask for each once, under a name of its
    own. Two that have different names, or belong to different ranks, are independent (NumPy's SeedSequence).
    """

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank

    def shared(self, name: str = "") -> np.random.Generator:
        """Make a generator that draws the same numbers on every rank: for first weights, orders, choices of all."""
        return np.random.default_rng(_sequence(self.seed, "shared", name))

    def own(self, name: str = "") -> np.random.Generator:
        """Make a generator that draws other numbers on every rank: for dropout, noise, augmentation."""
        return np.random.default_rng(_sequence(self.seed, "own", name, self.rank))

    def __repr__(self) -> str:
        return f"RankGenerators(seed {self.seed}, rank {self.rank})"


def seed_all(group: ProcessGroup, seed: int) -> RankGenerators:
    """Seed the global generators of Python and NumPy, and return generators made of the same seed.

    All ranks call it with the same seed. `random` and `np.random` then draw other numbers on every rank. Generators
    that are to agree come from `shared`:

        generators = seed_all(group, 0)
        linear = nn.Linear(8, 8, rng=generators.shared("weights"))
        net = nn.Sequential(linear, nn.Dropout(rng=generators.own("dropout")))

    Raises:
        UsageError: the ranks gave different seeds, or one is no whole number from 0 to 2**64 - 1; raised on all ranks.
    """
    check_group("seed_all", group)
    try:
        number: int | None = operator.index(seed)
    except TypeError:
        number = None
    seeds = group.all_gather_object(number if number is not None and 0 <= number < _MOST else repr(seed))
    wrong = next((rank for rank, found in enumerate(seeds) if isinstance(found, str) or found != seeds[0]), None)
    if wrong is not None:
        other = "" if isinstance(seeds[wrong], str) else f", rank 0 gave {seeds[0]}"
        raise UsageError(
            f"seed_all on group {group.name!r}: rank {wrong} gave the seed {seeds[wrong]}{other}: "
            "give the same whole number from 0 to 2**64 - 1 on every rank.",
            group=group.name,
            rank=group.rank,
            peer=wrong,
        )
    assert number is not None
    words = _sequence(number, "global", "", group.rank).generate_state(5)
    random.seed(int(words[0]))
    np.random.seed(words[1:])
    return RankGenerators(number, group.rank)


def separate_generators(module: Module, group: ProcessGroup) -> None:
    """Let the random generators of equal replicas draw other numbers on each rank, as Dropout should.

    Generators that are in the same state on all ranks, since the ranks built the model from one seed, get states
    derived of it, except on rank 0. Those that differ already, as behind a loaded state, stay as they are. All ranks
    of the group call it, with the same model.
    """
    generators = [generator for _, generator in module.named_generators()]
    if not generators:
        return
    own = [zlib.crc32(repr(generator.bit_generator.state).encode()) for generator in generators]
    everyones = group.all_gather_object(own)
    for index, generator in enumerate(generators):
        states = [states[index] for states in everyones if len(states) == len(own)]
        if group.rank and len(states) == group.world_size and len(set(states)) == 1:
            kind = type(generator.bit_generator)
            entropy = int(generator.bit_generator.random_raw()), int(generator.bit_generator.random_raw())
            derived = kind(np.random.SeedSequence(entropy, spawn_key=(group.rank,)))
            generator.bit_generator.state = derived.state


def _sequence(seed: int, *names: str | int) -> np.random.SeedSequence:
    keys = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
    return np.random.SeedSequence(seed, spawn_key=keys)
