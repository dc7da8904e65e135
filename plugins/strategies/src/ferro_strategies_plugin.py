"""What ferro-strategies offers to ferro: its strategies, and a backend made of others.

A module beside the package, not in it: asking what is installed must not import the layers and
optimizers that the package's own first line re-exports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferro import backends
from ferro.backend import Backend
from ferro.backend_config import BackendConfig
from ferro.environment import resolve
from ferro.errors import BackendUnavailable, FerroError
from ferro.hookspecs import BackendInfo, Strategy, StrategyInfo, hookimpl
from ferro.types import Availability, Device


def cpu_backend(launcher: str) -> str:
    """Return the name of the backend that `ferro.init()` takes under a launcher.

    Raises:
        BackendUnavailable: there is none, or it cannot be used here.
    """
    name = backends.default(launcher)
    if name is None:
        raise BackendUnavailable(
            "hybrid",
            "no installed backend is the default for CPU arrays",
            "Install one, or name it.",
        )
    found = backends.probe(backends.get(name))
    if not found.ok:
        raise BackendUnavailable(name, found.reason, found.hint)
    return name


def gpu_backend() -> str:
    """Return the name of the one backend for arrays on a GPU that can be used here.

    Raises:
        BackendUnavailable: there is none, or there are several.
    """
    found = {info.name: backends.probe(info) for info in _parts(Device.CUDA)}
    usable = [name for name, availability in found.items() if availability.ok]
    if len(usable) == 1:
        return usable[0]
    if usable:
        raise BackendUnavailable(
            "hybrid",
            f"several backends for arrays on {Device.CUDA} can be used ({', '.join(usable)})",
            f"Name one: ferro.init('cpu:…,cuda:{usable[0]}').",
        )
    why = "; ".join(f"{name}: {availability.reason}" for name, availability in found.items())
    raise BackendUnavailable(
        "hybrid",
        f"no backend for arrays on {Device.CUDA} can be used ({why or 'none is installed'})",
        "Repair that; or say what to use without a GPU: ferro.init('cpu:…').",
    )


def _probe_hybrid() -> Availability:
    """Say what "hybrid" is made of here; it can be used where any backend between processes can."""
    try:
        infos = [info for info in _parts(Device.CPU) if info.default_under]
        usable = [info.name for info in infos if backends.probe(info).ok]
        cpu, cuda = _told(lambda: cpu_backend(_launcher())), _told(gpu_backend)
    except FerroError as error:  # of a broken plugin
        return Availability(ok=False, reason=str(error), hint="repair or uninstall it")
    if not usable:
        return Availability(ok=False, reason=f"cpu: {cpu}", hint="install a backend that can")
    return Availability(ok=True, reason=f"cpu: {cpu}; cuda: {cuda}")


def _create_hybrid(config: BackendConfig) -> Backend:
    from ferro_strategies.hybrid.connect import connect

    return connect(config)


def _parts(device: Device) -> list[BackendInfo]:
    """Return the installed backends for arrays on a device that are made of no others."""
    infos = [backends.get(name) for name in backends.taking(device)]
    return [info for info in infos if not info.composes]


def _told(choose: Callable[[], str]) -> str:
    """Return what is chosen, or why nothing is."""
    try:
        return choose()
    except BackendUnavailable as error:
        return error.reason


def _launcher() -> str:
    """Return what started this process; nothing known where the environment contradicts itself."""
    try:
        return resolve().launcher
    except FerroError:  # for `ferro.init` to tell
        return "single"


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer hybrid, which stands for maps such as "cpu:gloo,cuda:nccl"."""
    return (
        BackendInfo(
            name="hybrid",
            summary="one backend for arrays on each device, one for transfers and barriers",
            probe=_probe_hybrid,
            create=_create_hybrid,
            devices=(Device.CPU, Device.CUDA),
            composes=True,
        ),
    )


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


def _load_sync_batchnorm() -> Strategy:
    from ferro_strategies.sync_batchnorm import convert_sync_batchnorm

    return convert_sync_batchnorm


@hookimpl
def ferro_strategies() -> Sequence[StrategyInfo]:
    """Offer the strategies of this distribution."""
    return (
        StrategyInfo(
            name="ddp",
            summary="every rank has the whole model; gradients are averaged in buckets",
            load=_load_ddp,
        ),
        StrategyInfo(
            name="fsdp",
            summary="every rank has a piece of the model, whole only where it is computed",
            load=_load_fsdp,
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
            name="sync_batchnorm",
            summary="BatchNorm layers take their statistics over the batches of all ranks",
            load=_load_sync_batchnorm,
        ),
    )
