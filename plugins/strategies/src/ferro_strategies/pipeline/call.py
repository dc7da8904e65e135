"""Call: what all ranks are to do together, as their messages say it to each other."""

from __future__ import annotations

from dataclasses import dataclass

STEP = "Pipeline.step"
FORWARD = "Pipeline.forward"
OPS = (STEP, FORWARD)


@dataclass(frozen=True, slots=True)
class Call:
    """One pass through the pipeline.

    Attributes:
        op: what the user called, one of OPS.
        microbatches: into how many parts the batch is cut.
    """

    op: str
    microbatches: int

    def __str__(self) -> str:
        return f"{self.op} with microbatches={self.microbatches}"
