"""Which parameters decay, and which are matrices: groups of a model's parameters."""

from __future__ import annotations

from typing import Any

from ..nn.batchnorm import BatchNorm
from ..nn.embedding import Embedding
from ..nn.layernorm import LayerNorm
from ..nn.module import Module
from ..nn.parameter import Parameter
from .pieces import whole_shape


def decay_groups(module: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Make two parameter groups: weights that decay, and biases, norms and embeddings that do not.

        optimizer = AdamW(decay_groups(model, weight_decay=0.1), lr=3e-4)

    It gives the same groups before and after the model is wrapped. Parameters that are not trained are in neither.

    Args:
        module: the model.
        weight_decay: that of the first group; the second one's is 0.
    """
    kept = _without_decay(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if id(parameter) not in kept], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if id(parameter) in kept], "weight_decay": 0.0},
    ]


def matrices_and_others(module: Module) -> tuple[list[Parameter], list[Parameter]]:
    """Divide the trained parameters into the matrices of layers, for Muon, and all others, for AdamW.

    Biases, norms, embeddings and arrays of more dimensions are among the others. Take out the output layer's weight,
    too, which is not recognized: its name differs from model to model.
    """
    kept = _without_decay(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    is_matrix = [id(parameter) not in kept and len(whole_shape(parameter)) == 2 for parameter in trained]
    matrices = [parameter for parameter, matrix in zip(trained, is_matrix, strict=True) if matrix]
    return matrices, [parameter for parameter, matrix in zip(trained, is_matrix, strict=True) if not matrix]


def _without_decay(module: Module) -> set[int]:
    """Find the identities of biases, of parameters of norms and embeddings, and of vectors and numbers."""
    kept = {id(parameter) for parameter in module.parameters() if len(whole_shape(parameter)) < 2}
    for part in module.modules():
        if isinstance(part, BatchNorm | Embedding | LayerNorm):
            kept.update(id(value) for value in vars(part).values() if isinstance(value, Parameter))
        else:
            kept.update(id(value) for key, value in vars(part).items() if key == "bias")
    return kept
