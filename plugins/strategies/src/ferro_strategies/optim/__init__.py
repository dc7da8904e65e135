"""Optimizers that work in place on `ferro_strategies.nn` parameters."""

from .adamw import AdamW
from .clip import clip_grad_norm
from .loss_scaler import LossScaler
from .optimizer import Optimizer
from .sgd import SGD

__all__ = ["SGD", "AdamW", "LossScaler", "Optimizer", "clip_grad_norm"]
