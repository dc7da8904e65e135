"""Modules that can be differentiated: the contract, layers for NumPy and CuPy, and losses."""

from .activations import GELU, ReLU, Sigmoid, SiLU, Softmax, SwiGLU, Tanh
from .adaptive_pooling import AdaptiveAvgPool2d, AdaptiveMaxPool2d
from .arrays import Array, namespace_of
from .attention import Attention
from .batchnorm import BatchNorm
from .checkpoint import Checkpoint
from .checkpoint_piece import CheckpointPiece
from .containers import Residual, Sequential
from .convolution import Conv1d, Conv2d
from .cross_attention import CrossAttention
from .deferral import deferring
from .dropout import Dropout
from .elementwise_losses import binary_cross_entropy_with_logits, l1_loss, mse_loss, smooth_l1_loss
from .embedding import Embedding
from .gradcheck import check_gradients
from .groupnorm import GroupNorm
from .initialization import DeferredValue, deferred, drawn
from .layernorm import LayerNorm, RMSNorm
from .linear import Flatten, Linear
from .losses import cross_entropy, nll_loss
from .module import Module, Pullback, TreeSnapshot, replace_modules
from .module_tree import Buffer
from .parameter import Parameter, Use
from .pooling import AvgPool2d, MaxPool2d
from .split import Split
from .state import StateDifference, StateLoad
from .transposed_convolution import ConvTranspose2d
from .trees import Arrays
from .unembedding import Unembedding

__all__ = [
    "GELU",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "Array",
    "Arrays",
    "Attention",
    "AvgPool2d",
    "BatchNorm",
    "Buffer",
    "Checkpoint",
    "CheckpointPiece",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "CrossAttention",
    "DeferredValue",
    "Dropout",
    "Embedding",
    "Flatten",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Module",
    "Parameter",
    "Pullback",
    "RMSNorm",
    "ReLU",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Split",
    "StateDifference",
    "StateLoad",
    "SwiGLU",
    "Tanh",
    "TreeSnapshot",
    "Unembedding",
    "Use",
    "binary_cross_entropy_with_logits",
    "check_gradients",
    "cross_entropy",
    "deferred",
    "deferring",
    "drawn",
    "l1_loss",
    "mse_loss",
    "namespace_of",
    "nll_loss",
    "replace_modules",
    "smooth_l1_loss",
]
