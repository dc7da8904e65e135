"""MoE: a layer of experts, of which a router chooses some for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ferro import UsageError

from ..nn.activations import GELU
from ..nn.arguments import check_real_dtype, whole_number
from ..nn.arrays import Array, Rng, namespace_of, wide_dtype
from ..nn.checks import check_dtype, check_gradient, check_input
from ..nn.initialization import he_uniform
from ..nn.module import Module, Pullback
from ..nn.parameter import Parameter, Use
from .expert_products import expert_matmul, gradient_of_products
from .routing import Dispatch, Routing, count_choices, dispatch, top_k_routing

# Rows sorted by expert, and the number of rows of each.
_Segments: TypeAlias = tuple[Array, list[int]]


@dataclass(slots=True)
class RouterStatistics:
    """Statistics of a MoE's last forward pass, over the tokens of all ranks.

    Attributes:
        load: for each expert, the tokens that it took.
        aux_loss: the load-balancing loss, of the last pass in training.
    """

    load: list[int] = field(default_factory=list)
    aux_loss: float = 0.0


class MoE(Module):
    """Mixture of experts: (..., dim) -> (..., dim), each expert a perceptron of one hidden layer.

    A router, a linear map with softmax, chooses `top_k` experts for each token; the output is the sum of theirs, each
    times its gate (see `top_k_routing`). The router computes in float32 for half precision. A token that every expert
    drops has an output of zero, so put the layer into a Residual.

    In training the pullback adds the gradient of `aux_loss_weight * aux_loss` to that of the loss. This keeps the load
    of the experts even:

        aux_loss = experts * sum over experts of (share of choices) * (mean probability)

    It is 1 when all experts have the same load and probability. The pullback cannot see by how much the loss was
    scaled: with a LossScaler, or microbatches of which each loss is divided by their number, set `aux_loss_scale` to
    that factor.

    Args:
        dim: size of the last dimension.
        hidden: size of an expert's hidden layer.
        num_experts: number of experts.
        top_k: experts of each token.
        capacity_factor: how many times its even share of tokens an expert takes at most, see `dispatch`; None: no token
            is dropped.
        aux_loss_weight: weight of the load-balancing loss.
        activation: a module without parameters, which keeps the shape, between an expert's two maps; None: GELU.
        dtype: of the parameters, the input and the output.
        rng: random generator or seed for the weights.

    Attributes:
        router: (dim, num_experts).
        up, up_bias: (num_experts, dim, hidden) and (num_experts, hidden).
        down, down_bias: (num_experts, hidden, dim) and (num_experts, dim).
        aux_loss_scale: 1 at first; see above.
        statistics: the load-balancing loss and the experts' loads in the last forward pass, for logs.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; Lepikhin et al., "GShard", 2020, section 2.2;
    the auxiliary loss is from Fedus et al., "Switch Transformers", 2021, section 2.2; without capacity, Gale et al.,
    "MegaBlocks", 2022.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float | None = None,
        aux_loss_weight: float = 0.01,
        activation: Module | None = None,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        dim, hidden = whole_number("MoE", "dim", dim), whole_number("MoE", "hidden", hidden)
        num_experts, top_k = whole_number("MoE", "num_experts", num_experts), whole_number("MoE", "top_k", top_k)
        check_real_dtype("MoE", dtype)
        if top_k > num_experts:
            raise UsageError(f"MoE: top_k must be at most num_experts, got {top_k} and {num_experts}.")
        if capacity_factor is not None and not capacity_factor > 0:
            raise UsageError(f"MoE: capacity_factor must be above 0 or None, got {capacity_factor}.")
        if activation is not None and not isinstance(activation, Module):
            raise UsageError(f"MoE: activation must be a module, such as nn.ReLU(), got {activation!r}.")
        self.dim, self.hidden, self.num_experts, self.top_k = dim, hidden, num_experts, top_k
        self.capacity_factor = capacity_factor
        self.aux_loss_weight = aux_loss_weight
        self.aux_loss_scale = 1.0
        self.statistics = RouterStatistics()
        self.activation = GELU() if activation is None else activation
        draws = np.random.default_rng(rng)
        self.router = Parameter(he_uniform((dim, num_experts), 6 * dim, dtype, draws), name="router")
        self.up = Parameter(he_uniform((num_experts, dim, hidden), dim, dtype, draws), name="up")
        self.up_bias = Parameter(np.zeros((num_experts, hidden), dtype), name="up_bias")
        self.down = Parameter(he_uniform((num_experts, hidden, dim), hidden, dtype, draws), name="down")
        self.down_bias = Parameter(np.zeros((num_experts, dim), dtype), name="down_bias")

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (..., dim) to (..., dim)."""
        check_dtype(self, x, self.router.data.dtype)
        check_input(self, x, f"(..., {self.dim})", fits=x.ndim > 0 and x.shape[-1] == self.dim)
        xp, wide, k = namespace_of(x), wide_dtype(x.dtype), self.top_k
        rows = x.reshape(x.size // self.dim, self.dim)
        router = self.router.use()
        wide_rows = rows.astype(wide, copy=False)
        routing = top_k_routing(wide_rows @ router.data.astype(wide, copy=False), k)
        plan = self._dispatch(routing)
        self.statistics.load = plan.counts.sum(axis=0).tolist()
        aux_gradient = self._balance(routing, plan) if self.training and self.aux_loss_weight else None
        tokens, counts = plan.slots // k, plan.counts
        segments, back = self._to_experts(rows[tokens], counts)
        made, pull_experts = self._run_experts(segments)
        outputs = xp.zeros((rows.shape[0] * k, self.dim), wide)
        outputs[plan.slots] = back(made)
        by_choice = outputs.reshape(rows.shape[0], k, self.dim)
        y = xp.einsum("nk,nkd->nd", routing.gates, by_choice)
        shape, dtype = x.shape, x.dtype

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape, real=True)
            grad = grad_y.reshape(rows.shape).astype(wide, copy=False)
            grad_gates = xp.einsum("nd,nkd->nk", grad, by_choice)
            grad_probabilities = xp.zeros_like(routing.probabilities)
            if aux_gradient is not None:
                grad_probabilities += aux_gradient * self.aux_loss_scale
            grad_scores = routing.pull(grad_gates, grad_probabilities)
            router.add_grad(wide_rows.T @ grad_scores)
            gates = routing.gates.reshape(routing.gates.size)[plan.slots]
            grad_made = (grad[tokens] * gates[:, None]).astype(dtype, copy=False)
            grad_segments, grad_back = self._to_experts(grad_made, counts)
            grad_inputs = xp.zeros((rows.shape[0] * k, self.dim), wide)
            grad_inputs[plan.slots] = grad_back(pull_experts(grad_segments[0]))
            grad_x = grad_inputs.reshape(rows.shape[0], k, self.dim).sum(axis=1)
            grad_x += grad_scores @ router.data.astype(wide, copy=False).T
            result: Array = grad_x.reshape(shape).astype(dtype, copy=False)
            return result

        return y.reshape(shape).astype(dtype, copy=False), pullback

    def _dispatch(self, routing: Routing) -> Dispatch:
        counts = self._gather_counts(count_choices(routing.experts, self.num_experts))
        return dispatch(routing.experts, counts, self._rank, self.capacity_factor)

    def _balance(self, routing: Routing, plan: Dispatch) -> Array:
        """Compute the load-balancing loss, and its gradient with respect to each token's probabilities."""
        shares = plan.choices / max(plan.tokens * self.top_k, 1)
        sums = self._sum(routing.probabilities.sum(axis=0, dtype=np.float64))
        tokens = max(plan.tokens, 1)
        self.statistics.aux_loss = float(self.num_experts * (shares * sums).sum() / tokens)
        factor = self.aux_loss_weight * self.num_experts * self._mean_ranks / tokens
        gradient: Array = (factor * shares).astype(routing.probabilities.dtype)
        return gradient

    def _run_experts(self, segments: _Segments) -> tuple[Array, Callable[[Array], Array]]:
        """Compute the experts' outputs of rows sorted by expert, and the function from their gradient to the rows'."""
        rows, counts = segments
        up, up_bias, down, down_bias = uses = [
            parameter.use() for parameter in (self.up, self.up_bias, self.down, self.down_bias)
        ]
        inner = expert_matmul(rows, up.data, up_bias.data, counts)
        hidden, pull_activation = self.activation.vjp(inner)
        if hidden.shape != inner.shape:
            raise UsageError(
                f"{self!r}: its activation, {self.activation!r}, made {hidden.shape} of {inner.shape}. Give one that "
                "keeps the shape."
            )
        outputs = expert_matmul(hidden, down.data, down_bias.data, counts)

        def pull(grad: Array) -> Array:
            grad_hidden = expert_matmul(grad, down.data.swapaxes(1, 2), None, counts)
            grad_inner = pull_activation(grad_hidden)
            assert grad_inner is not None, "an activation has a gradient"
            grad_rows = expert_matmul(grad_inner, up.data.swapaxes(1, 2), None, counts)
            self._add_gradients(uses, gradient_of_products(rows, grad_inner, counts))
            self._add_gradients(uses[2:], gradient_of_products(hidden, grad, counts))
            return grad_rows

        return outputs, pull

    def _add_gradients(self, uses: list[Use], grads: tuple[Array, Array]) -> None:
        for use, grad in zip(uses, grads, strict=False):
            use.add_grad(grad / self._mean_ranks if self._mean_ranks > 1 else grad)

    # The rest is overridden where the experts are divided over ranks.

    _rank = 0
    # Gradients are averaged over so many ranks, each of which has its own tokens.
    _mean_ranks = 1

    def _gather_counts(self, counts: Array) -> Array:
        """All ranks' counts, (ranks, k, experts)."""
        whole: Array = counts[None]
        return whole

    def _sum(self, values: Array) -> Array:
        """The sum of all ranks' values."""
        return values

    def _to_experts(self, rows: Array, counts: Array) -> tuple[_Segments, Callable[[Array], Array]]:
        """Send rows, sorted by expert, to the experts, and give the function that brings theirs back."""
        return (rows, counts[0].tolist()), lambda made: made

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.dim}, {self.hidden}, {self.num_experts}, top_k={self.top_k}, "
            f"capacity_factor={self.capacity_factor})"
        )
