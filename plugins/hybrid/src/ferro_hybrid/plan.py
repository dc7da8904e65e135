"""Plan: which installed backends a hybrid one is made of, as its user says or by default.

ferro.init("hybrid")                        the CPU's default, and what is there for GPUs
ferro.init("cpu:gloo,cuda:nccl")            these; transfers with the CPU's
ferro.init("hybrid", backend_options={
    "collectives": {"cpu": "gloo"},         these; or one name, see `routes.taken`
    "p2p": "mpi",                           transfers and barriers
    "options": {"gloo": {…}},               each backend's own options
})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ferro import BackendConfig, BackendInfo, BackendUnavailable, Device, UsageError, backends

from .defaults import cpu_backend, gpu_backend
from .routes import device_named

_OPTIONS = ("collectives", "p2p", "options")


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of a hybrid backend, by name.

    Attributes:
        collectives: what carries out collectives, by device; or one backend, for the
            arrays for which it is (`routes.taken`).
        p2p: what carries out transfers and barriers.
        options: backend -> its own options.
    """

    collectives: str | Mapping[Device, str]
    p2p: str
    options: Mapping[str, Mapping[str, object]]

    @classmethod
    def of(cls, config: BackendConfig) -> Plan:
        """Return what the user asks for.

        Raises:
            UsageError: it makes no sense.
            BackendUnavailable: a backend is not installed or cannot be used here, or there is
                no default for arrays on some device.
        """
        given = config.options
        _check_names(given, _OPTIONS, "hybrid has no option")
        collectives = _collectives(config)
        p2p = given.get("p2p")
        if p2p is None:
            mapped = {} if isinstance(collectives, str) else collectives
            p2p = mapped.get(Device.CPU) or cpu_backend(config.launcher)
        if not isinstance(p2p, str):
            raise UsageError(f"hybrid's option p2p is the name of a backend, not {p2p!r}")
        plan = cls(collectives, p2p, _own_options(given.get("options", {})))
        plan._check()
        return plan

    @property
    def names(self) -> tuple[str, ...]:
        """Every backend once, in the order in which they are made."""
        mapped = self.collectives
        others = [mapped] if isinstance(mapped, str) else list(mapped.values())
        return tuple(dict.fromkeys((self.p2p, *others)))

    def __str__(self) -> str:
        mapped = self.collectives
        if not isinstance(mapped, str):
            mapped = ",".join(f"{device}:{name}" for device, name in sorted(mapped.items()))
        return f"collectives {mapped}, p2p {self.p2p}"

    def _check(self) -> None:
        infos = {name: _usable(name) for name in self.names}
        _check_names(self.options, self.names, "hybrid's option options is for its own backends:")
        wanted = {} if isinstance(self.collectives, str) else self.collectives
        for device, name in ((Device.CPU, self.p2p), *wanted.items()):
            if device not in infos[name].devices:
                raise UsageError(
                    f"{name} takes arrays on {', '.join(infos[name].devices)}, not on {device}: "
                    f"hybrid cannot use it there ({self})"
                )


def parse_map(text: str) -> dict[Device, str]:
    """Read a map from devices to backends, such as "cpu:gloo,cuda:nccl".

    Raises:
        UsageError: it is none, or names a device twice or one that there is not.
    """
    found: dict[Device, str] = {}
    for item in text.split(","):
        device_name, _, name = item.partition(":")
        if not name or ":" in name:
            raise UsageError(
                f"{text!r} is no map of devices to backends: {item!r} should be DEVICE:BACKEND, "
                "as in 'cpu:gloo,cuda:nccl'"
            )
        device = device_named(device_name)
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
        return {Device.CPU: cpu_backend(config.launcher), Device.CUDA: gpu_backend()}
    if isinstance(given, str):
        return given
    if isinstance(given, Mapping) and given and all(isinstance(n, str) for n in given.values()):
        return {device_named(str(device)): name for device, name in given.items()}
    raise UsageError(
        "hybrid's option collectives is the name of a backend or a map from devices to names, "
        f"such as {{'cpu': 'gloo', 'cuda': 'nccl'}}, not {given!r}"
    )


def _usable(name: str) -> BackendInfo:
    """Return a backend that can be a part.

    Raises:
        BackendUnavailable: it is not installed, or cannot be used here.
        UsageError: it is made of others itself.
    """
    info = backends.get(name)
    if info.composes:
        raise UsageError(f"hybrid cannot be made of {name!r}, which is made of others itself")
    found = backends.probe(info)
    if not found.ok:
        raise BackendUnavailable(name, found.reason, found.hint)
    return info


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
