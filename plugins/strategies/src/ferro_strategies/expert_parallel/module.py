"""ExpertParallel: data parallel ranks that divide the experts of a model among them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import ClassVar, Self

from ferro import ProcessGroup, UsageError

from ..gradient_averaging import average_gradients
from ..nn.arrays import Array
from ..nn.module import Module, Pullback, replace_modules
from ..replicas import check_module_and_group
from ..tensor_parallel.replicated_values import broadcast_whole_values, check_same_model, is_whole
from ..tensor_parallel.state import full_state_dict, load_full_state_dict
from .moe import MoE
from .parallel_moe import ParallelMoE


class ExpertParallel(Module):
    """Run a model on each rank's own batch, with the experts of every MoE divided over the ranks.

        model = ExpertParallel(transformer, mesh["ep"])
        model = DDP(model, mesh["dp"])              # replicas of the experts, over another axis
        scores, pullback = model.vjp(words)         # this rank's batch
        loss, grad = nn.cross_entropy(scores, following)
        pullback(grad)

    Every `MoE` becomes a `ParallelMoE`; all other layers are the same on all ranks, and their gradients are averaged as
    by DDP. The gradients are those of the mean of the ranks' losses. Ranks may have batches of any size.

    Args:
        module: the model, the same on all ranks; rank 0's parameters and buffers are broadcast. It is changed in place;
            parameters are the same objects afterwards, so an optimizer may be made before; state that it has is cut
            like the experts.
        group: the ranks. All run the same passes, also with batches without tokens.

    Raises:
        UsageError: the models differ, the module has no MoE, or there are fewer experts than ranks.

    Source: Lepikhin et al., "GShard", 2020, section 3.
    """

    transparent: ClassVar[bool] = True

    def __init__(self, module: Module, group: ProcessGroup) -> None:
        check_module_and_group("ExpertParallel", module, group)
        layers = [layer for layer in module.modules() if type(layer) is MoE]
        if not layers:
            raise UsageError("ExpertParallel: the module has no MoE, whose experts could be divided. Use DDP.")
        fewest = min(layers, key=lambda layer: layer.num_experts)
        if fewest.num_experts < group.world_size:
            raise UsageError(
                f"ExpertParallel: {fewest!r} has fewer experts than the {group.world_size} ranks of group "
                f"{group.name!r}. Use a smaller group, and DDP over another axis of the mesh."
            )
        for layer in layers:
            for parameter in layer.parameters():
                for owner in parameter.state_owners:
                    owner.check_reshape(parameter)
        check_same_model(module, group, "ExpertParallel")
        self.group = group
        self.training = module.training

        def replacement(_name: str, layer: Module) -> Module:
            if type(layer) is not MoE:
                return layer
            broadcast_whole_values(layer, group)  # one layer after the other, of those that have no arrays yet
            return ParallelMoE(layer, group)

        self.module = replace_modules(module, replacement)
        broadcast_whole_values(self.module, group)
        self._average()

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Run the module on this rank's batch."""
        return self.module.vjp(x)

    def __call__(self, x: Array) -> Array:
        """Compute the output alone."""
        y: Array = self.module(x)
        return y

    def full_state_dict(self) -> dict[str, Array]:
        """Gather the experts; return the state of the module in one process, on every rank. All ranks call it."""
        return full_state_dict(self.module)

    def load_full_state_dict(self, state: Mapping[str, Array]) -> None:
        """Load a state from `full_state_dict`, or of the module in one process. All ranks call it."""
        load_full_state_dict(self.module, state)

    def _average(self) -> None:
        """Average the gradients of the parameters that every rank has, from now on."""
        whole = [(name, item) for name, item in self.named_parameters() if is_whole(item, self.group)]
        average_gradients(whole, self.group, "ExpertParallel")

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copy the model for the same ranks; the copy's gradients are averaged, too."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update({key: deepcopy(value, memo) for key, value in vars(self).items()})
        twin._average()
        return twin

    def __repr__(self) -> str:
        return f"ExpertParallel({self.module!r}, {self.group!r})"
