"""The hook implementation of ferro-hybrid: it offers the backend "hybrid"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferro import (
    Availability,
    Backend,
    BackendConfig,
    BackendInfo,
    BackendUnavailable,
    Device,
    FerroError,
    PluginError,
    backends,
    hookimpl,
)
from ferro.runtime.environment import resolve

from .composition import default_cpu_backend, default_gpu_backend, possible_parts


def _probe() -> Availability:
    """Name the parts that "hybrid" has here; it can be used if any backend for CPU arrays can."""
    try:
        infos = [info for info in possible_parts(Device.CPU) if info.default_under]
        usable = [info.name for info in infos if backends.probe(info).ok]
        cpu, cuda = _name_or_reason(lambda: default_cpu_backend(_launcher())), _name_or_reason(default_gpu_backend)
    except FerroError as error:  # two plugins claim one name
        return Availability(ok=False, reason=str(error), hint="Uninstall one of them.")
    if not usable:
        return Availability(ok=False, reason=f"cpu: {cpu}", hint="install a backend that can")
    return Availability(ok=True, reason=f"cpu: {cpu}; cuda: {cuda}")


def _name_or_reason(choose: Callable[[], str]) -> str:
    try:
        return choose()
    except BackendUnavailable as error:
        return error.reason
    except PluginError:  # of another plugin, which has a row of its own
        return "no default beside a broken plugin, name one"


def _launcher() -> str:
    try:
        return resolve().launcher
    except FerroError:  # `ferro.init` raises it
        return "single"


def _create(config: BackendConfig) -> Backend:
    from ferro_hybrid.connect import connect

    return connect(config)


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer hybrid, which also serves maps such as "cpu:gloo,cuda:nccl"."""
    return (
        BackendInfo(
            name="hybrid",
            summary="one backend for arrays on each device, one for transfers and barriers",
            probe=_probe,
            create=_create,
            devices=(Device.CPU, Device.CUDA),
            composes=True,
        ),
    )
