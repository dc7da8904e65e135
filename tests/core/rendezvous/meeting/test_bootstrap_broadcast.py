"""Opening the job's store by a library that broadcasts rank 0's message."""

import ipaddress
import json
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ferro.errors import RendezvousError
from ferro.rendezvous.meeting.job_store import open_job_store
from ferro.rendezvous.sockets import own_addresses
from ferro.runtime.environment import LaunchInfo

WAIT_S = 20.0


class Broadcast:
    """Broadcasts rank 0's message to the other ranks, as MPI would."""

    def __init__(self, world_size):
        self._boxes = [queue.Queue() for _ in range(world_size)]
        self.alter = lambda message: message

    def __call__(self, rank, world_size, message, deadline):
        if rank == 0:
            for box in self._boxes[1:]:
                box.put(self.alter(message))
            return message
        return self._boxes[rank].get(timeout=deadline - time.monotonic())


def open_one(who, broadcast, deadline):
    return open_job_store(who, broadcast=broadcast, deadline=deadline)


def info(rank, world_size=3):
    return LaunchInfo(rank=rank, world_size=world_size, local_rank=0, local_world_size=1, launcher="openmpi")


def open_all(broadcast, infos, seconds=WAIT_S):
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(len(infos)) as pool:
        return [pool.submit(open_one, who, broadcast, deadline) for who in infos]


def test_all_ranks_enter_the_store_that_rank_0_hosts():
    job_stores = [f.result() for f in open_all(Broadcast(3), [info(rank) for rank in range(3)])]
    try:
        job_stores[2].store.set("greeting", b"from 2")
        deadline = time.monotonic() + WAIT_S
        assert [s.store.get("greeting", deadline=deadline) for s in job_stores] == [b"from 2"] * 3
        assert [s.server is not None for s in job_stores] == [True, False, False]
        assert len({s.secret for s in job_stores}) == 1
    finally:
        for job_store in job_stores[::-1]:
            job_store.close()


def test_the_users_secret_is_kept():
    secret = bytes(range(32))
    infos = [replace(info(rank, 2), secret=secret if rank == 0 else None) for rank in range(2)]
    job_stores = [f.result() for f in open_all(Broadcast(2), infos)]
    for job_store in job_stores[::-1]:
        assert job_store.secret == secret
        job_store.close()


def test_addresses_that_do_not_answer_are_passed_over():
    def alter(message):
        told = json.loads(message)
        return json.dumps({**told, "addresses": ["127.255.255.254", *told["addresses"]]}).encode()

    broadcast = Broadcast(2)
    broadcast.alter = alter
    job_stores = [f.result() for f in open_all(broadcast, [info(0, 2), info(1, 2)])]
    for job_store in job_stores[::-1]:
        job_store.close()


def test_a_rank_that_reaches_no_address_says_which_it_tried():
    def broadcast(rank, world_size, message, deadline):
        return json.dumps({"addresses": ["127.0.0.1"], "port": 9, "secret": "78" * 32}).encode()

    with pytest.raises(RendezvousError, match=r"port 9 of 127\.0\.0\.1.*MASTER_ADDR"):
        open_one(info(1, 2), broadcast, time.monotonic() + 0.3)


def test_a_library_that_fails_leaves_no_store_behind():
    def broadcast(rank, world_size, message, deadline):
        raise RendezvousError("the library says no")

    before = threading.active_count()
    with pytest.raises(RendezvousError, match="says no"):
        open_one(info(0), broadcast, time.monotonic() + WAIT_S)
    assert threading.active_count() == before


def test_own_addresses_are_this_hosts_and_not_loopback_where_there_are_others():
    found = [ipaddress.ip_address(address) for address in own_addresses()]
    assert found
    assert not any(a.is_loopback for a in found) or len(found) == 1
    assert len(set(found)) == len(found)
