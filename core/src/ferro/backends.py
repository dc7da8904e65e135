"""The backends on offer: which are installed, whether they can be used, and one by name."""

from __future__ import annotations

from collections.abc import Mapping

from ferro.errors import BackendUnavailable, PluginError
from ferro.hookspecs import BackendInfo
from ferro.plugins.registry import Offer, Plugins, by_name, how_to_install, installed, own_extras
from ferro.types import Availability, Device


def available() -> dict[str, Availability]:
    """Return name -> Availability for every installed backend, usable or not.

    Never raises for a broken plugin: its entry says what is wrong. Imports no native library,
    opens no socket, starts no MPI.
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
    """Return the description of a backend.

    Args:
        name: a backend's, or a map from devices to backends, such as "cpu:gloo,cuda:nccl": that
            is of the installed backend that is made of others.

    Raises:
        BackendUnavailable: it is not installed; says what to install.
        PluginError: two plugins claim the name, or a plugin could not be loaded.
    """
    plugins = installed()
    plugins.require_all()
    table = _table(plugins)
    if ":" in name:
        return _composer(table, name)
    offer = table.get(name)
    if isinstance(offer, PluginError):
        raise offer
    if offer is None:
        raise _absent(name, plugins, table)
    return offer.item


def probe(info: BackendInfo) -> Availability:
    """Ask a backend whether it can be used here; never raises, whatever its probe does."""
    try:
        return info.probe()
    except Exception as error:  # noqa: BLE001 - a stranger's probe raises what it likes
        offers, _ = installed().survey("ferro_backends", BackendInfo)
        authors = [it.distribution for it in offers if it.item.name == info.name]
        return Availability(
            ok=False,
            reason=f"its probe raised {type(error).__name__}: {error}",
            hint=f"Report this to the authors of {' and '.join(authors) or info.name}.",
        )


def taking(device: Device) -> list[str]:
    """Return the names of installed backends, usable or not, that take arrays on a device."""
    offers = _table(installed()).values()
    infos = [offer.item for offer in offers if not isinstance(offer, PluginError)]
    return sorted(info.name for info in infos if device in info.devices)


def default(launcher: str) -> str | None:
    """Return the backend that `ferro.init()` takes under a launcher; None when none offers.

    Raises:
        PluginError: two backends offer themselves alike.
    """
    plugins = installed()
    plugins.require_all()
    infos = [o.item for o in _table(plugins).values() if not isinstance(o, PluginError)]
    for wanted in (launcher, "*"):
        names = [info.name for info in infos if wanted in info.default_under]
        if len(names) > 1:
            raise PluginError(
                f"backends {' and '.join(sorted(names))} both offer to be the default under "
                f"{launcher!r}: name one in ferro.init()"
            )
        if names:
            return names[0]
    return None


def _composer(table: Mapping[str, Offer[BackendInfo] | PluginError], name: str) -> BackendInfo:
    """Return the one backend that is made of others."""
    infos = [o.item for o in table.values() if not isinstance(o, PluginError) and o.item.composes]
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


def _table(plugins: Plugins) -> dict[str, Offer[BackendInfo] | PluginError]:
    return by_name(plugins.offers("ferro_backends", BackendInfo), "backend")


def _absent(name: str, plugins: Plugins, table: Mapping[str, Offer[BackendInfo] | PluginError]) -> BackendUnavailable:
    """Return the error that says why nobody offers a backend of this name, and what to do."""
    loaded = plugins.versions.get(name)
    offering = {it.distribution for it in plugins.offers("ferro_backends", BackendInfo)}
    if loaded is not None and loaded not in offering:
        return BackendUnavailable(
            name,
            f"plugin {name!r} of {loaded} is loaded, but offers no backend",
            "Is its ferro_backends decorated with @ferro.hookimpl?",
        )
    there = ", ".join(sorted(table))
    reason = f"no plugin that offers it is installed (installed: {there})"
    return BackendUnavailable(name, reason, _remedy(name))


def _remedy(name: str) -> str:
    """Say what to install, when it is one of ferro's own extras."""
    if name in own_extras():
        return f"Install it {how_to_install(name)}."
    return f"Check the spelling, or install the distribution that offers {name!r}."
