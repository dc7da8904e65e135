"""From variables and arguments to one frozen `LaunchInfo`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ferro.errors import UsageError
from ferro.runtime.environment.address import Address, address_pair, parse_address
from ferro.runtime.environment.families import Claim, agreed_claim
from ferro.runtime.environment.info import LaunchInfo
from ferro.runtime.environment.job import name_job
from ferro.runtime.environment.number import Found
from ferro.runtime.environment.settings import read_secret


def resolve(
    environ: Mapping[str, str] | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    rendezvous: str | None = None,
) -> LaunchInfo:
    """Find out who this process is.

    Args:
        environ: variables to read; the process's own by default.
        rank: beats the environment's rank.
        world_size: beats the environment's world size.
        rendezvous: "host:port" where rank 0 hosts the store; beats FERRO_STORE and MASTER_ADDR.

    Raises:
        UsageError: a variable is missing, malformed or out of range, or two families disagree.
    """
    env = os.environ if environ is None else environ
    claim = agreed_claim(env, rank, world_size)
    if claim is None:
        claim = _unlaunched(rank, world_size)
    _check_range("rank", claim.rank, claim.world_size)
    single = claim.world_size.value == 1
    store = None if rendezvous is not None else _store(env)
    master, master_source = _master(env, claim.launcher, rendezvous, lone=single or bool(store))
    local_rank, local_size = _local(claim, everyone_here=_all_here(claim, master))
    _check_range("local rank", local_rank, local_size)
    sources = [
        ("rank", claim.rank.source),
        ("world_size", claim.world_size.source),
        ("local_rank", local_rank.source),
        ("local_world_size", local_size.source),
        *([("store", "FERRO_STORE")] if store else []),
        *([("master", master_source)] if master else []),
    ]
    return LaunchInfo(
        rank=claim.rank.value,
        world_size=claim.world_size.value,
        local_rank=local_rank.value,
        local_world_size=local_size.value,
        launcher=claim.launcher,
        job=name_job(env, claim, store, master),
        store=store,
        master=master,
        master_port_taken=master_source == "MASTER_ADDR, MASTER_PORT"
        and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        secret=read_secret(env),
        provenance=tuple(sources),
    )


def _unlaunched(rank: int | None, world_size: int | None) -> Claim:
    """Without any launcher: the arguments' place, or a world of one."""
    if rank is None and world_size is None:
        nobody = "no launcher: a world of one"
        return Claim("single", Found(0, nobody), Found(1, nobody), Found(0, nobody), Found(1, nobody))
    if rank is None or world_size is None:
        given, missing = ("rank", "world_size") if world_size is None else ("world_size", "rank")
        raise UsageError(
            f"{given}= is given, but neither {missing}= nor a launcher's variables are there; "
            f"pass {missing}= too, or start the program with `ferro run`"
        )
    return Claim("arguments", Found(rank, "rank="), Found(world_size, "world_size="), None, None)


def _local(claim: Claim, *, everyone_here: bool) -> tuple[Found, Found]:
    """Fill in what the launcher left open: all ranks here, or else the least that fits."""
    assumed = f"assumed, as {'all ranks seem to be' if everyone_here else 'nobody says who is'} here"
    local_rank = claim.local_rank
    if local_rank is None:
        local_rank = Found(claim.rank.value if everyone_here else 0, assumed)
    size = claim.local_world_size
    if size is None:
        fits = claim.world_size.value if everyone_here else local_rank.value + 1
        size = Found(fits, assumed)
    return local_rank, size


def _all_here(claim: Claim, master: Address | None) -> bool:
    """Whether nothing speaks of a second host."""
    if claim.launcher not in ("torchrun", "ferro", "arguments"):
        return False
    host = master[0] if master else "localhost"
    return host in ("localhost", "::1") or host.startswith("127.")


def _store(env: Mapping[str, str]) -> Address | None:
    text = env.get("FERRO_STORE")
    return None if text is None else parse_address(text, source="FERRO_STORE")


def _master(env: Mapping[str, str], launcher: str, rendezvous: str | None, *, lone: bool) -> tuple[Address | None, str]:
    """Where rank 0 hosts the store, and the source of that.

    Args:
        env: the variables.
        launcher: who started this process.
        rendezvous: the caller's address, or None.
        lone: no host for the store is needed, so half an address is no error.
    """
    if rendezvous is not None:
        return parse_address(rendezvous, source="rendezvous"), "rendezvous="
    port = "FERRO_MASTER_PORT" if "FERRO_MASTER_PORT" in env else "MASTER_PORT"
    pairs = [("MASTER_ADDR", port)]
    if launcher == "kubeflow":
        pairs.append(("PET_MASTER_ADDR", "PET_MASTER_PORT"))
    for pair in pairs:
        there = [name in env for name in pair]
        if all(there) or (any(there) and not lone):
            return address_pair(env, *pair), ", ".join(pair)
    return None, ""


def _check_range(what: str, place: Found, size: Found) -> None:
    """Hold 0 <= place < size, or say which variable breaks it."""
    if size.value < 1:
        raise UsageError(f"{_assignment(size)} is too small: a world has at least one rank; correct it")
    if not 0 <= place.value < size.value:
        raise UsageError(
            f"{_assignment(place)} is out of range: with {_assignment(size)} "
            f"a {what} goes from 0 to {size.value - 1}; correct the one or the other"
        )


def _assignment(found: Found) -> str:
    """How the reader sees the value: "RANK=3", "rank=3", or "3 (assumed, …)"."""
    if found.source.startswith("assumed"):
        return f"{found.value} ({found.source})"
    return f"{found.source.removesuffix('=')}={found.value}"
