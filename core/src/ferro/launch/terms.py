"""What must be the same on all nodes of a job, as text that launchers compare."""

from __future__ import annotations

import importlib.metadata
import json

from ferro.launch.options import LaunchOptions


def write_terms(options: LaunchOptions) -> str:
    """This node's terms: a JSON object."""
    return json.dumps(
        {
            "--nnodes": options.nnodes,
            "--nproc-per-node": options.nproc_per_node,
            "--max-restarts": options.max_restarts,
            "ferro": importlib.metadata.version("ferro"),
        }
    )


def describe_difference(node: int, theirs: str, ours: str) -> str:
    """Name what a node's terms and node 0's do not have in common."""
    one, other = json.loads(theirs), json.loads(ours)
    differing = [
        f"{name} is {one.get(name)} on node {node} and {other.get(name)} on node 0"
        for name in other
        if one.get(name) != other.get(name)
    ]
    return f"the nodes do not fit together: {', '.join(differing)}; start all of them alike"
