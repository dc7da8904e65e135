"""average_gradients: average each parameter's gradient over a group when it is complete."""

from __future__ import annotations

from collections.abc import Iterable

from ferro import ProcessGroup

from .nn.parameter import Parameter


def average_gradients(parameters: Iterable[Parameter], group: ProcessGroup) -> None:
    """Average the gradients of these parameters over the ranks, inside the addition that completes each of them.

    A gradient to which several passes add is averaged several times. This is right, because the part that was averaged
    before is the same on all ranks, and so is its own average. Strategies that wrap the model afterwards, over another
    axis of the mesh, get gradients that are averaged over this group already.

    Args:
        parameters: whole on every rank; the same ones, in the same order, on all ranks.
        group: the ranks; all run the same passes.
    """
    if group.world_size == 1:
        return

    def average(parameter: Parameter) -> None:
        grad = parameter.grad
        assert grad is not None, "a complete gradient is there"
        group.all_reduce(grad, "mean", out=grad)

    for parameter in parameters:
        parameter.on_complete(average)
