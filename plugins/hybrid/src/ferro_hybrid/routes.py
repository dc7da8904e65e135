"""Routes: which part of a hybrid backend serves which arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ferro import Backend, Device, UsageError


@dataclass(frozen=True, slots=True)
class Routes:
    """The parts of one rank's hybrid backend, by what they serve.

    Attributes:
        collectives: for every device the part that carries out its collectives, CPU first.
        transfers: for every device the part that sends and receives its arrays.
        p2p: the part for transfers and barriers.
    """

    collectives: Mapping[Device, Backend]
    transfers: Mapping[Device, Backend]
    p2p: Backend

    @classmethod
    def between(cls, collectives: Backend | Mapping[Device, Backend] | Mapping[str, Backend], p2p: Backend) -> Routes:
        """Find the routes; see `HybridBackend`.

        Raises:
            UsageError: the parts do not fit together.
        """
        if Device.CPU not in taken(p2p):
            raise UsageError(
                f"p2p is {_name(p2p)}, which takes arrays on {', '.join(taken(p2p))}: it carries "
                "barriers as well, and must take arrays on cpu"
            )
        if isinstance(collectives, Backend):
            given = dict.fromkeys(taken(collectives), collectives)
        else:
            given = {device_named(key): part for key, part in collectives.items()}
        for device, part in given.items():
            _check_fits(device, part, p2p)
        by_device = {Device.CPU: given.pop(Device.CPU, p2p), **given}
        movers = {d: p2p if d in taken(p2p) else part for d, part in by_device.items()}
        return cls(MappingProxyType(by_device), MappingProxyType(movers), p2p)

    @property
    def parts(self) -> tuple[Backend, ...]:
        """Every part once, in an order that is the same on all ranks."""
        return tuple(dict.fromkeys((self.p2p, *self.collectives.values())))

    @property
    def streams(self) -> tuple[Device, ...]:
        """Devices on which some part only launches."""
        return tuple(
            device
            for device, part in self.collectives.items()
            if device in part.streams or device in self.transfers[device].streams
        )


def taken(part: Backend) -> tuple[Device, ...]:
    """Return where a backend takes arrays; if it does not say, where it launches, else the CPU."""
    return part.devices if part.devices is not None else part.streams or (Device.CPU,)


def device_named(name: str) -> Device:
    """Return the device of this name.

    Raises:
        UsageError: there is none.
    """
    try:
        return Device(name)
    except ValueError:
        raise UsageError(f"there is no device {name!r}: devices are {', '.join(Device)}") from None


def _check_fits(device: Device, part: Backend, p2p: Backend) -> None:
    if (part.rank, part.world_size) != (p2p.rank, p2p.world_size):
        raise UsageError(
            f"the parts of a hybrid backend are of one group: {_name(part)} (collectives on "
            f"{device}) is rank {part.rank} of {part.world_size}, {_name(p2p)} (p2p) is rank "
            f"{p2p.rank} of {p2p.world_size}"
        )
    if part.devices is not None and device not in part.devices:
        raise UsageError(
            f"{_name(part)} cannot carry out collectives on {device}: it takes arrays on {', '.join(part.devices)} here"
        )


def _name(part: Backend) -> str:
    return type(part).__name__
