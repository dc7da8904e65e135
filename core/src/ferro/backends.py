"""The backends of the installed plugins: which can be used on this machine, and one by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from ferro.errors import BackendUnavailable, PluginError
from ferro.hookspecs import BackendInfo
from ferro.plugins.registry import Offer, Plugins, by_name, how_to_install, installed, own_extras
from ferro.types import Availability, Device

_Table: TypeAlias = Mapping[str, Offer[BackendInfo] | PluginError]


def available() -> dict[str, Availability]:
    """List every installed backend, usable or not: name -> whether it can be used here, and if not, why.

    A broken plugin has an entry that says what is wrong; nothing is raised for it. No native library is imported, no
    socket opened, no MPI started.
    """
    plugins = installed()
    offers, silent = plugins.survey("ferro_backends", BackendInfo)
    found = {
        broken.name: Availability(ok=False, reason=str(broken.error), hint="repair or uninstall it")
        for broken in (*plugins.broken, *silent)
    }
    for name, offer in sorted(by_name(offers, "backend").items()):
        if isinstance(offer, PluginError):
            found[name] = Availability(ok=False, reason=str(offer), hint="uninstall one of them")
        else:
            found[name] = probe(offer.item)
    return found


def get(name: str) -> BackendInfo:
    """Return the description of an installed backend, usable or not.

    Args:
        name: a backend's name, such as "gloo"; or a map from devices to backends, such as "cpu:gloo,cuda:nccl", for
            which the description of the installed backend that is made of other backends is returned.

    Raises:
        BackendUnavailable: it is not installed; the hint says what to install.
        PluginError: two plugins claim the name, or a plugin could not be loaded.
    """
    plugins = installed()
    plugins.require_all()
    table = _table(plugins)
    if ":" in name:
        return _composing(table, name)
    offer = table.get(name)
    if isinstance(offer, PluginError):
        raise offer
    if offer is None:
        raise _absent(name, plugins, table)
    return offer.item


def probe(info: BackendInfo) -> Availability:
    """Ask a backend whether it can be used on this machine. Nothing is raised, even if its probe raises."""
    try:
        return info.probe()
    except Exception as error:  # noqa: BLE001 - a plugin's probe may raise anything
        offers, _ = installed().survey("ferro_backends", BackendInfo)
        authors = " and ".join(offer.distribution for offer in offers if offer.item.name == info.name) or info.name
        reason = f"its probe raised {type(error).__name__}: {error}"
        return Availability(ok=False, reason=reason, hint=f"Report this to the authors of {authors}.")


def supporting(device: Device) -> list[str]:
    """List the names of the installed backends, usable or not, that take arrays on a device."""
    return sorted(info.name for info in _infos(_table(installed())) if device in info.devices)


def default(launcher: str) -> str | None:
    """Name the backend that `ferro.init()` takes under a launcher, such as "torchrun"; None when there is none.

    Raises:
        PluginError: two backends offer to be the default, or a plugin could not be loaded.
    """
    plugins = installed()
    plugins.require_all()
    infos = _infos(_table(plugins))
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


def _table(plugins: Plugins) -> _Table:
    return by_name(plugins.offers("ferro_backends", BackendInfo), "backend")


def _infos(table: _Table) -> list[BackendInfo]:
    return [offer.item for offer in table.values() if not isinstance(offer, PluginError)]


def _composing(table: _Table, name: str) -> BackendInfo:
    """Find the one backend that is made of other backends."""
    infos = [info for info in _infos(table) if info.composes]
    if len(infos) > 1:
        both = " and ".join(sorted(info.name for info in infos))
        raise PluginError(f"backends {both} both take a map such as {name!r}: uninstall one")
    if not infos:
        raise BackendUnavailable(
            name,
            "it maps devices to backends, and no installed backend is made of others",
            f"Install a distribution that offers one; ferro's own: {', '.join(own_extras())}.",
        )
    return infos[0]


def _absent(name: str, plugins: Plugins, table: _Table) -> BackendUnavailable:
    """Make the error for a backend that no plugin offers: why, and what to do."""
    loaded = plugins.versions.get(name)
    offering = {offer.distribution for offer in plugins.offers("ferro_backends", BackendInfo)}
    reason = f"no plugin that offers it is installed (installed: {', '.join(sorted(table))})"
    remedy = f"Check the spelling, or install the distribution that offers {name!r}."
    if loaded is not None and loaded not in offering:
        reason = f"plugin {name!r} of {loaded} is loaded, but offers no backend"
        remedy = "Is its ferro_backends decorated with @ferro.hookimpl?"
    elif name in own_extras():
        remedy = f"Install it {how_to_install(name)}."
    return BackendUnavailable(name, reason, remedy)
