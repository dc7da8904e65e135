"""World: the group of all ranks, and what was opened for it: store, backend, observers."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import cast

from importlib_metadata import version

from ferro import backends, collectives
from ferro.collectives.choice import Choice
from ferro.errors import BackendUnavailable, FerroError, PluginError, RendezvousError, UsageError
from ferro.group.group_info import GroupInfo
from ferro.group.process_group import ProcessGroup
from ferro.hookspecs import BackendConfig, BackendInfo
from ferro.observers import Observer
from ferro.plugins import registry as plugins
from ferro.rendezvous.meeting.bootstrap import meet_introduced
from ferro.rendezvous.meeting.meeting import Meeting, meet
from ferro.rendezvous.meeting.membership import Record, call_roll
from ferro.rendezvous.store.interface import Store
from ferro.rendezvous.store.lost import Lost
from ferro.rendezvous.store.memory import MemoryStore
from ferro.runtime.environment import LaunchInfo, Options

_log = logging.getLogger("ferro")


class World:
    """The world group of this process and what was opened for it.

    Args:
        info: this process's place.
        given: what the user set through variables.
        backend: the backend that the user names, or None.
        timeout_s: seconds that joining, and then each operation, may take.
        number: how many worlds this process made before; all ranks count alike.
        explicit: the program itself says where to meet.

    Attributes:
        group: the world group, once joined.
        closed: whether it has been left.
    """

    group: ProcessGroup

    def __init__(
        self, info: LaunchInfo, given: Options, backend: str | None, timeout_s: float, number: int, *, explicit: bool
    ) -> None:
        self.closed = False
        self._info = info
        self._given = given
        self._backend = backend
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._meeting: Meeting | None = None
        if info.world_size > 1:
            self._meeting = self._meet(number, explicit=explicit)
        root: Store = MemoryStore() if self._meeting is None else self._meeting.store
        self._store = root.prefix(f"world{number}")
        self._observers: tuple[Observer, ...] = ()

    def _meet(self, number: int, *, explicit: bool) -> Meeting:
        info, deadline = self._info, self._deadline
        if info.lacks_rendezvous_address:
            name = self._backend or backends.default(info.launcher)
            introduce = backends.get(name).introduce if name else None
            if introduce is not None:
                return meet_introduced(info, number, introduce, deadline=deadline)
        return meet(info, number, explicit=explicit, deadline=deadline)

    def join(
        self,
        deterministic: bool,
        algorithms: Mapping[str, str],
        backend_options: Mapping[str, object],
        observers: Sequence[Observer],
    ) -> None:
        """Meet the other ranks, create the backend, make the group."""
        try:
            chosen, choice = self._choose(deterministic, algorithms, observers)
        except FerroError as error:
            with suppress(FerroError):  # the others are told why this rank does not come
                self._call_roll(self._backend or "none", "", str(error))
            raise
        settings = f"deterministic={deterministic}, algorithms={dict(sorted(algorithms.items()))}"
        requested = self._backend or chosen.name
        records = self._call_roll(requested, settings)
        # With the process that hosts the store all of it ends: a rank's, but for a launcher's.
        lost = Lost(self._store, self._info.rank, 0 if self._info.store is None else None)
        config = self._config(records, lost, choice, backend_options, requested)
        made = chosen.create(config)
        members = GroupInfo(
            name="world",
            backend_name=chosen.name,
            global_ranks=tuple(range(self._info.world_size)),
            hosts=tuple(record.host for record in records),
            job=self._store,
            store=self._store.prefix("group/0"),
            local_rank=self._info.local_rank,
            timeout_s=self._timeout_s,
            devices=chosen.devices if made.devices is None else made.devices,
            host_copies=self._given.gpu_fallback,
            observers=self._observers,
        )
        self.group = ProcessGroup(made, members, on_close=self.close)

    def _choose(
        self, deterministic: bool, algorithms: Mapping[str, str], observers: Sequence[Observer]
    ) -> tuple[BackendInfo, Choice]:
        """Return the backend and the rules for algorithms; keep the observers."""
        chosen = self._choose_backend()
        fixed = {name: collectives.get(name, value) for name, value in algorithms.items()}
        choice = Choice(deterministic=deterministic, fixed=fixed)
        choice.check()
        offered, silent = plugins.installed().ask("ferro_observers", object)
        if silent:
            raise silent[0].error
        self._observers = tuple(map(_observer, (*observers, *(o.item for o in offered))))
        return chosen, choice

    def _choose_backend(self) -> BackendInfo:
        info = self._info
        name = self._backend or backends.default(info.launcher)
        if name is None and info.world_size == 1:
            name = "simulated"  # core's own, enough for one rank
        if name is None:
            there = ", ".join(backends.available())
            raise PluginError(
                f"no backend between processes is installed (installed: {there}): install one of "
                f"ferro's extras ({', '.join(plugins.own_extras())}), "
                f"{plugins.how_to_install('EXTRA')}, or name one in ferro.init()"
            )
        chosen = backends.get(name)
        found = backends.probe(chosen)
        if not found.ok:
            raise BackendUnavailable(name, found.reason, found.hint)
        return chosen

    def _call_roll(self, backend: str, settings: str, problem: str = "") -> list[Record]:
        mine = Record(
            rank=self._info.rank,
            world_size=self._info.world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            address="127.0.0.1" if self._meeting is None else self._meeting.store.local_host,
            version=version("ferro"),
            backend=backend,
            plugins=plugins.installed().versions,
            settings=settings,
            problem=problem,
        )
        try:
            return call_roll(self._store.prefix("roll"), mine, deadline=self._deadline)
        except RendezvousError as error:
            server = None if self._meeting is None else self._meeting.server
            if server is not None and server.refused:
                error.add_note(
                    f"The store turned away {server.refused} connections with another secret: "
                    "is FERRO_SECRET the same on all ranks?"
                )
            raise

    def _config(
        self,
        records: Sequence[Record],
        lost: Lost,
        choice: Choice,
        backend_options: Mapping[str, object],
        requested: str,
    ) -> BackendConfig:
        meeting = self._meeting
        return BackendConfig(
            rank=self._info.rank,
            world_size=self._info.world_size,
            store=self._store.prefix("group/0"),
            secret=b"" if meeting is None else meeting.secret,
            addresses=tuple(record.address for record in records),
            store_host="127.0.0.1" if meeting is None else meeting.store.remote_host,
            timeout_s=max(1.0, self._deadline - time.monotonic()),
            choice=choice,
            host_id=self._given.host_id,
            local_rank=self._info.local_rank,
            launcher=self._info.launcher,
            requested=requested,
            lost=lost,
            options=backend_options,
        )

    def close(self, patience_s: float, farewell: bool = True) -> None:
        """Say goodbye and release the store.

        Args:
            patience_s: how long whoever hosts the store waits for the others, in seconds.
            farewell: this rank leaves in good order; else it is lost, as if it had died: see
                `BackendConfig.lost`.
        """
        if self.closed:
            return
        self.closed = True
        for observer in self._observers:
            try:
                observer.close()
            except Exception as error:  # noqa: BLE001 - the store must be left all the same
                _log.error("ferro: observer %s: %s", type(observer).__name__, error)
        if self._meeting is not None:
            if not farewell:  # first, for the others may wait for this rank
                self._meeting.store.carry_out_will()
            self._say_goodbye(self._meeting, patience_s)
            self._meeting.close()

    def _say_goodbye(self, meeting: Meeting, patience_s: float) -> None:
        try:
            gone = self._store.add("goodbye", 1)
            if gone == self._info.world_size:
                self._store.set("all gone", b"1")
            elif meeting.server is not None:
                self._store.get("all gone", deadline=time.monotonic() + patience_s)
        except (RendezvousError, TimeoutError) as error:
            _log.debug("goodbye: %s", error)


def _observer(item: object) -> Observer:
    """Return an observer that has what is called.

    Raises:
        UsageError: it has not.
    """
    lacking = [name for name in ("started", "finished", "close") if not hasattr(item, name)]
    if lacking:
        raise UsageError(f"{item!r} is no observer: it has no {', '.join(lacking)}")
    return cast(Observer, item)
