"""Checks of a parallel strategy: it trains as one process does, whatever the shares of the ranks, and nobody hangs.

    CASE = StrategyCase(train=train, batches=batches)

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_strategy(check):
        check(CASE)

Ranks are threads (`ferro.simulate`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ferro import CollectiveTimeout, FerroError, ProcessGroup, simulate
from ferro.types import Array
from ferro_testing.parity import assert_same_parameters

__all__ = ["CHECKS", "InjectedFailure", "StrategyCase", "check_failure", "check_parity", "check_uneven_batches"]

# One rank's share of a batch: the arrays, and the weight of its gradient in the average over ranks, which is 1 where
# all ranks have equally many samples.
Share: TypeAlias = tuple[tuple[Array, ...], float]
Train: TypeAlias = Callable[[ProcessGroup | None, Iterator[Share]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyCase:
    """How a strategy is checked.

    Attributes:
        train: (group, shares) -> the whole parameters by name, the same names as in one process. It makes the model
            with the same numbers at every call, by the strategy over `group`, or without a strategy where `group` is
            None; trains it on one share after the other, the gradient of each loss multiplied by the share's weight;
            and returns copies of what was trained, gathered where the strategy cuts it.
        batches: of one process: tuples of arrays whose axis 0 are the samples; at least three, each with at least
            twice as many samples as the largest world has ranks, and a multiple of every world size.
        world_sizes: the numbers of ranks to try.
        rtol: allowed difference, relative to a parameter's largest value; the default suits float64.
        timeout_s: deadline of each run.
    """

    train: Train
    batches: Sequence[tuple[Array, ...]]
    world_sizes: Sequence[int] = (1, 2, 3)
    rtol: float = 1e-10
    timeout_s: float = 60.0


class InjectedFailure(Exception):
    """The failure of one rank that `check_failure` injects."""


def check_parity(case: StrategyCase) -> None:
    """On 1, 2 and 3 ranks with equal shares every parameter is what one process gets, on every rank."""
    reference = _alone(case)
    for ranks in case.world_sizes:
        _require_uneven_shapes(reference, ranks)
        _compare(case, reference, ranks, [len(case.batches[0][0]) // ranks] * ranks)


def check_uneven_batches(case: StrategyCase) -> None:
    """Ranks with different numbers of samples, weighted accordingly, train as one process does."""
    reference = _alone(case)
    for ranks in case.world_sizes:
        total = len(case.batches[0][0])
        ends = [total * (rank + 1) * (rank + 2) // (ranks * (ranks + 1)) for rank in range(ranks)]
        _compare(case, reference, ranks, np.diff([0, *ends]).tolist())


def check_failure(case: StrategyCase) -> None:
    """Where one rank fails between two batches, every rank gets an error, and nobody waits for ever."""
    for ranks in (size for size in case.world_sizes if size > 1):
        for failing in (0, ranks - 1):
            errors = _errors_where_one_fails(case, ranks, failing)
            what = f"rank {failing} of {ranks} failed between two batches"
            assert isinstance(errors.get(failing), InjectedFailure), f"{what}, and raised {errors.get(failing)!r}"
            for rank in range(ranks):
                assert rank in errors, f"{what}, and rank {rank} has not ended"
                error = errors[rank]
                late = isinstance(error, CollectiveTimeout)
                assert error is not None, f"{what}, and rank {rank} trained on as if nothing had happened"
                assert not late, f"{what}, and rank {rank} waited for it until its deadline: {error}"
                assert rank == failing or isinstance(error, FerroError), f"{what}, and rank {rank} raised {error!r}"


CHECKS: tuple[Callable[[StrategyCase], None], ...] = (check_parity, check_uneven_batches, check_failure)


def _alone(case: StrategyCase) -> Mapping[str, Array]:
    """Train in one process; make sure that training changes every parameter."""
    before = case.train(None, iter(()))
    reference = case.train(None, iter([(batch, 1.0) for batch in case.batches]))
    same = [name for name in reference if np.array_equal(before[name], reference[name])]
    assert reference, "train() returned no parameter"
    assert not same, f"one process does not train {', '.join(same)}: nothing can be compared"
    return reference


def _require_uneven_shapes(reference: Mapping[str, Array], ranks: int) -> None:
    uneven = any(array.size % ranks for array in reference.values())
    assert ranks == 1 or uneven, (
        f"every parameter's size is a multiple of {ranks}: take a layer of another size, "
        "for strategies that cut parameters fail first where that leaves a remainder"
    )


def _compare(case: StrategyCase, reference: Mapping[str, Array], ranks: int, sizes: Sequence[int]) -> None:
    def on_rank(group: ProcessGroup) -> Mapping[str, Array]:
        return case.train(group, iter(_shares(case, sizes, group.rank)))

    try:
        found = simulate(on_rank, ranks, timeout_s=case.timeout_s, run_timeout_s=2 * case.timeout_s)
        assert_same_parameters(reference, [it for it in found if it is not None], rtol=case.rtol)
    except (AssertionError, FerroError) as error:
        error.add_note(f"(with {ranks} ranks, which had {', '.join(map(str, sizes))} samples of each batch)")
        raise


def _shares(case: StrategyCase, sizes: Sequence[int], rank: int) -> list[Share]:
    begin, total = sum(sizes[:rank]), sum(sizes)
    weight = sizes[rank] * len(sizes) / total
    return [(tuple(array[begin : begin + sizes[rank]] for array in batch), weight) for batch in case.batches]


def _errors_where_one_fails(case: StrategyCase, ranks: int, failing: int) -> dict[int, BaseException | None]:
    """Train while one rank fails; return the error of each rank that ended, None where it had none."""
    errors: dict[int, BaseException | None] = {}
    sizes = [len(case.batches[0][0]) // ranks] * ranks

    def shares(rank: int) -> Iterator[Share]:
        for number, share in enumerate(_shares(case, sizes, rank)):
            if number == 1 and rank == failing:
                raise InjectedFailure(f"rank {rank}, before its second batch")
            yield share

    def on_rank(group: ProcessGroup) -> None:
        try:
            case.train(group, shares(group.rank))
            errors[group.rank] = None
        except BaseException as error:
            errors[group.rank] = error
            raise

    with contextlib.suppress(Exception):  # each rank's own error is judged
        simulate(on_rank, ranks, timeout_s=case.timeout_s, run_timeout_s=2 * case.timeout_s)
    return errors
