"""What the user set for ferro itself, and what Kubeflow set for a node."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ferro.errors import UsageError
from ferro.runtime.environment.address import Address, address_pair
from ferro.runtime.environment.number import integer

_MIN_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may set for ferro through variables.

    Attributes:
        trace: directory for this job's per-rank trace parts (FERRO_TRACE), or None.
        gpu_fallback: a CPU backend may copy GPU arrays through the host
            (FERRO_ENABLE_GPU_FALLBACK, exactly "1").
        timeout_s: seconds that a collective may take (FERRO_TIMEOUT_S), or None.
        host_id: what the user calls this process's host (FERRO_HOST_ID), "" when not at all.
        trace_hooks: print each question to a plugin (FERRO_TRACE_HOOKS, exactly "1").
    """

    trace: str | None
    gpu_fallback: bool
    timeout_s: float | None
    host_id: str
    trace_hooks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDefaults:
    """What Kubeflow's PET_* variables say about this node; None where they say nothing."""

    nnodes: int | None
    node_rank: int | None
    nproc_per_node: int | None
    endpoint: Address | None


def options(environ: Mapping[str, str] | None = None) -> Options:
    """Read what the user set for ferro itself.

    Raises:
        UsageError: FERRO_TIMEOUT_S is not a positive number of seconds.
    """
    env = os.environ if environ is None else environ
    timeout_s = None
    if text := env.get("FERRO_TIMEOUT_S"):
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not (0 < timeout_s < math.inf):
            raise UsageError(
                f"FERRO_TIMEOUT_S={text!r} is not a positive number of seconds; set one such as 60, or unset it"
            )
    return Options(
        trace=env.get("FERRO_TRACE") or None,
        gpu_fallback=env.get("FERRO_ENABLE_GPU_FALLBACK") == "1",
        timeout_s=timeout_s,
        host_id=env.get("FERRO_HOST_ID", ""),
        trace_hooks=env.get("FERRO_TRACE_HOOKS") == "1",
    )


def variable(name: str) -> str | None:
    """Return a variable that a plugin's library or the plugin itself is set by; None if not set.

    For authors of plugins: an argument or a backend's option should beat it.
    """
    return os.environ.get(name)


def read_secret(environ: Mapping[str, str] | None = None) -> bytes | None:
    """The job's secret from FERRO_SECRET, or None where it is not set.

    Raises:
        UsageError: it is not hexadecimal or too short; the message does not show it.
    """
    text = (os.environ if environ is None else environ).get("FERRO_SECRET")
    if text is None:
        return None
    # bytes.fromhex would allow white space between the digits.
    if not re.fullmatch(rf"(?:[0-9a-fA-F]{{2}}){{{_MIN_SECRET_BYTES},}}", text):
        raise UsageError(
            f"FERRO_SECRET is not at least {2 * _MIN_SECRET_BYTES} hexadecimal digits, two for "
            "each byte; make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return bytes.fromhex(text)


def node_defaults(environ: Mapping[str, str] | None = None) -> NodeDefaults:
    """Read what Kubeflow says about this node, as defaults for `ferro run`.

    "auto", "cpu" and "gpu", which PET_NPROC_PER_NODE allows for, say nothing here.

    Raises:
        UsageError: a variable is no number, or one of the address pair is missing.
    """
    env = os.environ if environ is None else environ

    def number(name: str) -> int | None:
        return integer(env, name).value if name in env else None

    automatic = env.get("PET_NPROC_PER_NODE") in ("auto", "cpu", "gpu")
    pair = ("PET_MASTER_ADDR", "PET_MASTER_PORT")
    return NodeDefaults(
        nnodes=number("PET_NNODES"),
        node_rank=number("PET_NODE_RANK"),
        nproc_per_node=None if automatic else number("PET_NPROC_PER_NODE"),
        endpoint=address_pair(env, *pair) if any(name in env for name in pair) else None,
    )
