"""The backends of the installed plugins: list them, probe them, and get one by name."""

from __future__ import annotations

from collections.abc import Iterable

from ferro.errors import BackendUnavailable, PluginError
from ferro.hookspecs import BackendInfo
from ferro.plugins.registry import Offer, backend_extras, by_name, how_to_install, installed, own_extras, sole
from ferro.types import Availability, Device

_HOOK = "ferro_backends"


def available() -> dict[str, Availability]:
    """List every installed backend, usable or not: name -> whether it can be used here, and if not, why.

    A broken plugin has an entry that says what is wrong; nothing is raised for it. No native library is imported, no
    socket opened, no MPI started.
    """
    offers, broken = installed().survey(_HOOK, BackendInfo)
    found = {it.name: Availability(ok=False, reason=str(it.error), hint="repair or uninstall it") for it in broken}
    for name, claimants in by_name(offers).items():
        try:
            found[name] = probe(sole(claimants, f"backend name {name!r}").item)
        except PluginError as error:
            found[name] = Availability(ok=False, reason=str(error), hint="uninstall one of them")
    return found


def get(name: str) -> BackendInfo:
    """Return the description of an installed backend, usable or not.

    Args:
        name: a backend's name, such as "gloo"; or a map from devices to backends, such as "cpu:gloo,cuda:nccl":
            the result then describes the installed backend that is made of other backends.

    Raises:
        BackendUnavailable: it is not installed; the hint says what to install.
        PluginError: two plugins claim the name, or a plugin could not be loaded.
    """
    offers = installed().offers(_HOOK, BackendInfo)
    if ":" in name:
        return _composing(_sole_infos(offers), name)
    claimants = by_name(offers).get(name)
    if claimants is None:
        raise _absent(name, offers)
    return sole(claimants, f"backend name {name!r}").item


def probe(info: BackendInfo) -> Availability:
    """Ask a backend whether it can be used on this machine. Nothing is raised, even if its probe raises."""
    try:
        return info.probe()
    except Exception as error:  # noqa: BLE001 - a plugin's probe may raise anything
        offers, _ = installed().survey(_HOOK, BackendInfo)
        authors = " and ".join(offer.distribution for offer in offers if offer.item.name == info.name) or info.name
        reason = f"its probe raised {type(error).__name__}: {error}"
        return Availability(ok=False, reason=reason, hint=f"Report this to the authors of {authors}.")


def supporting(device: Device) -> list[str]:
    """List the names of the installed backends, usable or not, that take arrays on a device."""
    offers, _ = installed().survey(_HOOK, BackendInfo)
    return sorted(info.name for info in _sole_infos(offers) if device in info.devices)


def default(launcher: str) -> str | None:
    """Name the backend that `ferro.init()` takes under a launcher, such as "torchrun"; None when there is none.

    Raises:
        PluginError: two backends offer to be the default, or a plugin could not be loaded.
    """
    infos = _sole_infos(installed().offers(_HOOK, BackendInfo))
    for wanted in (launcher, "*"):
        names = sorted(info.name for info in infos if wanted in info.default_under)
        if len(names) > 1:
            raise PluginError(
                f"backends {' and '.join(names)} both offer to be the default under "
                f"{launcher!r}: name one in ferro.init()"
            )
        if names:
            return names[0]
    return None


def _sole_infos(offers: Iterable[Offer[BackendInfo]]) -> list[BackendInfo]:
    return [claimants[0].item for claimants in by_name(offers).values() if len(claimants) == 1]


def _composing(installed_infos: Iterable[BackendInfo], name: str) -> BackendInfo:
    """Find the one backend that is made of other backends."""
    infos = [info for info in installed_infos if info.composes]
    if len(infos) > 1:
        both = " and ".join(sorted(info.name for info in infos))
        raise PluginError(f"backends {both} both take a map such as {name!r}: uninstall one")
    if not infos:
        raise BackendUnavailable(
            name,
            "it maps devices to backends, and no installed backend is made of others",
            f"Install a distribution that offers one; ferro's own: {', '.join(backend_extras())}.",
        )
    return infos[0]


def _absent(name: str, offers: Iterable[Offer[BackendInfo]]) -> BackendUnavailable:
    """Make the error for a backend that no plugin offers: why, and what to do."""
    loaded = installed().loaded.get(name)
    reason = f"no plugin that offers it is installed (installed: {', '.join(by_name(offers))})"
    remedy = f"Check the spelling, or install the distribution that offers {name!r}."
    if loaded is not None and loaded.distribution not in {offer.distribution for offer in offers}:
        reason = f"plugin {name!r} of {loaded.distribution} is loaded, but offers no backend"
        remedy = "Is its ferro_backends decorated with @ferro.hookimpl?"
    elif name in own_extras():
        remedy = f"Install it {how_to_install(name)}."
    return BackendUnavailable(name, reason, remedy)
