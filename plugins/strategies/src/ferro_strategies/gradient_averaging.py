"""average_gradients: average each parameter's gradient over a group when it is complete."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from ferro import ProcessGroup, UsageError

from .nn.checks import first_few
from .nn.parameter import Parameter


def average_gradients(parameters: Sequence[tuple[str, Parameter]], group: ProcessGroup, strategy: str) -> None:
    """Average the gradients of these parameters over the ranks, inside the addition that completes each of them.

    A gradient to which several passes add is averaged several times. This is right, because the part that was averaged
    before is the same on all ranks, and so is its own average. Strategies that wrap the model afterwards, over another
    axis of the mesh, get gradients that are averaged over this group already.

    An optimizer refuses to step while a gradient is incomplete, and so that of this rank alone.

    Args:
        parameters: qualified names and parameters, whole on every rank; the same ones on all ranks.
        group: the ranks; all run the same passes.
        strategy: its name, for messages.
    """
    if group.world_size == 1:
        return
    known = [(name, weakref.ref(parameter)) for name, parameter in parameters]

    def average(parameter: Parameter) -> None:
        grad = parameter.grad
        assert grad is not None, "a complete gradient is there"
        group.all_reduce(grad, "mean", out=grad)

    def check_step(lr: float) -> None:
        found = [(name, ref()) for name, ref in known] if lr != 0 else []
        incomplete = [
            repr(name) for name, item in found if item is not None and item.grad is not None and item.outstanding_uses
        ]
        if incomplete:
            raise UsageError(
                f"{strategy}: the optimizer is about to step with gradients of this rank alone, of "
                f"{', '.join(first_few(incomplete))}: a pullback made earlier has not been run, so they count as "
                "incomplete. Run every pullback or drop it (`del pullback`) before the last one goes backward; "
                "evaluate with model(x), which keeps none. Nothing was updated."
            )

    for _, parameter in parameters:
        parameter.on_complete(average)
        parameter.step_guards[strategy] = check_step
