"""Sizes: the three numbers from which a named schedule follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large a pipeline is. Stage s is on rank s % ranks.

    Attributes:
        ranks: how many.
        stages_per_rank: how many stages each rank has.
        microbatches: how many.
    """

    ranks: int
    stages_per_rank: int
    microbatches: int

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return self.ranks * self.stages_per_rank

    def stages_of(self, rank: int) -> range:
        """Return the stages of a rank, first to last."""
        return range(rank, self.stages, self.ranks)
