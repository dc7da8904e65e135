"""What ferro-hybrid offers to ferro: a backend made of others."""

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
    backends,
    hookimpl,
)
from ferro.runtime.environment import resolve

from .defaults import cpu_backend, gpu_backend, installed_parts


def _probe_hybrid() -> Availability:
    """Say what "hybrid" is made of here; it can be used where any backend between processes can."""
    try:
        infos = [info for info in installed_parts(Device.CPU) if info.default_under]
        usable = [info.name for info in infos if backends.probe(info).ok]
        cpu, cuda = _told(lambda: cpu_backend(_launcher())), _told(gpu_backend)
    except FerroError as error:  # of a broken plugin
        return Availability(ok=False, reason=str(error), hint="repair or uninstall it")
    if not usable:
        return Availability(ok=False, reason=f"cpu: {cpu}", hint="install a backend that can")
    return Availability(ok=True, reason=f"cpu: {cpu}; cuda: {cuda}")


def _create_hybrid(config: BackendConfig) -> Backend:
    from ferro_hybrid.connect import connect

    return connect(config)


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
