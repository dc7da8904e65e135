"""Routing: the experts that a router chooses for each token, and their shares in its output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..nn.arrays import Array, namespace_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The choices for N tokens of k experts each.

    Attributes:
        experts: (N, k), the chosen experts, best first.
        gates: (N, k), their shares, in the dtype of the router's scores.
        probabilities: (N, all experts), softmax of the scores.
        pull: the function from the gradients of gates and probabilities to that of the scores.
    """

    experts: Array
    gates: Array
    probabilities: Array
    pull: Callable[[Array, Array], Array]


def top_k_routing(scores: Array, k: int) -> Routing:
    """Choose for each token the k experts of the highest scores; of equal ones, the first.

    With k = 1 the gate is the expert's probability (Switch), for a gate of 1 would give the router no gradient. With
    more, gates are the probabilities divided by their sum (GShard, Mixtral).

    Args:
        scores: (N, experts), float32 or wider.
        k: from 1 to the number of experts.

    Source: Lepikhin et al., "GShard", 2020, section 2.2; Fedus et al., "Switch Transformers", 2021, section 2.1.
    """
    xp = namespace_of(scores)
    experts = xp.argsort(-scores, axis=1, kind="stable")[:, :k]
    weights = xp.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    chosen = xp.take_along_axis(probabilities, experts, axis=1)
    total = chosen.sum(axis=1, keepdims=True)
    gates = chosen if k == 1 else chosen / total

    def pull(grad_gates: Array, grad_probabilities: Array) -> Array:
        grad_chosen = grad_gates
        if k > 1:
            grad_chosen = (grad_gates - (grad_gates * gates).sum(axis=1, keepdims=True)) / total
        grad: Array = grad_probabilities.copy()
        rows = xp.arange(len(experts))[:, None]
        grad[rows, experts] += grad_chosen
        grad -= (grad * probabilities).sum(axis=1, keepdims=True)
        grad *= probabilities
        return grad

    return Routing(experts=experts, gates=gates, probabilities=probabilities, pull=pull)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """The slots (pairs of a token and an expert) that reach their expert, sorted by expert.

    Attributes:
        slots: indices into the flat (N, k) choices, sorted by expert, then by priority.
        counts: (ranks, all experts), slots that each rank sends to each expert.
        choices: (all experts,), slots of all ranks before any is dropped.
        tokens: number of tokens of all ranks.
    """

    slots: Array
    counts: Array
    choices: Array
    tokens: int


def count_choices(experts: Array, num_experts: int) -> Array:
    """Count the tokens of this rank whose first, second, ... choice is each expert: (k, experts)."""
    xp = namespace_of(experts)
    counts: Array = xp.stack([xp.bincount(choice, minlength=num_experts) for choice in experts.T])
    return counts


def dispatch(experts: Array, counts: Array, rank: int, capacity_factor: float | None) -> Dispatch:
    """Decide which slots reach their expert.

    An expert takes `ceil(capacity_factor * tokens * k / experts)` slots of all ranks' tokens: first choices before
    second ones, then in order of rank and token. So the decision is the same for any division of a batch over ranks.

    Args:
        experts: (N, k), this rank's choices.
        counts: (ranks, k, experts), each rank's `count_choices`.
        rank: this rank.
        capacity_factor: None: no slot is dropped.
    """
    xp = namespace_of(experts)
    _, k, num_experts = counts.shape
    tokens = int(counts.sum()) // k
    capacity = tokens * k if capacity_factor is None else math.ceil(capacity_factor * tokens * k / num_experts)
    # A slot's place in its expert's queue: the slots of earlier choices, of earlier ranks, of earlier tokens.
    by_choice = counts.sum(axis=0)
    queue_start = by_choice.cumsum(axis=0) - by_choice + counts.cumsum(axis=0) - counts
    kept_counts = xp.clip(capacity - queue_start, 0, counts).sum(axis=1)
    kept = []
    for choice, chosen in enumerate(experts.T):
        order = xp.argsort(chosen, kind="stable")
        starts = counts[rank, choice].cumsum() - counts[rank, choice]
        place = xp.empty(len(chosen), order.dtype)
        place[order] = xp.arange(len(chosen)) - starts[chosen[order]]
        place += queue_start[rank, choice][chosen]
        kept.append(xp.flatnonzero(place < capacity) * k + choice)
    slots = xp.concatenate(kept)
    slots = slots[xp.argsort(experts.reshape(experts.size)[slots], kind="stable")]
    return Dispatch(slots=slots, counts=kept_counts, choices=by_choice.sum(axis=0), tokens=tokens)
