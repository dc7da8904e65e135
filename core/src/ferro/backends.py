"""The backends of the installed plugins: list them, probe them, and get one by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from ferro.backend import Backend
from ferro.errors import BackendUnavailable, PluginError
from ferro.hookspecs import BackendConfig, BackendInfo
from ferro.plugins.checks import ignored_fields, problem_of
from ferro.plugins.registry import Offer, by_name, installed, probing, sole
from ferro.types import Availability, Device

_HOOK = "ferro_backends"
_PROBE_S = 5.0  # a backend that is made of others, and so asks for their probes, has twice as long


def available() -> dict[str, Availability]:
    """List every installed backend, usable or not: name -> whether it can be used here, and if not, why.

    A plugin that is broken, or that offers nothing, has an entry that says what is wrong; nothing is raised for it. No
    native library is imported, no socket opened, no MPI started. All probes run at the same time; one that takes longer
    than seconds is not waited for.
    """
    offers, broken = installed().survey(_HOOK, BackendInfo)
    found = {it.name: Availability(ok=False, reason=str(it.error), hint="Repair or uninstall it.") for it in broken}
    for name, about in installed().loaded.items():
        if about.silence and (_HOOK in about.unmarked or not about.hooks):
            reason = f"plugin {name!r} of {about.distribution}: {about.silence}"
            found[name] = Availability(ok=False, reason=reason, hint=f"Repair or uninstall {about.distribution}.")
    claims = by_name(offers)
    for name, claimants in claims.items():
        try:
            sole(claimants, f"backend name {name!r}")
        except PluginError as error:
            found[name] = Availability(ok=False, reason=str(error), hint="Uninstall one of them.")
    asked = [claimants[0] for claimants in claims.values() if len(claimants) == 1]
    found |= zip([offer.item.name for offer in asked], _probe_all(asked), strict=True)
    rows = [*claims, *(name for name in found if name not in claims)]
    return {name: found[name] for name in rows}


def get(name: str) -> BackendInfo:
    """Return the description of an installed backend, usable or not.

    Args:
        name: a backend's name, such as "gloo"; or a map from devices to backends, such as "cpu:gloo,cuda:nccl":
            the result then describes the installed backend that is made of other backends.

    Raises:
        BackendUnavailable: it is not installed; the hint says what to install.
        PluginError: two plugins claim the name; or none offers it, and a plugin is broken, which may be the one. Beside
            a backend that is there, a broken plugin is a RuntimeWarning.
    """
    if ":" in name:
        return _composing(_sole_infos(installed().survey(_HOOK, BackendInfo)[0]), name)
    offer = installed().named(_HOOK, BackendInfo, lambda info: info.name == name, f"backend name {name!r}")
    if offer is None:
        raise _absent(name, installed().offers(_HOOK, BackendInfo))
    return offer.item


def probe(info: BackendInfo) -> Availability:
    """Ask a backend whether it can be used on this machine.

    Nothing is raised, even if its probe raises; one that takes longer than seconds is not waited for.
    """
    offers, _ = installed().survey(_HOOK, BackendInfo)
    offer = next((it for it in offers if it.item is info), Offer(info, info.name))
    return _probe_all([offer])[0]


def create(info: BackendInfo, config: BackendConfig) -> Backend:
    """Create a backend of this rank by its description; all ranks do.

    Raises:
        PluginError: its `create` returned something else than a backend of this rank.
        BackendUnavailable: the backend cannot be used here, as its `create` found.
    """
    made = info.create(config)
    problem = problem_of(made, Backend)
    place, wanted = (getattr(made, "rank", None), getattr(made, "world_size", None)), (config.rank, config.world_size)
    if not problem and place != wanted:
        problem = f"a backend whose (rank, world_size) is {place}, not {wanted}"
    if problem:
        offers, _ = installed().survey(_HOOK, BackendInfo)
        origin = " and ".join(offer.distribution for offer in offers if offer.item.name == info.name)
        raise PluginError(
            f"create() of backend {info.name!r} of {origin} returned {problem}. Update or repair {origin}."
        )
    return made


def _probe_all(offers: Sequence[Offer[BackendInfo]]) -> list[Availability]:
    """Ask all probes at the same time, each on a thread, since one that hangs cannot be ended."""
    answers: dict[int, Availability] = {}
    threads = [threading.Thread(target=_ask, args=(*it, answers), daemon=True) for it in enumerate(offers)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    for number, (offer, thread) in enumerate(zip(offers, threads, strict=True)):
        patience_s = _PROBE_S * (2 if offer.item.composes else 1)
        thread.join(max(0.0, started + patience_s - time.monotonic()))
        reason, hint = (
            f"its probe has not ended after {patience_s:g} s",
            "Try again on an idle machine, or report this to",
        )
        answers.setdefault(
            number, Availability(ok=False, reason=reason, hint=f"{hint} the authors of {offer.distribution}.")
        )
    return [answers[number] for number in range(len(offers))]


def _ask(number: int, offer: Offer[BackendInfo], answers: dict[int, Availability]) -> None:
    probing.set(True)  # this and the next are of this thread
    ignored_fields.set(set() if offer.newer else None)
    try:
        answer = offer.item.probe()
        problem = problem_of(answer, Availability)
        reason = f"its probe returned {problem}" if problem else ""
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's probe may raise anything
        reason = f"its probe raised {type(error).__name__}: {error}"
    if reason:
        answer = Availability(ok=False, reason=reason, hint=f"Report this to the authors of {offer.distribution}.")
    answers.setdefault(number, answer)


def supporting(device: Device) -> list[str]:
    """List the names of the installed backends, usable or not, that take arrays on a device."""
    offers, _ = installed().survey(_HOOK, BackendInfo)
    return sorted(info.name for info in _sole_infos(offers) if device in info.devices)


def default(launcher: str) -> str | None:
    """Name the backend that `ferro.init()` takes under a launcher, such as "torchrun"; None when there is none.

    Raises:
        PluginError: two backends offer to be the default, or a plugin could not be loaded.
    """
    offers, broken = installed().survey(_HOOK, BackendInfo)
    if broken:
        reason = broken[0].error
        text = (
            f"no default backend is chosen while a plugin is broken, for it may offer one: {str(reason).rstrip('.')}."
        )
        raise PluginError(f"{text} Name a backend in ferro.init(), or repair the plugin.") from reason
    infos = _sole_infos(offers)
    for wanted in (launcher, "*"):
        names = sorted(info.name for info in infos if wanted in info.default_under)
        if len(names) > 1:
            raise PluginError(
                f"backends {' and '.join(names)} both offer to be the default under "
                f"{launcher!r}: name one in ferro.init()"
            )
        if names:
            return names[0]
        for name, claimants in by_name(offers).items():
            if len(claimants) > 1 and any(wanted in claimant.item.default_under for claimant in claimants):
                get(name)  # raises the error that names those who claim it
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
            "Install a distribution that offers one, as ferro's extras do; `ferro backends` lists what is there.",
        )
    return infos[0]


def _absent(name: str, offers: Iterable[Offer[BackendInfo]]) -> BackendUnavailable:
    """Make the error for a backend that no plugin offers: why, and what to do."""
    from ferro.plugins.extras import how_to_install, own_extras  # here, for `import ferro` does without its imports

    loaded = installed().loaded.get(name)
    offered = list(by_name(offers))
    reason = f"no plugin that offers it is installed (installed: {', '.join(offered)})"
    remedy = f"Check the spelling, or install the distribution that offers {name!r}."
    silent = [
        f"plugin {key!r} of {it.distribution}: {it.silence}" for key, it in installed().loaded.items() if it.silence
    ]
    if loaded is not None and _HOOK not in loaded.hooks:
        reason = f"plugin {name!r} of {loaded.distribution} is loaded, but offers no backend"
        remedy = "Is its ferro_backends decorated with @ferro.hookimpl?"
    elif silent:
        reason = f"{reason}; {'; '.join(silent)}"
    elif name in own_extras():
        remedy = f"Install it: {how_to_install(name)}."
    return BackendUnavailable(name, reason, remedy)
