"""Defaults: the installed backends that a hybrid one is made of where its user names none."""

from __future__ import annotations

from ferro import BackendUnavailable, Device, backends
from ferro.hookspecs import BackendInfo


def cpu_backend(launcher: str) -> str:
    """Return the name of the backend that `ferro.init()` takes under a launcher.

    Raises:
        BackendUnavailable: there is none, or it cannot be used here.
    """
    name = backends.default(launcher)
    if name is None:
        raise BackendUnavailable(
            "hybrid", "no installed backend is the default for CPU arrays", "Install one, or name it."
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
    found = {info.name: backends.probe(info) for info in installed_parts(Device.CUDA)}
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


def installed_parts(device: Device) -> list[BackendInfo]:
    """Return the installed backends for arrays on a device that are made of no others."""
    infos = [backends.get(name) for name in backends.supporting(device)]
    return [info for info in infos if not info.composes]
