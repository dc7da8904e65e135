"""The options of the backend: what `backend_options` of `ferro.init("nccl")` may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ferro.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user may choose.

    Attributes:
        device: number of the GPU to take; None for that of the local rank.
        check_calls: compare the ranks' calls before each collective, on the host: a difference is
            a CollectiveMismatch at once. It ends the overlap of collectives with the host.
    """

    device: int | None = None
    check_calls: bool = False

    @classmethod
    def read(cls, options: Mapping[str, object]) -> Settings:
        """Return what the options say.

        Raises:
            UsageError: there is no such option, or no such value.
        """
        unknown = sorted(set(options) - {"device", "check_calls"})
        if unknown:
            raise UsageError(
                f"nccl has no option {', '.join(unknown)}: backend_options may hold device and "
                "check_calls"
            )
        device, check = options.get("device"), options.get("check_calls", False)
        number = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if device is not None and not number:
            raise UsageError(f"nccl's option device is the number of a GPU, not {device!r}")
        if not isinstance(check, bool):
            raise UsageError(f"nccl's option check_calls is True or False, not {check!r}")
        return cls(device=device if isinstance(device, int) else None, check_calls=check)
