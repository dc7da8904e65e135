"""mean: average a bucket exactly, as DDP does without a hook; for hooks of your own."""

from __future__ import annotations

from ferro import ProcessGroup

from ..ddp.bucket import GradBucket, Pending


def mean(bucket: GradBucket, group: ProcessGroup) -> Pending:
    """Average the gradients in their own dtype, in place."""
    work: Pending = group.all_reduce(bucket.buffer, "mean", out=bucket.buffer, async_op=True)
    return work
