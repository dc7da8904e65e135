"""World: the group of all ranks, with its store, backend and observers."""

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
from ferro.plugins.checks import observer_problem
from ferro.rendezvous.meeting.job_store import JobStore, open_job_store
from ferro.rendezvous.meeting.membership import RankRecord, enter_world
from ferro.rendezvous.store.interface import Store, StoreGone
from ferro.rendezvous.store.liveness import FailureDetector, lost_ranks
from ferro.rendezvous.store.memory import MemoryStore
from ferro.runtime.environment import LaunchInfo, thread_advice
from ferro.runtime.environment.inherited import unmark_rank
from ferro.runtime.environment.settings import Options

_log = logging.getLogger("ferro")
_LOOK_S = 0.25  # how often the rank that hosts the store looks at its end which ranks are lost


class World:
    """The world group of this process and its connection to the job's store.

    `timeout_s` is for joining, and then for each operation.
    """

    group: ProcessGroup

    def __init__(self, info: LaunchInfo, settings: Options, backend: str | None, timeout_s: float) -> None:
        self.closed = False
        self._pid = os.getpid()
        self._info = info
        self._settings = settings
        self._backend = backend
        self._timeout_s = timeout_s
        if advice := thread_advice(info):
            _log.warning("ferro: %s", advice)
        self._deadline = time.monotonic() + timeout_s
        self._observers: tuple[Observer, ...] = ()
        self._job_store = self._open_job_store() if info.world_size > 1 else None
        self._store: Store | None = None  # the part of the store that belongs to the world which this rank entered

    def _open_job_store(self) -> JobStore:
        info, broadcast = self._info, None
        nowhere = info.store is None and (info.master is None or info.master_derived)
        if info.local_world_size != info.world_size and nowhere:
            # Nobody named a place where the ranks of several hosts meet; a library that connects them may tell.
            name = self._backend or backends.default(info.launcher)
            broadcast = backends.get(name).bootstrap_broadcast if name else None
        return open_job_store(info, deadline=self._deadline, broadcast=broadcast)

    def join(
        self,
        deterministic: bool,
        algorithms: Mapping[str, str],
        options: Mapping[str, object],
        observers: Sequence[Observer],
    ) -> None:
        """Meet the other ranks, create the backend, make the group."""
        info = self._info
        try:
            chosen = self._choose_backend()
            fixed = {name: collectives.get(name, algorithm) for name, algorithm in algorithms.items()}
            choice = Choice(deterministic=deterministic, fixed=fixed)
            choice.check()
            self._observers = _all_observers(observers)
        except FerroError as error:
            with suppress(FerroError):  # the others are told why this rank does not come
                self._enter(self._backend or "none", "", str(error))
            raise
        requested = self._backend or chosen.name
        settings = f"deterministic={deterministic}, algorithms={dict(sorted(algorithms.items()))}"
        lost, records = self._enter(requested, settings)
        assert self._store is not None
        job_store, group_store = self._job_store, self._store.prefix("group/0")
        config = BackendConfig(
            rank=info.rank,
            world_size=info.world_size,
            store=group_store,
            secret=b"" if job_store is None else job_store.secret,
            addresses=tuple(self._reached(record.address) for record in records),
            store_host="127.0.0.1" if job_store is None else job_store.store.remote_host,
            lost=lost,
            timeout_s=max(1.0, self._deadline - time.monotonic()),
            choice=choice,
            host_id=self._settings.host_id,
            local_rank=info.local_rank,
            launcher=info.launcher,
            requested=requested,
            options=options,
        )
        backend = backends.create(chosen, config)
        group_info = GroupInfo(
            name="world",
            backend_name=chosen.name,
            global_ranks=tuple(range(info.world_size)),
            hosts=tuple(record.host for record in records),
            job_store=self._store,
            store=group_store,
            local_rank=info.local_rank,
            timeout_s=self._timeout_s,
            devices=chosen.devices if backend.devices is None else backend.devices,
            host_copies=self._settings.gpu_fallback,
            observers=self._observers,
        )
        self.group = ProcessGroup(backend, group_info, on_close=self.close)

    def _choose_backend(self) -> BackendInfo:
        name = self._backend or backends.default(self._info.launcher)
        if name is None and self._info.world_size == 1:
            name = "simulated"  # core's own, enough for one rank
        if name is None:
            from ferro.plugins.extras import backend_extras, how_to_install  # they are needed here only

            extras = backend_extras()
            such = f", such as: {how_to_install(extras[0])};" if extras else ","
            raise PluginError(
                f"no backend between processes is installed (installed: {', '.join(backends.available())}): "
                f"install one of ferro's extras ({', '.join(extras)}){such} or name one in ferro.init()"
            )
        chosen = backends.get(name)
        found = backends.probe(chosen)
        if not found.ok:
            raise BackendUnavailable(name, found.reason, found.hint)
        return chosen

    def _enter(self, backend: str, settings: str, problem: str = "") -> tuple[FailureDetector, list[RankRecord]]:
        """Enter the newest world with all ranks: see `enter_world`."""
        record = RankRecord(
            rank=self._info.rank,
            world_size=self._info.world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            address="127.0.0.1" if self._job_store is None else self._job_store.store.local_host.partition("%")[0],
            version=version("ferro"),
            backend=backend,
            plugins=plugins.installed().versions(),
            settings=settings,
            problem=problem,
        )
        job_store = self._job_store
        if job_store is None:
            return enter_world(MemoryStore(), record, begin=self._begin, deadline=self._deadline)
        try:
            return enter_world(job_store.store, record, begin=self._begin, deadline=self._deadline)
        except StoreGone:
            if not job_store.reopens or time.monotonic() >= self._deadline:
                raise
        except RendezvousError as error:
            if self._info.world_size > 1:
                error.add_note(f"This process takes itself for {self._info.describe()}.")
            server = job_store.server
            if server is not None and server.refused:
                error.add_note(
                    f"The store turned away {server.refused} connections with another secret: "
                    "is FERRO_SECRET the same on all ranks?"
                )
            raise
        # This rank was early, and found the store of the world before, which has ended meanwhile.
        job_store.close()
        self._store, self._job_store = None, self._open_job_store()
        return self._enter(backend, settings, problem)

    def _reached(self, address: str) -> str:
        """Complete another rank's link-local address by the interface that leads from here to the store."""
        own = "" if self._job_store is None else self._job_store.store.local_host
        return address + "".join(own.partition("%")[1:]) if address.startswith("fe80:") else address

    def _begin(self, store: Store) -> None:
        """Take a world's part of the store, and leave that of a world which was over before it was complete."""
        if self._job_store is not None and self._store is not None:
            self._job_store.store.declare_lost()
        self._store = store

    def close(self, patience_s: float, orderly: bool = True) -> None:
        """Leave the store; the rank that hosts it waits up to `patience_s` for the others.

        Unless this rank leaves in good order, the others see it as lost, as if it had died. A forked child leaves its
        parent's world alone.
        """
        if self.closed or os.getpid() != self._pid:
            return
        self.closed = True
        unmark_rank()
        for observer in self._observers:
            try:
                observer.close()
            except Exception as error:  # noqa: BLE001 - the store must be left all the same
                _log.error("ferro: observer %s: %s", type(observer).__name__, error)
        job_store = self._job_store
        if job_store is None:
            return
        job_store.store.request_timeout_s = patience_s  # the process that hosts the store may be stopped
        if not orderly:  # first, since the others may wait for this rank
            job_store.store.declare_lost()
        try:
            if self._store is None:  # this rank never entered a world
                pass
            elif self._store.add("goodbye", int(orderly)) == self._info.world_size:
                self._store.set("all gone", b"1")
            elif job_store.server is not None:
                self._await_others(self._store, time.monotonic() + patience_s)
        except (RendezvousError, TimeoutError) as error:
            _log.debug("goodbye: %s", error)
        job_store.close(orderly)

    def _await_others(self, store: Store, deadline: float) -> None:
        """Host the store until all other ranks have left it, or are lost."""
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                store.get("all gone", deadline=min(deadline, time.monotonic() + _LOOK_S))
                return
            if store.add("goodbye", 0) + len(lost_ranks(store)) >= self._info.world_size:
                return


def _all_observers(given: Sequence[Observer]) -> tuple[Observer, ...]:
    """Join the given observers and those of plugins; refuse objects that lack a method."""
    offers, broken = plugins.installed().ask("ferro_observers", object)
    if broken:
        raise broken[0].error
    observers = (*given, *(cast(Observer, offer.item) for offer in offers))
    for item in observers:
        if problem := observer_problem(item):
            raise UsageError(f"observers={problem}")
    return observers
