"""Hook implementations that offer the strategies of this distribution and the command `ferro show`.

This module lies beside the package, because importing the package would import all layers and optimizers, which listing
the installed plugins must not do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferro import strategies
from ferro.errors import PluginError, UsageError
from ferro.hookspecs import CommandInfo, Strategy, StrategyInfo, hookimpl


def _load_ddp() -> Strategy:
    from ferro_strategies.ddp import DDP

    return DDP


def _load_fsdp() -> Strategy:
    from ferro_strategies.fsdp import FSDP

    return FSDP


def _load_pipeline() -> Strategy:
    from ferro_strategies.pipeline import Pipeline

    return Pipeline


def _show_pipeline(arguments: Sequence[str]) -> int:
    from ferro_strategies.pipeline.drawing.show import show

    return show(arguments)


def _load_tensor_parallel() -> Strategy:
    from ferro_strategies.tensor_parallel import parallelize

    return parallelize


def _load_context_parallel() -> Strategy:
    from ferro_strategies.context_parallel import ContextParallel

    return ContextParallel


def _load_expert_parallel() -> Strategy:
    from ferro_strategies.expert_parallel import ExpertParallel

    return ExpertParallel


def _load_sync_batchnorm() -> Strategy:
    from ferro_strategies.sync_batchnorm import convert_sync_batchnorm

    return convert_sync_batchnorm


@hookimpl
def ferro_strategies() -> Sequence[StrategyInfo]:
    """Offer the strategies of this distribution."""
    return (
        StrategyInfo(
            name="ddp", summary="every rank has the whole model; gradients are averaged in buckets", load=_load_ddp
        ),
        StrategyInfo(
            name="fsdp", summary="every rank has a piece of the model, whole only where it is computed", load=_load_fsdp
        ),
        StrategyInfo(
            name="pipeline",
            summary="every rank has some of the layers; batches pass through in microbatches",
            load=_load_pipeline,
            show=_show_pipeline,
        ),
        StrategyInfo(
            name="tensor_parallel",
            summary="every rank has a piece of each matrix (plan=: which layers, and how)",
            load=_load_tensor_parallel,
        ),
        StrategyInfo(
            name="context_parallel",
            summary="every rank has some positions of each sequence; keys and values travel around the ranks",
            load=_load_context_parallel,
        ),
        StrategyInfo(
            name="expert_parallel",
            summary="every rank has its own batch and some experts of each MoE; tokens travel to their experts",
            load=_load_expert_parallel,
        ),
        StrategyInfo(
            name="sync_batchnorm",
            summary="BatchNorm layers take their statistics over the batches of all ranks",
            load=_load_sync_batchnorm,
        ),
    )


_SHOW_HELP = """\
usage: ferro show NAME ...

Draw what a strategy would do, before anything runs; `ferro show NAME --help` tells the rest. The testing kit draws
collectives: `ferro show collective NAME`."""


def _show(arguments: Sequence[str]) -> int:
    """Run the drawing command of the strategy in the first argument, or print help; return the exit status.

    Raises:
        UsageError: no strategy is named, it is not installed, or it draws nothing.
    """
    drawing = [name for name in strategies.available() if strategies.info(name).show is not None]
    there_is = f"There is: {', '.join(drawing) or 'nothing'}"
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{_SHOW_HELP}\n{there_is}.")  # noqa: T201 - a command prints
        return 0
    question = f"what is to be shown? {there_is}"
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"{question}; say `ferro show NAME --help`")
    try:
        show = strategies.info(arguments[0]).show
    except PluginError as error:
        raise UsageError(f"{error}; {question}") from error
    if show is None:
        raise UsageError(f"{arguments[0]} draws nothing; {question}")
    return show(arguments[1:])


def _load_show() -> Callable[[Sequence[str]], int]:
    return _show


@hookimpl
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer `ferro show`."""
    return (
        CommandInfo(
            name="show", summary="draw what a strategy would do, such as a pipeline's schedule", load=_load_show
        ),
    )
