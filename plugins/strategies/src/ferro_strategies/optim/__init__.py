"""Optimizers that work in place on `ferro_strategies.nn` parameters."""

from .adamw import AdamW
from .clip import clip_grad_norm
from .optimizer import Optimizer
from .scaler import LossScaler
from .sgd import SGD

__all__ = ["SGD", "AdamW", "LossScaler", "Optimizer", "clip_grad_norm"]
