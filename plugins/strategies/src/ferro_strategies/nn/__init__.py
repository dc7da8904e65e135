"""Modules that can be differentiated: the contract, layers for NumPy and CuPy, and losses."""

from .activations import GELU, ReLU
from .arrays import Array, namespace_of
from .attention import Attention
from .batchnorm import BatchNorm
from .checkpoint import Checkpoint
from .containers import Residual, Sequential
from .convolution import Conv2d
from .dropout import Dropout
from .embedding import Embedding
from .gradcheck import check_gradients
from .layernorm import LayerNorm
from .linear import Flatten, Linear
from .losses import cross_entropy, mse_loss
from .module import Module, Pullback, replace_modules
from .module_tree import Buffer
from .parameter import Parameter, Split, Use, deferring
from .pooling import MaxPool2d
from .trees import Arrays
from .unembedding import Unembedding

__all__ = [
    "GELU",
    "Array",
    "Arrays",
    "Attention",
    "BatchNorm",
    "Buffer",
    "Checkpoint",
    "Conv2d",
    "Dropout",
    "Embedding",
    "Flatten",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Module",
    "Parameter",
    "Pullback",
    "ReLU",
    "Residual",
    "Sequential",
    "Split",
    "Unembedding",
    "Use",
    "check_gradients",
    "cross_entropy",
    "deferring",
    "mse_loss",
    "namespace_of",
    "replace_modules",
]
