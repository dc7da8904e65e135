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
from ferro.rendezvous.meeting.membership import RankRecord, check_membership
from ferro.rendezvous.store.interface import Store
from ferro.rendezvous.store.liveness import FailureDetector
from ferro.rendezvous.store.memory import MemoryStore
from ferro.runtime.environment import LaunchInfo, thread_advice
from ferro.runtime.environment.settings import Options

_log = logging.getLogger("ferro")


class World:
    """The world group of this process and its connection to the job's store.

    `timeout_s` is for joining, and then for each operation. `number` counts the worlds that this process made before,
    the same on all ranks.
    """

    group: ProcessGroup

    def __init__(self, info: LaunchInfo, settings: Options, backend: str | None, timeout_s: float, number: int) -> None:
        self.closed = False
        self._info = info
        self._settings = settings
        self._backend = backend
        self._timeout_s = timeout_s
        if advice := thread_advice(info):
            _log.warning("ferro: %s", advice)
        self._deadline = time.monotonic() + timeout_s
        self._observers: tuple[Observer, ...] = ()
        self._job_store = self._open_job_store(number) if info.world_size > 1 else None
        root: Store = MemoryStore() if self._job_store is None else self._job_store.store
        self._store = root.prefix(f"world{number}")

    def _open_job_store(self, number: int) -> JobStore:
        info, broadcast = self._info, None
        nowhere = info.store is None and (info.master is None or info.master_derived)
        if info.local_world_size != info.world_size and nowhere:
            # Nobody named a place where the ranks of several hosts meet; a library that connects them may tell.
            name = self._backend or backends.default(info.launcher)
            broadcast = backends.get(name).bootstrap_broadcast if name else None
        return open_job_store(info, number, deadline=self._deadline, broadcast=broadcast)

    def join(
        self,
        deterministic: bool,
        algorithms: Mapping[str, str],
        options: Mapping[str, object],
        observers: Sequence[Observer],
    ) -> None:
        """Meet the other ranks, create the backend, make the group."""
        info, job_store, group_store = self._info, self._job_store, self._store.prefix("group/0")
        try:
            chosen = self._choose_backend()
            fixed = {name: collectives.get(name, algorithm) for name, algorithm in algorithms.items()}
            choice = Choice(deterministic=deterministic, fixed=fixed)
            choice.check()
            self._observers = _all_observers(observers)
        except FerroError as error:
            with suppress(FerroError):  # the others are told why this rank does not come
                self._check_membership(self._backend or "none", "", str(error))
            raise
        requested = self._backend or chosen.name
        settings = f"deterministic={deterministic}, algorithms={dict(sorted(algorithms.items()))}"
        records = self._check_membership(requested, settings)
        config = BackendConfig(
            rank=info.rank,
            world_size=info.world_size,
            store=group_store,
            secret=b"" if job_store is None else job_store.secret,
            addresses=tuple(record.address for record in records),
            store_host="127.0.0.1" if job_store is None else job_store.store.remote_host,
            lost=FailureDetector(self._store, info.rank),
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

    def _check_membership(self, backend: str, settings: str, problem: str = "") -> list[RankRecord]:
        """Exchange records with all ranks, by rank; raise where they do not fit together."""
        record = RankRecord(
            rank=self._info.rank,
            world_size=self._info.world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            address="127.0.0.1" if self._job_store is None else self._job_store.store.local_host,
            version=version("ferro"),
            backend=backend,
            plugins=plugins.installed().versions(),
            settings=settings,
            problem=problem,
        )
        try:
            return check_membership(self._store.prefix("membership"), record, deadline=self._deadline)
        except RendezvousError as error:
            if self._info.world_size > 1:
                error.add_note(f"This process takes itself for {self._info.describe()}.")
            server = None if self._job_store is None else self._job_store.server
            if server is not None and server.refused:
                error.add_note(
                    f"The store turned away {server.refused} connections with another secret: "
                    "is FERRO_SECRET the same on all ranks?"
                )
            raise

    def close(self, patience_s: float, orderly: bool = True) -> None:
        """Leave the store; the rank that hosts it waits up to `patience_s` for the others.

        Unless this rank leaves in good order, the others see it as lost, as if it had died.
        """
        if self.closed:
            return
        self.closed = True
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
            if self._store.add("goodbye", 1) == self._info.world_size:
                self._store.set("all gone", b"1")
            elif job_store.server is not None:
                self._store.get("all gone", deadline=time.monotonic() + patience_s)
        except (RendezvousError, TimeoutError) as error:
            _log.debug("goodbye: %s", error)
        job_store.close(orderly)


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
