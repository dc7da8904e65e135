"""Composition: the backends of which a hybrid backend is made, as the user names them, or by default.

ferro.init("hybrid")                        the CPU's default, and the one backend for GPUs that can be used
ferro.init("cpu:gloo,cuda:nccl")            the named ones; transfers use the CPU's
ferro.init("hybrid", backend_options={
    "collectives": {"cpu": "gloo"},         for collectives; or one name, see `routes.supported_devices`
    "p2p": "mpi",                           for transfers and barriers
    "options": {"gloo": {…}},               each backend's own options
})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ferro import BackendConfig, BackendInfo, BackendUnavailable, Device, UsageError, backends

from .routes import device_from_name

_OPTIONS = ("collectives", "p2p", "options")


@dataclass(frozen=True, slots=True)
class Composition:
    """The parts of a hybrid backend, by name.

    Attributes:
        collectives: the part for the collectives on each device; or one name, for the devices that this part supports
            (`routes.supported_devices`).
        p2p: the part for transfers and barriers.
        options: each part's own options, by name.
    """

    collectives: str | Mapping[Device, str]
    p2p: str
    options: Mapping[str, Mapping[str, object]]

    @classmethod
    def from_config(cls, config: BackendConfig) -> Composition:
        """Read the user's backend name and options, and fill in the defaults.

        Raises:
            UsageError: the options make no sense.
            BackendUnavailable: a part is not installed or cannot be used here, or a device has no default.
        """
        given = config.options
        _check_names(given, _OPTIONS, "hybrid has no option")
        collectives = _collectives(config)
        p2p = given.get("p2p")
        if p2p is None:
            mapped = {} if isinstance(collectives, str) else collectives
            p2p = mapped.get(Device.CPU) or default_cpu_backend(config.launcher)
        if not isinstance(p2p, str):
            raise UsageError(f"hybrid's option p2p is the name of a backend, not {p2p!r}")
        composition = cls(collectives, p2p, _own_options(given.get("options", {})))
        composition._check()
        return composition

    @property
    def names(self) -> tuple[str, ...]:
        """Every part once, in the order in which the parts are created."""
        mapped = self.collectives
        others = [mapped] if isinstance(mapped, str) else list(mapped.values())
        return tuple(dict.fromkeys((self.p2p, *others)))

    def __str__(self) -> str:
        mapped = self.collectives
        if not isinstance(mapped, str):
            mapped = ",".join(f"{device}:{name}" for device, name in sorted(mapped.items()))
        return f"collectives {mapped}, p2p {self.p2p}"

    def _check(self) -> None:
        infos = {name: _usable_part(name) for name in self.names}
        _check_names(self.options, self.names, "hybrid's option options is for its own backends:")
        wanted = {} if isinstance(self.collectives, str) else self.collectives
        for device, name in ((Device.CPU, self.p2p), *wanted.items()):
            if device not in infos[name].devices:
                raise UsageError(
                    f"{name} takes arrays on {', '.join(infos[name].devices)}, not on {device}: "
                    f"hybrid cannot use it there ({self})"
                )


def parse_map(text: str) -> dict[Device, str]:
    """Parse a map from devices to backends, such as "cpu:gloo,cuda:nccl".

    Raises:
        UsageError: `text` is no such map, names a device twice, or names an unknown device.
    """
    found: dict[Device, str] = {}
    for item in text.split(","):
        device_name, _, name = item.partition(":")
        if not name or ":" in name:
            raise UsageError(
                f"{text!r} is no map of devices to backends: {item!r} should be DEVICE:BACKEND, "
                "as in 'cpu:gloo,cuda:nccl'"
            )
        device = device_from_name(device_name)
        if device in found:
            raise UsageError(f"{text!r} names device {device} twice: one backend for each")
        found[device] = name
    return found


def _collectives(config: BackendConfig) -> str | dict[Device, str]:
    given = config.options.get("collectives")
    if ":" in config.requested:
        if given is not None:
            raise UsageError(
                f"{config.requested!r} says already what carries out collectives: leave the "
                "option collectives out, or ask for 'hybrid'"
            )
        return parse_map(config.requested)
    if given is None:
        return {Device.CPU: default_cpu_backend(config.launcher), Device.CUDA: default_gpu_backend()}
    if isinstance(given, str):
        return given
    if isinstance(given, Mapping) and given and all(isinstance(n, str) for n in given.values()):
        return {device_from_name(str(device)): name for device, name in given.items()}
    raise UsageError(
        "hybrid's option collectives is the name of a backend or a map from devices to names, "
        f"such as {{'cpu': 'gloo', 'cuda': 'nccl'}}, not {given!r}"
    )


def _usable_part(name: str) -> BackendInfo:
    """Return the description of a backend that can be a part.

    Raises:
        BackendUnavailable: the backend is not installed, or cannot be used here.
        UsageError: the backend is itself made of others.
    """
    info = backends.get(name)
    if info.composes:
        raise UsageError(f"hybrid cannot be made of {name!r}, which is made of others itself")
    _require_usable(info)
    return info


def _require_usable(info: BackendInfo) -> None:
    found = backends.probe(info)
    if not found.ok:
        raise BackendUnavailable(info.name, found.reason, found.hint)


def _own_options(given: object) -> Mapping[str, Mapping[str, object]]:
    if isinstance(given, Mapping) and all(isinstance(own, Mapping) for own in given.values()):
        return given
    raise UsageError(
        "hybrid's option options maps backends to their own options, such as "
        f"{{'gloo': {{'shared_memory': False}}}}; not {given!r}"
    )


def _check_names(given: Mapping[str, object], known: tuple[str, ...], problem: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(f"{problem} {', '.join(unknown)} (there are {', '.join(known)})")


def default_cpu_backend(launcher: str) -> str:
    """Name the backend that `ferro.init()` takes under a launcher.

    Raises:
        BackendUnavailable: no backend is the default, or the default cannot be used here.
    """
    name = backends.default(launcher)
    if name is None:
        raise BackendUnavailable(
            "hybrid", "no installed backend is the default for CPU arrays", "Install one, or name it."
        )
    _require_usable(backends.get(name))
    return name


def default_gpu_backend() -> str:
    """Name the one backend for arrays on a GPU that can be used here.

    Raises:
        BackendUnavailable: no such backend can be used, or several can.
    """
    found = {info.name: backends.probe(info) for info in possible_parts(Device.CUDA)}
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


def possible_parts(device: Device) -> list[BackendInfo]:
    """List the installed backends for arrays on a device that are not made of others."""
    infos = [backends.get(name) for name in backends.supporting(device)]
    return [info for info in infos if not info.composes]
